//! [`NvmeDisk`] on the emulated controller: splitting, formats, the CMB, bounds, and what it asks of the drive.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]
use std::sync::Arc;

use nvme_driver::clock::ManualClock;
use nvme_driver::controller::{Controller, ControllerError, ControllerOptions};
use nvme_driver::disk::{Disk, DiskError, Op};
use nvme_driver::emu::{Backing, CmbSupport, Config, EmulatedController, PowerCut};
use nvme_driver::nvme_disk::{NvmeDisk, Recoveries};
use nvme_driver::pci::DmaAccess;
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

fn disk(config: &Config) -> (Arc<EmulatedController>, NvmeDisk) {
    let emulated = EmulatedController::new(config).unwrap();
    let clock = Arc::new(ManualClock::new());
    let controller = Controller::new(emulated.function(), ControllerOptions::default(), clock).unwrap();
    let disk = NvmeDisk::new(&controller).unwrap();
    (emulated, disk)
}

fn ram(mib: u64, lba_size: u32) -> Config {
    Config { namespace: Backing::Ram { bytes: mib << 20 }, lba_size, ..Config::default() }
}

#[test]
fn random_transfers_match_a_model_on_every_format_and_transfer_size() {
    for (lba_size, mdts, seed) in [(512, 1, 1), (512, 9, 2), (4096, 1, 3), (4096, 5, 4), (4096, 9, 5)] {
        let (emulated, mut disk) = disk(&Config { mdts, ..ram(8, lba_size) });
        assert_eq!(disk.geometry().max_transfer, (4096usize << mdts).min(1 << 20));
        let mut model = vec![0u8; 8 << 20];
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let block = lba_size as usize;
        let total = model.len() / block;
        for step in 0..60 {
            let most = if step % 8 == 0 { total } else { 64 };
            let count = 1 + rng.next_u32() as usize % most;
            let lba = rng.next_u32() as usize % (total - count + 1);
            let range = lba * block..(lba + count) * block;
            match rng.next_u32() % 4 {
                0 => {
                    let mut got = vec![0xee; count * block];
                    disk.read(lba as u64, &mut got).unwrap();
                    assert!(got == model[range], "seed {seed}, step {step}");
                }
                1 => {
                    disk.write_zeroes(lba as u64, count as u64).unwrap();
                    model[range].fill(0);
                }
                _ => {
                    let mut data = vec![0; count * block];
                    rng.fill_bytes(&mut data);
                    disk.write(lba as u64, &data).unwrap();
                    model[range].copy_from_slice(&data);
                }
            }
        }
        let mut all = vec![1; model.len()];
        disk.read(0, &mut all).unwrap();
        assert!(all == model, "seed {seed}");
        assert_eq!(disk.recoveries(), Recoveries::default());
        assert!(emulated.domain().faults().is_empty());
    }
}

#[test]
fn data_between_drive_and_cmb_passes_no_host_memory() {
    let (emulated, mut disk) = disk(&Config { cmb_size: 3 << 20, mdts: 5, ..ram(16, 4096) });
    let cmb = disk.cmb().unwrap().clone();
    assert_eq!(cmb.memory.len(), 3 << 20);
    let data: Vec<u8> = (0..2u32 << 20).map(|i| (i / 4096 * 3 + i) as u8).collect();
    cmb.memory.write(4096, &data).unwrap();
    disk.write_from_cmb(5, 4096, data.len()).unwrap();
    cmb.memory.zero(0, 3 << 20).unwrap();
    disk.read_to_cmb(5, 8192, data.len()).unwrap();
    let mut got = vec![0; data.len()];
    cmb.memory.read(8192, &mut got).unwrap();
    assert!(got == data);
    let counters = emulated.counters();
    assert_eq!((counters.cmb_to_drive, counters.drive_to_cmb), (2 << 20, 2 << 20));
    assert_eq!((counters.host_to_drive, counters.drive_to_host), (0, 0));
    for (offset, len) in [(0, (3 << 20) + 4096), (3 << 20, 4096), (usize::MAX - 4095, 4096), (2, 4096)] {
        assert!(matches!(disk.read_to_cmb(0, offset, len), Err(DiskError::Cmb { .. })), "{offset} {len}");
    }
}

