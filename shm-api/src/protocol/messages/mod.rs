//! The body of every request and reply. Handles, map ids and peer ids are the server's numbers: opaque to clients, and
//! checked against the connection they came over.
//!
//! * `server`: hello, and what a server says about itself
//! * `files`: names and files
//! * `windows`: map, fault, read, commit, revoke
//! * `peers`: emulated peers
//! * `layouts`: block numbers under a lease
mod files;
mod layouts;
mod peers;
mod server;
mod windows;

pub use files::*;
pub use layouts::*;
pub use peers::*;
pub use server::*;
pub use windows::*;
