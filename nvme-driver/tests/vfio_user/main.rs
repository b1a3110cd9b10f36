//! The vfio-user server, from the other side of the socket: a raw client that knows the message format and the NVMe specification
//! and nothing of our driver.
//!
//! * `raw`: the client
//! * `handshake`, `device`, `dma`: what the protocol specification asks for, section by section
//! * `nvme`: an admin queue brought up by hand through the socket
//! * `by_message`: the same in memory without a descriptor, read and written by DMA_READ and DMA_WRITE
//! * `client`: our client, on our server and on servers that misbehave; and the `vfio_user` crate's client on our server
//! * `proxy`: what our client sends, word by word
//! * `bars`: our client on a server that routes accesses by the addresses of BARs
//! * `fuzz`: random messages, as many as `CMBFS_FUZZ_MESSAGES` says (see `tape`)
#[cfg(test)]
mod bars;
#[cfg(test)]
mod by_message;
#[cfg(test)]
mod client;
#[cfg(test)]
mod device;
#[cfg(test)]
mod dma;
#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod handshake;
#[cfg(test)]
mod nvme;
#[cfg(test)]
mod proxy;
#[cfg(test)]
mod raw;
#[cfg(test)]
#[path = "../tape/mod.rs"]
mod tape;
