//! Several queues of one controller, each on its own thread, and resets in the middle.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nvme_driver::clock::SystemClock;
use nvme_driver::controller::{Controller, ControllerOptions};
use nvme_driver::disk::Disk;
use nvme_driver::emu::{Backing, Config, EmulatedController};
use nvme_driver::nvme_disk::NvmeDisk;

const BLOCK: usize = 4096;
const PER_THREAD: u64 = 256;

/// Writes and reads back its own blocks; every block always holds the last thing that was written to it.
fn work(controller: &Arc<Controller>, thread: u64, rounds: u64) {
    let mut disk = NvmeDisk::new(controller).unwrap();
    let first = thread * PER_THREAD;
    let mut data = vec![0; 40 * BLOCK];
    for round in 0..rounds {
        let lba = first + round * 37 % (PER_THREAD - 40);
        let fill = (thread * 101 + round) as u8;
        data.fill(fill);
        disk.write(lba, &data).unwrap();
        data.fill(!fill);
        disk.read(lba, &mut data).unwrap();
        assert!(data.iter().all(|&b| b == fill), "thread {thread}, round {round}");
    }
}

#[test]
fn resets_by_others_lose_and_mix_nothing() {
    let config = Config {
        namespace: Backing::Ram { bytes: 4 << 20 },
        lba_size: 4096,
        volatile_cache: false,
        mdts: 3,
        ..Config::default()
    };
    let emulated = EmulatedController::new(&config).unwrap();
    let clock = Arc::new(SystemClock::new());
    let controller = Controller::new(emulated.function(), ControllerOptions::default(), clock).unwrap();
    let _running = emulated.spawn(None).unwrap();
    let busy = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..3)
            .map(|thread| {
                let controller = &controller;
                scope.spawn(move || work(controller, thread, 30))
            })
            .collect();
        let busy = &busy;
        let controller = &controller;
        scope.spawn(move || {
            while busy.load(Ordering::Relaxed) {
                std::thread::sleep(std::time::Duration::from_millis(20));
                controller.reset(controller.epoch()).unwrap();
            }
        });
        let finished: Vec<_> = workers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        busy.store(false, Ordering::Relaxed);
        finished.into_iter().for_each(|r| r.unwrap());
    });
    assert!(controller.epoch() > 0);
    // What nobody uses any more is free again.
    let all: Vec<_> = std::iter::from_fn(|| controller.create_queue().ok()).collect();
    assert_eq!(all.len(), usize::from(controller.identity().io_queues));
    assert!(emulated.domain().faults().is_empty(), "{:?}", emulated.domain().faults());
}
