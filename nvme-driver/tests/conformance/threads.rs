//! The controller on a thread of its own, and in processes that are killed.

use std::io::{BufRead, BufReader};
use std::process::{Command as Process, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use nvme_driver::emu::{Backing, Config};
use nvme_driver::mem::{Mapping, PAGE};
use nvme_driver::pci::DmaAccess;
use nvme_driver::spec::{Command, Completion, regs};

use crate::host::{Host, pattern, small};

/// Waits for the next completion while another thread steps the controller.
fn wait(h: &mut Host, qid: u16) -> Completion {
    for _ in 0..1u64 << 28 {
        if let Some(done) = h.reap(qid) {
            return done;
        }
        std::thread::yield_now();
    }
    panic!("no completion on queue {qid}");
}

/// Whoever sees the phase tag sees the data and the rest of the entry.
#[test]
fn a_thread_executes_commands() {
    let mut h = Host::with_queue();
    assert!(h.function.needs_step());
    let thread = h.controller.spawn(Some(0)).unwrap();
    assert!(!h.function.needs_step());
    let at = h.pages(2);
    for i in 0..500u64 {
        h.put(at, &pattern(i + 1, 4096));
        h.submit(1, Command { prp1: at, ..Command::new(1, 1).with_blocks(i * 8, 8) });
        assert!(wait(&mut h, 1).status().is_success());
        h.submit(1, Command { prp1: at + 4096, ..Command::new(2, 1).with_blocks(i * 8, 8) });
        assert!(wait(&mut h, 1).status().is_success());
        assert_eq!(h.get(at + 4096, 4096), pattern(i + 1, 4096));
    }
    // Registers are served meanwhile, and a reset stops it.
    h.disable();
    assert!(!h.csts().rdy());
    drop(thread);
    assert!(h.function.needs_step());
    h.enable();
}

/// When `dma_unmap` returns, no DMA is in flight and none lands later: what is written there afterwards stays.
#[test]
fn unmap_waits_for_dma_in_flight() {
    let mut h = Host::with_queue();
    let _thread = h.controller.spawn(None).unwrap();
    h.submit(1, Command::new(8, 1).with_blocks(0, 256));
    wait(&mut h, 1);
    let memory = Mapping::anonymous(32 * PAGE).unwrap();
    let iova = 0x7000_0000;
    let list = h.pages(1);
    h.put_u64s(list, &(1..32).map(|i| iova + i * 4096).collect::<Vec<_>>());
    for round in 0..300u64 {
        h.function.dma_map(&memory, 0, 32 * PAGE, iova, DmaAccess::ReadWrite).unwrap();
        h.submit(1, Command { prp1: iova, prp2: list, ..Command::new(2, 1).with_blocks(0, 256) });
        for _ in 0..round * 20 {
            std::hint::spin_loop();
        }
        h.function.dma_unmap(iova, 32 * PAGE).unwrap();
        memory.write(0, &[0x5a; 32 * PAGE]).unwrap();
        let status = wait(&mut h, 1).status();
        let mut got = vec![0; 32 * PAGE];
        memory.read(0, &mut got).unwrap();
        assert!(got.iter().all(|b| *b == 0x5a), "round {round}: a late DMA landed ({status})");
    }
}

/// Register accesses are not starved by a busy controller thread.
#[test]
fn registers_while_the_thread_is_busy() {
    let mut h = Host::with_queue();
    let _thread = h.controller.spawn(None).unwrap();
    let stop = AtomicBool::new(false);
    let function = h.function.clone();
    std::thread::scope(|s| {
        s.spawn(|| {
            for _ in 0..2000 {
                assert_eq!(function.read32(0, regs::VS).unwrap(), 0x0001_0400);
            }
            stop.store(true, Ordering::Relaxed);
        });
        while !stop.load(Ordering::Relaxed) {
            h.submit(1, Command::new(0, 1));
            wait(&mut h, 1);
        }
    });
}

const IMAGE: &str = "CMBFS_TEST_IMAGE";
const LOSE: &str = "CMBFS_TEST_LOSE";

fn image(path: std::path::PathBuf) -> Config {
    let namespace = Backing::File { path, create: Some(1 << 20) };
    let lose_on_kill = std::env::var_os(LOSE).is_some();
    Config { namespace, volatile_cache: true, lose_on_kill, ..small() }
}

/// Run as a process of its own by the next tests: writes and flushes version after version, and writes one more block
/// each time that it does not flush; then waits to be killed.
#[test]
fn child_that_is_killed() {
    let Some(path) = std::env::var_os(IMAGE) else { return };
    let mut h = Host::with_queue_on(&image(path.into()));
    let at = h.pages(1);
    for version in 1u64.. {
        h.put(at, &pattern(version, 4096));
        h.ok(1, Command { prp1: at, ..Command::new(1, 1).with_blocks(version % 64 * 8, 8) });
        h.ok(1, Command::new(0, 1));
        h.ok(1, Command { prp1: at, ..Command::new(1, 1).with_blocks(1024, 8) });
        println!("\nflushed {version}");
        if version == 40 {
            loop {
                std::thread::park();
            }
        }
    }
}

/// Runs the child until it has flushed 40 versions and kills it. The image's last flushed version, and the version in
/// the block that was written after each flush.
fn kill(lose: bool) -> (u64, u64) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let mut child = Process::new(std::env::current_exe().unwrap())
        .args(["--exact", "threads::child_that_is_killed", "--nocapture"])
        .env(IMAGE, &path)
        .envs(lose.then_some((LOSE, "1")))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut flushed = 0u64;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some(version) = line.strip_prefix("flushed ") {
            flushed = version.parse().unwrap();
            if flushed == 40 {
                child.kill().unwrap();
            }
        }
    }
    child.wait().unwrap();
    let mut h = Host::with_queue_on(&image(path));
    for version in 1..=flushed {
        assert_eq!(h.read_blocks(version % 64 * 8, 8, 512), pattern(version, 4096));
    }
    let unflushed = h.read_blocks(1024, 8, 512);
    (flushed, u64::from_le_bytes(unflushed[..8].try_into().unwrap()) >> 32)
}

/// SIGKILL of the process that holds the controller loses nothing: what was written is in the host's page cache.
#[test]
fn a_killed_process_keeps_what_was_written() {
    assert_eq!(kill(false), (40, 40));
}

/// With `lose_on_kill` it loses what was not flushed, as a power cut would: the last flush was before the last write.
#[test]
fn a_killed_process_can_lose_what_was_not_flushed() {
    assert_eq!(kill(true), (40, 39));
}
