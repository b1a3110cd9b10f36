//! Identify, features, log pages, events, abort, format.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::pod_read_unaligned;
use nvme_driver::emu::{Backing, Config, Fault, Rule, Target};
use nvme_driver::spec::features as f;
use nvme_driver::spec::identify::{IdentifyController, IdentifyNamespace};
use nvme_driver::spec::{AdminOpcode, Command, Status};

use crate::host::{Host, admin, get_feature, get_log, identify, pattern, set_feature, small};

fn identified<T: bytemuck::AnyBitPattern>(h: &mut Host, cns: u8, nsid: u32) -> T {
    let at = h.pages(1);
    h.ok(0, identify(cns, nsid, at));
    pod_read_unaligned(&h.get(at, 4096))
}

fn aer() -> Command {
    admin(AdminOpcode::AsyncEventRequest)
}

fn abort(qid: u16, cid: u16) -> Command {
    Command { cdw10: u32::from(qid) | u32::from(cid) << 16, ..admin(AdminOpcode::Abort) }
}

/// Base 5.15.2.2 "Identify Controller data structure".
#[test]
fn identify_controller() {
    let mut h = Host::ready_with(&Config { mdts: 5, serial: "S/N 1\u{e9}".into(), ..small() });
    let id: IdentifyController = identified(&mut h, 1, 0);
    assert_eq!(id.ver, 0x0001_0400, "as register VS");
    assert_eq!(id.cntrltype, 1);
    assert_eq!((id.sqes, id.cqes), (0x66, 0x44));
    assert_eq!((id.mdts, id.nn, id.vwc & 1, id.sgls), (5, 1, 0, 0));
    assert!(
        id.sn.starts_with(b"S/N 1")
            && id.sn.iter().chain(&id.mn).chain(&id.fr).all(|b| (0x20..0x7f).contains(b))
    );
    assert_eq!(id.sn[19], b' ', "strings are padded with spaces");
    let nqn = id.subnqn.split(|b| *b == 0).next().unwrap();
    assert!(nqn.starts_with(b"nqn.2014-08.org.nvmexpress:uuid:") && nqn.len() == 32 + 36);
    // Compare, dataset management, write zeroes, timestamp, verify.
    assert_eq!(id.oncs, 0b1100_1101);
    assert!(id.psd[0][0] != 0 || id.psd[0][1] != 0, "a maximum power is reported");
}

/// Base 5.15.2.1 "Identify Namespace data structure", and its NSID rules.
#[test]
fn identify_namespace() {
    for lba_size in [512u32, 4096] {
        let mut h = Host::ready_with(&Config { lba_size, ..small() });
        let ns: IdentifyNamespace = identified(&mut h, 0, 1);
        assert_eq!(ns.nsze, (4 << 20) / u64::from(lba_size));
        assert_eq!((ns.ncap, ns.nuse), (ns.nsze, ns.nsze));
        let format = ns.lbaf[usize::from(ns.flbas & 0xf)];
        assert_eq!((1 << format.lbads, format.ms), (lba_size, 0));
        assert_eq!(ns.nlbaf, 1);
        assert!(ns.nguid != [0; 16] && ns.eui64 != [0; 8]);
        let at = h.pages(1);
        for nsid in [0, 2, 0xffff_fffe, 0xffff_ffff] {
            h.fails(0, identify(0, nsid, at), Status::INVALID_NAMESPACE);
        }
    }
}

/// Base 5.15.2.3 "Active Namespace ID list".
#[test]
fn identify_active_namespaces() {
    let mut h = Host::ready();
    let list: [u32; 1024] = identified(&mut h, 2, 0);
    assert_eq!((list[0], list[1]), (1, 0));
    let list: [u32; 1024] = identified(&mut h, 2, 1);
    assert_eq!(list, [0; 1024]);
    let at = h.pages(1);
    for nsid in [0xffff_fffe, 0xffff_ffff] {
        h.fails(0, identify(2, nsid, at), Status::INVALID_NAMESPACE);
    }
}

