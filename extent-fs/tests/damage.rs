//! Every kind of damage, made by a corrupter that knows the format: found, refused by mount, repaired.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]

mod common;

use common::corrupt::{Corrupter, EXTENTS, INODE};
use common::model::{Found, read_all};
use common::ram::RamDisk;
use extent_fs::*;

/// An image with a checkpoint of everything: /d (2), /d/a (3, two blocks), /b (4, two blocks), /e (5).
fn image() -> Corrupter {
    let mut disk = RamDisk::new(2 << 20);
    let options = FormatOptions { log_bytes: Some(64 << 10), ..Default::default() };
    format(&mut disk, &options).unwrap();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    fs.mkdir("/d", &NewInode::directory()).unwrap();
    for (name, byte) in [("/d/a", b'a'), ("/b", b'b')] {
        let f = fs.create(name, &NewInode::file()).unwrap();
        fs.write_at(f, 0, &[byte; 8000]).unwrap();
    }
    fs.mkdir("/e", &NewInode::directory()).unwrap();
    fs.checkpoint_now().unwrap();
    Corrupter { bytes: fs.unmount().unwrap().bytes }
}

fn found(bytes: &[u8]) -> Result<Found, FsError> {
    Filesystem::mount(RamDisk::from_image(bytes.to_vec(), 512), MountOptions::default())
        .map(|mut fs| read_all(&mut fs))
}

fn look(c: &Corrupter) -> Vec<Finding> {
    check(&mut RamDisk::from_image(c.bytes.clone(), 512), &CheckOptions::default()).unwrap().findings
}

/// Checks that the fault is found, that check alone changes nothing, that mount refuses (if `refuses`), and that repair
/// leaves a clean image. Returns what that holds.
fn mended(c: &Corrupter, refuses: bool, force: bool, is: impl Fn(&Fault) -> bool) -> Found {
    let mut disk = RamDisk::from_image(c.bytes.clone(), 512);
    let report = check(&mut disk, &CheckOptions::default()).unwrap();
    assert!(report.findings.iter().any(|f| is(&f.fault)), "{:?}", report.findings);
    assert!(!report.is_clean());
    assert!(disk.bytes == c.bytes, "a mere check wrote");
    assert_eq!(found(&c.bytes).is_err(), refuses);
    let gentle = check(&mut disk, &CheckOptions { repair: true, force: false }).unwrap();
    if force {
        assert!(gentle.findings.iter().any(|f| f.outcome == Outcome::NeedsForce), "{:?}", gentle.findings);
        assert!(disk.bytes == c.bytes, "a repair that needs force wrote without it");
        check(&mut disk, &CheckOptions { repair: true, force: true }).unwrap();
    } else {
        assert!(gentle.is_clean(), "{:?}", gentle.findings);
    }
    let after = check(&mut disk, &CheckOptions::default()).unwrap();
    assert!(after.findings.is_empty(), "after the repair: {:?}", after.findings);
    found(&disk.bytes).unwrap()
}

fn contents<'f>(found: &'f Found, path: &str) -> &'f [u8] {
    let entry = found.iter().find(|f| f.0 == path).unwrap_or_else(|| panic!("{path} is gone: {found:?}"));
    entry.1.as_deref().unwrap()
}

#[test]
fn a_sound_image_has_no_findings() {
    let c = image();
    assert_eq!(look(&c), []);
    let report = check(&mut RamDisk::from_image(c.bytes.clone(), 512), &CheckOptions::default()).unwrap();
    assert_eq!((report.files, report.directories, report.extents, report.used_blocks), (2, 3, 2, 4));
    assert_eq!((c.chunks().len(), c.superblocks().len()), (1, 2));
    let free = report.free_blocks.unwrap();
    assert_eq!(free, 512 - 17 - 16 - 4 - 1);
}

#[test]
fn one_superblock_is_enough() {
    for copy in [0, 1] {
        let mut c = image();
        let at = c.superblocks()[copy].at;
        c.bytes[at + 100] ^= 1;
        let want = found(&image().bytes).unwrap();
        assert_eq!(mended(&c, false, false, |f| *f == Fault::Superblock { copy }), want);
    }
}

