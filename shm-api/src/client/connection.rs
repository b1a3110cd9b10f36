//! The connection: requests and replies over the socket, hot ones over the ring, and the shared regions.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nvme_driver::mem::{Access, Mapping};
use p2p::layout::{self, server_alive};

use super::error::ClientError;
use super::silence::{Patience, ServerProcess, Silence};
use crate::protocol::messages::{CMB_GIVEN, Empty, FaultRequest, HelloReply, HelloRequest};
use crate::protocol::wire::Wire;
use crate::protocol::{Message, Op, VERSION, header};
use crate::transport::peer;
use crate::transport::ring::{ClientRing, RING_FAULT, RING_TOUCH, RecallWord, RingReply, RingRequest};
use crate::transport::socket::Socket;

/// How often to look whether the server lives.
const LOOK_MS: u32 = 50;
/// Looks at the ring before sleeping: about as long as a short request takes.
const SPINS: u32 = 2_000;

#[derive(Debug)]
pub(crate) struct Connection {
    socket: Socket,
    patience: Patience,
    next: Mutex<u64>,
    ring: Mutex<ClientRing>,
    pub(crate) control: Arc<Mapping>,
    pub(crate) region: Arc<Mapping>,
    pub(crate) cmb: Option<Arc<Mapping>>,
    pub(crate) cmb_text: String,
    /// This client's number on the server.
    pub(crate) id: u32,
    pub(crate) recalls: RecallWord,
}

/// A reply with what came with it.
pub(crate) struct Reply {
    pub(crate) message: Message,
    pub(crate) fds: Vec<OwnedFd>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The state is consistent between any two statements that can panic: there are none inside.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn protocol(text: impl Into<String>) -> ClientError {
    ClientError::Protocol(text.into())
}

fn map_len(len: u64) -> Result<usize, ClientError> {
    usize::try_from(len).map_err(|_| protocol(format!("a region of {len} bytes")))
}

impl Connection {
    /// `limit`: how long the server may be silent, at any time.
    pub(crate) fn open(path: &Path, limit: Duration) -> Result<Self, ClientError> {
        let socket = Socket::connect_within(path, limit)
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let pid = peer::identity(socket.as_fd()).map_or(0, |server| server.pid);
        let patience = Patience::new(limit, ServerProcess::new(pid));
        let request = HelloRequest { min_version: VERSION, max_version: VERSION, reserved: 0 };
        let bytes = header::encode(Op::Hello, false, 1, 0, &request, &[])?;
        let reply = exchange(&socket, &patience, &bytes, 1, "hello", &|| true, None)?;
        let (hello, text) = reply.message.body::<HelloReply>()?;
        let cmb_text = String::from_utf8_lossy(text).into_owned();
        let mut fds = reply.fds.into_iter();
        let mut next =
            |what: &str| fds.next().ok_or_else(|| protocol(format!("no descriptor for the {what}")));
        let control =
            Mapping::from_fd(next("control page")?, 0, map_len(hello.control_len)?, Access::ReadOnly)?;
        let region =
            Mapping::from_fd(next("client region")?, 0, map_len(hello.slots_len)?, Access::ReadWrite)?;
        let ring = Mapping::from_fd(next("ring")?, 0, map_len(hello.ring_len)?, Access::ReadWrite)?;
        let cmb = if hello.cmb_reason == CMB_GIVEN {
            let (fd, len) = (next("CMB")?, map_len(hello.cmb_len)?);
            // A canary is for memory on a device, which may go away: reads give ones then, and the canary says so.
            let canary = control.u64_at(layout::header::CANARY)?.load(Ordering::Relaxed);
            Some(if canary == u64::MAX {
                Mapping::from_fd(fd, hello.cmb_offset, len, Access::ReadWrite)?
            } else {
                Mapping::of_device(fd, hello.cmb_offset, len)?
            })
        } else {
            None
        };
        let recalls = RecallWord::of(Arc::clone(&ring));
        let ring = Mutex::new(ClientRing::attach(ring)?);
        let next = Mutex::new(2);
        Ok(Self { socket, patience, next, ring, control, region, cmb, cmb_text, id: hello.client, recalls })
    }

    /// Whether the server lives, by its robust word: no system call.
    pub(crate) fn server_lives(&self) -> bool {
        self.control
            .u32_at(layout::header::SERVER)
            .is_ok_and(|word| server_alive(word.load(Ordering::Relaxed)))
    }

    /// Sends a request and waits for its reply. An error reply is an error.
    pub(crate) fn call<T: Wire>(
        &self,
        op: Op,
        what: &'static str,
        body: &T,
        tail: &[u8],
    ) -> Result<Reply, ClientError> {
        let mut next = locked(&self.next);
        let request = *next;
        *next += 1;
        let bytes = header::encode(op, false, request, 0, body, tail)?;
        let lives = || self.server_lives();
        exchange(&self.socket, &self.patience, &bytes, request, what, &lives, Some(&mut next))
    }

    /// A call whose reply is one fixed-size body.
    pub(crate) fn ask<T: Wire, R: Wire>(
        &self,
        op: Op,
        what: &'static str,
        body: &T,
        tail: &[u8],
    ) -> Result<R, ClientError> {
        Ok(self.call(op, what, body, tail)?.message.body_only()?)
    }