/// Base 5.15.2.4 "Namespace Identification Descriptor list": EUI64 and NGUID as in Identify Namespace, and a UUID.
#[test]
fn identify_namespace_descriptors() {
    let mut h = Host::ready();
    let ns: IdentifyNamespace = identified(&mut h, 0, 1);
    let list: [u8; 4096] = identified(&mut h, 3, 1);
    let (mut at, mut seen) = (0, Vec::new());
    while list[at] != 0 {
        let len = usize::from(list[at + 1]);
        match list[at] {
            1 => assert_eq!(list[at + 4..at + 4 + len], ns.eui64),
            2 => assert_eq!(list[at + 4..at + 4 + len], ns.nguid),
            3 => assert_eq!(list[at + 4 + 6] >> 4, 4, "a version 4 UUID"),
            other => panic!("descriptor type {other}"),
        }
        seen.push(list[at]);
        at += 4 + len;
    }
    assert_eq!(seen, [1, 2, 3]);
    let page = h.pages(1);
    h.fails(0, identify(3, 2, page), Status::INVALID_NAMESPACE);
}

/// Base 2.0 5.17.2.5, 5.17.2.6: the I/O command set specific structures exist for command set 0 only.
#[test]
fn identify_command_set_structures_and_unknown_cns() {
    let mut h = Host::ready();
    let _: [u8; 4096] = identified(&mut h, 5, 1);
    let _: [u8; 4096] = identified(&mut h, 6, 0);
    let at = h.pages(1);
    for cns in [5, 6] {
        h.fails(0, Command { cdw11: 1 << 24, ..identify(cns, 1, at) }, Status::INVALID_FIELD);
    }
    for cns in [4, 7, 0x10, 0x13, 0x1c, 0xff] {
        h.fails(0, identify(cns, 1, at), Status::INVALID_FIELD);
    }
}

/// Two drives are two drives.
#[test]
fn identifiers_differ_between_drives() {
    let id = |config: &Config| {
        let mut h = Host::ready_with(config);
        let ns: IdentifyNamespace = identified(&mut h, 0, 1);
        let c: IdentifyController = identified(&mut h, 1, 0);
        (ns.nguid, ns.eui64, c.subnqn)
    };
    let (a, b) = (id(&small()), id(&Config { serial: "another".into(), ..small() }));
    assert_eq!(a, id(&small()), "and one drive is the same each time");
    assert!(a.0 != b.0 && a.1 != b.1 && a.2 != b.2);
}

/// Base 5.14, 5.21: features, their defaults, what is not saveable, what is not per namespace.
#[test]
fn features() {
    let mut h = Host::ready_with(&Config { io_queues: 3, volatile_cache: true, ..small() });
    let changes: [(u8, u32); 7] = [
        (f::FEAT_ARBITRATION, 0x0102_0303),
        (f::FEAT_TEMPERATURE_THRESHOLD, 400),
        (f::FEAT_ERROR_RECOVERY, 0x55),
        (f::FEAT_VOLATILE_WRITE_CACHE, 0),
        (f::FEAT_INTERRUPT_COALESCING, 0x0102),
        (f::FEAT_WRITE_ATOMICITY, 1),
        (f::FEAT_ASYNC_EVENT, 0x1ff),
    ];
    for (fid, value) in changes {
        let default = h.ok(0, get_feature(fid));
        h.fails(
            0,
            Command { cdw10: 1 << 31 | u32::from(fid), ..set_feature(fid, value) },
            Status::FEATURE_NOT_SAVEABLE,
        );
        h.fails(0, Command { nsid: 1, ..set_feature(fid, value) }, Status::FEATURE_NOT_NAMESPACE_SPECIFIC);
        h.ok(0, set_feature(fid, value));
        assert_eq!(h.ok(0, get_feature(fid)), value, "feature {fid:#x}");
        let select = |s: u32| Command { cdw10: u32::from(fid) | s << 8, ..get_feature(fid) };
        assert_eq!(h.ok(0, select(1)), default, "default of feature {fid:#x}");
        assert_eq!(h.ok(0, select(2)), default);
        assert_eq!(h.ok(0, select(3)) & 0b101, 0b100, "changeable, not saveable");
        h.fails(0, select(4), Status::INVALID_FIELD);
    }
    for fid in [0x00, 0x03, 0x0c, 0x0d, 0x7f, 0x80, 0xc0, 0xff] {
        h.fails(0, get_feature(fid), Status::INVALID_FIELD);
        h.fails(0, set_feature(fid, 0), Status::INVALID_FIELD);
    }
    h.ok(0, set_feature(f::FEAT_POWER_MANAGEMENT, 0));
    h.fails(0, set_feature(f::FEAT_POWER_MANAGEMENT, 1), Status::INVALID_FIELD);
    // Base 7.3.2: a reset brings the defaults back.
    h.disable();
    h.enable();
    assert_eq!(h.ok(0, get_feature(f::FEAT_ERROR_RECOVERY)), 0);
    // No cache, no such feature.
    let mut h = Host::ready();
    h.fails(0, get_feature(f::FEAT_VOLATILE_WRITE_CACHE), Status::INVALID_FIELD);
    h.fails(0, set_feature(f::FEAT_VOLATILE_WRITE_CACHE, 1), Status::INVALID_FIELD);
}

