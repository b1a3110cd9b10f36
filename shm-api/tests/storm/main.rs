//! The storm: everything that this is about at once, in real processes, and every byte verified.
//!
//! A server on an emulated drive whose commands fail, stall, are late, are lost and answered twice, with placements refused at random; a CMB
//! of a quarter of the working set and a host cache of half of it; four client processes that read, write, borrow and commit, two of them each
//! with a peer whose DMA is under way while windows are taken back; a revoker at full speed; and somebody who stops and kills clients in the middle of whatever they do.
//!
//! * `board`: the model: what the processes tell each other about every word, outside of what is tested
//! * `client`: a client, with or without a peer
//! * `serve`: the server and its bad drive, and what is on the drive in the end
//! * `run`: the revoker, the stops and kills, and the sums
//!
//! Each 8-byte word says which version of which word of which window it is. Whoever reads demands of every word: that it is this word
//! (not torn, no other's, not poison), that it is at least as new as what was published before the read and as what any process
//! has read of this very word (not stale), and no newer than what was begun. Pages that a revocation freed are filled with poison by the
//! revoker, which demands that all of it is there (no late store, no late DMA). What is borrowed is verified again after its window
//! was taken back: a snapshot, but for what a fenced writer had begun. At the end the drive must hold at least what
//! was published and what was seen (nothing lost). In a storm with resets of the drive the floor is what was committed,
//! and what was borrowed in the CMB may be gone when its window was taken back, but is never another's.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]
#![allow(unreachable_pub, reason = "rooms of one test")]

mod board;
mod client;
#[path = "../common/mod.rs"]
mod common;
mod run;
mod serve;

use common::{number, seed_from_clock};
use run::{Size, storm};

#[test]
fn helper_process() {
    common::play(&[("serve", serve::serve), ("client", client::client)]);
}

fn seed() -> u64 {
    number("SEED").unwrap_or(0x5eed_0012)
}

/// Ten seconds and more under `tests/run`, a look at it in a quick run.
#[test]
fn a_storm() {
    let full = std::env::var_os("CMBFS_SKIPS").is_some();
    storm(seed(), if full { Size::TEN_SECONDS } else { Size::SHORT });
}

/// A drive so bad that it is reset again and again: what was not committed may be lost with its CMB, and nothing else.
#[test]
fn a_storm_with_resets() {
    let full = std::env::var_os("CMBFS_SKIPS").is_some();
    storm(seed(), if full { Size::SHORT.with_resets(5) } else { Size::SHORT.with_resets(0) });
}

/// Another storm each time, or the one that `SEED` names.
#[test]
#[ignore = "a minute: cargo test --profile test-fast -p shm-api --test storm -- --ignored --nocapture"]
fn a_minute_of_storm() {
    let chosen = std::env::var_os("SEED").is_some();
    storm(if chosen { seed() } else { seed_from_clock() }, Size::MINUTE);
}

#[test]
#[ignore = "a minute, with resets: as a_minute_of_storm"]
fn another_minute_with_resets() {
    storm(seed(), Size::MINUTE.with_resets(60));
}
