//! The durable storm: the server is killed at random moments while everything goes on, half of the time together with its drive's power;
//! then the drive is checked and read, another server starts on it, and the clients go on.
//!
//! Client processes write through windows (in the CMB and in the host cache), commit files and ranges, cut files, make, replace and remove
//! names; one has a peer that does DMA; a revoker takes windows back all the time, and clients are stopped and killed as well.
//! The drive has a volatile write cache. Two kinds of it, by the seed: in the server's process, where killing that is the power cut; and in
//! this one, served over vfio-user, where it outlives the server, and a cut loses any mixture of what was not flushed.
//!
//! * `board`: what everybody must find, word by word, outside of what is tested
//! * `client`: a client, over any number of servers
//! * `drive`: the drive, its cuts, and what is on it after one
//! * `run`: the rounds
//!
//! Each 8-byte word of a file says which change it is of. After a cut a word must be of a change between the last that a commit
//! has acknowledged and the last that was begun, both included, or zero if the file was cut in between; the names and what they name
//! likewise. Readers find what was published, or newer. Everything that a client is told is one of the few errors that it is to be told.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]
#![allow(unreachable_pub, reason = "rooms of one test")]

mod board;
mod client;
#[path = "../common/mod.rs"]
mod common;
mod drive;
mod run;

use common::{number, seed_from_clock};
use run::storm;

#[test]
fn helper_process() {
    common::play(&[("serve", drive::serve), ("client", client::client)]);
}

/// Some rounds on either kind of drive under `tests/run`, a few in a quick run.
#[test]
fn a_durable_storm() {
    let rounds = if std::env::var_os("CMBFS_SKIPS").is_some() { 16 } else { 6 };
    let seed = number("SEED").unwrap_or(0x5eed_0030);
    // A round takes longer where every command goes to another process.
    for seed in [seed, seed + 1] {
        storm(seed, if seed.is_multiple_of(2) { rounds / 2 } else { rounds });
    }
}

/// Another storm each time, `ROUNDS` (20) for each of `SEEDS` (40) seeds from `SEED` on.
#[test]
#[ignore = "minutes: SEED=1 SEEDS=40 ROUNDS=20 cargo test --profile test-fast -p shm-api --test durable -- --ignored --nocapture"]
fn many_durable_storms() {
    let first = number("SEED").unwrap_or_else(seed_from_clock);
    for seed in first..first + number("SEEDS").unwrap_or(40) {
        storm(seed, number("ROUNDS").unwrap_or(20));
    }
}