/// Base 5.21.1.7 "Number of Queues": counts are 0's based; not after queues exist; FFFFh is invalid.
#[test]
fn number_of_queues() {
    let mut h = Host::ready_with(&Config { io_queues: 5, ..small() });
    assert_eq!(h.ok(0, set_feature(f::FEAT_NUMBER_OF_QUEUES, 7 | 7 << 16)), 4 | 4 << 16);
    assert_eq!(h.ok(0, get_feature(f::FEAT_NUMBER_OF_QUEUES)), 4 | 4 << 16);
    h.fails(0, set_feature(f::FEAT_NUMBER_OF_QUEUES, 0xffff), Status::INVALID_FIELD);
    h.fails(0, set_feature(f::FEAT_NUMBER_OF_QUEUES, 0xffff << 16), Status::INVALID_FIELD);
    h.create_pair(5, 4);
    h.fails(0, set_feature(f::FEAT_NUMBER_OF_QUEUES, 0), Status::COMMAND_SEQUENCE_ERROR);
}

/// Base 5.21.1.9 "Interrupt Vector Configuration".
#[test]
fn interrupt_vector_configuration() {
    let mut h = Host::ready_with(&Config { io_queues: 2, ..small() });
    let get = |v: u32| Command { cdw11: v, ..get_feature(f::FEAT_INTERRUPT_VECTOR) };
    h.ok(0, set_feature(f::FEAT_INTERRUPT_VECTOR, 2 | 1 << 16));
    assert_eq!(h.ok(0, get(2)), 2 | 1 << 16);
    assert_eq!(h.ok(0, get(1)), 1);
    h.fails(0, get(3), Status::INVALID_FIELD);
    h.fails(0, set_feature(f::FEAT_INTERRUPT_VECTOR, 3), Status::INVALID_FIELD);
}

/// Base 5.21.1.14 "Timestamp": counts milliseconds from what the host set.
#[test]
fn timestamp() {
    let now = Arc::new(AtomicU64::new(5_000_000_000));
    let clock = Arc::clone(&now);
    let config = Config { clock: Arc::new(move || clock.load(Ordering::Relaxed)), ..small() };
    let mut h = Host::ready_with(&config);
    let at = h.pages(1);
    let get = Command { prp1: at, ..get_feature(f::FEAT_TIMESTAMP) };
    now.fetch_add(7_000_000, Ordering::Relaxed);
    h.ok(0, get);
    // Since the controller was made; origin 0: cleared at reset.
    assert_eq!(h.get(at, 8), 7u64.to_le_bytes());
    h.put(at, &0x1234_5678_9abcu64.to_le_bytes());
    h.ok(0, Command { prp1: at, ..set_feature(f::FEAT_TIMESTAMP, 0) });
    now.fetch_add(16_000_000, Ordering::Relaxed);
    h.ok(0, get);
    assert_eq!(h.get(at, 8), (0x1234_5678_9accu64 | 2 << 48).to_le_bytes());
    h.disable();
    h.enable();
    now.fetch_add(3_000_000, Ordering::Relaxed);
    h.ok(0, get);
    assert_eq!(h.get(at, 8), 3u64.to_le_bytes(), "a reset sets it to 0");
}

