//! The NVM command set.

use std::collections::HashMap;

use nvme_driver::emu::{Backing, Config};
use nvme_driver::spec::command::{DSM_AD, FUA};
use nvme_driver::spec::{Command, Status};

use crate::host::{Host, data, pattern, small};

/// NVM "Read command", "Write command": what was written is read, at every size up to MDTS.
#[test]
fn what_was_written_is_read() {
    for lba_size in [512usize, 4096] {
        let mut h = Host::with_queue_on(&Config { lba_size: lba_size as u32, ..small() });
        for (slba, blocks) in [(0, 1), (7, 8), (100, 16), (200, 17), (300, 128)] {
            let bytes = pattern(slba, blocks * lba_size);
            h.write_blocks(slba, &bytes, lba_size);
            assert_eq!(h.read_blocks(slba, blocks as u32, lba_size), bytes, "{blocks} blocks at {slba}");
        }
        // Unwritten blocks read as zeros, and neighbours were left alone.
        assert_eq!(h.read_blocks(6, 1, lba_size), vec![0; lba_size]);
        assert_eq!(h.read_blocks(15, 1, lba_size), vec![0; lba_size]);
    }
}

/// Base "Generic Command Status": LBA Out of Range.
#[test]
fn blocks_beyond_the_end_are_refused() {
    let mut h = Host::with_queue();
    let end = (4 << 20) / 512;
    let at = h.pages(2);
    for op in [0x01, 0x02, 0x05, 0x08, 0x0c] {
        for (slba, blocks) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 2), (1 << 63, 1)] {
            let cmd = data(Command::new(op, 1).with_blocks(slba, blocks), at, &mut h, 1024);
            h.fails(1, cmd, Status::LBA_OUT_OF_RANGE);
        }
        let cmd = data(Command::new(op, 1).with_blocks(end - 1, 1), at, &mut h, 512);
        h.ok(1, cmd);
    }
    let moved = h.controller.counters();
    assert_eq!((moved.drive_to_host, moved.host_to_drive), (512, 512));
}

/// Base 6.1.2 "Namespace usage": an NSID that does not exist, 0, and the broadcast value where it is not allowed.
#[test]
fn namespaces_that_do_not_exist() {
    let mut h = Host::with_queue();
    let at = h.pages(1);
    for op in [0x01, 0x02, 0x05, 0x08, 0x09, 0x0c] {
        for nsid in [0, 2, 0xffff_fffe, 0xffff_ffff] {
            h.fails(1, Command { prp1: at, ..Command::new(op, nsid) }, Status::INVALID_NAMESPACE);
        }
    }
    for nsid in [0, 2, 0xffff_fffe] {
        h.fails(1, Command::new(0, nsid), Status::INVALID_NAMESPACE);
    }
    // Identify Controller VWC: flush takes the broadcast value.
    h.ok(1, Command::new(0, 0xffff_ffff));
}

/// Base 5.15.2.2 MDTS: a transfer beyond it is refused; commands without a transfer are not bound by it.
#[test]
fn transfers_beyond_mdts_are_refused() {
    let mut h = Host::with_queue_on(&Config { mdts: 2, ..small() });
    let at = h.pages(5);
    for op in [0x01, 0x02, 0x05] {
        let cmd = data(Command::new(op, 1).with_blocks(0, 32), at, &mut h, 16384);
        h.ok(1, cmd);
        let cmd = data(Command::new(op, 1).with_blocks(0, 33), at, &mut h, 16384 + 512);
        h.fails(1, cmd, Status::INVALID_FIELD);
    }
    for op in [0x08, 0x0c] {
        h.ok(1, Command::new(op, 1).with_blocks(0, 4096));
    }
}

/// NVM "Write Zeroes command", with and without Deallocate.
#[test]
fn write_zeroes() {
    let mut h = Host::with_queue();
    let bytes = pattern(5, 32 * 512);
    h.write_blocks(0, &bytes, 512);
    h.ok(1, Command::new(8, 1).with_blocks(3, 9));
    let got = h.read_blocks(0, 32, 512);
    assert_eq!(got[..3 * 512], bytes[..3 * 512]);
    assert_eq!(got[3 * 512..12 * 512], vec![0; 9 * 512]);
    assert_eq!(got[12 * 512..], bytes[12 * 512..]);
    let cmd = Command::new(8, 1).with_blocks(12, 20);
    h.ok(1, Command { cdw12: cmd.cdw12 | 1 << 25, ..cmd });
    assert_eq!(h.read_blocks(12, 20, 512), vec![0; 20 * 512]);
}

