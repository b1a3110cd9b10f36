//! Admin and I/O queues, doorbells, phase tags, arbitration.

use nvme_driver::emu::Config;
use nvme_driver::mem::PAGE;
use nvme_driver::pci::DmaAccess;
use nvme_driver::spec::regs::{self, sq_tail_doorbell};
use nvme_driver::spec::{AdminOpcode, Command, Status};

use crate::host::{
    BASE, Host, MEMORY, Pair, admin, create_cq, create_sq, delete, get_feature, get_log, small,
};

const FLUSH: Command = Command::new(0, 1);

/// Base 5.3 "Create I/O Completion Queue": its statuses.
#[test]
fn create_completion_queue_refusals() {
    let mut h = Host::ready_with(&Config { io_queues: 4, max_queue_entries: 128, ..small() });
    let at = h.pages(2);
    for qid in [0, 5, 0xffff] {
        h.fails(0, create_cq(qid, at, 16), Status::INVALID_QUEUE_ID);
    }
    h.fails(0, create_cq(1, at, 1), Status::INVALID_QUEUE_SIZE);
    h.fails(0, create_cq(1, at, 129), Status::INVALID_QUEUE_SIZE);
    h.fails(0, create_cq(1, at, 65536), Status::INVALID_QUEUE_SIZE);
    h.fails(0, create_cq(1, at + 8, 16), Status::INVALID_PRP_OFFSET);
    // Not physically contiguous: CAP.CQR forbids it.
    h.fails(0, Command { cdw11: 0, ..create_cq(1, at, 16) }, Status::INVALID_FIELD);
    // Interrupt vector 5 does not exist.
    h.fails(0, Command { cdw11: 3 | 5 << 16, ..create_cq(1, at, 16) }, Status::INVALID_INTERRUPT_VECTOR);
    h.ok(0, Command { cdw11: 3 | 4 << 16, ..create_cq(1, at, 128) });
    h.fails(0, create_cq(1, at, 16), Status::INVALID_QUEUE_ID);
}

/// Base 5.4 "Create I/O Submission Queue": its statuses.
#[test]
fn create_submission_queue_refusals() {
    let mut h = Host::ready_with(&Config { io_queues: 4, max_queue_entries: 128, ..small() });
    let at = h.pages(4);
    h.fails(0, create_sq(1, at, 16, 1), Status::INVALID_CQ);
    h.ok(0, create_cq(1, at, 16));
    for qid in [0, 5, 0xffff] {
        h.fails(0, create_sq(qid, at, 16, 1), Status::INVALID_QUEUE_ID);
        h.fails(0, create_sq(1, at, 16, qid), Status::INVALID_QUEUE_ID);
    }
    h.fails(0, create_sq(1, at, 16, 2), Status::INVALID_CQ);
    h.fails(0, create_sq(1, at, 1, 1), Status::INVALID_QUEUE_SIZE);
    h.fails(0, create_sq(1, at, 129, 1), Status::INVALID_QUEUE_SIZE);
    h.fails(0, create_sq(1, at + 64, 16, 1), Status::INVALID_PRP_OFFSET);
    h.fails(0, Command { cdw11: 1 << 16, ..create_sq(1, at, 16, 1) }, Status::INVALID_FIELD);
    h.ok(0, create_sq(1, at, 16, 1));
    h.fails(0, create_sq(1, at, 16, 1), Status::INVALID_QUEUE_ID);
}

/// Base 3.1.5 CC.IOSQES, CC.IOCQES: I/O queues need 64- and 16-byte entries.
#[test]
fn entry_sizes_are_checked() {
    let mut h = Host::new(&small());
    h.set_admin_queue(32, 32);
    h.w32(regs::CC, Host::cc_enabled().with_iosqes(7).with_iocqes(5).into_bits());
    h.wait_ready();
    let at = h.pages(2);
    h.fails(0, create_cq(1, at, 16), Status::INVALID_QUEUE_SIZE);
    // They may be set while enabled, as long as no I/O queue exists.
    h.w32(regs::CC, Host::cc_enabled().with_iosqes(7).into_bits());
    h.ok(0, create_cq(1, at, 16));
    h.fails(0, create_sq(1, at, 16, 1), Status::INVALID_QUEUE_SIZE);
}