/// Base 5.13.1 "Get Log Page": unknown pages, offsets, lengths.
#[test]
fn log_pages_and_their_offsets() {
    let mut h = Host::ready();
    let at = h.pages(2);
    for (lid, len) in [(0u8, 1024u32), (1, 4096), (2, 512), (3, 512), (4, 4096), (5, 4096)] {
        h.ok(0, get_log(lid, at, len));
        let whole = h.get(at, len as usize);
        h.ok(0, Command { cdw12: len / 2, ..get_log(lid, at, len / 2) });
        if lid != 2 {
            assert_eq!(h.get(at, len as usize / 2), whole[len as usize / 2..], "log {lid:#x}");
        }
        h.fails(0, Command { cdw12: 2, ..get_log(lid, at, 4) }, Status::INVALID_FIELD);
        h.fails(0, Command { cdw12: len + 4, ..get_log(lid, at, 4) }, Status::INVALID_FIELD);
        h.fails(0, Command { cdw13: 1, ..get_log(lid, at, 4) }, Status::INVALID_FIELD);
        // More than there is: only what there is moves.
        h.ok(0, Command { cdw11: 0xffff, ..get_log(lid, at, len) });
    }
    for lid in [6, 7, 0x0d, 0x70, 0x80, 0xff] {
        h.fails(0, get_log(lid, at, 4), Status::INVALID_LOG_PAGE);
    }
    h.fails(0, Command { nsid: 5, ..get_log(2, at, 512) }, Status::INVALID_NAMESPACE);
}

/// Base 5.14.1.1 "Error Information": newest first.
#[test]
fn the_error_log_tells_what_failed() {
    let mut h = Host::with_queue();
    let at = h.pages(1);
    h.fails(1, Command::new(0xff, 1), Status::INVALID_OPCODE);
    let cid = h.submit(1, Command::new(2, 9));
    h.wait(1);
    h.ok(0, get_log(1, at, 192));
    let entry = |h: &Host, i: u64| {
        let e = h.get(at + 64 * i, 64);
        let u16_at = |o: usize| u16::from_le_bytes([e[o], e[o + 1]]);
        (
            u64::from_le_bytes(e[..8].try_into().unwrap()),
            u16_at(8),
            u16_at(10),
            Status::from_field(u16_at(12) >> 1),
        )
    };
    let (count, sqid, got, status) = entry(&h, 0);
    assert_eq!((count, sqid, got), (2, 1, cid));
    assert!(status.is(Status::INVALID_NAMESPACE));
    assert!(entry(&h, 1).3.is(Status::INVALID_OPCODE));
    assert_eq!(entry(&h, 2).0, 0);
}

/// Base 5.14.1.2 "SMART / Health Information": data units, commands, errors.
#[test]
fn the_smart_log_counts() {
    let mut h = Host::with_queue();
    let at = h.pages(1);
    let bytes = pattern(1, 512 * 512);
    for _ in 0..4 {
        h.write_blocks(0, &bytes, 512);
    }
    h.read_blocks(0, 1, 512);
    h.fails(1, Command::new(0xff, 1), Status::INVALID_OPCODE);
    h.ok(0, get_log(2, at, 512));
    let word = |h: &Host, o: u64| u64::from_le_bytes(h.get(at + o, 8).try_into().unwrap());
    // A unit is a thousand 512-byte pieces, rounded up: 1 MiB written is 3, 512 bytes read is 1.
    assert_eq!((word(&h, 32), word(&h, 48)), (1, 3));
    assert_eq!((word(&h, 64), word(&h, 80)), (1, 4));
    assert_eq!(word(&h, 176), 1);
    assert_eq!(h.get(at, 1), [0], "no critical warning");
    assert_eq!(h.get(at + 1, 2), 300u16.to_le_bytes());
}