#[test]
fn without_a_superblock_it_says_so() {
    let mut c = image();
    for s in c.superblocks() {
        c.bytes[s.at + 100] ^= 1;
    }
    assert!(matches!(found(&c.bytes), Err(FsError::Damaged { .. })));
}

#[test]
fn superblocks_that_were_overwritten_are_missed_where_there_is_a_log() {
    let mut c = image();
    for s in c.superblocks() {
        c.bytes[s.at..s.at + 4096].fill(0);
    }
    for err in [
        found(&c.bytes).unwrap_err(),
        check(&mut RamDisk::from_image(c.bytes.clone(), 512), &CheckOptions::default()).unwrap_err(),
    ] {
        assert!(matches!(&err, FsError::Damaged { what } if what.contains("is the log")), "{err}");
    }
    // Nothing is missed where nothing was.
    let blank = RamDisk::from_image(vec![0; c.bytes.len()], 512);
    let err = Filesystem::mount(blank, MountOptions::default()).map(|_| ()).unwrap_err();
    assert!(matches!(err, FsError::NotCmbfs { .. }), "{err}");
}

#[test]
fn another_version_is_refused_with_both_numbers() {
    let mut c = image();
    for s in c.superblocks() {
        c.put(s.at + 8, &2u32.to_le_bytes());
        c.seal(s);
    }
    let err = found(&c.bytes).unwrap_err();
    assert!(matches!(err, FsError::Version { found: 2, known: 1 }), "{err}");
}

#[test]
fn features_decide_what_may_be_done() {
    // compat at 32, ro-compat at 40, incompat at 48.
    for (at, mounts, writes) in [(32, true, true), (40, true, false), (48, false, false)] {
        let mut c = image();
        for s in c.superblocks() {
            c.put(s.at + at, &0x10u64.to_le_bytes());
            c.seal(s);
        }
        let disk = RamDisk::from_image(c.bytes, 512);
        match Filesystem::mount(disk, MountOptions::default()) {
            Ok(mut fs) => {
                assert!(mounts);
                let made = fs.create("/x", &NewInode::file());
                assert_eq!(made.is_ok(), writes, "{made:?}");
            }
            Err(e) => assert!(!mounts && matches!(e, FsError::Features { bits: 0x10, .. }), "{e}"),
        }
    }
}

#[test]
fn a_lost_chunk_costs_what_it_held_and_no_more() {
    let mut disk = RamDisk::new(24 << 20);
    format(&mut disk, &FormatOptions::default()).unwrap();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    fs.mkdir("/many", &NewInode::directory()).unwrap();
    for i in 0..12_000 {
        let f = fs.create(format!("/many/{i:0>180}"), &NewInode::file()).unwrap();
        if i % 100 == 0 {
            fs.write_at(f, 0, format!("{i}").as_bytes()).unwrap();
        }
    }
    fs.checkpoint_now().unwrap();
    let mut c = Corrupter { bytes: fs.unmount().unwrap().bytes };
    let chunks = c.chunks();
    assert!(chunks.len() > 3, "{}", chunks.len());
    c.bytes[chunks[1].at + 5000] ^= 0x40;
    let found = mended(&c, true, true, |f| matches!(f, Fault::Chunk { index: 1, .. }));
    let files = found.iter().filter(|f| f.1.as_ref().is_some_and(|b| !b.is_empty())).count();
    assert!(files > 30, "only {files} files with contents are left");
}

#[test]
fn a_damaged_record_in_the_middle_of_the_log_is_not_its_end() {
    let mut disk = RamDisk::new(2 << 20);
    format(&mut disk, &FormatOptions::default()).unwrap();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    for name in ["/a", "/b", "/c", "/d"] {
        fs.create(name, &NewInode::file()).unwrap();
        fs.sync_all().unwrap();
    }
    let mut c = Corrupter { bytes: fs.disk().bytes.clone() };
    let records = c.records();
    assert_eq!(records.len(), 4);
    c.bytes[records[1].at + 70] ^= 1;
    let found = mended(&c, true, true, |f| *f == Fault::Record { sequence: 2, last: 4 });
    assert_eq!(found.iter().map(|f| &*f.0).collect::<Vec<_>>(), ["/a"]);
}