    /// Asks over the ring for a window to be made resident.
    pub(crate) fn fault(&self, want: FaultRequest) -> Result<RingReply, ClientError> {
        let mut ring = locked(&self.ring);
        let request = {
            let mut next = locked(&self.next);
            *next += 1;
            *next - 1
        };
        let FaultRequest { handle, offset, flags, .. } = want;
        let entry = RingRequest { request, handle, offset, opcode: RING_FAULT, flags, ..Default::default() };
        let mut silence = self.patience.begin();
        while !ring.has_room()? {
            // Full of hints: the server takes them as soon as it looks.
            self.kick()?;
            self.still_waiting(&mut silence)?;
            std::thread::sleep(Duration::from_micros(100));
        }
        if ring.put(&entry)? {
            self.kick()?;
        }
        let mut spins = 0;
        loop {
            while let Some(reply) = ring.take()? {
                if reply.request == request {
                    return Ok(reply);
                }
            }
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
                continue;
            }
            ring.sleep(LOOK_MS)?;
            self.still_waiting(&mut silence)?;
        }
    }

    fn still_waiting(&self, silence: &mut Silence<'_>) -> Result<(), ClientError> {
        if !self.server_lives() {
            return Err(ClientError::Gone(" (its word says so)"));
        }
        if silence.is_time_to_ask() {
            // What comes in the ring may take as long as it likes while the socket is answered.
            self.call(Op::Info, "a window to be resident", &Empty {}, &[])?;
            silence.heard();
        }
        Ok(())
    }

    /// Tells the server that a window was used. Lost when the ring is full: it is a hint.
    pub(crate) fn touch(&self, handle: u64, offset: u64) -> Result<(), ClientError> {
        let mut ring = locked(&self.ring);
        let entry = RingRequest { handle, offset, opcode: RING_TOUCH, ..Default::default() };
        if ring.has_room()? && ring.put(&entry)? {
            self.kick()?;
        }
        Ok(())
    }

    /// Wakes the server. It wakes by any message, so a full socket is as good.
    fn kick(&self) -> Result<(), ClientError> {
        let bytes = header::encode(Op::Kick, false, 0, 0, &Empty {}, &[])?;
        match self.socket.send(&bytes, &[]) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
            Err(e) => Err(gone_or(e)),
        }
    }
}

/// `next`: the number of the next request, with which the server may be asked whether it lives (not before hello).
fn exchange(
    socket: &Socket,
    patience: &Patience,
    bytes: &[u8],
    request: u64,
    what: &'static str,
    alive: &dyn Fn() -> bool,
    mut next: Option<&mut u64>,
) -> Result<Reply, ClientError> {
    let mut silence = patience.begin();
    let check = |silence: &mut Silence<'_>| {
        if !alive() {
            return Err(ClientError::Gone(" (its word says so)"));
        }
        match silence.is_over() {
            Some(after) => Err(ClientError::TimedOut { what, after, server: patience.server }),
            None => Ok(()),
        }
    };
    loop {
        match socket.send(bytes, &[]) {
            Ok(()) => break,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                check(&mut silence)?;
                socket.wait_writable(LOOK_MS)?;
            }
            Err(e) => return Err(gone_or(e)),
        }
    }
    loop {
        if !socket.wait_readable(LOOK_MS)? {
            check(&mut silence)?;
            if let Some(next) = next.as_deref_mut()
                && silence.is_time_to_ask()
            {
                ask(socket, next)?;
            }
            continue;
        }
        let datagram = match socket.receive() {
            Ok(Some(datagram)) => datagram,
            Ok(None) => return Err(ClientError::Gone("")),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(e) => return Err(gone_or(e)),
        };
        silence.heard();
        if datagram.truncated {
            return Err(protocol("a reply longer than the limit"));
        }
        let message = Message::decode(&datagram.bytes)?;
        if !message.reply {
            return Err(protocol("a request from the server"));
        }
        if message.request != request {
            // Request 0 is the server's farewell; anything else answers a call that gave up waiting, or says that it lives.
            if message.request == 0
                && let Some(error) = message.error()
            {
                return Err(error.into());
            }
            continue;
        }
        if usize::try_from(message.fds).ok() != Some(datagram.fds.len()) {
            return Err(protocol(format!(
                "{} descriptors came instead of {}",
                datagram.fds.len(),
                message.fds
            )));
        }
        return match message.error() {
            Some(error) => Err(error.into()),
            None => Ok(Reply { message, fds: datagram.fds }),
        };
    }
}

/// Asks the server for anything, so that it is heard while it works on something long. The answer is for nobody.
fn ask(socket: &Socket, next: &mut u64) -> Result<(), ClientError> {
    let bytes = header::encode(Op::Info, false, *next, 0, &Empty {}, &[])?;
    *next += 1;
    match socket.send(&bytes, &[]) {
        Err(e) if e.kind() != std::io::ErrorKind::WouldBlock => Err(gone_or(e)),
        _ => Ok(()),
    }
}

fn gone_or(error: std::io::Error) -> ClientError {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    if matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected) {
        ClientError::Gone("")
    } else {
        error.into()
    }
}
