//! A drive of the server's as a peer: its blocks go to windows and come from them, for whoever may, and no other way.
//!
//! * `rig`: the server and the drive
//! * `bytes`: which way bytes go
//! * `revoked`: revocations, and a drive that fails
//! * `clients`: who may, and who is killed
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]
#![allow(unreachable_pub, reason = "rooms of one test")]

mod bytes;
mod clients;
#[path = "../common/mod.rs"]
mod common;
mod revoked;
mod rig;

#[test]
fn helper_process() {
    common::play(&[("user", clients::user), ("stranger", clients::stranger)]);
}