#[test]
fn a_damaged_last_record_is_the_end_of_the_log() {
    let mut disk = RamDisk::new(2 << 20);
    format(&mut disk, &FormatOptions::default()).unwrap();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    for name in ["/a", "/b"] {
        fs.create(name, &NewInode::file()).unwrap();
        fs.sync_all().unwrap();
    }
    let mut c = Corrupter { bytes: fs.disk().bytes.clone() };
    let last = *c.records().last().unwrap();
    c.bytes[last.at + 70] ^= 1;
    assert_eq!(look(&c), []);
    assert_eq!(found(&c.bytes).unwrap().len(), 1);
    // An unmount leaves a record behind the last one, so that damage to that one is known for what it is.
    let mut c = Corrupter { bytes: fs.unmount().unwrap().bytes };
    c.bytes[last.at + 70] ^= 1;
    assert!(matches!(look(&c)[0].fault, Fault::Record { sequence: 2, .. }));
}

#[test]
fn what_an_earlier_mount_left_behind_the_end_is_not_taken_up() {
    // Two records are lost by a crash, only the second reaches the medium; a new mount writes another record in the place
    // of the first, with the same sequence.
    let mut disk = RamDisk::new(2 << 20);
    format(&mut disk, &FormatOptions::default()).unwrap();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    fs.create("/a", &NewInode::file()).unwrap();
    fs.sync_all().unwrap();
    let before = fs.disk().bytes.clone();
    fs.create("/x", &NewInode::file()).unwrap();
    fs.sync_all().unwrap();
    fs.create("/y", &NewInode::file()).unwrap();
    fs.sync_all().unwrap();
    let c = Corrupter { bytes: fs.disk().bytes.clone() };
    let records = c.records();
    // The second record claims to know the first durable; a device that lies about flushes makes such a medium.
    let (lost, left) = (records[1], records[2]);
    let mut bytes = before;
    let copy = Corrupter { bytes: c.bytes.clone() };
    bytes[left.at..left.at + 512].copy_from_slice(&copy.bytes[left.at..left.at + 512]);
    let mut c = Corrupter { bytes };
    c.put(left.at + 16, &1u64.to_le_bytes());
    c.seal(left);
    let mut fs = Filesystem::mount(RamDisk::from_image(c.bytes, 512), MountOptions::default()).unwrap();
    assert_eq!(read_all(&mut fs).len(), 1);
    fs.create("/z", &NewInode::file()).unwrap();
    fs.sync_all().unwrap();
    let c = Corrupter { bytes: fs.disk().bytes.clone() };
    assert_eq!(c.records()[1].at, lost.at);
    let names: Vec<_> = found(&c.bytes).unwrap().into_iter().map(|f| f.0).collect();
    assert_eq!(names, ["/a", "/z"]);
}

#[test]
fn an_older_filesystem_on_the_device_comes_back_in_no_part() {
    // The same log, the same places, the same sequences: only the uuid in every checksum is another.
    let make = |disk: &mut RamDisk, uuid: u8| {
        let log_bytes = Some(64 << 10);
        let options =
            FormatOptions { uuid: Some([uuid; 16]), time: Some(1), log_bytes, ..Default::default() };
        format(disk, &options).unwrap();
    };
    let mut disk = RamDisk::new(2 << 20);
    make(&mut disk, 1);
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    for name in ["/a", "/b", "/c"] {
        fs.create(name, &NewInode::file()).unwrap();
        fs.sync_all().unwrap();
    }
    let mut disk = fs.disk().clone();
    let log = 17 * 4096..33 * 4096;
    let older = disk.bytes[log.clone()].to_vec();
    make(&mut disk, 2);
    // The log of the older one is written over with zeros; the checksums would do without.
    disk.bytes[log].copy_from_slice(&older);
    assert_eq!(check(&mut disk, &CheckOptions::default()).unwrap().records, 0);
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    assert_eq!(read_all(&mut fs), []);
}

