//! A CMB of 1 MiB under a working set of 10 GiB, through a server: at full size in a long test that has to be asked for, and a
//! thousandth of it in every run.
//!
//! `cargo test --profile test-fast -p shm-api --test small_cmb -- --ignored --nocapture`
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use common::{Serving, Setup, filesystem, options};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use shm_api::client::OpenMode;
use shm_api::server::ServerOptions;

/// What is written at the start and the end of a page.
fn stamp(page: u64, version: u64) -> [u8; 8] {
    (page << 24 | version).to_le_bytes()
}

/// Stamps one page of every window of a file of `size` bytes, then goes to `visits` of them at random, reads what was written last, and
/// writes every third anew.
fn run(url: &str, window: usize, size: u64, host_cache: u64, visits: u64) {
    let seed = common::number("SEED").unwrap_or(5);
    println!("SEED={seed}");
    let setup = Setup { url, window, ..common::SMALL };
    let serving =
        Serving::with(filesystem(url), |socket| ServerOptions { host_cache, ..options(socket, setup) });
    let client = serving.client();
    let file = client.open("/large", OpenMode::create()).unwrap();
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let windows = size / window as u64;
    let mut versions = vec![0u8; windows as usize];
    // As many as the server has slots for at a time, and less.
    let part = 4096 * window as u64;
    for from in (0..size).step_by(part as usize) {
        let mapped = file.map(from, part.min(size - from)).unwrap();
        for at in (0..mapped.len()).step_by(window) {
            mapped.write(at + 8, &stamp((from + at) / 4096, 0)).unwrap();
        }
    }
    let report = file.commit().unwrap();
    assert_eq!(report.size, size);
    for visit in 0..visits {
        let n = rng.next_u64() % windows;
        let at = n * window as u64;
        let mapped = file.map(at, window as u64).unwrap();
        let mut got = [0; 16];
        mapped.read(4, &mut got).unwrap();
        let want = stamp(at / 4096, u64::from(versions[n as usize]));
        assert_eq!(
            (&got[4..12], &got[..4], &got[12..]),
            (&want[..], &[0; 4][..], &[0; 4][..]),
            "visit {visit}, window {n}"
        );
        if visit % 3 == 0 {
            versions[n as usize] += 1;
            mapped.write(8, &stamp(at / 4096, u64::from(versions[n as usize]))).unwrap();
        }
    }
    file.commit().unwrap();
    let status = client.status().unwrap();
    assert!(status.host_bytes <= host_cache && status.cmb_used <= status.cmb_bytes);
    println!("{} MiB of CMB, {} MiB: {visits} visits", status.cmb_bytes >> 20, size >> 20);
    // And once more through a new handle: what was written last, all of it.
    drop((file, client));
    let client = serving.client();
    let file = client.open("/large", OpenMode::read()).unwrap();
    for (n, version) in versions.iter().enumerate().filter(|(n, v)| **v > 0 || n % 97 == 0) {
        let mut got = [0; 8];
        let at = n as u64 * window as u64;
        file.read_at(at + 8, &mut got).unwrap();
        assert_eq!(got, stamp(at / 4096, u64::from(*version)), "window {n} at the end");
    }
}

#[test]
fn a_thousandth_of_it() {
    run("emu:ram?size=32M&cmb=8K", 4096, 10 << 20, 64 << 10, 3000);
}

#[test]
#[ignore = "many minutes, and an image of 10 GiB (sparse): cargo test --profile test-fast -p shm-api --test small_cmb -- --ignored"]
fn one_mebibyte_under_ten_gibibytes() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("emu:{}/large.img?size=12G&cmb=1M", dir.path().display());
    run(&url, 64 << 10, 10 << 30, 64 << 20, 200_000);
}
