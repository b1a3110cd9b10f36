//! The wire protocol: what crosses the socket and the rings, encoded and decoded in one place.
//!
//! * [`wire`]: fixed-size little-endian structs, and the one macro that defines them
//! * [`header`]: what every message starts with, and how a datagram becomes a checked [`Message`]
//! * [`messages`]: the body of every request and reply
//! * [`records`]: what follows a body in some messages: directory entries, windows, path counters
//! * [`error`]: error codes, and the text that goes with them
//!
//! `docs/protocol.md` is the specification; `include/cmbfs.h` the same structs in C.
pub mod error;
pub mod header;
pub mod messages;
pub mod records;
pub mod wire;

pub use error::{ErrorCode, WireError};
pub use header::{Header, Message, Op};

/// The only version of the protocol there is.
pub const VERSION: u16 = 1;
/// Longest message in bytes, header included. Bigger transfers go through memory, not through the socket.
pub const MAX_MESSAGE: usize = 32 * 1024;
/// Most descriptors with one message.
pub const MAX_FDS: usize = 8;
/// Longest path in bytes (as `PATH_MAX`, without the closing zero).
pub const MAX_PATH: usize = 4095;
/// Most windows that one `Map` returns.
pub const MAX_WINDOWS: usize = 1024;
/// Most requests a client may have unanswered at one time.
pub const MAX_IN_FLIGHT: usize = 64;