/// NVM "Dataset Management command": deallocated blocks read as zeros (DLFEAT 1); other attributes are hints; all
/// ranges are checked before any takes effect.
#[test]
fn dataset_management() {
    let mut h = Host::with_queue();
    let bytes = pattern(6, 64 * 512);
    h.write_blocks(0, &bytes, 512);
    let at = h.pages(1);
    let range = |slba: u64, blocks: u64| [blocks << 32, slba];
    let dsm =
        |n: u32, attributes| Command { prp1: at, cdw10: n - 1, cdw11: attributes, ..Command::new(9, 1) };
    h.put_u64s(at, &[range(1, 2), range(8, 0), range(32, 16)].concat());
    // Integral dataset for read and write: nothing happens.
    h.ok(1, dsm(3, 3));
    assert_eq!(h.read_blocks(0, 64, 512), bytes);
    h.ok(1, dsm(3, DSM_AD));
    let got = h.read_blocks(0, 64, 512);
    for block in 0..64 {
        let zero = (1..3).contains(&block) || (32..48).contains(&block);
        let expect = if zero { vec![0; 512] } else { bytes[block * 512..][..512].to_vec() };
        assert_eq!(got[block * 512..][..512], expect, "block {block}");
    }
    for bad in [range(8192, 1), range(8191, 2), range(u64::MAX, 1), range(0, 0xffff_ffff)] {
        h.put_u64s(at, &[range(0, 1), bad].concat());
        h.fails(1, dsm(2, DSM_AD), Status::LBA_OUT_OF_RANGE);
        assert_eq!(h.read_blocks(0, 1, 512), bytes[..512]);
    }
    // 256 ranges are a page.
    let many: Vec<u64> = (0..256).flat_map(|i| range(i * 16, 16)).collect();
    h.put_u64s(at, &many);
    h.ok(1, dsm(256, DSM_AD));
    assert_eq!(h.read_blocks(0, 64, 512), vec![0; 64 * 512]);
}

/// NVM "Compare command".
#[test]
fn compare() {
    let mut h = Host::with_queue();
    let bytes = pattern(7, 24 * 512);
    h.write_blocks(10, &bytes, 512);
    let at = h.pages(3);
    h.put(at, &bytes);
    let cmd = data(Command::new(5, 1).with_blocks(10, 24), at, &mut h, bytes.len());
    h.ok(1, cmd);
    for place in [0, 511, 512, 5000, bytes.len() - 1] {
        h.put(at + place as u64, &[bytes[place] ^ 0x80]);
        h.fails(1, cmd, Status::COMPARE_FAILURE);
        h.put(at + place as u64, &[bytes[place]]);
    }
    h.ok(1, cmd);
}

/// Base "Data Transfer Error": memory that the device may not touch. A refused write changes no block, also if some of
/// its memory is accessible.
#[test]
fn inaccessible_memory() {
    let mut h = Host::with_queue();
    let bytes = pattern(8, 8192);
    h.write_blocks(0, &bytes, 512);
    let at = h.pages(1);
    let nowhere = 0x5000_0000;
    for op in [1, 2, 5] {
        for (prp1, prp2) in [(at, nowhere), (nowhere, at), (nowhere, nowhere)] {
            let cmd = Command { prp1, prp2, ..Command::new(op, 1).with_blocks(0, 16) };
            h.fails(1, cmd, Status::DATA_TRANSFER_ERROR);
        }
    }
    assert_eq!(h.read_blocks(0, 16, 512), bytes);
    assert_eq!(h.controller.counters().iommu_faults, 9);
    assert_eq!(h.controller.domain().counters().faults, 9);
}

/// The IOMMU lets a device only read what is mapped for reading, and only write what is mapped for writing.
#[test]
fn permissions_of_mappings() {
    use nvme_driver::mem::{Mapping, PAGE};
    use nvme_driver::pci::DmaAccess;
    let mut h = Host::with_queue();
    let memory = Mapping::anonymous(2 * PAGE).unwrap();
    h.function.dma_map(&memory, 0, PAGE, 0x6000_0000, DmaAccess::Read).unwrap();
    h.function.dma_map(&memory, PAGE, PAGE, 0x6000_1000, DmaAccess::Write).unwrap();
    let cmd = |op, at| Command { prp1: at, ..Command::new(op, 1).with_blocks(0, 8) };
    memory.write(0, &pattern(9, PAGE)).unwrap();
    h.ok(1, cmd(1, 0x6000_0000));
    h.fails(1, cmd(2, 0x6000_0000), Status::DATA_TRANSFER_ERROR);
    h.ok(1, cmd(2, 0x6000_1000));
    h.fails(1, cmd(1, 0x6000_1000), Status::DATA_TRANSFER_ERROR);
    let mut got = vec![0; PAGE];
    memory.read(PAGE, &mut got).unwrap();
    assert_eq!(got, pattern(9, PAGE));
    h.function.dma_unmap(0x6000_1000, PAGE).unwrap();
    memory.zero(PAGE, PAGE).unwrap();
    h.fails(1, cmd(2, 0x6000_1000), Status::DATA_TRANSFER_ERROR);
    memory.read(PAGE, &mut got).unwrap();
    assert_eq!(got, vec![0; PAGE], "a late DMA does not land");
}

