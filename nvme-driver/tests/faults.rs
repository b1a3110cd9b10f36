//! More of what a drive may do wrong (see `recovery` for the rest): every command and every moment of a bring-up, statuses that mean
//! nothing, namespaces that change in use, events; and that the caller knows what completed and nothing leaks.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]
mod rig;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nvme_driver::clock::{Clock, ManualClock};
use nvme_driver::controller::{ControllerError, EventKind};
use nvme_driver::disk::{Disk, DiskError};
use nvme_driver::emu::{Config, EmulatedController, Fault, Rule, Target};
use nvme_driver::nvme_disk::NvmeDisk;
use nvme_driver::pci::PciError;
use nvme_driver::queue::Data;
use nvme_driver::spec::{AdminOpcode, NvmOpcode, Status};
use rig::{BLOCK, READ, attach, bound, config, rig, rig_with};

/// Every command that the disk sends, under every fault that can be recovered from: the right bytes in the end, within the bound.
#[test]
fn every_command_survives_every_fault_that_passes() {
    let faults = [
        Fault::Status(Status::ABORT_REQUESTED),
        Fault::Stall,
        Fault::Lose,
        Fault::Duplicate,
        Fault::WrongCid(0x200),
        Fault::WrongSqid(1),
        Fault::WrongPhase,
        Fault::Fatal,
    ];
    let opcodes = [NvmOpcode::Write, NvmOpcode::Flush, NvmOpcode::WriteZeroes, NvmOpcode::DatasetManagement];
    for opcode in opcodes {
        for fault in faults {
            let mut rig = rig();
            rig.inject(Rule::once(Target::io(opcode as u8), fault));
            let (result, took) = rig.timed(|r| match opcode {
                NvmOpcode::Write => r.disk.write(8, &[0xee; 9 * BLOCK]),
                NvmOpcode::Flush => r.disk.flush(),
                NvmOpcode::WriteZeroes => r.disk.write_zeroes(8, 9),
                _ => r.disk.deallocate(8, 9),
            });
            assert!(result.is_ok() && took < bound(), "{opcode:?} {fault:?}: {result:?} after {took:?}");
            let mut got = vec![1; 9 * BLOCK];
            rig.disk.read(8, &mut got).unwrap();
            let expected = match opcode {
                NvmOpcode::Write => 0xee,
                NvmOpcode::Flush => continue,
                _ => 0,
            };
            assert!(got.iter().all(|b| *b == expected), "{opcode:?} {fault:?}");
            let blocks: Vec<u8> = (8..17).flat_map(|block| [rig::pattern(block); BLOCK]).collect();
            rig.disk.write(8, &blocks).unwrap();
            rig.is_well();
        }
    }
}

/// Removal at every command of a bring-up, and at every I/O command of a call: an error that says so, at once.
#[test]
fn removal_at_any_moment_is_noticed() {
    let any_admin = Target { queue: Some(0), ..Target::default() };
    let mut attached = false;
    for skip in 0..20 {
        let emulated = EmulatedController::new(&config()).unwrap();
        let clock = Arc::new(ManualClock::new());
        emulated.faults().inject(Rule { skip, ..Rule::once(any_admin.clone(), Fault::Remove) });
        let result = attach(&emulated, &clock);
        assert!(clock.now() < bound(), "{:?}", clock.now());
        match result {
            Err(ControllerError::Pci(PciError::Removed(_))) => assert!(!attached, "after {skip} commands"),
            // The bring-up was over; the next admin command is a queue's.
            Ok(controller) => {
                attached = true;
                let disk = NvmeDisk::new(&controller);
                let gone = |e: &ControllerError| matches!(e, ControllerError::Pci(PciError::Removed(_)));
                assert!(disk.as_ref().err().is_none_or(gone), "{:?}", disk.err());
            }
            Err(e) => panic!("after {skip} commands: {e}"),
        }
    }
    assert!(attached);
    for skip in [0, 1, 7, 31, 32, 63] {
        let mut rig = rig();
        rig.inject(Rule { skip, ..Rule::once(Target::io(READ), Fault::Remove) });
        let (result, took) = rig.timed(|r| r.read(0, 256));
        assert!(matches!(result, Err(DiskError::Dead { .. })), "{result:?}");
        assert!(took < Duration::from_secs(2), "{took:?}");
    }
    // While a command is being aborted.
    let mut rig = rig();
    rig.inject(Rule::once(Target::io(READ), Fault::Stall));
    rig.inject(Rule::once(Target::admin(AdminOpcode::Abort as u8), Fault::Remove));
    let (result, took) = rig.timed(|r| r.read(0, 1));
    assert!(matches!(result, Err(DiskError::Dead { .. })), "{result:?}");
    assert!(took < bound(), "{took:?}");
}

