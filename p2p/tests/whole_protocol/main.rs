//! The whole protocol as a model, searched exhaustively for small counts: a server with several revokers, two clients that may stop (they
//! simply do not go on) or die at any step, a reader, a writing and a reading peer, commit, truncation with a layout out, re-promotion,
//! drive commands that time out, resets of the device, and the mass revocation. Memory is sequentially consistent here: what weak memory
//! adds is loom's part (`tests/loom`).
//!
//! * `state`: the world, and its normal form
//! * `steps`: what each party does, step by step
//! * `moves`, `resets`, `parties`: the same in parts: the server's moves; a reset and what is told of it; clients, readers and peers
//! * `protocol`: what may happen when, and what must always hold
//! * `searches`: the searches
//! * `exhaust`: how the largest is searched
//! * `broken`: what the search must notice
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
#![allow(unreachable_pub, reason = "rooms of one test")]

mod broken;
mod exhaust;
mod moves;
mod parties;
mod protocol;
mod resets;
mod searches;
mod state;
mod steps;
