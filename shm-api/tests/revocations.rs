//! The promise of the whole thing (P1): under any number of revocations no reader ever sees a torn or a stale byte.
//!
//! A writer process raises a version in every 8-byte word of a file, window by window, each in one write section, and publishes
//! the number after the section. Four reader processes check every word of every read: it belongs to this file and this place, and is neither older than what was
//! published before the read nor newer than what was begun before its end. Meanwhile the windows are revoked from the CMB again and
//! again; the pages they leave are filled at once with another file's bytes, and then the windows go back.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{Process, Setup, connect, role, spawn};
use nvme_driver::mem::{Access, Mapping};
use shm_api::client::{Client, Mapped, OpenMode};

const WINDOW: usize = 16 * 1024;
const WINDOWS: usize = 2;
const READERS: usize = 4;
const SETUP: Setup<'static> =
    Setup { url: "emu:ram?size=16M&cmb=32K", window: WINDOW, grace_ms: 1000, ..common::SMALL };

/// A word of the file: version, window and place in it. Poison has the top bit set.
fn word(version: u64, window: usize, index: usize) -> u64 {
    version << 24 | (window as u64) << 16 | index as u64 & 0xffff
}

const POISON: u64 = 0xdead_beef_0bad_f00d;

/// What the processes tell each other, outside of what is tested: per window the version begun and the version published.
fn board(path: &str) -> Arc<Mapping> {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    Mapping::from_fd(OwnedFd::from(file), 0, 4096, Access::ReadWrite).unwrap()
}

fn begun(board: &Mapping, window: usize) -> &std::sync::atomic::AtomicU64 {
    board.u64_at(window * 128).unwrap()
}

fn published(board: &Mapping, window: usize) -> &std::sync::atomic::AtomicU64 {
    board.u64_at(window * 128 + 64).unwrap()
}

fn stopped(board: &Mapping) -> &std::sync::atomic::AtomicU64 {
    board.u64_at(4088).unwrap()
}

fn write_on(mapped: &Mapped, board: &Mapping) -> u64 {
    let mut version = 0;
    let mut bytes = vec![0; WINDOW];
    while stopped(board).load(Ordering::Relaxed) == 0 {
        version += 1;
        for window in 0..WINDOWS {
            for (index, chunk) in bytes.chunks_exact_mut(8).enumerate() {
                chunk.copy_from_slice(&word(version, window, index).to_le_bytes());
            }
            begun(board, window).store(version, Ordering::SeqCst);
            mapped.write((window * WINDOW) as u64, &bytes).unwrap();
            published(board, window).store(version, Ordering::SeqCst);
        }
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
    version
}

fn read_on(mapped: &Mapped, board: &Mapping) -> u64 {
    let mut reads = 0;
    let mut bytes = vec![0; WINDOW];
    while stopped(board).load(Ordering::Relaxed) == 0 {
        let window = reads as usize % WINDOWS;
        let least = published(board, window).load(Ordering::SeqCst);
        mapped.read((window * WINDOW) as u64, &mut bytes).unwrap();
        let most = begun(board, window).load(Ordering::SeqCst);
        for (index, chunk) in bytes.chunks_exact(8).enumerate() {
            let got = u64::from_le_bytes(chunk.try_into().unwrap());
            let version = got >> 24;
            assert_eq!(
                got,
                word(version, window, index),
                "read {reads}: word {index} of window {window} was never in this file: {got:#x}"
            );
            assert!(
                (least..=most).contains(&version),
                "read {reads}: word {index} of window {window} has version {version}, not {least} to {most}"
            );
        }
        reads += 1;
        if reads % 16 == 0 {
            // Two cores for six processes: the server must get its share for the test to be short.
            std::thread::sleep(std::time::Duration::from_micros(300));
        }
    }
    reads
}

#[test]
fn helper_process() {
    let Some((role, args)) = role() else { return };
    match role.as_str() {
        "serve" => {
            let server = shm_api::server::Server::new(
                common::filesystem(SETUP.url),
                common::options(Path::new(&args[0]), SETUP),
            );
            server.unwrap().run().unwrap();
        }
        "read" | "write" => {
            let board = board(&args[1]);
            let client = connect(Path::new(&args[0]));
            let mode = if role == "write" { OpenMode::write() } else { OpenMode::read() };
            let file = client.open("/data", mode).unwrap();
            let mapped = file.map(0, (WINDOW * WINDOWS) as u64).unwrap();
            println!("\nready");
            let count = if role == "write" { write_on(&mapped, &board) } else { read_on(&mapped, &board) };
            let paths = mapped.paths();
            println!("\ncount {count} cmb {} host {}", paths.cmb_reads, paths.host_reads);
        }
        other => panic!("no role {other}"),
    }
    std::io::stdout().flush().unwrap();
    std::process::exit(0);
}

fn wait_ready(process: &mut Process) -> BufReader<std::process::ChildStdout> {
    let mut out = BufReader::new(process.0.stdout.take().unwrap());
    let mut line = String::new();
    while line.trim() != "ready" {
        line.clear();
        assert!(out.read_line(&mut line).unwrap() > 0, "the process ended too early");
    }
    out
}

fn numbers(mut process: Process, mut out: BufReader<std::process::ChildStdout>) -> Vec<u64> {
    let mut text = String::new();
    out.read_to_string(&mut text).unwrap();
    assert!(process.0.wait().unwrap().success(), "{text}");
    let line = text.lines().find(|l| l.starts_with("count")).unwrap();
    line.split_whitespace().filter_map(|w| w.parse().ok()).collect()
}

/// Revokes `rounds` times; returns how many windows of the file were moved out of the CMB.
fn revoke_on(client: &Client, rounds: u32) -> u64 {
    let data = client.open("/data", OpenMode::read()).unwrap();
    let data = data.map_read(0, (WINDOW * WINDOWS) as u64).unwrap();
    let poison = client.open("/poison", OpenMode::read()).unwrap();
    let poison = poison.map_read(0, (WINDOW * WINDOWS) as u64).unwrap();
    let mut bytes = [0; 8];
    let (mut moved, mut kept) = (0, 0);
    for _ in 0..rounds {
        moved += client.revoke("/data").unwrap().windows;
        poison.prefer_cmb().unwrap();
        for window in 0..WINDOWS {
            poison.read((window * WINDOW) as u64, &mut bytes).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), POISON);
        }
        client.revoke("/poison").unwrap();
        data.prefer_cmb().unwrap();
        kept += u32::from(client.status().unwrap().spare_bytes > 0);
    }
    assert!(kept > 0, "the host cache never kept pages for windows that went back to the CMB");
    let poisoned = poison.paths().cmb_reads;
    assert!(poisoned > u64::from(rounds), "the pages left were refilled {poisoned} times in {rounds} rounds");
    moved
}