#[test]
fn a_cmb_that_may_not_hold_data_is_not_used_for_it() {
    let cmb = CmbSupport { write_data: false, ..CmbSupport::default() };
    let (_emulated, mut only_reads) = disk(&Config { cmb_size: 1 << 20, cmb, ..ram(4, 4096) });
    only_reads.read_to_cmb(0, 0, 4096).unwrap();
    let refused = only_reads.write_from_cmb(0, 0, 4096).unwrap_err();
    assert!(refused.to_string().contains("CMBSZ.WDS"), "{refused}");
    let (_emulated, mut none) = disk(&ram(4, 4096));
    assert!(none.cmb().is_none());
    let refused = none.read_to_cmb(0, 0, 4096).unwrap_err();
    assert!(refused.to_string().contains("CAP.CMBS"), "{refused}");
}

#[test]
fn submission_queues_and_prp_lists_can_lie_in_the_cmb() {
    let emulated = EmulatedController::new(&Config { cmb_size: 4 << 20, ..ram(4, 4096) }).unwrap();
    let options = ControllerOptions {
        cmb_queue_bytes: 1280 << 10,
        cmb_prp_lists: true,
        ..ControllerOptions::default()
    };
    let controller = Controller::new(emulated.function(), options, Arc::new(ManualClock::new())).unwrap();
    let cmb = Arc::clone(controller.cmb().cmb().unwrap());
    assert_eq!(cmb.data.memory.len(), (4 << 20) - (1280 << 10));
    let mut disk = NvmeDisk::new(&controller).unwrap();
    let data: Vec<u8> = (0..1u32 << 20).map(|i| (i / 4096 + i) as u8).collect();
    disk.write(1, &data).unwrap();
    let mut got = vec![0; 1 << 20];
    disk.read(1, &mut got).unwrap();
    assert!(got == data);
    let (queues, _) = cmb.queues.as_ref().unwrap();
    // 256 entries of 64 bytes, then the lists.
    for offset in [0, 256 * 64] {
        let mut first = [0; 64];
        queues.read(offset, &mut first).unwrap();
        assert_ne!(first, [0; 64], "the CMB was used at {offset}");
    }
    // What does not fit lies in host memory.
    let mut second = NvmeDisk::new(&controller).unwrap();
    second.read(1, &mut got).unwrap();
    assert!(got == data);
}

#[test]
fn events_are_reported_once_each() {
    let (emulated, disk) = disk(&ram(4, 4096));
    let controller = disk.controller();
    assert_eq!(controller.events().unwrap(), []);
    for _ in 0..3 {
        emulated.faults().set_namespace_attached(false);
        emulated.faults().set_namespace_attached(true);
        let events = controller.events().unwrap();
        assert!(!events.is_empty() && events.iter().all(|e| e.is_namespace_change()), "{events:?}");
        assert_eq!(controller.events().unwrap(), []);
    }
    controller.reset(0).unwrap();
    emulated.faults().set_namespace_attached(false);
    assert_eq!(controller.events().unwrap().len(), 1, "after a reset too");
}

#[test]
fn ranges_outside_the_disk_never_reach_the_drive() {
    let (emulated, mut disk) = disk(&ram(1, 512));
    let bad = |r: Result<(), DiskError>| assert!(matches!(r, Err(DiskError::BadRange { .. })), "{r:?}");
    bad(disk.read(2048, &mut [0; 512]));
    bad(disk.read(2047, &mut [0; 1024]));
    bad(disk.read(u64::MAX, &mut [0; 512]));
    bad(disk.write(0, &[0; 513]));
    bad(disk.write_zeroes(1, 2048));
    bad(disk.write_zeroes(0, u64::MAX));
    bad(disk.deallocate(2, u64::MAX));
    disk.read(2048, &mut []).unwrap();
    disk.write(2047, &[1; 512]).unwrap();
    assert_eq!(emulated.counters().io_total(), 1);
}

