//! The vfio-user server, from the other side of the socket: a raw client that knows the message format and the NVMe specification
//! and nothing of our driver.
//!
//! * `raw`: the client
//! * `handshake`, `device`, `dma`: what the protocol specification asks for, section by section
//! * `nvme`: an admin queue brought up by hand through the socket
//! * `fuzz`: random messages (`CMBFS_SEED`, `CMBFS_FUZZ_MESSAGES`)
mod device;
mod dma;
mod fuzz;
mod handshake;
mod nvme;
mod raw;