/// CSTS.CFS at every command of a bring-up is an error; before it, it is reset away.
#[test]
fn a_fatal_status_during_bring_up_is_an_error_and_before_it_none() {
    let mut attached = 0;
    for skip in 0..12 {
        let emulated = EmulatedController::new(&config()).unwrap();
        let clock = Arc::new(ManualClock::new());
        let any_admin = Target { queue: Some(0), ..Target::default() };
        emulated.faults().inject(Rule { skip, ..Rule::once(any_admin, Fault::Fatal) });
        match attach(&emulated, &clock) {
            Err(ControllerError::Fatal { .. }) => {}
            Ok(_) => attached += 1,
            Err(e) => panic!("after {skip} commands: {e}"),
        }
        emulated.faults().clear();
        emulated.faults().fatal();
        attach(&emulated, &clock).unwrap();
    }
    assert!((1..12).contains(&attached));
}

/// Statuses that no specification knows belong to their command and are passed on as they are.
#[test]
fn garbage_statuses_are_their_own_commands_error() {
    let mut rig = rig();
    for field in [0x7ff, 0x7fff, 0x4001, 0x3ff, 0x0fe, 0x6ab, 0x2ff, 0x3fff] {
        let status = Status::from_field(field);
        let target = Target { lba: Some(0..=0), ..Target::io(READ) };
        rig.inject(Rule::always(target, Fault::Status(status)));
        let (result, took) = rig.timed(|r| r.read(0, 64));
        let Err(DiskError::Device { lba, status: got, .. }) = result else {
            panic!("{field:#x}: {result:?}")
        };
        assert!(lba == 0 && got.is(status), "{field:#x}: {got} at {lba}");
        assert!(took < Duration::from_secs(1), "{took:?}");
        rig.read(4, 60).unwrap();
        rig.is_well();
    }
}

#[test]
fn a_namespace_that_shrinks_in_use() {
    let mut rig = rig();
    let controller = Arc::clone(rig.disk.controller());
    rig.emulated.faults().set_namespace_size(2 << 20);
    let events = controller.events().unwrap();
    assert!(events.iter().any(|e| e.is_namespace_change()), "{events:?}");
    rig.read(0, 512).unwrap();
    let beyond = rig.read(512, 1).unwrap_err();
    assert!(
        matches!(beyond, DiskError::Device { lba: 512, status, .. } if status.is(Status::LBA_OUT_OF_RANGE)),
        "{beyond}"
    );
    // What is another namespace after a reset is not touched.
    rig.inject(Rule::once(Target::io(READ), Fault::WrongCid(1)));
    let error = rig.read(0, 1).unwrap_err();
    assert!(matches!(&error, DiskError::Dead { reason, .. } if reason.contains("namespace 1")), "{error}");
}

#[test]
fn a_namespace_that_is_gone_in_use_and_comes_back() {
    let mut rig = rig();
    let controller = Arc::clone(rig.disk.controller());
    rig.emulated.faults().set_namespace_attached(false);
    assert!(controller.events().unwrap().iter().any(|e| e.is_namespace_change()));
    for result in [rig.read(0, 8), rig.disk.flush(), rig.disk.write(0, &[0; BLOCK])] {
        let Err(DiskError::Device { status, .. }) = result else { panic!("{result:?}") };
        assert!(status.is(Status::INVALID_NAMESPACE));
    }
    rig.emulated.faults().set_namespace_attached(true);
    assert!(controller.events().unwrap().iter().any(|e| e.is_namespace_change()));
    rig.is_well();
}

#[test]
fn health_warnings_are_reported_once_each() {
    let rig = rig();
    let controller = rig.disk.controller();
    for _ in 0..2 {
        rig.emulated.faults().set_temperature(400);
        let events = controller.events().unwrap();
        let [event] = events[..] else { panic!("{events:?}") };
        assert_eq!((event.kind, event.info, event.log_page), (EventKind::Health, 1, 2));
        assert_eq!(controller.events().unwrap(), [], "reported once");
        rig.emulated.faults().set_temperature(300);
        assert_eq!(controller.events().unwrap(), []);
    }
}

