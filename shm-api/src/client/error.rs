//! What can go wrong on the client's side.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nvme_driver::mem::{MapError, OutOfRange};
use nvme_driver::socket_path;

use super::silence::ServerProcess;
use crate::protocol::{ErrorCode, WireError};
use crate::transport::listener::is_other_kind;
use crate::transport::ring::RingError;

/// A client's request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No server was reached there.
    #[error("cannot connect to {path}: {source}{}", advice(.path, .source))]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The server refused; it says why.
    #[error(transparent)]
    Server(#[from] WireError),
    /// The server died or closed the connection. What was committed is on the drive; connect again when it is back.
    #[error("the server is gone{0}; what was committed is on the drive, connect again when it is back")]
    Gone(&'static str),
    /// The server is there but silent. What was asked may still be done when it goes on.
    #[error("{server} has not answered for {:.1} s, asked for {what}{}", .after.as_secs_f64(), .server.advice())]
    TimedOut {
        /// What was asked for.
        what: &'static str,
        /// How long it was silent.
        after: Duration,
        /// Who.
        server: ServerProcess,
    },
    /// The server answered what the protocol does not allow.
    #[error("the server's answer breaks the protocol: {0}")]
    Protocol(String),
    /// The range is outside what is mapped.
    #[error("{len} bytes at {offset} are outside a mapping of {mapped} bytes")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Length of the mapping in bytes.
        mapped: u64,
    },
    /// The mapping or the file was opened for reading only.
    #[error("{what} is open for reading only")]
    ReadOnly {
        /// Which.
        what: &'static str,
    },
    /// Windows were revoked faster than they could be used.
    #[error("the window at {offset} was taken back {times} times in a row before this {what} was through")]
    Starved {
        /// File offset.
        offset: u64,
        /// How often it was tried.
        times: u32,
        /// What was tried.
        what: &'static str,
    },
    /// The server had no place for a window again and again, neither in the CMB nor in the host cache. A writer needs one.
    #[error(
        "the window at {offset} could not be written, it was refused {times} times in a row: {why}; revoke the CMB or free raw memory, \
         or serve with more host cache"
    )]
    NoPlace {
        /// File offset.
        offset: u64,
        /// How often it was asked for.
        times: u32,
        /// The server's last refusal.
        why: WireError,
    },
    /// A window stayed closed to writers for too long: it did not end moving ([`ErrorCode::Moving`]), or a layout over it did not come back
    /// ([`ErrorCode::Leased`]).
    #[error("the window at {offset} could not be written for {waited:?}: {why}")]
    HeldUp {
        /// File offset.
        offset: u64,
        /// How long it was asked for.
        waited: Duration,
        /// What the server says is in the way.
        why: WireError,
    },
    /// Memory could not be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A shared region is smaller than it should be.
    #[error(transparent)]
    Range(#[from] OutOfRange),
    /// The ring is unusable.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The socket is unusable.
    #[error("the socket to the server: {0}")]
    Io(#[from] io::Error),
}

impl ClientError {
    /// The server's error code, if it was the server that refused.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Server(e) | Self::NoPlace { why: e, .. } | Self::HeldUp { why: e, .. } => Some(e.code),
            _ => None,
        }
    }
}

/// What to do about a connection that did not come about, where the system's answer does not tell.
fn advice(path: &Path, error: &io::Error) -> String {
    let advice = match error.kind() {
        _ if is_other_kind(error) => {
            "that is a socket of another kind, not a cmbfs server's. A drive that is served over vfio-user is a DEVICE: vfio-user:PATH"
        }
        io::ErrorKind::TimedOut => "the server there takes no clients: it is stopped or hung",
        _ => {
            let why = socket_path::why_refused(path, error, "`cmbfs serve` with this --socket");
            return why.map_or(String::new(), |why| format!("; {why}"));
        }
    };
    format!("; {advice}")
}
