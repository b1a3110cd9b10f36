//! PRP entries and lists, SGLs.

use nvme_driver::emu::Config;
use nvme_driver::mem::PAGE;
use nvme_driver::spec::{Command, Status};

use crate::host::{Host, pattern, small};

const P: u64 = PAGE as u64;

fn read(blocks: u32, prp1: u64, prp2: u64) -> Command {
    Command { prp1, prp2, ..Command::new(2, 1).with_blocks(0, blocks) }
}

/// A drive with a pattern of 64 KiB at its start.
fn host() -> (Host, Vec<u8>) {
    let mut h = Host::with_queue();
    let bytes = pattern(1, 128 * 512);
    h.write_blocks(0, &bytes, 512);
    (h, bytes)
}

/// Base 4.3 "Physical Region Page Entry and List": PRP1 may start anywhere in a page, at a dword.
#[test]
fn prp1_has_an_offset() {
    let (mut h, bytes) = host();
    let at = h.pages(3);
    for offset in [0, 4, 8, 512, 2048, 3584, 4092] {
        h.ok(1, read(8, at + offset, at + P));
        let first = (P - offset) as usize;
        assert_eq!(h.get(at + offset, first.min(4096)), bytes[..first.min(4096)]);
        assert_eq!(h.get(at + P, 4096 - first.min(4096)), bytes[first.min(4096)..4096]);
    }
    for offset in [1, 2, 3, 4095] {
        h.fails(1, read(1, at + offset, 0), Status::INVALID_PRP_OFFSET);
    }
}

/// Base 4.3: the second and later entries have offset 0; a list pointer is aligned to 8 bytes.
#[test]
fn later_entries_have_no_offset() {
    let (mut h, bytes) = host();
    let (at, list) = (h.pages(4), h.pages(1));
    for offset in [1, 4, 8, 512, 4092] {
        h.fails(1, read(16, at, at + P + offset), Status::INVALID_PRP_OFFSET);
        h.put_u64s(list, &[at + P, at + 2 * P + offset]);
        h.fails(1, read(24, at, list), Status::INVALID_PRP_OFFSET);
    }
    for offset in [1, 2, 4, 7] {
        h.fails(1, read(24, at, list + offset), Status::INVALID_PRP_OFFSET);
    }
    // A list may start anywhere in its page.
    h.put_u64s(list + 1000, &[at + P, at + 2 * P]);
    h.ok(1, read(24, at, list + 1000));
    assert_eq!(h.get(at, 3 * PAGE), bytes[..3 * PAGE]);
    // PRP2 is not looked at if PRP1 is enough.
    h.ok(1, read(8, at, 3));
}

/// Base 4.3: pages in any order, in lists that end with their page and go on in another: the last slot leads on.
#[test]
fn chained_lists() {
    let (mut h, bytes) = host();
    let at = h.pages(16);
    let (first, second, third) = (h.pages(1), h.pages(1), h.pages(1));
    let order = [9u64, 2, 14, 0, 5, 11, 7, 3, 15, 1, 12, 8, 4, 10, 6];
    let pages: Vec<u64> = order.iter().map(|i| at + i * P).collect();
    // The first list has two entries and a link, the second one list begins in the last slot: nothing but a link.
    h.put_u64s(first + P - 24, &[pages[0], pages[1], second]);
    h.put_u64s(second, &pages[2..]);
    h.ok(1, read(128, at + 13 * P, first + P - 24));
    let mut got = h.get(at + 13 * P, PAGE);
    for p in &pages {
        got.extend(h.get(*p, PAGE));
    }
    assert_eq!(got, bytes);
    h.put_u64s(third + P - 8, &[second]);
    h.put_u64s(second, &pages);
    h.ok(1, read(128, at + 13 * P, third + P - 8));
    // Exactly as many entries as fit: the last slot is data, not a link.
    h.put_u64s(first + P - 16, &[pages[0], pages[1]]);
    h.ok(1, read(24, at + 13 * P, first + P - 16));
    // A link has no offset either.
    h.put_u64s(first + P - 16, &[pages[0], second + 8]);
    h.fails(1, read(32, at + 13 * P, first + P - 16), Status::INVALID_PRP_OFFSET);
}

/// A list that links to itself ends with the transfer.
#[test]
fn a_list_that_leads_to_itself() {
    let (mut h, _) = host();
    let (at, list) = (h.pages(1), h.pages(1));
    let mut entries = vec![at; 511];
    entries.push(list);
    h.put_u64s(list, &entries);
    h.ok(1, read(128, at, list));
    h.ok(1, read(1024, at, list + P - 8));
}

/// A list that the device may not read.
#[test]
fn a_list_behind_the_iommu() {
    let (mut h, _) = host();
    let at = h.pages(1);
    for list in [0x5000_0000, u64::MAX - 7, 0, 0xfee0_0000] {
        h.fails(1, read(128, at, list), Status::DATA_TRANSFER_ERROR);
    }
}