#[test]
fn a_placement_of_a_newer_program_is_no_damage_and_is_kept() {
    let mut c = image();
    let item = c.item(INODE, 3);
    c.put(item.body + 63, &[99]);
    c.seal(item.inside);
    assert_eq!(look(&c), []);
    let mut fs = Filesystem::mount(RamDisk::from_image(c.bytes, 512), MountOptions::default()).unwrap();
    assert_eq!(fs.stat(3).unwrap().placement, 99);
    fs.set_attr(3, &SetAttr { mode: Some(0o600), ..SetAttr::default() }).unwrap();
    fs.checkpoint_now().unwrap();
    let fs = Filesystem::mount(fs.unmount().unwrap(), MountOptions::default()).unwrap();
    assert_eq!((fs.stat(3).unwrap().placement, fs.stat(3).unwrap().mode), (99, 0o600));
}

#[test]
fn a_repair_keeps_placements() {
    let mut c = image();
    for (ino, placement) in [(1, 2), (3, 3)] {
        let item = c.item(INODE, ino);
        c.put(item.body + 63, &[placement]);
        c.seal(item.inside);
    }
    let item = c.item(INODE, 3);
    c.put(item.body + 56, &9u32.to_le_bytes());
    c.seal(item.inside);
    let mut disk = RamDisk::from_image(c.bytes, 512);
    let report = check(&mut disk, &CheckOptions { repair: true, force: false }).unwrap();
    assert!(!report.findings.is_empty() && report.is_clean(), "{:?}", report.findings);
    let fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    assert_eq!([1, 3].map(|ino| fs.stat(ino).unwrap().placement), [2, 3]);
}

#[test]
fn an_image_without_placements_gets_the_feature_with_its_next_checkpoint() {
    let mut c = image();
    for s in c.superblocks() {
        assert_eq!(c.u64(s.at + 32), 1, "mkfs says that inodes have placements");
        c.put(s.at + 32, &0u64.to_le_bytes());
        c.seal(s);
    }
    let mut fs = Filesystem::mount(RamDisk::from_image(c.bytes, 512), MountOptions::default()).unwrap();
    fs.set_attr(3, &SetAttr { placement: Some(2), ..SetAttr::default() }).unwrap();
    fs.checkpoint_now().unwrap();
    let c = Corrupter { bytes: fs.unmount().unwrap().bytes };
    assert!(c.superblocks().iter().all(|s| c.u64(s.at + 32) == 1));
    assert_eq!(c.bytes[c.item(INODE, 3).body + 63], 2);
}

#[test]
fn link_counts() {
    let mut c = image();
    let item = c.item(INODE, 3);
    c.put(item.body + 56, &9u32.to_le_bytes());
    c.seal(item.inside);
    let found = mended(&c, true, false, |f| *f == Fault::Links { ino: 3, found: 1, says: 9 });
    assert_eq!(contents(&found, "/d/a"), [b'a'; 8000]);
}

#[test]
fn names_without_inodes() {
    let mut c = image();
    let (at, inside) = c.entry(2, "a");
    c.put(at, &99u64.to_le_bytes());
    c.seal(inside);
    let found = mended(&c, true, false, |f| matches!(f, Fault::Dangling { dir: 2, ino: 99, .. }));
    // The file whose name that was is not lost.
    assert_eq!(contents(&found, "/lost+found/inode-3"), [b'a'; 8000]);
}

#[test]
fn a_directory_with_two_names() {
    let mut c = image();
    let (at, inside) = c.entry(2, "a");
    c.put(at, &5u64.to_le_bytes());
    c.seal(inside);
    let found = mended(&c, true, false, |f| matches!(f, Fault::SecondName { ino: 5, .. }));
    assert_eq!(contents(&found, "/lost+found/inode-3"), [b'a'; 8000]);
}