/// Base 5.5, 5.6 "Delete I/O ... Queue".
#[test]
fn delete_queue_refusals() {
    let mut h = Host::with_queue();
    for op in [AdminOpcode::DeleteIoSq, AdminOpcode::DeleteIoCq] {
        for qid in [0, 2, 65, 0xffff] {
            h.fails(0, delete(op, qid), Status::INVALID_QUEUE_ID);
        }
    }
    // A completion queue goes after its submission queues.
    h.fails(0, delete(AdminOpcode::DeleteIoCq, 1), Status::INVALID_QUEUE_DELETION);
    h.ok(0, delete(AdminOpcode::DeleteIoSq, 1));
    h.fails(0, delete(AdminOpcode::DeleteIoSq, 1), Status::INVALID_QUEUE_ID);
    h.ok(0, delete(AdminOpcode::DeleteIoCq, 1));
    h.fails(0, delete(AdminOpcode::DeleteIoCq, 1), Status::INVALID_QUEUE_ID);
    h.create_pair(1, 8);
    h.ok(1, FLUSH);
}

/// Base 4.1: entries are fetched from head to tail, and both queues wrap around; the phase tag turns with each pass of
/// the completion queue (4.6).
#[test]
fn queues_wrap_around() {
    for (sq, cq) in [(2, 2), (3, 5), (5, 3), (4, 64), (64, 4)] {
        let mut h = Host::ready();
        let (a, b) = (h.pages(1), h.pages(1));
        h.create_pair_at(1, a, sq, b, cq);
        for i in 0..200u32 {
            let cid = h.submit(1, FLUSH);
            let done = h.wait(1);
            assert_eq!((done.cid, done.sqid), (cid, 1));
            assert_eq!(u32::from(done.sqhd), (i + 1) % sq, "the head is one past the command");
        }
    }
}

/// Base 4.1.2 "Full Queue": a full submission queue holds one entry less than its size.
#[test]
fn a_full_submission_queue_is_executed() {
    let mut h = Host::ready();
    let (a, b) = (h.pages(1), h.pages(1));
    h.create_pair_at(1, a, 16, b, 64);
    for round in 0..5 {
        let cids: Vec<u16> = (0..15).map(|_| h.place(1, FLUSH)).collect();
        h.ring_queue(1);
        for (i, cid) in cids.into_iter().enumerate() {
            let done = h.wait(1);
            assert!(done.status().is_success());
            assert_eq!((done.cid, usize::from(done.sqhd)), (cid, (round * 15 + i + 1) % 16));
        }
        h.expect_silence(1);
    }
}

/// Base 4.1.2: a full completion queue is not overrun; the controller goes on when the host makes room.
#[test]
fn a_full_completion_queue_waits() {
    let mut h = Host::ready();
    let (a, b) = (h.pages(1), h.pages(1));
    h.create_pair_at(1, a, 64, b, 4);
    let cids: Vec<u16> = (0..10).map(|_| h.place(1, FLUSH)).collect();
    h.ring_queue(1);
    h.step(20);
    // Three entries of four: a full queue keeps one slot free.
    let first: Vec<u16> = std::iter::from_fn(|| h.peek(1)).map(|c| c.cid).collect();
    assert_eq!(first, cids[..3]);
    h.step(20);
    assert_eq!(h.peek(1), None, "no room: nothing may be posted");
    h.ring_head(1, 1);
    h.step(20);
    assert_eq!(h.reap(1).map(|c| c.cid), Some(cids[3]));
    for cid in &cids[4..] {
        assert_eq!(h.wait(1).cid, *cid);
    }
}

/// The same for several submission queues that share a completion queue, and for completions that come late.
#[test]
fn a_shared_completion_queue_keeps_order_per_queue() {
    let mut h = Host::ready();
    let (cq, sq1, sq2) = (h.pages(1), h.pages(1), h.pages(1));
    h.ok(0, create_cq(1, cq, 8));
    h.ok(0, create_sq(1, sq1, 16, 1));
    h.ok(0, create_sq(2, sq2, 16, 1));
    let pair = |sq| Pair { sq, cq, sq_entries: 16, cq_entries: 8, tail: 0, head: 0, phase: true };
    h.pairs.insert(1, pair(sq1));
    h.pairs.insert(2, pair(sq2));
    let mut expect = [Vec::new(), Vec::new()];
    for _ in 0..15 {
        expect[0].push(h.place(1, FLUSH));
        expect[1].push(h.place(2, FLUSH));
    }
    h.ring_queue(1);
    h.ring_queue(2);
    let mut got = [Vec::new(), Vec::new()];
    for _ in 0..30 {
        let done = h.wait(1);
        got[usize::from(done.sqid) - 1].push(done.cid);
    }
    assert_eq!(got, expect);
    h.ok(0, delete(AdminOpcode::DeleteIoSq, 2));
    h.fails(0, delete(AdminOpcode::DeleteIoCq, 1), Status::INVALID_QUEUE_DELETION);
}

