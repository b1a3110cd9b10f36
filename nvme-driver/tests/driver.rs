//! The driver against the emulated controller: the paths where nothing goes wrong.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]
use std::sync::Arc;

use nvme_driver::clock::ManualClock;
use nvme_driver::controller::{Controller, ControllerOptions};
use nvme_driver::emu::{Backing, Config, EmulatedController};
use nvme_driver::queue::Data;

fn bring_up(config: &Config, options: ControllerOptions) -> (Arc<EmulatedController>, Arc<Controller>) {
    let emulated = EmulatedController::new(config).unwrap();
    let controller = Controller::new(emulated.function(), options, Arc::new(ManualClock::new())).unwrap();
    (emulated, controller)
}

#[test]
fn identifies_the_controller_and_its_namespace() {
    let config = Config { lba_size: 4096, serial: "S1".into(), ..Config::default() };
    let (_emulated, controller) = bring_up(&config, ControllerOptions::default());
    let identity = controller.identity();
    assert_eq!(identity.serial(), "S1");
    assert!(identity.write_cache);
    let namespace = controller.namespace().unwrap();
    assert_eq!((namespace.nsid, namespace.block_size, namespace.bytes()), (1, 4096, 64 << 20));
    assert_eq!(controller.max_transfer(), 4096 << 7);
    assert!(controller.cmb().cmb().is_none());
}

#[test]
fn reads_back_what_was_written_at_every_offset_and_length() {
    let config = Config { mdts: 9, ..Config::default() };
    let options = ControllerOptions { max_transfer: 2 << 20, ..ControllerOptions::default() };
    let (emulated, controller) = bring_up(&config, options);
    let mut queue = controller.create_queue().unwrap();
    let max = queue.pair().max_transfer();
    assert_eq!(max, 2 << 20);
    let memory = controller.arena().alloc(max + 8192).unwrap();
    for (offset, len) in [
        (0, 512),
        (512, 4096),
        (4096 - 512, 8192),
        (0, 8192),
        (1024, 12288),
        (0, max),
        (512, max),
        (4092, 512),
    ] {
        let pattern: Vec<u8> = (0..len).map(|i| (i / 512 + i * 7 + offset) as u8).collect();
        memory.write(offset, &pattern).unwrap();
        let data = Data { address: memory.bus_address() + offset as u64, len };
        let blocks = (len / 512) as u32;
        queue.write(1, 100, blocks, data, 1).unwrap();
        finish(&mut queue);
        memory.zero().unwrap();
        queue.read(1, 100, blocks, data, 2).unwrap();
        finish(&mut queue);
        let mut got = vec![0; len];
        memory.read(offset, &mut got).unwrap();
        assert!(got == pattern, "offset {offset}, {len} bytes");
    }
    drop(queue);
    assert!(emulated.domain().faults().is_empty());
}

fn finish(queue: &mut nvme_driver::io_queue::IoQueue) {
    queue.ring();
    let mut left = queue.pair().in_flight();
    for _ in 0..1000 {
        left -= queue.reap(usize::MAX, |d| assert!(d.status.is_success(), "{}", d.status)).unwrap();
        if left == 0 {
            return;
        }
    }
    panic!("{left} commands did not complete");
}

#[test]
fn lands_data_in_the_cmb() {
    let config =
        Config { namespace: Backing::Ram { bytes: 1 << 20 }, cmb_size: 1 << 20, ..Config::default() };
    let (emulated, controller) = bring_up(&config, ControllerOptions::default());
    let cmb = Arc::clone(controller.cmb().cmb().unwrap());
    assert_eq!(cmb.size, 1 << 20);
    assert!(!cmb.data.is_device_memory);
    let mut queue = controller.create_queue().unwrap();
    cmb.data.memory.write(8192, &[0xa5; 4096]).unwrap();
    let from = Data { address: cmb.data.bus_address + 8192, len: 4096 };
    queue.write(1, 0, 8, from, 0).unwrap();
    finish(&mut queue);
    let to = Data { address: cmb.data.bus_address + (1 << 20) - 4096, len: 4096 };
    queue.read(1, 0, 8, to, 0).unwrap();
    finish(&mut queue);
    let mut got = [0; 4096];
    cmb.data.memory.read((1 << 20) - 4096, &mut got).unwrap();
    assert_eq!(got, [0xa5; 4096]);
    drop(queue);
    drop(controller);
    assert!(emulated.domain().faults().is_empty());
}