#[test]
fn a_directory_that_does_not_know_where_it_is() {
    let mut c = image();
    let item = c.item(INODE, 2);
    c.put(item.body + 40, &5u64.to_le_bytes());
    c.seal(item.inside);
    let found = mended(&c, true, false, |f| *f == Fault::Parent { ino: 2, dir: 1, says: 5 });
    assert_eq!(contents(&found, "/d/a"), [b'a'; 8000]);
}

#[test]
fn directories_in_a_circle() {
    // /d's name in the root goes to /e, and /d/a becomes /d itself: /d is its own child.
    let mut c = image();
    let (outer, inside) = c.entry(1, "d");
    let (inner, _) = c.entry(2, "a");
    let item = c.item(INODE, 2);
    c.put(outer, &4u64.to_le_bytes());
    c.put(inner, &2u64.to_le_bytes());
    c.put(item.body + 40, &2u64.to_le_bytes());
    c.seal(inside);
    let found = mended(&c, true, false, |f| *f == Fault::Unreachable { ino: 2 });
    assert_eq!(contents(&found, "/b"), [b'b'; 8000]);
    assert_eq!(contents(&found, "/lost+found/inode-3"), [b'a'; 8000]);
    assert!(found.iter().any(|f| f.0 == "/lost+found/inode-2"));
}

#[test]
fn blocks_of_two_files() {
    let mut c = image();
    let a = c.item(EXTENTS, 3);
    let b = c.item(EXTENTS, 4);
    let disk = c.u64(a.body + 16 + 8);
    c.put(b.body + 16 + 8, &(disk + 1).to_le_bytes());
    c.seal(b.inside);
    let found = mended(&c, true, false, |f| matches!(f, Fault::Overlap { blocks: 1, .. }));
    assert_eq!(contents(&found, "/d/a"), [b'a'; 8000]);
    assert_eq!(contents(&found, "/b")[..3904], [b'a'; 3904], "what was readable there stays readable");
}

#[test]
fn blocks_that_are_not_for_files() {
    let mut c = image();
    let a = c.item(EXTENTS, 3);
    c.put(a.body + 16 + 8, &3u64.to_le_bytes());
    c.seal(a.inside);
    let found = mended(&c, true, false, |f| *f == Fault::OutOfRange { ino: 3, block: 3, blocks: 2 });
    assert_eq!(contents(&found, "/d/a"), [0; 8000]);
    assert_eq!(contents(&found, "/b"), [b'b'; 8000]);
}

#[test]
fn written_blocks_behind_the_end() {
    let mut c = image();
    let a = c.item(INODE, 3);
    c.put(a.body + 8, &100u64.to_le_bytes());
    c.seal(a.inside);
    // If it is the size that is wrong, those blocks are the file's last ones: not to be given up unasked.
    let found = mended(&c, true, true, |f| *f == Fault::BehindEnd { ino: 3, block: 1 });
    assert_eq!(contents(&found, "/d/a"), [b'a'; 100]);
}

#[test]
fn a_checkpoint_with_too_few_inodes() {
    let mut c = image();
    for s in c.superblocks() {
        c.put(s.at + 144, &6u64.to_le_bytes());
        c.seal(s);
    }
    let want = found(&image().bytes).unwrap();
    assert_eq!(mended(&c, true, true, |f| *f == Fault::Inodes { found: 5, expected: 6 }), want);
}

#[test]
fn an_item_that_makes_no_sense() {
    let mut c = image();
    let a = c.item(EXTENTS, 3);
    c.bytes[a.body - 8] = 99;
    c.seal(a.inside);
    let found = mended(&c, true, true, |f| matches!(f, Fault::Item { .. }));
    assert_eq!(contents(&found, "/b"), [b'b'; 8000]);
}

#[test]
fn no_root_directory() {
    let mut c = image();
    let root = c.item(INODE, 1);
    c.bytes[root.body + 62] = 1;
    c.seal(root.inside);
    let found = mended(&c, true, true, |f| *f == Fault::Root);
    assert_eq!(contents(&found, "/lost+found/inode-2/a"), [b'a'; 8000]);
    assert_eq!(contents(&found, "/lost+found/inode-4"), [b'b'; 8000]);
}
