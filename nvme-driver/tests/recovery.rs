//! What the driver does about a drive that misbehaves: each fault ends in the right bytes or in a typed error, within a
//! bound of injected time, and leaks nothing.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]
mod rig;

use std::sync::Arc;
use std::time::Duration;

use nvme_driver::clock::ManualClock;
use nvme_driver::controller::{ControllerError, State};
use nvme_driver::disk::{Disk, DiskError};
use nvme_driver::emu::{Config, EmulatedController, Fault, Rule, Stuck, Target};
use nvme_driver::nvme_disk::NvmeDisk;
use nvme_driver::pci::PciError;
use nvme_driver::spec::{AdminOpcode, NvmOpcode, Status};
use rig::{BLOCK, READ, attach, bound, config, pattern, rig, rig_with};

#[test]
fn a_stalled_command_is_aborted_and_sent_again() {
    let mut rig = rig();
    rig.inject(Rule::once(Target::io(READ), Fault::Stall));
    let (result, took) = rig.timed(|r| r.read(0, 64));
    result.unwrap();
    assert!(took >= Duration::from_secs(3) && took < Duration::from_secs(4), "{took:?}");
    let r = rig.disk.recoveries();
    assert_eq!((r.aborts, r.replays, r.resets), (1, 1, 0));
    rig.is_well();
}

#[test]
fn an_abort_that_does_not_help_ends_in_a_reset_and_a_replay() {
    // The abort itself fails, or is never answered, or is answered without effect.
    for abort in [Fault::Status(Status::ABORT_LIMIT_EXCEEDED), Fault::Stall, Fault::Lie, Fault::Lose] {
        let mut rig = rig();
        rig.inject(Rule::always(Target::admin(AdminOpcode::Abort as u8), abort));
        rig.inject(Rule::once(Target::io(READ), Fault::Stall));
        let (result, took) = rig.timed(|r| r.read(0, 64));
        result.unwrap();
        assert!(took < bound(), "{took:?}");
        let r = rig.disk.recoveries();
        assert!(r.resets == 1 && r.replays >= 1, "{abort:?}: {r:?}");
        rig.is_well();
    }
}

#[test]
fn a_lost_completion_is_recovered_from() {
    let mut rig = rig();
    rig.inject(Rule { skip: 3, ..Rule::once(Target::io(READ), Fault::Lose) });
    let (result, took) = rig.timed(|r| r.read(0, 512));
    result.unwrap();
    assert!(took < bound());
    assert_eq!(rig.disk.recoveries().resets, 1);
    rig.is_well();
}

#[test]
fn a_command_that_always_stalls_is_a_typed_error_within_the_bound() {
    let mut rig = rig();
    let target = Target { lba: Some(8..=8), ..Target::io(READ) };
    rig.inject(Rule::always(target.clone(), Fault::Stall));
    let (result, took) = rig.timed(|r| r.read(0, 64));
    assert!(
        matches!(result, Err(DiskError::Device { lba: 8, status: Status::ABORT_REQUESTED, .. })),
        "{result:?}"
    );
    assert!(took < bound(), "{took:?}");
    // Not even abortable.
    rig.emulated.faults().clear();
    rig.inject(Rule::always(target, Fault::Lose));
    let (result, took) = rig.timed(|r| r.read(0, 64));
    assert!(matches!(result, Err(DiskError::TimedOut { lba: 8, .. })), "{result:?}");
    assert!(took < bound(), "{took:?}");
    rig.is_well();
}

