//! 4 KiB reads through the driver and an emulated controller that is stepped inline: `cargo bench --bench nvme_io`.
//!
//! `nvme_io count` runs the driver's functions a fixed number of times each, for `benches/nvme_io_instructions`, which
//! counts their instructions under callgrind.
use std::error::Error;
use std::hint::black_box;
use std::sync::Arc;

use cmbfs_benches::reads::{BLOCK, Reads};
use nvme_driver::clock::SystemClock;
use nvme_driver::controller::{Controller, ControllerOptions};
use nvme_driver::dma::DmaBuffer;
use nvme_driver::emu::{Backing, Config, EmulatedController};
use nvme_driver::io_queue::IoQueue;
use nvme_driver::queue::{Data, QueueError, SubmitError};

struct Bench {
    emulated: Arc<EmulatedController>,
    reads: Reads,
}

fn main() -> Result<(), Box<dyn Error>> {
    if std::env::args().any(|a| a == "count") {
        return count();
    }
    for (name, backing) in [
        ("RAM namespace", Backing::Ram { bytes: 256 << 20 }),
        ("null namespace", Backing::Null { bytes: 256 << 20 }),
    ] {
        let mut bench = Bench::new(backing, false)?;
        println!("{name}, 4 KiB reads, controller inline on the same core");
        for depth in [1, 2, 4, 8, 16, 32, 64, 128] {
            let mut rates: Vec<f64> = Vec::new();
            for _ in 0..5 {
                rates.push(bench.reads.rate(depth, 200_000)?);
            }
            rates.sort_by(f64::total_cmp);
            println!("  depth {depth:>3}: {:>9.0} reads/s, {:>5.0} ns each", rates[2], 1e9 / rates[2]);
        }
    }
    Ok(())
}

impl Bench {
    /// `manual`: reaping does not step the controller.
    fn new(namespace: Backing, manual: bool) -> Result<Self, Box<dyn Error>> {
        let config = Config { namespace, lba_size: 4096, ..Config::default() };
        let emulated = EmulatedController::new(&config)?;
        let clock = Arc::new(SystemClock::new());
        let controller = Controller::new(emulated.function(), ControllerOptions::default(), clock)?;
        // A queue made while a thread steps the controller does not step it.
        let thread = if manual { Some(emulated.spawn(None)?) } else { None };
        let reads = Reads::new(&controller)?;
        drop(thread);
        Ok(Self { emulated, reads })
    }
}

#[inline(always)]
fn submit(queue: &mut IoQueue, memory: &DmaBuffer, n: u64, slot: u64) -> Result<u16, SubmitError> {
    let data = Data { address: memory.bus_address() + slot * BLOCK as u64, len: BLOCK };
    // Some LBA of the 65,536 there are.
    queue.read(1, n.wrapping_mul(0x9e37_79b9) & 0xffff, 1, data, slot)
}

// What is counted: one function for each part, not inlined, so that callgrind tells them apart.

#[inline(never)]
fn counted_submit_1(queue: &mut IoQueue, memory: &DmaBuffer, n: u64) -> Result<(), SubmitError> {
    submit(queue, memory, n, n & 127)?;
    queue.ring();
    Ok(())
}

#[inline(never)]
fn counted_submit_32(queue: &mut IoQueue, memory: &DmaBuffer, n: u64) -> Result<(), SubmitError> {
    for i in 0..32 {
        submit(queue, memory, n + i, i)?;
    }
    queue.ring();
    Ok(())
}

#[inline(never)]
fn counted_reap_1(queue: &mut IoQueue, sum: &mut u64) -> Result<usize, QueueError> {
    queue.reap(1, |d| *sum += d.token + u64::from(!d.status.is_success()) * 1000)
}

#[inline(never)]
fn counted_reap_32(queue: &mut IoQueue, sum: &mut u64) -> Result<usize, QueueError> {
    queue.reap(32, |d| *sum += d.token + u64::from(!d.status.is_success()) * 1000)
}

#[inline(never)]
fn counted_reap_empty(queue: &mut IoQueue, sum: &mut u64) -> Result<usize, QueueError> {
    queue.reap(32, |d| *sum += d.token)
}

/// 3,200 reads at batch 1, 3,200 at batch 32, 3,200 empty polls.
fn count() -> Result<(), Box<dyn Error>> {
    const READS: u64 = 3200;
    let mut bench = Bench::new(Backing::Ram { bytes: 256 << 20 }, true)?;
    let Reads { queue, memory, .. } = &mut bench.reads;
    let mut sum = 0;
    for n in 0..READS {
        counted_submit_1(queue, memory, n)?;
        bench.emulated.step();
        let reaped = counted_reap_1(queue, &mut sum)?;
        assert_eq!(reaped, 1);
        let reaped = counted_reap_empty(queue, &mut sum)?;
        assert_eq!(reaped, 0);
    }
    for n in 0..READS / 32 {
        counted_submit_32(queue, memory, n * 32)?;
        while bench.emulated.step() {}
        let reaped = counted_reap_32(queue, &mut sum)?;
        assert_eq!(reaped, 32);
    }
    assert!(black_box(sum) > 0);
    Ok(())
}
