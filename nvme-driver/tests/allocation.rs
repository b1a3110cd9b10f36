//! No allocation per I/O, counted by the global allocator.
#![allow(clippy::unwrap_used, reason = "a failed call fails the test")]
#![expect(unsafe_code, reason = "a global allocator that counts")]
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use nvme_driver::clock::SystemClock;
use nvme_driver::controller::{Controller, ControllerOptions};
use nvme_driver::disk::Disk;
use nvme_driver::emu::{Backing, Config, EmulatedController};
use nvme_driver::nvme_disk::NvmeDisk;
use nvme_driver::queue::Data;

struct Counting;

thread_local! {
    /// Of this thread only: the emulated controller runs on another.
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator; the counter does not allocate (const-initialised, no destructor).
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|c| c.set(c.get() + 1));
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        COUNT.with(|c| c.set(c.get() + 1));
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn counted(what: impl FnOnce()) -> u64 {
    let before = COUNT.get();
    what();
    COUNT.get() - before
}

#[test]
fn no_io_allocates() {
    let config = Config {
        namespace: Backing::Ram { bytes: 16 << 20 },
        lba_size: 4096,
        cmb_size: 2 << 20,
        ..Config::default()
    };
    let emulated = EmulatedController::new(&config).unwrap();
    let clock = Arc::new(SystemClock::new());
    let controller = Controller::new(emulated.function(), ControllerOptions::default(), clock).unwrap();
    let _thread = emulated.spawn(None).unwrap();
    let mut disk = NvmeDisk::new(&controller).unwrap();
    let mut buffer = vec![0; 1 << 20];
    let made = counted(|| drop(vec![1u8; 10]));
    assert_eq!(made, 2, "the allocator counts");

    let through_the_disk = counted(|| {
        for _ in 0..50 {
            disk.read(7, &mut buffer[..4096]).unwrap();
            disk.write(7, &buffer[..4096]).unwrap();
            disk.read(0, &mut buffer).unwrap();
            disk.read_to_cmb(0, 0, 1 << 20).unwrap();
            disk.write_zeroes(3, 5).unwrap();
            disk.deallocate(3, 5).unwrap();
            disk.flush().unwrap();
        }
    });
    assert_eq!(through_the_disk, 0);

    let mut queue = controller.create_queue().unwrap();
    let memory = controller.arena().alloc(1 << 20).unwrap();
    let through_the_queue = counted(|| {
        for round in 0..200 {
            let count = 1 + round % 100;
            for i in 0..count {
                // From one page to a PRP list.
                let len = [4096, 8192, 65536][i as usize % 3];
                let data = Data { address: memory.bus_address(), len };
                queue.read(1, i, (len / 4096) as u32, data, i).unwrap();
            }
            queue.ring();
            let mut left = count;
            while left > 0 {
                left -= queue.reap(64, |d| assert!(d.status.is_success())).unwrap() as u64;
                std::thread::yield_now();
            }
        }
    });
    assert_eq!(through_the_queue, 0);
}