/// Of many commands in flight some fail, some never come back: the caller is told of each exactly once, as done, as failed, or as
/// abandoned in the reset; what is reported as done is done.
#[test]
fn the_caller_knows_which_commands_completed() {
    let rig = rig();
    let controller = Arc::clone(rig.disk.controller());
    let mut queue = controller.create_queue().unwrap();
    let memory = controller.arena().alloc(60 * BLOCK).unwrap();
    memory.zero().unwrap();
    let failing = Target { lba: Some(10..=12), ..Target::io(READ) };
    rig.inject(Rule::always(failing, Fault::Status(Status::UNRECOVERED_READ_ERROR)));
    rig.inject(Rule::always(Target { lba: Some(20..=24), ..Target::io(READ) }, Fault::Lose));
    rig.inject(Rule::always(Target { lba: Some(30..=31), ..Target::io(READ) }, Fault::Stall));
    let mut outcomes: BTreeMap<u64, &str> = BTreeMap::new();
    for block in 0..60u64 {
        let data = Data { address: memory.bus_address() + block * BLOCK as u64, len: BLOCK };
        queue.read(1, block, 1, data, block).unwrap();
    }
    queue.ring();
    let note = |outcomes: &mut BTreeMap<u64, &str>, token, outcome| {
        assert_eq!(outcomes.insert(token, outcome), None, "{token} was reported twice");
    };
    for _ in 0..200 {
        queue
            .reap(60, |d| note(&mut outcomes, d.token, if d.status.is_success() { "done" } else { "failed" }))
            .unwrap();
    }
    assert_eq!(queue.pair().in_flight(), 7);
    queue.recover(|token| note(&mut outcomes, token, "abandoned")).unwrap();
    for (block, outcome) in &outcomes {
        let expected = match block {
            10..=12 => "failed",
            20..=24 | 30..=31 => "abandoned",
            _ => "done",
        };
        assert_eq!(*outcome, expected, "block {block}");
        if *outcome == "done" {
            let mut got = [0; BLOCK];
            memory.read(*block as usize * BLOCK, &mut got).unwrap();
            assert_eq!(got, [rig::pattern(*block as usize); BLOCK], "block {block}");
        }
    }
    assert_eq!((outcomes.len(), queue.pair().in_flight()), (60, 0));
    // All of the queue's slots are there.
    rig.emulated.faults().clear();
    let capacity = queue.pair().capacity() as u64;
    for token in 0..capacity {
        queue.flush(1, token).unwrap();
    }
    queue.ring();
    let mut done = 0;
    for _ in 0..200 {
        done += queue.reap(usize::MAX, |d| assert!(d.status.is_success())).unwrap() as u64;
    }
    assert_eq!(done, capacity);
    drop((queue, memory));
    assert_eq!(controller.arena().in_use(), rig.in_use);
}

/// More faults than a queue has slots, or a controller DMA memory to lose.
#[test]
fn hundreds_of_faults_leak_neither_slots_nor_memory() {
    let mut rig = rig_with(&Config { max_queue_entries: 64, ..config() });
    let faults = [Fault::Status(Status::INTERNAL_ERROR), Fault::Stall, Fault::Lose, Fault::WrongCid(7)];
    for round in 0..300 {
        rig.inject(Rule::once(Target::io(READ), faults[round % faults.len()]));
        let _ = rig.read(round, 3);
        assert_eq!(rig.disk.controller().arena().in_use(), rig.in_use, "round {round}");
    }
    rig.is_well();
    let controller = Arc::clone(rig.disk.controller());
    for _ in 0..50 {
        rig.inject(Rule::once(Target::admin(AdminOpcode::CreateIoSq as u8), Fault::Stall));
        assert!(controller.create_queue().is_err());
        rig.emulated.faults().clear();
        // Whatever was left half made is gone with the reset.
        let _ = controller.reset(controller.epoch());
        drop(controller.create_queue().unwrap());
    }
    assert_eq!(controller.arena().in_use(), rig.in_use);
}

#[test]
fn a_drive_without_a_usable_format_is_refused_clearly() {
    let emulated = EmulatedController::new(&config()).unwrap();
    emulated.faults().set_namespace_attached(false);
    let clock = Arc::new(ManualClock::new());
    let controller = attach(&emulated, &clock).unwrap();
    let error = controller.namespace().unwrap_err();
    assert!(error.to_string().contains("without an active namespace"), "{error}");
    assert!(NvmeDisk::new(&controller).is_err());
}