/// Base 5.14.1.5 "Commands Supported and Effects": says of each opcode what the controller does.
#[test]
fn the_effects_log_agrees_with_the_controller() {
    let mut h = Host::with_queue();
    let at = h.pages(1);
    h.ok(0, get_log(5, at, 4096));
    let effects: Vec<u8> = h.get(at, 4096);
    for op in 0..=255u8 {
        // Delete queue, AER, format: not to be tried blindly; they are supported.
        if ![0x00, 0x04, 0x0c, 0x80].contains(&op) {
            let unknown = h.status(0, Command::new(op, 0)).is(Status::INVALID_OPCODE);
            assert_eq!(effects[usize::from(op) * 4] & 1 == 0, unknown, "admin opcode {op:#x}");
        }
        let unknown = h.status(1, Command::new(op, 1)).is(Status::INVALID_OPCODE);
        assert_eq!(effects[1024 + usize::from(op) * 4] & 1 == 0, unknown, "I/O opcode {op:#x}");
    }
}

/// Base 5.2 "Asynchronous Event Request": held; at most AERL + 1; gone with a reset.
#[test]
fn event_requests_are_held() {
    let mut h = Host::ready();
    for _ in 0..4 {
        h.submit(0, aer());
    }
    h.expect_silence(0);
    h.fails(0, aer(), Status::AER_LIMIT_EXCEEDED);
    h.disable();
    h.enable();
    h.expect_silence(0);
    for _ in 0..4 {
        h.submit(0, aer());
    }
    h.expect_silence(0);
}

/// Base 5.2: events wait for a request, an event type is silent until its log page was read (without RAE).
#[test]
fn events_are_cleared_by_their_log_page() {
    let mut h = Host::ready();
    let at = h.pages(1);
    h.ok(0, set_feature(f::FEAT_ASYNC_EVENT, 0x1ff));
    // The drive is at 300 K: this threshold is reached.
    let hot = set_feature(f::FEAT_TEMPERATURE_THRESHOLD, 290);
    h.ok(0, hot);
    h.submit(0, aer());
    assert_eq!(h.wait(0).dw0, 0x0002_0101);
    h.submit(0, aer());
    h.ok(0, hot);
    // With Retain Asynchronous Event set it stays silent.
    h.ok(0, Command { cdw10: get_log(2, at, 512).cdw10 | 1 << 15, ..get_log(2, at, 512) });
    h.expect_silence(0);
    assert_eq!(h.get(at, 1), [2], "critical warning: temperature");
    let cid = h.submit(0, get_log(2, at, 512));
    assert_eq!(h.wait(0).cid, cid);
    assert_eq!(h.wait(0).dw0, 0x0002_0101);
    // Unwanted events are not raised.
    h.ok(0, get_log(2, at, 512));
    h.ok(0, set_feature(f::FEAT_ASYNC_EVENT, 0));
    h.submit(0, aer());
    h.ok(0, hot);
    h.expect_silence(0);
}

/// Base 5.2, 8.? "Namespace Attribute Notices": the Changed Namespace List names the namespace, once.
#[test]
fn a_namespace_that_goes_and_comes_back() {
    let mut h = Host::with_queue();
    let at = h.pages(1);
    h.ok(0, set_feature(f::FEAT_ASYNC_EVENT, 1 << 8));
    h.submit(0, aer());
    h.controller.faults().set_namespace_attached(false);
    assert_eq!(h.wait(0).dw0, 0x0004_0002);
    h.ok(0, get_log(4, at, 4096));
    assert_eq!(h.get(at, 8), 1u64.to_le_bytes());
    h.ok(0, get_log(4, at, 4096));
    assert_eq!(h.get(at, 8), [0; 8]);
    let list: [u32; 1024] = identified(&mut h, 2, 0);
    assert_eq!(list[0], 0);
    let ns: [u8; 4096] = identified(&mut h, 0, 1);
    assert_eq!(ns, [0; 4096], "an inactive namespace is all zeros");
    h.fails(1, Command::new(0, 1), Status::INVALID_NAMESPACE);
    h.fails(1, Command { prp1: at, ..Command::new(2, 1) }, Status::INVALID_NAMESPACE);
    h.submit(0, aer());
    h.controller.faults().set_namespace_attached(true);
    assert_eq!(h.wait(0).dw0, 0x0004_0002);
    h.ok(1, Command::new(0, 1));
    // Half as large: what was beyond is out of range.
    h.ok(0, get_log(4, at, 4096));
    h.submit(0, aer());
    h.controller.faults().set_namespace_size(2 << 20);
    assert_eq!(h.wait(0).dw0, 0x0004_0002);
    let ns: IdentifyNamespace = identified(&mut h, 0, 1);
    assert_eq!(ns.nsze, 4096);
    h.fails(1, Command { prp1: at, ..Command::new(2, 1).with_blocks(4096, 1) }, Status::LBA_OUT_OF_RANGE);
    h.controller.faults().set_namespace_size(u64::MAX);
    h.ok(1, Command { prp1: at, ..Command::new(2, 1).with_blocks(8191, 1) });
}