#[test]
fn a_flush_makes_writes_survive_a_power_cut() {
    let (emulated, mut disk) = disk(&ram(4, 4096));
    assert!(disk.geometry().volatile_cache);
    disk.write(3, &[3; 4096]).unwrap();
    disk.flush().unwrap();
    disk.write(4, &[4; 4096]).unwrap();
    emulated.power_cut(PowerCut::LoseAll).unwrap();
    drop(disk);
    let clock = Arc::new(ManualClock::new());
    let controller = Controller::new(emulated.function(), ControllerOptions::default(), clock).unwrap();
    let mut disk = NvmeDisk::new(&controller).unwrap();
    let mut got = [0; 8192];
    disk.read(3, &mut got).unwrap();
    assert_eq!(got[..4096], [3; 4096]);
    assert_eq!(got[4096..], [0; 4096]);
}

#[test]
fn a_shutdown_writes_the_cache_out() {
    let (emulated, mut disk) = disk(&ram(4, 4096));
    disk.write(3, &[3; 4096]).unwrap();
    drop(disk);
    emulated.power_cut(PowerCut::LoseAll).unwrap();
    let clock = Arc::new(ManualClock::new());
    let controller = Controller::new(emulated.function(), ControllerOptions::default(), clock).unwrap();
    let mut got = [0; 4096];
    NvmeDisk::new(&controller).unwrap().read(3, &mut got).unwrap();
    assert_eq!(got, [3; 4096]);
}

#[test]
fn deallocated_blocks_are_told_to_the_drive() {
    let (emulated, mut disk) = disk(&ram(4, 4096));
    assert!(disk.geometry().can_deallocate);
    disk.write(10, &[1; 3 * 4096]).unwrap();
    disk.deallocate(11, 1).unwrap();
    let mut got = [9; 3 * 4096];
    disk.read(10, &mut got).unwrap();
    assert_eq!((got[0], got[3 * 4096 - 1]), (1, 1));
    assert_eq!(got[4096..8192], [0; 4096], "the emulated drive reads deallocated blocks as zeros");
    assert_eq!(emulated.counters().io_commands[9], 1);
}

#[test]
fn a_drive_without_huge_pages_says_so_and_gives_everything_back() {
    let (emulated, disk) = disk(&ram(4, 4096));
    let controller = Arc::clone(disk.controller());
    let before = controller.arena().in_use();
    if let Some(why) = controller.arena().fallback() {
        assert!(why.contains("4 KiB pages"), "{why}");
    }
    let second = NvmeDisk::new(&controller).unwrap();
    assert!(controller.arena().in_use() > before);
    drop(second);
    assert_eq!(controller.arena().in_use(), before);
    let iova = 2 << 20;
    assert!(emulated.domain().is_mapped(iova, 4096, DmaAccess::ReadWrite));
    drop(disk);
    drop(controller);
    assert!(!emulated.domain().is_mapped(iova, 4096, DmaAccess::Read));
}

#[test]
fn queues_are_as_many_as_granted_and_come_back() {
    let emulated = EmulatedController::new(&Config { io_queues: 2, ..ram(4, 4096) }).unwrap();
    let clock = Arc::new(ManualClock::new());
    let controller = Controller::new(emulated.function(), ControllerOptions::default(), clock).unwrap();
    assert_eq!(controller.identity().io_queues, 2);
    let first = controller.create_queue().unwrap();
    let _second = controller.create_queue().unwrap();
    let refused = controller.create_queue().unwrap_err();
    assert!(matches!(refused, ControllerError::NoQueues { granted: 2, .. }), "{refused}");
    drop(first);
    controller.create_queue().unwrap();
}

#[test]
fn errors_name_the_block_that_failed() {
    use nvme_driver::emu::{Fault, Rule, Target};
    use nvme_driver::spec::Status;
    let (emulated, mut disk) = disk(&Config { mdts: 1, ..ram(4, 4096) });
    let target = Target { lba: Some(100..=101), ..Target::io(2) };
    emulated.faults().inject(Rule::always(target, Fault::Status(Status::UNRECOVERED_READ_ERROR)));
    let mut got = vec![0; 200 * 4096];
    let error = disk.read(0, &mut got).unwrap_err();
    let DiskError::Device { op: Op::Read, lba, status } = error else { panic!("{error}") };
    assert_eq!((lba, status), (100, Status::UNRECOVERED_READ_ERROR));
    disk.read(102, &mut got[..98 * 4096]).unwrap();
    disk.read(0, &mut got[..100 * 4096]).unwrap();
}