fn run(rounds: u32) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let board_path = dir.path().join("board");
    std::fs::write(&board_path, [0; 4096]).unwrap();
    let (s, b) = (socket.to_str().unwrap(), board_path.to_str().unwrap());
    let _server = spawn("serve", &[s]);
    let client = connect(&socket);
    let data = client.open("/data", OpenMode::create()).unwrap();
    for window in 0..WINDOWS {
        let bytes: Vec<u8> = (0..WINDOW / 8).flat_map(|i| word(0, window, i).to_le_bytes()).collect();
        data.write_at((window * WINDOW) as u64, &bytes).unwrap();
    }
    data.commit().unwrap();
    let poison = client.open("/poison", OpenMode::create()).unwrap();
    let bytes: Vec<u8> = (0..WINDOW * WINDOWS / 8).flat_map(|_| POISON.to_le_bytes()).collect();
    poison.write_at(0, &bytes).unwrap();
    poison.commit().unwrap();
    client.revoke("/poison").unwrap();

    let started = std::time::Instant::now();
    let mut helpers: Vec<Process> = (0..READERS).map(|_| spawn("read", &[s, b])).collect();
    helpers.push(spawn("write", &[s, b]));
    let outputs: Vec<_> = helpers.iter_mut().map(wait_ready).collect();
    let board = board(b);
    let moved = revoke_on(&client, rounds);
    stopped(&board).store(1, Ordering::SeqCst);
    let mut counts: Vec<Vec<u64>> =
        helpers.into_iter().zip(outputs).map(|(process, out)| numbers(process, out)).collect();
    let versions = counts.pop().unwrap()[0];
    let (reads, cmb): (u64, u64) = (counts.iter().map(|c| c[0]).sum(), counts.iter().map(|c| c[1]).sum());
    println!(
        "{moved} windows revoked in {rounds} rounds, {reads} reads ({cmb} from the CMB), {versions} versions, {:?}",
        started.elapsed()
    );
    assert!(moved >= u64::from(rounds), "only {moved} windows were moved in {rounds} rounds");
    assert!(cmb > 0 && cmb < reads, "both paths served readers: {cmb} of {reads} from the CMB");
    assert!(versions > 10, "the writer went on: {versions} versions");
    let status = client.status().unwrap();
    assert_eq!((status.expelled, status.cmb_quarantined), (0, 0), "{status:?}");
}

/// Two windows are revoked in each round: 10,000 under `tests/run`, which builds for speed, and some of them in a quick run.
#[test]
fn no_reader_sees_a_torn_or_stale_byte() {
    run(if std::env::var_os("CMBFS_SKIPS").is_some() { 5_000 } else { 150 });
}
