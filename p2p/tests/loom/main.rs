//! The protocol's own code (`p2p::protocol`) under loom, which tries every interleaving and every value that a weak memory may
//! show. Each model comes with broken twins (a fence, an ordering or a step left out) that loom must catch.
//!
//! * `world`: what the models share
//! * `readers`, `writers`, `borrows`, `revokers`, `deaths`: the models
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
#![allow(unreachable_pub, reason = "rooms of one test")]

mod borrows;
mod deaths;
mod readers;
mod revokers;
mod world;
mod writers;
