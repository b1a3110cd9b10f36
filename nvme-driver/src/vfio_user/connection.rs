//! The client's end of the socket: one call at a time, every reply checked.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::protocol::{Fields, Header, MAX_DATA, MAX_FDS, Put, command};
use super::transport::{Message, receive, send};

/// How long a server may take for a reply.
const PATIENCE: Duration = Duration::from_secs(10);
/// Messages from the server in between that are put up with while waiting for a reply.
const MAX_INTERRUPTIONS: usize = 64;
/// Descriptors in one message when the server does not say (spec, "Version Data Format").
const DEFAULT_MAX_FDS: usize = 1;

/// A call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallError {
    /// The server answered with this error; the connection goes on.
    Refused(Errno),
    /// The server hung up, does not answer, or breaks the protocol: the connection is over.
    Gone(Errno),
}

/// A reply's body and descriptors.
pub(super) type Answer = Result<(Vec<u8>, Vec<OwnedFd>), CallError>;

/// A connection to a server after the handshake.
pub(super) struct Connection {
    stream: UnixStream,
    next: u16,
    /// Why it is over, if it is.
    dead: Option<Errno>,
    /// Descriptors the server takes in one message.
    pub(super) max_fds: usize,
    /// Bytes of data the server takes in one access.
    pub(super) max_data: usize,
}

impl Connection {
    /// Connects and shakes hands.
    pub(super) fn open(path: &Path) -> Result<Self, CallError> {
        let gone = |e: std::io::Error| CallError::Gone(Errno::from_io_error(&e).unwrap_or(Errno::IO));
        let stream = UnixStream::connect(path).map_err(gone)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(gone)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(gone)?;
        let mut new = Self { stream, next: 0, dead: None, max_fds: DEFAULT_MAX_FDS, max_data: MAX_DATA };
        let mut body = Vec::new();
        body.put_u16(0);
        body.put_u16(1);
        let capabilities =
            json!({ "capabilities": { "max_msg_fds": MAX_FDS, "max_data_xfer_size": MAX_DATA } });
        body.extend_from_slice(capabilities.to_string().as_bytes());
        body.push(0);
        let (reply, _) = new.call(command::VERSION, &body, &[])?;
        new.agree(&reply).map_err(CallError::Gone)?;
        Ok(new)
    }

    /// Takes over what the server announces; without version data the specification's defaults hold.
    fn agree(&mut self, reply: &[u8]) -> Result<(), Errno> {
        let mut fields = Fields(reply);
        if fields.u16()? != 0 {
            return Err(Errno::PROTO);
        }
        fields.u16()?;
        let text = fields.0.split(|b| *b == 0).next().unwrap_or_default();
        let announced = match text {
            [] => Value::Null,
            text => serde_json::from_slice(text).map_err(|_| Errno::PROTO)?,
        };
        let number =
            |name: &str| announced["capabilities"][name].as_u64().and_then(|n| usize::try_from(n).ok());
        if let Some(n) = number("max_msg_fds") {
            self.max_fds = n.clamp(1, MAX_FDS);
        }
        if let Some(n) = number("max_data_xfer_size") {
            self.max_data = n.clamp(8, MAX_DATA);
        }
        Ok(())
    }

    /// The process at the other end could do us harm anyway: it is root's or of the same user.
    pub(super) fn is_trusted(&self) -> bool {
        rustix::net::sockopt::socket_peercred(&self.stream)
            .is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid())
    }

    /// Whether it has ended already, or the server's end is closed.
    pub(super) fn is_over(&self) -> bool {
        let mut look = [PollFd::new(&self.stream, PollFlags::empty())];
        let hung_up = poll(&mut look, Some(&Timespec::default())).is_ok()
            && look[0].revents().intersects(PollFlags::HUP | PollFlags::ERR);
        self.dead.is_some() || hung_up
    }

    /// Sends a command, waits for its reply.
    pub(super) fn call(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Answer {
        if let Some(e) = self.dead {
            return Err(CallError::Gone(e));
        }
        self.exchange(command, body, fds).unwrap_or_else(|e| {
            // A stream that has lost its place cannot be used again.
            self.dead = Some(e);
            Err(CallError::Gone(e))
        })
    }

    /// The outer error ends the connection.
    fn exchange(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Answer, Errno> {
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        let mut bytes = Header::command(id, command, body.len()).to_bytes().to_vec();
        bytes.extend_from_slice(body);
        let deadline = Instant::now() + PATIENCE;
        send(&self.stream, &bytes, fds, deadline)?;
        for _ in 0..MAX_INTERRUPTIONS {
            let Message { header, body, fds } = receive(&self.stream, deadline)?;
            if header.is_command() {
                // DMA by message: never needed, the server has a descriptor for all of our memory.
                if !header.no_reply() {
                    let refusal = header.reply(0, Some(Errno::NOTSUP)).to_bytes();
                    send::<OwnedFd>(&self.stream, &refusal, &[], deadline)?;
                }
                continue;
            }
            if !header.is_reply() || (header.id, header.command) != (id, command) {
                return Err(Errno::PROTO);
            }
            if header.is_error() {
                let code = i32::try_from(header.error).ok().filter(|code| (1..4096).contains(code));
                return Ok(Err(CallError::Refused(code.map_or(Errno::IO, Errno::from_raw_os_error))));
            }
            return Ok(Ok((body, fds)));
        }
        Err(Errno::PROTO)
    }
}
