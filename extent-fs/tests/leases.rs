//! Layouts and leases: what is handed out, what is in whose way, and that nothing is reused under a holder.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::ram::RamDisk;
use extent_fs::*;
use nvme_driver::disk::Disk;

const GRACE: u64 = 1000;

struct Rig {
    fs: Filesystem<RamDisk>,
    now: Arc<AtomicU64>,
}

fn rig() -> Rig {
    let mut disk = RamDisk::new(4 << 20);
    format(&mut disk, &FormatOptions::default()).unwrap();
    mount(disk)
}

fn mount(disk: RamDisk) -> Rig {
    let now = Arc::new(AtomicU64::new(1));
    let clock = Arc::clone(&now);
    let options = MountOptions {
        clock: Box::new(move || clock.load(Ordering::Relaxed)),
        device_generation: 5,
        lease_grace: GRACE,
        ..Default::default()
    };
    Rig { fs: Filesystem::mount(disk, options).unwrap(), now }
}

impl Rig {
    fn file(&mut self, name: &str, blocks: usize, byte: u8) -> Ino {
        let f = self.fs.create(name, &NewInode::file()).unwrap();
        self.fs.write_at(f, 0, &vec![byte; blocks * 4096]).unwrap();
        self.fs.sync(f).unwrap();
        f
    }

    fn read(&mut self, ino: Ino) -> Vec<u8> {
        let mut bytes = vec![0; self.fs.stat(ino).unwrap().size as usize];
        self.fs.read_at(ino, 0, &mut bytes).unwrap();
        bytes
    }

    /// What a direct writer does.
    fn write_direct(&mut self, layout: &Layout, byte: u8) {
        for e in &layout.extents {
            self.fs.disk_mut().write(e.lba, &vec![byte; e.bytes() as usize]).unwrap();
        }
    }

    fn later(&self, by: u64) {
        self.now.fetch_add(by, Ordering::Relaxed);
    }
}

fn conflict<T>(r: Result<T, FsError>) -> u64 {
    match r.map(|_| ()).unwrap_err() {
        FsError::LeaseConflict { lease, .. } => lease,
        e => panic!("{e}"),
    }
}

#[test]
fn mapping_for_write_allocates_and_stays_invisible_until_committed() {
    let mut r = rig();
    let f = r.fs.create("/f", &NewInode::file()).unwrap();
    let layout = r.fs.map_blocks(f, 0, 20_000, Access::Write).unwrap();
    assert_eq!(layout.extents.iter().map(|e| e.blocks).sum::<u64>(), 5);
    assert!(layout.extents.iter().all(|e| e.state == BlockState::Unwritten));
    assert_eq!((layout.lease.device_generation, layout.uuid), (5, r.fs.uuid()));
    r.write_direct(&layout, 9);
    assert_eq!(r.fs.stat(f).unwrap().size, 0);
    r.fs.truncate(f, 20_000).unwrap();
    r.fs.release(layout.lease).unwrap();
    assert_eq!(r.read(f), vec![0; 20_000]);
}

#[test]
fn committed_blocks_are_the_file() {
    let mut r = rig();
    let f = r.fs.create("/f", &NewInode::file()).unwrap();
    let layout = r.fs.map_blocks(f, 0, 20_000, Access::Write).unwrap();
    r.write_direct(&layout, 9);
    r.fs.commit_blocks(layout.lease, &layout.extents, Some(10_000)).unwrap();
    r.fs.sync(f).unwrap();
    r.fs.release(layout.lease).unwrap();
    let mut r = mount(r.fs.disk().clone());
    let f = r.fs.lookup("/f").unwrap();
    assert_eq!(r.read(f), vec![9; 10_000]);
    // What the holder wrote behind the end is not to be seen, however the file grows.
    r.fs.truncate(f, 30_000).unwrap();
    assert!(r.read(f)[10_000..].iter().all(|&b| b == 0));
    let states: Vec<_> =
        r.fs.query_blocks(f, 0, 30_000).unwrap().iter().map(|e| (e.blocks, e.state)).collect();
    assert_eq!(states, [(3, BlockState::Written), (2, BlockState::Unwritten), (3, BlockState::Hole)]);
}