#[test]
fn completions_that_make_no_sense_are_counted_and_survived() {
    for fault in [Fault::Duplicate, Fault::WrongCid(1), Fault::WrongCid(0x8000), Fault::WrongSqid(3)] {
        let mut rig = rig();
        rig.inject(Rule { skip: 2, ..Rule::once(Target::io(READ), fault) });
        rig.read(0, 512).unwrap();
        let r = rig.disk.recoveries();
        assert!(r.protocol_errors >= 1 && r.resets >= 1, "{fault:?}: {r:?}");
        rig.is_well();
    }
    let mut rig = rig();
    rig.inject(Rule { skip: 2, ..Rule::once(Target::io(READ), Fault::WrongPhase) });
    let (result, took) = rig.timed(|r| r.read(0, 512));
    result.unwrap();
    assert!(took < bound());
    rig.is_well();
}

#[test]
fn a_drive_that_keeps_breaking_the_protocol_is_a_typed_error() {
    let mut rig = rig();
    rig.inject(Rule::always(Target::io(READ), Fault::WrongCid(0x40)));
    let result = rig.read(0, 1);
    assert!(matches!(result, Err(DiskError::Protocol { .. })), "{result:?}");
    rig.is_well();
}

#[test]
fn a_fatal_status_is_reset_away() {
    let mut rig = rig();
    rig.inject(Rule { skip: 5, ..Rule::once(Target::io(READ), Fault::Fatal) });
    let (result, took) = rig.timed(|r| r.read(0, 512));
    result.unwrap();
    assert!(took < Duration::from_secs(2), "CFS is noticed before anything times out: {took:?}");
    rig.is_well();
}

#[test]
fn a_removed_drive_is_dead_at_once_and_stays_so() {
    let mut rig = rig();
    rig.inject(Rule { skip: 5, ..Rule::once(Target::io(READ), Fault::Remove) });
    let (result, took) = rig.timed(|r| r.read(0, 512));
    assert!(matches!(result, Err(DiskError::Dead { .. })), "{result:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");
    let (result, took) = rig.timed(|r| r.disk.flush());
    assert!(matches!(result, Err(DiskError::Dead { .. })));
    assert_eq!(took, Duration::ZERO);
    let ((), took) = rig.timed(|r| drop(std::mem::replace(&mut r.disk, rig_with(&config()).disk)));
    assert!(took < Duration::from_secs(1));
}

#[test]
fn one_failure_among_many_is_that_commands_alone() {
    let mut rig = rig();
    let target = Target { lba: Some(40..=43), ..Target::io(READ) };
    rig.inject(Rule::always(target, Fault::Status(Status::UNRECOVERED_READ_ERROR)));
    let result = rig.read(0, 128);
    assert!(matches!(result, Err(DiskError::Device { lba: 40, .. })), "{result:?}");
    rig.read(0, 40).unwrap();
    rig.read(44, 512).unwrap();
    rig.is_well();
}

#[test]
fn a_status_that_says_try_again_is_tried_again_and_one_that_does_not_is_not() {
    let mut rig = rig();
    rig.inject(Rule::once(Target::io(READ), Fault::Status(Status::COMMAND_INTERRUPTED)));
    rig.read(0, 1).unwrap();
    assert_eq!(rig.disk.recoveries().replays, 1);
    rig.inject(Rule::once(Target::io(READ), Fault::Status(Status::COMMAND_INTERRUPTED.with_dnr())));
    assert!(matches!(rig.read(0, 1), Err(DiskError::Device { .. })));
    rig.inject(Rule::always(Target::io(READ), Fault::Status(Status::NAMESPACE_NOT_READY)));
    assert!(matches!(rig.read(0, 1), Err(DiskError::Device { .. })));
    rig.is_well();
}

#[test]
fn a_controller_that_never_gets_ready_is_given_up_after_its_own_timeout() {
    let emulated = EmulatedController::new(&config()).unwrap();
    let clock = Arc::new(ManualClock::new());
    emulated.faults().set_stuck(Some(Stuck::Enabling));
    let error = attach(&emulated, &clock).unwrap_err();
    let ControllerError::Stuck { state: State::WaitReady, waited, .. } = error else { panic!("{error}") };
    assert!(waited >= Duration::from_millis(500) && waited < Duration::from_secs(128));
    emulated.faults().clear();
    attach(&emulated, &clock).unwrap();
}

