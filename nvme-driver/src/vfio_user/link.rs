//! The server's end of a client's socket: the client's commands come in, our own (DMA by message) go out.
//!
//! Commands of ours and their replies go over a twin socket where the client wants one. Otherwise they share the client's: commands of
//! the client's that come while we wait for a reply are put aside, to be served in their order afterwards. Nothing waits forever: a
//! client that does not answer within the server's patience has lost its connection, and with it every later call at once.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::protocol::{Fields, Header, Put, command};
use super::session::{ClientCalls, Reply};
use super::transport::{Message, receive, send};

/// How often a wait for an answer looks whether the server is to stop, in nanoseconds.
const LOOK_UP: i64 = 50_000_000;
/// The client's commands that are put aside while it owes an answer, and the bytes in them.
const MAX_ASIDE: usize = 256;
const MAX_ASIDE_BYTES: usize = 8 << 20;

/// What the client's socket has brought.
#[derive(Debug, Default)]
struct Inbox {
    aside: VecDeque<Message>,
    aside_bytes: usize,
    next_id: u16,
    /// Why nothing more can come.
    over: Option<Errno>,
}

/// One client's connection, shared by the thread that serves it and the one that runs the function.
#[derive(Debug)]
pub(super) struct Link {
    stream: UnixStream,
    /// Held while a message is received, and by a call from its sending to its reply.
    inbox: Mutex<Inbox>,
    /// Held while a message is sent. Locked after `inbox`, if both are.
    sending: Mutex<()>,
    /// Where our commands go, if not over `stream`.
    twin: OnceLock<UnixStream>,
    stop: Arc<AtomicBool>,
    patience: Duration,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_readable(stream: &UnixStream, nanoseconds: i64) -> Result<bool, Errno> {
    let wait = Timespec { tv_sec: 0, tv_nsec: nanoseconds };
    match poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&wait)) {
        Ok(n) => Ok(n > 0),
        Err(Errno::INTR) => Ok(false),
        Err(e) => Err(e),
    }
}

fn make_patient(stream: &UnixStream, patience: Duration) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))
}