#[test]
fn a_commit_of_blocks_that_the_file_lost_is_refused() {
    let mut r = rig();
    let f = r.file("/f", 4, 1);
    let layout = r.fs.map_blocks(f, 0, 16_384, Access::Write).unwrap();
    r.fs.truncate(f, 0).unwrap();
    let err = r.fs.commit_blocks(layout.lease, &layout.extents, Some(16_384)).unwrap_err();
    assert_eq!(err.errno(), 116, "{err}");
    assert_eq!(r.fs.stat(f).unwrap().size, 0);
}

#[test]
fn readers_share_writers_do_not() {
    let mut r = rig();
    let f = r.file("/f", 8, 1);
    let a = r.fs.map_blocks(f, 0, 8192, Access::Read).unwrap().lease;
    let b = r.fs.map_blocks(f, 4096, 8192, Access::Read).unwrap().lease;
    let far = r.fs.map_blocks(f, 16_384, 4096, Access::Write).unwrap().lease;
    assert!(r.fs.take_recalls().is_empty());
    assert_eq!(conflict(r.fs.map_blocks(f, 0, 4096, Access::Write)), a.id);
    let recalls = r.fs.take_recalls();
    assert_eq!(recalls.len(), 1);
    assert_eq!((recalls[0].lease, recalls[0].ranges.clone()), (a, vec![(0, 4096)]));
    assert!(r.fs.take_recalls().is_empty(), "told once");
    // Giving back what was asked for is enough; the rest stays.
    r.fs.release_range(a, 0, 4096).unwrap();
    let w = r.fs.map_blocks(f, 0, 4096, Access::Write).unwrap().lease;
    assert_eq!(conflict(r.fs.map_blocks(f, 4096, 4096, Access::Write)), a.id);
    // Cached I/O minds writers, cached writes mind readers too; other ranges go on.
    let mut buf = [0; 4096];
    assert_eq!(conflict(r.fs.read_at(f, 0, &mut buf)), w.id);
    assert_eq!(conflict(r.fs.read_at(f, 16_384, &mut buf)), far.id);
    r.fs.read_at(f, 8192, &mut buf).unwrap();
    assert_eq!(conflict(r.fs.write_at(f, 8192, b"x")), b.id);
    r.fs.write_at(f, 12_288, b"x").unwrap();
    for lease in [a, b, w, far] {
        r.fs.release(lease).unwrap();
        assert_eq!(r.fs.release(lease).unwrap_err().errno(), 116);
    }
    r.fs.write_at(f, 0, b"x").unwrap();
}

#[test]
fn blocks_of_a_layout_are_not_reused_before_release() {
    let mut r = rig();
    let f = r.file("/f", 100, 1);
    let free = r.fs.statfs().free;
    let layout = r.fs.map_blocks(f, 0, 100 * 4096, Access::Write).unwrap();
    // The holder's own truncate recalls its own lease.
    r.fs.truncate(f, 0).unwrap();
    r.fs.sync_all().unwrap();
    assert_eq!(r.fs.take_recalls().len(), 1);
    assert_eq!((r.fs.statfs().free, r.fs.statfs().held), (free, 100));
    assert_eq!(r.fs.statfs().pending, 0, "no sync frees what a layout is out of");
    // Others fill the disk; none of the blocks may be theirs.
    let g = r.fs.create("/g", &NewInode::file()).unwrap();
    let mut at = 0;
    while r.fs.write_at(g, at, &[2; 4096]).is_ok() {
        at += 4096;
    }
    // Nor are they trimmed: what the device does with a trimmed block that is written to is not ours to find out.
    r.write_direct(&layout, 3);
    r.fs.trim().unwrap();
    let mut block = [0; 4096];
    for e in &layout.extents {
        r.fs.disk_mut().read(e.lba, &mut block).unwrap();
        assert!(block == [3; 4096], "a block under a layout was trimmed");
    }
    assert!(r.read(g).iter().all(|&b| b == 2), "a late write of the holder landed in another file");
    r.fs.release(layout.lease).unwrap();
    assert_eq!(r.fs.statfs().held, 0);
    r.fs.write_at(g, at, &[2; 4096]).unwrap();
}