/// Base 5.1 "Abort": dword 0 bit 0 says whether the command was *not* aborted.
#[test]
fn abort_finds_what_is_held() {
    let mut h = Host::with_queue();
    let at = h.pages(1);
    h.controller.faults().inject(Rule::once(Target::io(2), Fault::Stall));
    let stalled = h.submit(1, Command { prp1: at, ..Command::new(2, 1) });
    h.expect_silence(1);
    assert_eq!(h.ok(0, abort(1, stalled + 1)), 1);
    assert_eq!(h.ok(0, abort(2, stalled)), 1);
    assert_eq!(h.ok(0, abort(1, stalled)), 0);
    let done = h.wait(1);
    assert!(done.cid == stalled && done.status().is(Status::ABORT_REQUESTED));
    assert_eq!(h.ok(0, abort(1, stalled)), 1);
    // An event request can be aborted too.
    let cid = h.submit(0, aer());
    h.expect_silence(0);
    h.submit(0, abort(0, cid));
    let done = h.wait(0);
    assert!(done.cid == cid && done.status().is(Status::ABORT_REQUESTED));
    assert_eq!(h.wait(0).dw0, 0);
}

/// Base 5.18 "Keep Alive": not supported (KAS is 0).
#[test]
fn keep_alive_is_refused() {
    let mut h = Host::ready();
    h.fails(0, admin(AdminOpcode::KeepAlive), Status::INVALID_OPCODE);
}

/// Base 5.23 "Format NVM": another block size, all bytes gone; metadata and unknown formats refused.
#[test]
fn format() {
    let mut h = Host::with_queue_on(&Config { namespace: Backing::Ram { bytes: 1 << 20 }, ..small() });
    let format = |nsid, dw10| Command { cdw10: dw10, ..Command::new(AdminOpcode::FormatNvm as u8, nsid) };
    h.write_blocks(3, &pattern(1, 4096), 512);
    for (dw10, status) in [
        (2, Status::INVALID_FORMAT),
        (15, Status::INVALID_FORMAT),
        (1 | 1 << 4, Status::INVALID_FORMAT),
        (1 | 1 << 5, Status::INVALID_FORMAT),
        (1 | 2 << 9, Status::INVALID_FIELD),
    ] {
        h.fails(0, format(1, dw10), status);
    }
    h.fails(0, format(0, 1), Status::INVALID_NAMESPACE);
    h.fails(0, format(2, 1), Status::INVALID_NAMESPACE);
    h.ok(0, format(1, 1));
    let ns: IdentifyNamespace = identified(&mut h, 0, 1);
    assert_eq!((ns.nsze, ns.flbas), (256, 1));
    assert_eq!(h.read_blocks(0, 16, 4096), vec![0; 65536]);
    h.write_blocks(255, &pattern(2, 4096), 4096);
    let at = h.pages(1);
    h.fails(1, Command { prp1: at, ..Command::new(2, 1).with_blocks(256, 1) }, Status::LBA_OUT_OF_RANGE);
    h.ok(0, format(0xffff_ffff, 1 << 9));
    assert_eq!(h.read_blocks(2040, 8, 512), vec![0; 4096]);
}