#[test]
fn a_controller_that_cannot_be_disabled_is_dead_after_a_function_reset_was_tried() {
    let mut rig = rig();
    rig.emulated.faults().set_stuck(Some(Stuck::Disabling));
    rig.inject(Rule::once(Target::io(READ), Fault::Lose));
    let (result, took) = rig.timed(|r| r.read(0, 64));
    match result {
        // The function reset helped.
        Ok(()) => rig.is_well(),
        Err(e) => assert!(matches!(e, DiskError::Dead { .. }), "{e}"),
    }
    assert!(took < bound(), "{took:?}");
}

#[test]
fn bring_up_commands_that_fail_are_named() {
    for (opcode, fault) in [
        (AdminOpcode::Identify, Fault::Status(Status::INTERNAL_ERROR)),
        (AdminOpcode::Identify, Fault::Stall),
        (AdminOpcode::SetFeatures, Fault::Status(Status::INVALID_FIELD)),
        (AdminOpcode::GetFeatures, Fault::WrongCid(9)),
        (AdminOpcode::Identify, Fault::Remove),
    ] {
        let emulated = EmulatedController::new(&config()).unwrap();
        let clock = Arc::new(ManualClock::new());
        emulated.faults().inject(Rule::once(Target::admin(opcode as u8), fault));
        let error = attach(&emulated, &clock).unwrap_err();
        let expected = match fault {
            Fault::Status(_) => matches!(error, ControllerError::Command { .. }),
            Fault::Stall => matches!(error, ControllerError::CommandTimeout { .. }),
            Fault::Remove => matches!(error, ControllerError::Pci(PciError::Removed(_))),
            _ => matches!(error, ControllerError::Protocol { .. }),
        };
        assert!(expected, "{opcode:?}, {fault:?}: {error}");
        if fault != Fault::Remove {
            attach(&emulated, &clock).unwrap();
        }
    }
}

#[test]
fn a_queue_that_is_refused_leaves_nothing_behind() {
    for opcode in [AdminOpcode::CreateIoCq, AdminOpcode::CreateIoSq] {
        let rig = rig();
        let controller = Arc::clone(rig.disk.controller());
        let before = controller.arena().in_use();
        let fault = Fault::Status(Status::INVALID_QUEUE_SIZE);
        rig.inject(Rule::once(Target::admin(opcode as u8), fault));
        let error = controller.create_queue().unwrap_err();
        assert!(matches!(error, ControllerError::Command { .. }), "{error}");
        assert_eq!(controller.arena().in_use(), before);
        let all: Vec<_> = std::iter::from_fn(|| controller.create_queue().ok()).collect();
        assert_eq!(all.len(), usize::from(controller.identity().io_queues) - 1, "{opcode:?}");
    }
}

#[test]
fn a_queue_that_cannot_be_deleted_takes_its_memory_back_by_a_reset() {
    let rig = rig();
    let controller = Arc::clone(rig.disk.controller());
    let queue = controller.create_queue().unwrap();
    rig.inject(Rule::once(Target::admin(AdminOpcode::DeleteIoSq as u8), Fault::Stall));
    drop(queue);
    assert_eq!(controller.epoch(), 1);
    let mut rig = rig;
    rig.read(0, 64).unwrap();
    assert_eq!(rig.disk.recoveries().resets_elsewhere, 1, "the other queue notices, and is made again");
}

#[test]
fn another_queues_reset_is_noticed_and_survived() {
    let mut rig = rig();
    let controller = Arc::clone(rig.disk.controller());
    let mut other = NvmeDisk::new(&controller).unwrap();
    rig.inject(Rule::once(Target::io(READ), Fault::WrongCid(1)));
    rig.read(0, 16).unwrap();
    assert_eq!(controller.epoch(), 1);
    let mut got = [0; BLOCK];
    other.read(9, &mut got).unwrap();
    assert_eq!(got[0], pattern(9));
    assert_eq!(controller.epoch(), 1, "one reset serves both");
    drop(other);
    rig.is_well();
}