#[test]
fn unlink_holds_blocks_until_the_silent_holder_is_fenced() {
    let mut r = rig();
    let f = r.file("/f", 10, 1);
    let lease = r.fs.map_blocks(f, 0, 4096, Access::Read).unwrap().lease;
    r.fs.unlink("/f").unwrap();
    r.fs.sync_all().unwrap();
    assert!(r.fs.statfs().held > 0);
    assert_eq!(r.fs.take_recalls()[0].lease, lease);
    assert_eq!(r.fs.next_lease_deadline(), Some(1 + GRACE));
    r.later(GRACE - 1);
    assert_eq!(r.fs.expire_leases(|_| panic!("too early")), 0);
    r.later(1);
    assert_eq!(r.fs.expire_leases(|_| false), 0);
    assert!(r.fs.statfs().held > 0, "the fence failed: nothing may be reused");
    let mut fenced = Vec::new();
    let ended = r.fs.expire_leases(|late| {
        fenced.push(late.lease);
        true
    });
    assert_eq!((ended, fenced), (1, vec![lease]));
    assert_eq!(r.fs.statfs().held, 0);
    assert_eq!(r.fs.release(lease).unwrap_err().errno(), 116);
}

#[test]
fn blocks_freed_under_a_lease_wait_for_the_record_too() {
    let mut r = rig();
    let f = r.file("/f", 10, 1);
    let lease = r.fs.map_blocks(f, 0, 40_960, Access::Read).unwrap().lease;
    r.fs.unlink("/f").unwrap();
    r.fs.release(lease).unwrap();
    let before = r.fs.statfs();
    assert_eq!((before.held, before.pending), (10, 10), "the freeing record is not durable yet");
    r.fs.sync_all().unwrap();
    let after = r.fs.statfs();
    assert_eq!((after.held, after.pending, after.free), (0, 0, before.free + 10));
}

#[test]
fn a_lease_is_shared_by_processes_and_ends_with_the_last() {
    let mut r = rig();
    let f = r.file("/f", 1, 1);
    let lease = r.fs.map_blocks(f, 0, 4096, Access::Write).unwrap().lease;
    r.fs.share_lease(lease).unwrap();
    r.fs.release(lease).unwrap();
    assert_eq!(conflict(r.fs.write_at(f, 0, b"x")), lease.id);
    r.fs.release(lease).unwrap();
    r.fs.write_at(f, 0, b"x").unwrap();
}

#[test]
fn a_stale_device_generation_is_refused() {
    let mut r = rig();
    let f = r.file("/f", 4, 1);
    let layout = r.fs.map_blocks(f, 0, 16_384, Access::Write).unwrap();
    r.fs.set_device_generation(6);
    assert_eq!(r.fs.commit_blocks(layout.lease, &layout.extents, None).unwrap_err().errno(), 116);
    assert_eq!(r.fs.release(layout.lease).unwrap_err().errno(), 116);
    let again = r.fs.map_blocks(f, 0, 16_384, Access::Write).unwrap();
    assert_eq!(again.lease.device_generation, 6);
    let forged = Lease { device_generation: 5, ..again.lease };
    assert_eq!(r.fs.commit_blocks(forged, &again.extents, None).unwrap_err().errno(), 116);
}

#[test]
fn a_lease_covers_no_more_than_its_range() {
    let mut r = rig();
    let f = r.file("/f", 4, 1);
    let layout = r.fs.map_blocks(f, 0, 4096, Access::Write).unwrap();
    let mut wide = layout.extents.clone();
    wide[0].blocks = 2;
    assert_eq!(r.fs.commit_blocks(layout.lease, &wide, None).unwrap_err().errno(), 22);
    let reader = r.fs.map_blocks(f, 8192, 4096, Access::Read).unwrap();
    assert_eq!(r.fs.commit_blocks(reader.lease, &reader.extents, None).unwrap_err().errno(), 22);
}

