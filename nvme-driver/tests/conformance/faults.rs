//! Injected faults do what they say, to whom they say, and no more.

use nvme_driver::emu::{Config, Fault, Rule, Target};
use nvme_driver::spec::{AdminOpcode, Command, Status};

use crate::host::{Host, delete, get_feature, identify, pattern, small};

fn read(at: u64, slba: u64) -> Command {
    Command { prp1: at, ..Command::new(2, 1).with_blocks(slba, 8) }
}

#[test]
fn a_status_without_execution() {
    let mut h = Host::with_queue();
    let at = h.pages(1);
    h.put(at, b"old");
    h.write_blocks(0, &pattern(1, 4096), 512);
    let target = Target { lba: Some(8..=15), ..Target::io(2) };
    h.controller.faults().inject(Rule::always(target, Fault::Status(Status::UNRECOVERED_READ_ERROR)));
    h.controller
        .faults()
        .inject(Rule { skip: 2, ..Rule::once(Target::io(0), Fault::Status(Status::WRITE_FAULT)) });
    for slba in [8, 15, 8] {
        h.fails(1, read(at, slba), Status::UNRECOVERED_READ_ERROR);
    }
    assert_eq!(h.get(at, 3), b"old");
    h.ok(1, read(at, 0));
    h.ok(1, read(at, 16));
    let flush = Command::new(0, 1);
    h.ok(1, flush);
    h.ok(1, flush);
    h.fails(1, flush, Status::WRITE_FAULT);
    h.ok(1, flush);
    assert_eq!(h.controller.counters().injected, 4);
    h.controller.faults().clear();
    h.ok(1, read(at, 8));
}

/// The opcodes of the admin and the I/O command set overlap: a fault for one is not for the other.
#[test]
fn targets_tell_admin_from_io() {
    let mut h = Host::with_queue();
    let at = h.pages(1);
    h.controller.faults().inject(Rule::always(Target::io(6), Fault::Fatal));
    h.controller.faults().inject(Rule::always(Target::admin(2), Fault::Fatal));
    h.ok(0, identify(1, 0, at));
    h.ok(1, read(at, 0));
    assert!(!h.csts().cfs());
    h.controller.faults().inject(Rule::once(Target { queue: Some(1), ..Target::default() }, Fault::Fatal));
    h.submit(1, Command::new(0, 1));
    h.expect_silence(1);
    assert!(h.csts().cfs());
}

#[test]
fn stalled_commands_end_with_their_queue() {
    let mut h = Host::with_queue();
    let at = h.pages(1);
    h.controller.faults().inject(Rule::always(Target::io(2), Fault::Stall));
    let cids = [h.submit(1, read(at, 0)), h.submit(1, read(at, 8))];
    h.expect_silence(1);
    assert_eq!(h.controller.faults().held(), 2);
    // Others pass.
    h.ok(1, Command::new(0, 1));
    h.ok(0, delete(AdminOpcode::DeleteIoSq, 1));
    for cid in cids {
        let done = h.wait(1);
        // Base 5.6: commands of a deleted queue may complete as aborted.
        assert!(done.cid == cid && done.status().is(Status::ABORTED_SQ_DELETION));
    }
    assert_eq!(h.controller.faults().held(), 0);
    h.ok(0, delete(AdminOpcode::DeleteIoCq, 1));
}

#[test]
fn stalled_commands_end_with_a_reset() {
    let mut h = Host::with_queue();
    let at = h.pages(1);
    h.controller.faults().inject(Rule::always(Target::io(2), Fault::Delay { steps: 5 }));
    h.submit(1, read(at, 0));
    h.step(1);
    h.disable();
    h.step(50);
    assert_eq!(h.peek(1), None);
    assert_eq!(h.controller.counters().drive_to_host, 0, "no late DMA");
    assert_eq!(h.controller.faults().held(), 0);
}

/// A delayed command's DMA is late, too.
#[test]
fn delayed_commands_are_executed_late() {
    let mut h = Host::with_queue();
    let at = h.pages(2);
    h.write_blocks(0, &pattern(1, 4096), 512);
    h.controller.faults().inject(Rule::once(Target::io(2), Fault::Delay { steps: 10 }));
    let late = h.submit(1, read(at, 0));
    h.step(5);
    assert_eq!(h.get(at, 4096), vec![0; 4096]);
    // It is overtaken; its identifier is still taken (Base "Command ID Conflict").
    h.ok(1, read(at + 4096, 0));
    h.place_with_cid(1, read(at + 4096, 0).with_cid(late));
    h.ring_queue(1);
    assert!(h.wait(1).status().is(Status::COMMAND_ID_CONFLICT));
    let done = h.wait(1);
    assert!(done.cid == late && done.status().is_success());
    assert_eq!(h.get(at, 4096), pattern(1, 4096));
}

