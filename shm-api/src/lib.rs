//! Files of a cmbfs as shared memory: the server, its clients, and what goes between them.
//!
//! * [`client`]: the client library: connect, open, map, read, write, commit
//! * [`server`]: the server: one thread that owns a filesystem and its windows
//! * [`protocol`]: messages, encoded and decoded in one place
//! * [`Placement`], [`PlacedBy`]: where a file's windows may live, and who says so
//! * [`transport`]: socket, descriptors, rings, and how each side sees the other die
pub mod client;
mod placement;
pub mod protocol;
pub mod server;
pub mod transport;

pub use placement::{PlacedBy, Placement, UnknownPlacement};