#[test]
fn a_recall_names_no_more_than_what_is_in_the_way() {
    let mut r = rig();
    let f = r.file("/f", 16, 1);
    let lease = r.fs.map_blocks(f, 8192, 16_384, Access::Write).unwrap().lease;
    // Somebody reads from before the lease to its second block, then one block of that, then the rest.
    let mut buf = [0; 4096];
    r.fs.make_way(f, 0, 16_384, Access::Read).unwrap_err();
    assert_eq!(r.fs.take_recalls()[0].ranges, [(8192, 8192)]);
    r.fs.read_at(f, 12_288, &mut buf).unwrap_err();
    assert!(r.fs.take_recalls().is_empty(), "it knows already");
    r.fs.truncate(f, 20_480).unwrap();
    assert_eq!(r.fs.take_recalls()[0].ranges, [(8192, 8192), (20_480, 4096)]);
    r.fs.make_way(f, 40_960, 4096, Access::Write).unwrap();
    // The middle is the holder's still.
    r.fs.release_range(lease, 8192, 8192).unwrap();
    r.fs.release_range(lease, 20_480, 4096).unwrap();
    assert_eq!(r.fs.next_lease_deadline(), None);
    let left = r.fs.layout(lease).unwrap();
    assert_eq!(left.extents.iter().map(|e| (e.file_offset, e.blocks)).collect::<Vec<_>>(), [(16_384, 1)]);
    r.fs.make_way(f, 8192, 8192, Access::Write).unwrap();
}

#[test]
fn a_silent_holder_that_cannot_be_fenced_keeps_its_blocks_and_nobody_waiting() {
    let mut r = rig();
    let f = r.file("/f", 4, 1);
    // Four written blocks and four unwritten ones.
    let layout = r.fs.map_blocks(f, 0, 32_768, Access::Write).unwrap();
    let mut buf = [0; 4096];
    assert_eq!(conflict(r.fs.read_at(f, 0, &mut buf)), layout.lease.id);
    r.later(GRACE);
    assert_eq!(r.fs.expire_leases(|_| false), 0);
    r.fs.sever(layout.lease).unwrap();
    assert_eq!(r.fs.verify(), []);
    // The file goes on elsewhere; what the holder writes from here on shows nowhere.
    r.write_direct(&layout, 9);
    assert_eq!(r.read(f), vec![1; 16_384]);
    r.fs.write_at(f, 0, &[2; 32_768]).unwrap();
    r.fs.sync_all().unwrap();
    assert_eq!(r.read(f), vec![2; 32_768]);
    let now = r.fs.query_blocks(f, 0, 32_768).unwrap();
    assert!(now.iter().all(|n| {
        layout.extents.iter().all(|e| n.lba + n.bytes() / 512 <= e.lba || e.lba + e.bytes() / 512 <= n.lba)
    }));
    // The blocks are nobody's until it answers, and it is told what it is no more.
    assert_eq!(r.fs.statfs().held, 8);
    let g = r.fs.create("/g", &NewInode::file()).unwrap();
    let mut at = 0;
    while r.fs.write_at(g, at, &[4; 4096]).is_ok() {
        at += 4096;
    }
    r.write_direct(&layout, 9);
    assert!(r.read(g).iter().all(|&b| b == 4), "a severed holder wrote into another file");
    assert_eq!(r.fs.commit_blocks(layout.lease, &layout.extents, None).unwrap_err().errno(), 116);
    assert_eq!(r.fs.release_range(layout.lease, 0, 4096).unwrap_err().errno(), 116);
    assert_eq!(r.fs.share_lease(layout.lease).unwrap_err().errno(), 116);
    r.fs.release(layout.lease).unwrap();
    assert_eq!(r.fs.statfs().held, 0);
    r.fs.write_at(g, at, &[4; 4096]).unwrap();
    // All of that is what a mount after a kill finds too.
    r.fs.sync_all().unwrap();
    let mut r = mount(r.fs.disk().clone());
    assert_eq!(r.read(f), vec![2; 32_768]);
}

#[test]
fn a_severed_reader_costs_nothing_until_the_file_changes() {
    let mut r = rig();
    let f = r.file("/f", 8, 1);
    let before = r.fs.query_blocks(f, 0, 32_768).unwrap();
    let lease = r.fs.map_blocks(f, 0, 32_768, Access::Read).unwrap().lease;
    assert_eq!(conflict(r.fs.write_at(f, 0, b"x")), lease.id);
    r.fs.sever(lease).unwrap();
    assert_eq!(r.fs.query_blocks(f, 0, 32_768).unwrap(), before);
    r.fs.write_at(f, 0, b"x").unwrap();
    // It may still be reading there: nobody else's bytes come to lie where it does.
    r.fs.truncate(f, 0).unwrap();
    r.fs.sync_all().unwrap();
    assert!(r.fs.statfs().held >= 7, "{:?}", r.fs.statfs());
    r.fs.release(lease).unwrap();
    assert_eq!(r.fs.statfs().held, 0);
}