/// Bytes are counted by direction, commands by opcode.
#[test]
fn counters() {
    let mut h = Host::with_queue();
    h.write_blocks(0, &pattern(1, 8192), 512);
    h.read_blocks(0, 3, 512);
    h.ok(1, Command::new(0, 1));
    let c = h.controller.counters();
    assert_eq!((c.host_to_drive, c.drive_to_host, c.drive_to_cmb, c.cmb_to_drive), (8192, 1536, 0, 0));
    assert_eq!((c.io_commands[0], c.io_commands[1], c.io_commands[2], c.io_total()), (1, 1, 1, 3));
    assert_eq!((c.admin_commands[5], c.admin_commands[1], c.errors), (1, 1, 0));
}

/// A null namespace moves nothing, checks everything.
#[test]
fn a_null_namespace() {
    let mut h = Host::with_queue_on(&Config { namespace: Backing::Null { bytes: 1 << 40 }, ..small() });
    let at = h.pages(1);
    h.put(at, b"untouched");
    h.ok(1, Command { prp1: at, ..Command::new(2, 1).with_blocks((1 << 31) - 1, 1) });
    h.fails(1, Command { prp1: at, ..Command::new(2, 1).with_blocks(1 << 31, 1) }, Status::LBA_OUT_OF_RANGE);
    h.fails(1, Command { prp1: at + 1, ..Command::new(2, 1) }, Status::INVALID_PRP_OFFSET);
    assert_eq!(h.get(at, 9), b"untouched");
    assert_eq!(h.controller.counters().drive_to_host, 0);
}

/// An image file keeps its bytes from one controller to the next; FUA and flush reach it.
#[test]
fn an_image_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let config = |create| Config {
        namespace: Backing::File { path: path.clone(), create },
        volatile_cache: true,
        lba_size: 4096,
        ..small()
    };
    assert!(nvme_driver::emu::EmulatedController::new(&config(None)).is_err(), "there is none yet");
    let bytes = pattern(3, 3 * 4096);
    {
        let mut h = Host::with_queue_on(&config(Some(1 << 20)));
        h.write_blocks(5, &bytes, 4096);
        h.ok(1, Command::new(0, 1));
        let at = h.pages(1);
        h.put(at, &bytes[..4096]);
        let cmd = Command::new(1, 1).with_blocks(255, 1);
        h.ok(1, Command { prp1: at, cdw12: cmd.cdw12 | FUA, ..cmd });
    }
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
    let mut h = Host::with_queue_on(&config(Some(1 << 30)));
    assert_eq!(h.read_blocks(5, 3, 4096), bytes);
    assert_eq!(h.read_blocks(255, 1, 4096), bytes[..4096]);
    h.ok(1, Command::new(8, 1).with_blocks(6, 1));
    assert_eq!(h.read_blocks(5, 3, 4096)[4096..8192], vec![0; 4096]);
    let at = h.pages(1);
    h.fails(1, Command { prp1: at, ..Command::new(2, 1).with_blocks(256, 1) }, Status::LBA_OUT_OF_RANGE);
    // The image shrinks behind our back: an error, not a crash.
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(8192).unwrap();
    h.fails(
        1,
        Command { prp1: at, ..Command::new(2, 1).with_blocks(100, 1) },
        Status::UNRECOVERED_READ_ERROR,
    );
}

/// Reads of an image run together: each command completes once, with its own status and data, also if some fail, if the
/// completion queue is small, and if writes to the same blocks lie between them.
#[test]
fn reads_of_an_image_run_together() {
    let dir = tempfile::tempdir().unwrap();
    let namespace = Backing::File { path: dir.path().join("disk.img"), create: Some(1 << 20) };
    let mut h = Host::with_queue_on(&Config { namespace, commands_per_step: 200, ..small() });
    let (sq, cq) = (h.pages(4), h.pages(1));
    h.create_pair_at(2, sq, 256, cq, 8);
    let at = h.pages(220);
    let page = |i: u64| at + i * 4096;
    for round in 1..=3u64 {
        let mut expect = HashMap::new();
        for i in 0..200u64 {
            let blocks = |op, slba| Command::new(op, 1).with_blocks(slba, 8);
            let cmd = match i % 10 {
                // Beyond the end; to nowhere; a write of this round's bytes.
                3 => blocks(2, 2041),
                6 => Command { prp1: 0x5000_0000, ..blocks(2, 0) },
                0 => {
                    h.put(page(i), &pattern(round << 16 | i, 4096));
                    Command { prp1: page(i), ..blocks(1, i / 10 * 8) }
                }
                _ => Command { prp1: page(i), ..blocks(2, i / 10 * 8) },
            };
            expect.insert(h.place(2, cmd), i);
        }
        h.ring_queue(2);
        while !expect.is_empty() {
            let done = h.wait(2);
            let i = expect.remove(&done.cid).unwrap();
            let status = match i % 10 {
                3 => Status::LBA_OUT_OF_RANGE,
                6 => Status::DATA_TRANSFER_ERROR,
                _ => Status::SUCCESS,
            };
            assert!(done.status().is(status), "command {i}: {}", done.status());
            if status.is_success() {
                assert_eq!(h.get(page(i), 4096), pattern(round << 16 | (i / 10 * 10), 4096), "command {i}");
            }
        }
    }
}