#[test]
fn garbage_and_lies() {
    let mut h = Host::with_queue();
    let at = h.pages(1);
    h.write_blocks(0, &pattern(1, 4096), 512);
    h.controller.faults().inject(Rule::once(Target::io(2), Fault::Garbage));
    h.ok(1, read(at, 0));
    let garbage = h.get(at, 4096);
    assert!(garbage != pattern(1, 4096) && garbage.iter().any(|b| *b != 0));
    h.controller.faults().inject(Rule::once(Target::admin(6), Fault::Garbage));
    let page = h.pages(1);
    h.ok(0, identify(1, 0, page));
    assert_ne!(h.get(page, 2), 0x4e58u16.to_le_bytes());
    h.controller.faults().inject(Rule::once(Target::io(1), Fault::Lie));
    h.write_blocks(0, &pattern(2, 4096), 512);
    h.ok(1, read(at, 0));
    assert_eq!(h.get(at, 4096), pattern(1, 4096), "the write was not executed");
    // One seed, one run.
    let mut again = Host::with_queue();
    let at = again.pages(1);
    again.controller.faults().inject(Rule::once(Target::io(2), Fault::Garbage));
    again.ok(1, read(at, 0));
    assert_eq!(again.get(at, 4096), garbage);
}

#[test]
fn wrong_completions() {
    let mut h = Host::with_queue();
    let mut with = |fault| {
        h.controller.faults().inject(Rule::once(Target::io(0), fault));
        let cid = h.submit(1, Command::new(0, 1));
        let got: Vec<_> = std::iter::from_fn(|| {
            h.step(5);
            h.reap(1)
        })
        .map(|c| (c.cid.wrapping_sub(cid), c.sqid))
        .collect();
        got
    };
    assert_eq!(with(Fault::Duplicate), [(0, 1), (0, 1)]);
    assert_eq!(with(Fault::WrongSqid(6)), [(0, 7)]);
    let wrong = with(Fault::WrongCid(0x8000));
    assert_eq!(wrong, [(0x8000, 1)]);
    assert_eq!(with(Fault::Lose), []);
    // The entry is there, with the old phase; the next one lands behind it.
    assert_eq!(with(Fault::WrongPhase), []);
    h.submit(1, Command::new(0, 1));
    h.step(5);
    assert_eq!(h.peek(1), None);
    let pair = &h.pairs[&1];
    let entry = h.get(pair.cq + 16 * u64::from(pair.head + 1) + 14, 1);
    assert_eq!(entry[0] & 1, 1);
}

#[test]
fn removal_in_the_middle() {
    let mut h = Host::with_queue();
    let at = h.pages(1);
    h.controller.faults().inject(Rule { skip: 3, ..Rule::once(Target::io(2), Fault::Remove) });
    for _ in 0..10 {
        h.place(1, read(at, 0));
    }
    h.ring_queue(1);
    let done = std::iter::from_fn(|| {
        h.step(2);
        h.reap(1)
    });
    assert_eq!(done.count(), 3);
    assert_eq!(h.r32(nvme_driver::spec::regs::CSTS), u32::MAX);
}

/// Random faults hit about one in so many, differently from seed to seed, the same for one seed.
#[test]
fn random_faults_follow_the_seed() {
    let run = |seed| {
        let mut h = Host::with_queue_on(&Config { seed, ..small() });
        h.controller
            .faults()
            .randomly(4, &[Fault::Status(Status::INTERNAL_ERROR), Fault::Delay { steps: 3 }]);
        let trace: Vec<u16> = (0..400).map(|_| h.status(1, Command::new(0, 1)).field()).collect();
        let n = h.controller.counters().injected;
        assert!((50..150).contains(&n), "{n} of 400");
        (trace, n)
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
    let mut h = Host::with_queue();
    h.controller.faults().randomly(1, &[]);
    h.controller.faults().randomly(0, &[Fault::Stall]);
    h.ok(0, get_feature(7));
}
