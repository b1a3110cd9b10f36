//! vfio-user: a PCI function served to, or used from, another process over a Unix socket.
//!
//! * [`server`]: serves any [`PciFunction`](crate::pci::PciFunction), above all the emulated controller, to a foreign driver or to QEMU
//!   (`vfio-user-pci`), so that a guest's own NVMe driver runs on it
//! * [`VfioUserFunction`]: a function that another process serves, for our driver
//! * [`Session`]: one client's view of the function: takes messages, gives replies, does no I/O (so it can be fuzzed as fast as it runs)
//! * `version`, `regions`, `memory`, `interrupts`: what a session serves: the first handshake, BARs and config space, the client's DMA
//!   memory, and its eventfds
//! * `link`: the server's end of a client's socket, DMA by message included
//! * `protocol`, `transport`, `connection`: the message format, messages over a socket, and the client's calls
//!
//! The message format is the vfio-user protocol specification 0.1 (docs/interop/vfio-user.rst in QEMU's source), referred to below as "spec".
mod bars;
mod client;
mod connection;
mod interrupts;
mod link;
mod memory;
mod protocol;
mod regions;
pub mod server;
mod session;
mod transport;
mod version;

pub use client::VfioUserFunction;
pub use protocol::{Header, MAX_DATA, MAX_FDS, command};
pub use session::{ClientCalls, Reply, Session};
