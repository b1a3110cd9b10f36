//! What revocation must get right, case by case, in injected time.
//!
//! * `readers`: they carry on, by window and by mass, and every byte is counted
//! * `writers`: waited for, or fenced
//! * `borrows`: snapshots, and what a silent one costs
//! * `deaths`: of clients, and of the server
//! * `drive`: a drive that fails or is late, and truncation
//! * `slots`: how control slots are held and reused
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod borrows;
#[path = "../common/mod.rs"]
mod common;
mod deaths;
mod drive;
mod readers;
mod slots;
mod writers;
