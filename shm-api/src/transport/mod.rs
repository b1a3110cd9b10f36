//! How messages, descriptors and hot requests get from one process to another.
//!
//! * [`socket`]: datagrams with descriptors over a Unix seqpacket socket
//! * [`listener`]: binding the socket path, and what to do about an old one
//! * [`peer`]: who is at the other end, and whether it still lives
//! * [`ring`]: the shared-memory rings for requests that are hot
//! * [`server_word`]: the robust word by which clients see the server die
pub mod listener;
pub mod peer;
pub mod ring;
pub mod server_word;
pub mod socket;