/// Base 5.2 (Asynchronous Event Information, Error Status): an invalid doorbell value is ignored and reported.
#[test]
fn bad_doorbell_values_are_ignored_and_reported() {
    let mut h = Host::with_queue();
    let at = h.pages(1);
    for _ in 0..4 {
        h.submit(0, admin(AdminOpcode::AsyncEventRequest));
    }
    h.expect_silence(0);
    // A tail outside the queue; a head outside the queue; a head beyond what was posted.
    let bad: [(u64, u32); 4] = [
        (sq_tail_doorbell(1, 0), 64),
        (sq_tail_doorbell(1, 0), u32::MAX),
        (regs::cq_head_doorbell(1, 0), 64),
        (regs::cq_head_doorbell(1, 0), 3),
    ];
    for (i, (doorbell, value)) in bad.into_iter().enumerate() {
        h.ring(doorbell, value);
        let event = h.wait(0);
        assert!(event.status().is_success());
        // Type 0 (error status), information 1 (invalid doorbell write value), log page 1.
        assert_eq!(event.dw0, 0x0001_0100, "case {i}");
        assert_eq!(h.controller.counters().bad_doorbells, i as u64 + 1);
        // Reading the log page arms the event type again.
        h.ok(0, get_log(1, at, 64));
    }
    h.ring_head(1, 0);
    h.ok(1, FLUSH);
}

/// Base 5.2: Write to Invalid Doorbell Register.
#[test]
fn a_doorbell_of_no_queue_is_reported() {
    let mut h = Host::with_queue();
    h.submit(0, admin(AdminOpcode::AsyncEventRequest));
    h.ring(sq_tail_doorbell(7, 0), 1);
    assert_eq!(h.wait(0).dw0, 0x0001_0000);
    // One of no queue that could be: the last of the page.
    let at = h.pages(1);
    h.ok(0, get_log(1, at, 64));
    h.submit(0, admin(AdminOpcode::AsyncEventRequest));
    h.ring(0x1ffc, 5);
    assert_eq!(h.wait(0).dw0, 0x0001_0000);
    h.ok(1, FLUSH);
    // It starts from 0 when it is created.
    h.create_pair(7, 8);
    h.expect_silence(7);
    h.ok(7, FLUSH);
}

/// Base 4.2: an unknown opcode, on both kinds of queue; fused operations, which are not supported.
#[test]
fn unknown_opcodes_and_fused_commands() {
    let mut h = Host::with_queue();
    for op in [0x03, 0x0b, 0x0d, 0x11, 0x18, 0x7f, 0xc0, 0xff] {
        h.fails(0, Command::new(op, 0), Status::INVALID_OPCODE);
    }
    for op in [0x03, 0x04, 0x06, 0x0d, 0x0e, 0x11, 0x15, 0x79, 0x80, 0xff] {
        h.fails(1, Command::new(op, 1), Status::INVALID_OPCODE);
    }
    for fuse in [1, 2, 3] {
        let fused = |c: Command| Command { cdw0: c.cdw0 | fuse << 8, ..c };
        h.fails(0, fused(get_feature(7)), Status::INVALID_FIELD);
        h.fails(1, fused(FLUSH), Status::INVALID_FIELD);
    }
    // Base 4.2: admin commands use PRPs.
    let cmd = get_feature(7);
    h.fails(0, Command { cdw0: cmd.cdw0 | 1 << 14, ..cmd }, Status::INVALID_FIELD);
    assert!(h.status(0, Command::new(0xff, 0)).dnr());
}