#[test]
fn a_namespace_that_is_gone_after_a_reset_is_not_written_to() {
    let mut rig = rig();
    rig.emulated.faults().set_namespace_attached(false);
    rig.inject(Rule::once(Target::io(NvmOpcode::Write as u8), Fault::WrongCid(1)));
    let error = rig.disk.write(0, &[0; BLOCK]).unwrap_err();
    assert!(matches!(&error, DiskError::Dead { reason, .. } if reason.contains("namespace 1")), "{error}");
}

#[test]
fn random_faults_end_in_the_right_bytes_or_in_a_typed_error() {
    let faults = [
        Fault::Status(Status::INTERNAL_ERROR),
        Fault::Status(Status::NAMESPACE_NOT_READY),
        Fault::Stall,
        Fault::Delay { steps: 40 },
        Fault::Lose,
        Fault::Duplicate,
        Fault::WrongCid(2),
        Fault::WrongSqid(1),
        Fault::WrongPhase,
        Fault::Fatal,
    ];
    for seed in 0..6 {
        let mut rig = rig_with(&Config { seed, ..config() });
        rig.emulated.faults().randomly(150, &faults);
        let mut failed = 0;
        for round in 0..40 {
            let (result, took) = rig.timed(|r| r.read(round * 13, 100 + round));
            // Several commands of one call may be hit; each costs one recovery.
            assert!(took < bound() * 8, "seed {seed}, round {round}: {took:?}");
            match result {
                Ok(()) => {}
                Err(DiskError::Dead { reason, .. }) => panic!("seed {seed}: given up: {reason}"),
                Err(_) => failed += 1,
            }
        }
        assert!(failed < 40, "seed {seed}");
        rig.is_well();
    }
}

#[test]
fn a_reset_is_announced_before_the_cmb_is_lost_and_writes_from_it_are_not_sent_again() {
    let mut rig = rig();
    let cmb = Arc::clone(&rig.disk.cmb().unwrap().memory);
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    rig.disk.on_reset({
        let (cmb, seen) = (Arc::clone(&cmb), Arc::clone(&seen));
        Arc::new(move || {
            let mut first = [0; 1];
            cmb.read(0, &mut first).unwrap();
            seen.lock().unwrap().push(first[0]);
        })
    });
    // Longer than one command: what was not in flight yet must not be sent from the emptied CMB either.
    cmb.write(0, &[0xaa; 256 * BLOCK]).unwrap();
    rig.inject(Rule::once(Target::io(NvmOpcode::Write as u8), Fault::Fatal));
    let error = rig.disk.write_from_cmb(100, 0, 256 * BLOCK).unwrap_err();
    assert!(matches!(error, DiskError::CmbLost { .. }), "{error}");
    assert_eq!(*seen.lock().unwrap(), [0xaa], "once, while the bytes were still there");
    let mut first = [1; 1];
    cmb.read(0, &mut first).unwrap();
    assert_eq!(first, [0]);
    let mut got = vec![0; 256 * BLOCK];
    rig.disk.read(100, &mut got).unwrap();
    for (n, block) in got.chunks(BLOCK).enumerate() {
        assert!(block[0] == 0xaa || block[0] == pattern(100 + n), "block {n} has neither old nor new bytes");
    }
    // Reads into the CMB are sent again.
    rig.inject(Rule::once(Target::io(READ), Fault::Fatal));
    rig.disk.read_to_cmb(7, 0, BLOCK).unwrap();
    cmb.read(0, &mut first).unwrap();
    assert_eq!(first, [pattern(7)]);
    assert_eq!(seen.lock().unwrap().len(), 2);
    rig.is_well();
}
