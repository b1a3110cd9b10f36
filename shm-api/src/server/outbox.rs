//! Replies on their way to a client that may not be reading: sent at once if they fit the socket, else kept, up to a bound. The
//! server never waits for a client; one that leaves more than the bound unread is disconnected.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::protocol::MAX_IN_FLIGHT;
use crate::transport::socket::Socket;

/// A reply that waits.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) bytes: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

#[derive(Debug, Default)]
pub(crate) struct Outbox {
    waiting: VecDeque<Outgoing>,
}

/// Why a client is let go.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    #[error("it leaves more than {MAX_IN_FLIGHT} replies unread")]
    NotReading,
    #[error("its socket failed: {0}")]
    Io(io::Error),
}

impl Outbox {
    /// Sends or keeps.
    pub(crate) fn send(&mut self, socket: &Socket, message: Outgoing) -> Result<(), SendError> {
        self.waiting.push_back(message);
        self.flush(socket)?;
        if self.waiting.len() > MAX_IN_FLIGHT { Err(SendError::NotReading) } else { Ok(()) }
    }

    /// Sends what fits now.
    pub(crate) fn flush(&mut self, socket: &Socket) -> Result<(), SendError> {
        while let Some(message) = self.waiting.front() {
            let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
            match socket.send(&message.bytes, &fds) {
                Ok(()) => self.waiting.pop_front(),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(SendError::Io(e)),
            };
        }
        Ok(())
    }

    /// Whether something waits for the client to read.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }
}
