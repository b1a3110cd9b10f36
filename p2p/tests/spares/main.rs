//! Spares: host pages that a window keeps while it is in the CMB. What they save, what they must never show, and who they make way for.
//!
//! * `copies`: what is copied all the same, and nothing else
//! * `silent`: fenced writers and borrows
//! * `peers`: what a peer wrote
//! * `ends`: what takes a spare away
//! * `kinds`: which windows have one
//! * `room`: the room that they take and give
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "../common/mod.rs"]
mod common;
mod copies;
mod ends;
mod kinds;
mod peers;
mod room;
mod silent;
mod world;