/// The same rules for admin commands: data of 4 KiB across two pages.
#[test]
fn admin_data_across_pages() {
    let mut h = Host::ready();
    let at = h.pages(2);
    h.ok(0, Command { prp2: at + P, ..crate::host::identify(1, 0, at + 2048) });
    assert_eq!(h.get(at + 2048, 2), 0x4e58u16.to_le_bytes());
    h.fails(
        0,
        Command { prp2: at + P + 4, ..crate::host::identify(1, 0, at + 2048) },
        Status::INVALID_PRP_OFFSET,
    );
    h.fails(0, crate::host::identify(1, 0, at + 1), Status::INVALID_PRP_OFFSET);
}

/// An SGL descriptor: address, length, type.
fn sgl(addr: u64, len: u64, kind: u64) -> [u64; 2] {
    [addr, len | kind << 60]
}

fn sgl_read(blocks: u32, d: [u64; 2]) -> Command {
    let cmd = read(blocks, d[0], d[1]);
    Command { cdw0: cmd.cdw0 | 1 << 14, ..cmd }
}

const DATA: u64 = 0;
const SEGMENT: u64 = 2;
const LAST: u64 = 3;

/// Base 4.4 "Scatter Gather List": refused where it is not offered (SGLS 0), and on admin queues.
#[test]
fn sgls_are_refused_unless_offered() {
    let (mut h, _) = host();
    let at = h.pages(1);
    h.fails(1, sgl_read(1, sgl(at, 512, DATA)), Status::INVALID_FIELD);
}

/// Base 4.4: data blocks of any length and alignment, segments that lead on, a last segment.
#[test]
fn sgls_work_where_offered() {
    let mut h = Host::with_queue_on(&Config { sgls: true, ..small() });
    let bytes = pattern(1, 128 * 512);
    h.write_blocks(0, &bytes, 512);
    let (at, list) = (h.pages(20), h.pages(2));
    h.ok(1, sgl_read(8, sgl(at + 3, 4096, DATA)));
    assert_eq!(h.get(at + 3, 4096), bytes[..4096]);
    // Pieces of odd sizes through three segments.
    h.put_u64s(
        list,
        &[sgl(at + 1, 700, DATA), sgl(at + 9000, 1, DATA), sgl(list + 0x800, 32, SEGMENT)].concat(),
    );
    h.put_u64s(list + 0x800, &[sgl(at + 20_000, 3000, DATA), sgl(list + 0x1000, 48, LAST)].concat());
    let last = [sgl(at + 30_001, 395, DATA), sgl(0, 0, DATA), sgl(at + 40_000, 1_000_000, DATA)];
    h.put_u64s(list + 0x1000, &last.concat());
    h.ok(1, sgl_read(9, sgl(list, 48, SEGMENT)));
    let mut got = h.get(at + 1, 700);
    for (p, n) in [(9000, 1), (20_000, 3000), (30_001, 395), (40_000, 512)] {
        got.extend(h.get(at + p, n));
    }
    assert_eq!(got, bytes[..4608]);
}

/// Base 4.4, "Generic Command Status": what is wrong with an SGL.
#[test]
fn bad_sgls() {
    let mut h = Host::with_queue_on(&Config { sgls: true, ..small() });
    let (at, list) = (h.pages(1), h.pages(1));
    let mut fails = |entries: &[[u64; 2]], first: [u64; 2], status| {
        h.put_u64s(list, &entries.concat());
        h.fails(1, sgl_read(1, first), status);
    };
    let ok = sgl(at, 512, DATA);
    fails(&[], sgl(at, 511, DATA), Status::SGL_LENGTH_INVALID);
    fails(&[sgl(at, 511, DATA)], sgl(list, 16, LAST), Status::SGL_LENGTH_INVALID);
    for kind in [1, 4, 5, 15] {
        fails(&[], sgl(at, 512, kind), Status::SGL_TYPE_INVALID);
        fails(&[sgl(at, 512, kind)], sgl(list, 16, LAST), Status::SGL_TYPE_INVALID);
    }
    fails(&[], [at, 512 | 1 << 56], Status::SGL_TYPE_INVALID);
    for len in [0, 8, 17] {
        fails(&[ok], sgl(list, len, LAST), Status::INVALID_SGL_SEGMENT);
    }
    // A segment in the middle, a segment in a last segment, a segment that leads nowhere.
    fails(&[sgl(list, 16, LAST), ok], sgl(list, 32, SEGMENT), Status::INVALID_SGL_SEGMENT);
    fails(&[ok, sgl(list, 16, LAST)], sgl(list, 32, LAST), Status::INVALID_SGL_SEGMENT);
    fails(&[ok], sgl(list, 16, SEGMENT), Status::INVALID_SGL_SEGMENT);
    // Round and round.
    fails(&[sgl(list, 16, SEGMENT)], sgl(list, 16, SEGMENT), Status::INVALID_SGL_COUNT);
    fails(&[], sgl(list, 0xffff_fff0, LAST), Status::INVALID_SGL_COUNT);
    fails(&[], sgl(0x5000_0000, 16, LAST), Status::DATA_TRANSFER_ERROR);
    fails(&[sgl(0x5000_0000, 512, DATA)], sgl(list, 16, LAST), Status::DATA_TRANSFER_ERROR);
}