impl Link {
    /// A client that has just connected. `patience`: how long it may leave a message half sent, a reply unread, or a call unanswered.
    /// Calls are given up once `stop` is set.
    pub(super) fn new(stream: UnixStream, stop: Arc<AtomicBool>, patience: Duration) -> io::Result<Self> {
        make_patient(&stream, patience)?;
        let (inbox, sending, twin) = (Mutex::default(), Mutex::default(), OnceLock::new());
        Ok(Self { stream, inbox, sending, twin, stop, patience })
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.patience
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether [`next`](Self::next) has something to say although the socket may not be readable.
    pub(super) fn has_waiting(&self) -> bool {
        let inbox = lock(&self.inbox);
        !inbox.aside.is_empty() || inbox.over.is_some()
    }

    /// The client's next command, if one is there. An error: the connection is over.
    pub(super) fn next(&self) -> Result<Option<Message>, Errno> {
        let mut inbox = lock(&self.inbox);
        if let Some(e) = inbox.over {
            return Err(e);
        }
        if let Some(message) = inbox.aside.pop_front() {
            inbox.aside_bytes -= message.body.len();
            return Ok(Some(message));
        }
        // Somebody who waited for a reply may have taken what woke us.
        if !is_readable(&self.stream, 0)? {
            return Ok(None);
        }
        receive(&self.stream, self.deadline()).map(Some)
    }

    pub(super) fn reply(&self, reply: &Reply) -> Result<(), Errno> {
        let _guard = lock(&self.sending);
        send(&self.stream, &reply.bytes, &reply.fds, self.deadline())
    }

    /// Ends the connection: a call that waits fails now.
    pub(super) fn close(&self) {
        for stream in [Some(&self.stream), self.twin.get()].into_iter().flatten() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Sends a command of ours, waits for its reply: its body.
    fn call(&self, command: u16, body: &[u8]) -> io::Result<Vec<u8>> {
        let mut inbox = lock(&self.inbox);
        if let Some(e) = inbox.over {
            return Err(e.into());
        }
        let id = inbox.next_id;
        inbox.next_id = id.wrapping_add(1);
        match self.exchange(&mut inbox, Header::command(id, command, body.len()), body) {
            Ok(answer) => answer.map_err(io::Error::from),
            Err(e) => {
                // A stream that has lost its place cannot be used again.
                inbox.over = Some(e);
                Err(e.into())
            }
        }
    }

    /// The outer error ends the connection.
    fn exchange(
        &self,
        inbox: &mut Inbox,
        header: Header,
        body: &[u8],
    ) -> Result<Result<Vec<u8>, Errno>, Errno> {
        let deadline = self.deadline();
        let stream = self.twin.get().unwrap_or(&self.stream);
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend_from_slice(body);
        let sending = lock(&self.sending);
        send::<OwnedFd>(stream, &bytes, &[], deadline)?;
        drop(sending);
        loop {
            while !is_readable(stream, LOOK_UP)? {
                if self.stop.load(Ordering::Relaxed) {
                    return Err(Errno::CANCELED);
                }
                if Instant::now() >= deadline {
                    return Err(Errno::TIMEDOUT);
                }
            }
            let message = receive(stream, deadline)?;
            if message.header.is_command() && self.twin.get().is_none() {
                inbox.aside_bytes += message.body.len();
                inbox.aside.push_back(message);
                if inbox.aside.len() > MAX_ASIDE || inbox.aside_bytes > MAX_ASIDE_BYTES {
                    return Err(Errno::NOBUFS);
                }
                continue;
            }
            let reply = message.header;
            if !reply.is_reply() || (reply.id, reply.command) != (header.id, header.command) {
                return Err(Errno::PROTO);
            }
            if reply.is_error() {
                let code = i32::try_from(reply.error).ok().filter(|code| (1..4096).contains(code));
                return Ok(Err(code.map_or(Errno::IO, Errno::from_raw_os_error)));
            }
            return Ok(Ok(message.body));
        }
    }
}

fn access(address: u64, count: usize) -> Vec<u8> {
    let mut body = Vec::with_capacity(16 + count);
    body.put_u64(address);
    body.put_u64(count as u64);
    body
}

/// A reply that is not what was asked for: nothing of it is used.
fn wrong_reply() -> io::Error {
    io::Error::from(Errno::PROTO)
}

impl ClientCalls for Link {
    fn dma_read(&self, address: u64, into: &mut [u8]) -> io::Result<()> {
        let ask = access(address, into.len());
        let reply = self.call(command::DMA_READ, &ask)?;
        // Address and count are repeated, then comes the data.
        let data = reply.strip_prefix(&ask[..]).filter(|data| data.len() == into.len());
        into.copy_from_slice(data.ok_or_else(wrong_reply)?);
        Ok(())
    }

    fn dma_write(&self, address: u64, from: &[u8]) -> io::Result<()> {
        let mut ask = access(address, from.len());
        ask.extend_from_slice(from);
        let reply = self.call(command::DMA_WRITE, &ask)?;
        // The specification's table says four bytes of count here, its text and other implementations eight.
        let mut fields = Fields(&reply);
        let said = (fields.u64().map_err(|_| wrong_reply())?, fields.u32().map_err(|_| wrong_reply())?);
        if said == (address, from.len() as u32) { Ok(()) } else { Err(wrong_reply()) }
    }

    fn twin(&self) -> io::Result<OwnedFd> {
        let (ours, theirs) = UnixStream::pair()?;
        make_patient(&ours, self.patience)?;
        self.twin.set(ours).map_err(|_| io::Error::from(io::ErrorKind::AlreadyExists))?;
        Ok(theirs.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connect(patience: Duration) -> (Arc<Link>, UnixStream, Arc<AtomicBool>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        (Arc::new(Link::new(ours, Arc::clone(&stop), patience).unwrap()), theirs, stop)
    }

    #[test]
    fn a_client_that_does_not_answer_is_given_up_once_and_for_all() {
        let (link, theirs, _) = connect(Duration::from_millis(20));
        let mut bytes = [0; 4];
        assert_eq!(link.dma_read(0x1000, &mut bytes).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(link.dma_write(0x1000, &bytes).unwrap_err().kind(), io::ErrorKind::TimedOut);
        let asked = receive(&theirs, Instant::now() + Duration::from_secs(9)).unwrap();
        assert_eq!((asked.header.command, asked.body), (command::DMA_READ, access(0x1000, 4)));
        assert!(!is_readable(&theirs, 0).unwrap(), "the second call was not even sent");
        assert_eq!(link.next().unwrap_err(), Errno::TIMEDOUT, "the connection is over");
    }

    /// Each byte comes in time, the message does not.
    #[test]
    fn a_client_that_trickles_is_given_up() {
        let (link, theirs, _) = connect(Duration::from_millis(20));
        let trickle = std::thread::spawn(move || {
            let mut bytes = Header::command(1, command::REGION_WRITE, 1 << 20).to_bytes().to_vec();
            while rustix::net::send(&theirs, &bytes, rustix::net::SendFlags::NOSIGNAL).is_ok() {
                bytes.truncate(1);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let over = loop {
            match link.next() {
                Ok(None) => std::thread::yield_now(),
                other => break other,
            }
        };
        assert_eq!(over.unwrap_err(), Errno::AGAIN);
        link.close();
        trickle.join().unwrap();
    }

    #[test]
    fn a_call_ends_when_the_server_stops_or_the_link_closes() {
        let (link, _theirs, stop) = connect(Duration::from_secs(3600));
        stop.store(true, Ordering::Relaxed);
        assert!(link.dma_read(0, &mut [0; 4]).is_err());
        let (link, _theirs, _) = connect(Duration::from_secs(3600));
        let caller = Arc::clone(&link);
        let call = std::thread::spawn(move || caller.dma_read(0, &mut [0; 4]));
        link.close();
        assert!(call.join().unwrap().is_err());
    }
}
