//! One order: whatever windows do, what everybody sees of them is explained by one order of the writes.
//!
//! Several processes write records of 64 bytes to the same places of shared windows, through write sections, by their peers' DMA and through
//! host memory; others read them: with seqlock reads and borrows, by DMA, and with the client in Python. All of them note what they did
//! and from when to when. Meanwhile windows are taken back and put into the CMB again, writers are too slow and are fenced, and processes are stopped
//! and killed. Afterwards a judge, which knows nothing of windows, says for each word whether there is an order of all writes that explains every
//! read and in which nothing is before what had ended when it began: so nobody reads anything stale, no write is lost, and none comes back.
//!
//! The places are in a file, in one that stays out of the CMB, in raw memory, in a peer's exported memory and in the drive's PMR.
//! A drive that is reset takes what was not committed: then what is read afterwards may be older, but nothing that a commit was over.
//!
//! * `history`: the notes
//! * `judge`: the verdict, and that it convicts
//! * `parties`: who writes and who reads
//! * `run`: the server, the revoker, stops, kills and resets
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]
#![allow(unreachable_pub, reason = "rooms of one test")]

#[path = "../common/mod.rs"]
mod common;
mod history;
mod judge;
mod parties;
mod run;

use std::time::Duration;

use common::{number, seed_from_clock};
use run::{Size, storm};

#[test]
fn helper_process() {
    common::play(&[("serve", run::serve), ("party", parties::party)]);
}

fn seed() -> u64 {
    number("SEED").unwrap_or(0x5eed_0040)
}

fn lasting(full: u64) -> Duration {
    Duration::from_millis(if std::env::var_os("CMBFS_SKIPS").is_some() { full } else { full / 3 })
}

#[test]
fn everybody_sees_one_order() {
    storm(seed(), Size { lasts: lasting(3000), resets: false });
}

#[test]
fn everybody_sees_one_order_but_for_what_resets_took() {
    storm(seed(), Size { lasts: lasting(2000), resets: true });
}

/// Both, for `SECONDS` (2) with each of `SEEDS` (100) seeds from `SEED` on.
#[test]
#[ignore = "minutes: SEED=1 SEEDS=100 SECONDS=2 cargo test --profile test-fast -p shm-api --test order -- --ignored --nocapture"]
fn many_orders() {
    let first = number("SEED").unwrap_or_else(seed_from_clock);
    let lasts = Duration::from_secs(number("SECONDS").unwrap_or(2));
    for seed in first..first + number("SEEDS").unwrap_or(100) {
        storm(seed, Size { lasts, resets: seed.is_multiple_of(3) });
    }
}
