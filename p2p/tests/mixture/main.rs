//! Everything at once, from a seed: files, raw memory and a device's own memory; clients that read, write, hold sections and borrows, and
//! die; peers with DMA in flight; revocations of every scope; truncation and layouts; refusals, failures, and a drive that is reset in the
//! middle of its transfers. Every word says which window it is of and when it was written, and all of them are compared with a model.
//!
//! * `world`: the model, and what must always hold
//! * `acts`: what happens
//! * `held`: what is held over it: sections, borrows and DMA
//!
//! The last page of each window is written by what is held and may be late: there each word has to be one of this window's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
#![allow(unreachable_pub, reason = "rooms of one test")]

mod acts;
#[path = "../common/mod.rs"]
mod common;
mod held;
mod world;

use world::{Chances, World};

fn run(seeds: std::ops::Range<u64>, steps: usize, chances: Chances) {
    let base = common::seed(seeds.start);
    let only = std::env::var_os("SEED").is_some();
    for seed in base..if only { base + 1 } else { seeds.end } {
        println!("SEED={seed}");
        let mut world = World::new(seed, chances);
        for _ in 0..steps {
            world.step();
        }
        world.finish();
    }
}

#[test]
fn a_good_drive() {
    run(100..112, 400, Chances::default());
}

#[test]
fn refusals_and_failures() {
    run(200..212, 400, Chances { refusals: 150, failures: 40, resets: 0 });
}

#[test]
fn resets() {
    run(300..324, 400, Chances { refusals: 0, failures: 0, resets: 15 });
}

#[test]
fn resets_refusals_and_failures() {
    run(400..424, 400, Chances { refusals: 100, failures: 30, resets: 25 });
}

/// For as long as `SECONDS` says, or a minute.
#[test]
#[ignore = "a minute: cargo test --profile test-fast -p p2p --test mixture -- --ignored --nocapture"]
fn many_seeds() {
    let seconds = std::env::var("SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    let mut seed = common::seed(u64::from(std::process::id()) << 20);
    let (first, only) = (seed, std::env::var_os("SEED").is_some());
    while std::time::Instant::now() < until && !(only && seed > first) {
        let chances = Chances {
            refusals: [0, 100, 300][seed as usize % 3],
            failures: [0, 30, 80][seed as usize / 3 % 3],
            resets: [0, 10, 40][seed as usize / 9 % 3],
        };
        run(seed..seed + 1, 600, chances);
        seed += 1;
    }
    println!("{} seeds", seed - first);
}
