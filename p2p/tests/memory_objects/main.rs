//! Objects with device memory of their own, in injected time: what a PMR or a peer's exported memory holds is what the object holds,
//! wherever its windows are.
//!
//! * `homes`: where its windows are, and what that moves
//! * `silent`: borrows and silent writers
//! * `peers`: peers that reach it, and such as cannot be cut off
//! * `losses`: resets of the drive, which leave it alone, and the end of its own device
//! * `off`: a device that was off for a while
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "../common/mod.rs"]
mod common;
mod homes;
mod losses;
mod off;
mod peers;
mod silent;
mod world;