/// Base 4.13 "Command Arbitration", round robin: no queue starves, and each gets its burst.
#[test]
fn round_robin_is_fair() {
    let mut h = Host::ready_with(&Config { commands_per_step: 8, ..small() });
    for qid in 1..=4 {
        h.create_pair(qid, 64);
    }
    // Feature Arbitration: bursts of two.
    h.ok(0, crate::host::set_feature(1, 1));
    for qid in 1..=4 {
        for _ in 0..40 {
            h.place(qid, FLUSH);
        }
        h.ring_queue(qid);
    }
    for _ in 0..5 {
        h.step(1);
        for qid in 1..=4 {
            let n = std::iter::from_fn(|| h.reap(qid)).count();
            assert_eq!(n, 2, "queue {qid}");
        }
    }
}

/// Base 4.6: the phase tag of entries that were not posted is not touched, and dword 1 is 0.
#[test]
fn a_completion_entry_is_complete() {
    let mut h = Host::with_queue();
    let cid = h.submit(1, Command::new(0xff, 1));
    h.step(1);
    let entry = h.peek(1).unwrap();
    assert_eq!((entry.dw0, entry.dw1, entry.cid, entry.sqid, entry.sqhd), (0, 0, cid, 1, 1));
    assert!(entry.phase());
    let cq = h.pairs[&1].cq;
    assert_eq!(h.get(cq + 16, 63 * 16), vec![0; 63 * 16]);
}

/// Base 9.5: a submission queue that cannot be read, or a completion queue that cannot be written, is fatal.
#[test]
fn queues_behind_the_iommu() {
    for access in [None, Some(DmaAccess::Read), Some(DmaAccess::Write)] {
        let mut h = Host::ready();
        let page = |h: &Host, iova| {
            if let Some(a) = access {
                h.function.dma_map(&h.memory, MEMORY - PAGE, PAGE, iova, a).unwrap();
            }
        };
        page(&h, 0x7000_0000);
        let (sq, cq) = match access {
            Some(DmaAccess::Write) => (0x7000_0000, h.pages(1)),
            _ => (h.pages(1), 0x7000_0000),
        };
        h.ok(0, create_cq(1, cq, 16));
        h.ok(0, create_sq(1, sq, 16, 1));
        h.ring_tail(1, 1);
        h.step(10);
        assert!(h.csts().cfs(), "{access:?}");
        assert_eq!(h.controller.counters().iommu_faults, 1);
        assert_eq!(h.controller.domain().faults().len(), 1);
        // Nothing goes on until a reset.
        h.submit(0, get_feature(7));
        h.expect_silence(0);
        h.disable();
        h.enable();
        h.ok(0, get_feature(7));
    }
}

/// Base 4.1: a queue of the largest size (CAP.MQES).
#[test]
fn the_largest_queue() {
    let mut h = Host::ready_with(&Config { max_queue_entries: 4096, ..small() });
    h.create_pair(1, 4096);
    for _ in 0..2 {
        for _ in 0..4095 {
            h.place(1, FLUSH);
        }
        h.ring_queue(1);
        for _ in 0..4095 {
            assert!(h.wait(1).status().is_success());
        }
    }
}

/// Base 3.1.8: the admin queues have their own sizes and wrap around too.
#[test]
fn small_admin_queues() {
    let mut h = Host::new(&small());
    h.set_admin_queue(2, 3);
    h.w32(regs::CC, Host::cc_enabled().into_bits());
    h.wait_ready();
    for _ in 0..20 {
        h.ok(0, get_feature(7));
    }
}

/// Doorbells work through register writes as through mapped memory (Base 3.1.24).
#[test]
fn doorbells_by_register_write() {
    let mut h = Host::with_queue();
    for _ in 0..100 {
        h.place(1, FLUSH);
        h.w32(sq_tail_doorbell(1, 0), h.pairs[&1].tail);
        h.step(1);
        assert!(h.peek(1).is_some());
        h.w32(regs::cq_head_doorbell(1, 0), h.pairs[&1].head);
    }
    assert_eq!(h.controller.counters().bad_doorbells, 0);
}

/// A queue whose memory wraps around the address space is no queue of ours to read.
#[test]
fn queue_addresses_at_the_end_of_the_address_space() {
    let mut h = Host::ready();
    let cq = h.pages(1);
    h.ok(0, create_cq(1, cq, 256));
    h.ok(0, create_sq(1, !0xfff, 256, 1));
    h.ring_tail(1, 200);
    h.step(10);
    assert!(h.csts().cfs());
    let faults = h.controller.domain().faults();
    assert_eq!(faults[0].iova, !0xfff);
    assert!(BASE < faults[0].iova);
}
