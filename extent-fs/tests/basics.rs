//! The calls one by one: names, contents, attributes, and that all of it is there after a remount.
#![allow(clippy::unwrap_used, reason = "a failed call fails the test")]

mod common;

use common::ram::RamDisk;
use extent_fs::*;

fn fresh(mib: usize) -> Filesystem<RamDisk> {
    let mut disk = RamDisk::new(mib << 20);
    format(&mut disk, &FormatOptions::default()).unwrap();
    Filesystem::mount(disk, MountOptions::default()).unwrap()
}

fn remount(fs: Filesystem<RamDisk>) -> Filesystem<RamDisk> {
    Filesystem::mount(fs.unmount().unwrap(), MountOptions::default()).unwrap()
}

fn contents(fs: &mut Filesystem<RamDisk>, path: &str) -> Vec<u8> {
    let ino = fs.lookup(path).unwrap();
    let mut bytes = vec![0xaa; fs.stat(ino).unwrap().size as usize + 10];
    let n = fs.read_at(ino, 0, &mut bytes).unwrap();
    bytes.truncate(n);
    bytes
}

fn names(fs: &Filesystem<RamDisk>, path: &str) -> Vec<String> {
    let dir = fs.lookup(path).unwrap();
    fs.readdir(dir).unwrap().iter().map(|e| String::from_utf8_lossy(&e.name).into_owned()).collect()
}

#[test]
fn files_and_directories_survive_a_remount() {
    let mut fs = fresh(4);
    fs.mkdir("/a", &NewInode::directory()).unwrap();
    fs.mkdir("/a/b", &NewInode::directory()).unwrap();
    let f = fs.create("/a/b/f", &NewInode { mode: 0o600, uid: 7, gid: 8 }).unwrap();
    let data: Vec<u8> = (0..10_000u32).map(|i| (i % 251) as u8).collect();
    fs.write_at(f, 100, &data).unwrap();
    fs.create("/empty", &NewInode::file()).unwrap();
    let before = fs.stat(f).unwrap();
    let mut fs = remount(fs);
    let f = fs.lookup("a//b/./f").unwrap();
    assert_eq!(fs.stat(f).unwrap(), before);
    assert_eq!((before.mode, before.uid, before.gid, before.size), (0o600, 7, 8, 10_100));
    let mut want = vec![0; 100];
    want.extend_from_slice(&data);
    assert_eq!(contents(&mut fs, "/a/b/f"), want);
    assert_eq!(contents(&mut fs, "/empty"), b"");
    assert_eq!(names(&fs, "/"), ["a", "empty"]);
    assert_eq!(fs.stat(fs.lookup("/a").unwrap()).unwrap().nlink, 3);
    assert_eq!(fs.lookup("/a/b/..").unwrap(), fs.lookup("/a").unwrap());
}

#[test]
fn a_kill_loses_nothing_that_was_synced() {
    let mut fs = fresh(4);
    let f = fs.create("/f", &NewInode::file()).unwrap();
    fs.write_at(f, 0, b"hello").unwrap();
    fs.sync(f).unwrap();
    fs.write_at(f, 0, b"HELLO").unwrap();
    fs.create("/g", &NewInode::file()).unwrap();
    let image = fs.disk().clone();
    drop(fs);
    let mut fs = Filesystem::mount(image, MountOptions::default()).unwrap();
    assert_eq!(contents(&mut fs, "/f"), b"hello");
    assert_eq!(names(&fs, "/"), ["f"]);
}

#[test]
fn rename_replaces_and_unlink_waits_for_close() {
    let mut fs = fresh(4);
    for (name, text) in [("/a", "aa"), ("/b", "bb")] {
        let f = fs.create(name, &NewInode::file()).unwrap();
        fs.write_at(f, 0, text.as_bytes()).unwrap();
    }
    let b = fs.lookup("/b").unwrap();
    fs.open(b).unwrap();
    fs.rename("/a", "/b").unwrap();
    assert_eq!(names(&fs, "/"), ["b"]);
    assert_eq!(contents(&mut fs, "/b"), b"aa");
    let mut old = [0; 2];
    fs.read_at(b, 0, &mut old).unwrap();
    assert_eq!(&old, b"bb");
    assert_eq!(fs.stat(b).unwrap().nlink, 0);
    fs.write_at(b, 0, b"cc").unwrap();
    fs.sync_all().unwrap();
    let used = fs.statfs().used;
    fs.close(b).unwrap();
    assert_eq!(fs.stat(b).unwrap_err().errno(), 2);
    fs.sync_all().unwrap();
    assert_eq!(fs.statfs().used, used - 1);
    assert_eq!(fs.statfs().held, 0);
}

#[test]
fn posix_refusals() {
    let mut fs = fresh(4);
    let d = NewInode::directory();
    fs.mkdir("/d", &d).unwrap();
    fs.mkdir("/d/e", &d).unwrap();
    fs.create("/f", &NewInode::file()).unwrap();
    let errno = |r: Result<(), FsError>| r.unwrap_err().errno();
    assert_eq!(errno(fs.rmdir("/d")), 39);
    assert_eq!(errno(fs.rmdir("/f")), 20);
    assert_eq!(errno(fs.unlink("/d")), 21);
    assert_eq!(errno(fs.unlink("/x")), 2);
    assert_eq!(errno(fs.rename("/d", "/d/e/x")), 22);
    assert_eq!(errno(fs.rename("/f", "/d")), 21);
    assert_eq!(errno(fs.rename("/d", "/f")), 20);
    assert_eq!(errno(fs.mkdir("/f", &d).map(|_| ())), 17);
    assert_eq!(errno(fs.mkdir("/", &d).map(|_| ())), 17);
    assert_eq!(errno(fs.mkdir("/f/x", &d).map(|_| ())), 20);
    assert_eq!(errno(fs.create("/d/..", &NewInode::file()).map(|_| ())), 17);
    assert_eq!(errno(fs.rmdir("/d/.")), 22);
    assert_eq!(errno(fs.create([b'x'; 256], &NewInode::file()).map(|_| ())), 36);
    let f = fs.lookup("/f").unwrap();
    assert_eq!(errno(fs.write_at(f, u64::MAX - 2, b"xyz")), 27);
    assert_eq!(errno(fs.truncate(ROOT, 0)), 21);
}

#[test]
fn truncate_and_punch_leave_zeros() {
    let mut fs = fresh(4);
    let f = fs.create("/f", &NewInode::file()).unwrap();
    fs.write_at(f, 0, &[7; 20_000]).unwrap();
    fs.truncate(f, 5_000).unwrap();
    fs.truncate(f, 9_000).unwrap();
    let mut want = vec![7; 5_000];
    want.resize(9_000, 0);
    assert_eq!(contents(&mut fs, "/f"), want);
    fs.fallocate(f, 100, 5_000, Falloc::PunchHole).unwrap();
    want[100..5_000].fill(0);
    let mut fs = remount(fs);
    assert_eq!(contents(&mut fs, "/f"), want);
    let f = fs.lookup("/f").unwrap();
    let used = fs.statfs().used;
    fs.fallocate(f, 8_192, 40_960, Falloc::KeepSize).unwrap();
    assert_eq!(fs.statfs().used, used + 10);
    fs.fallocate(f, 0, 49_152, Falloc::Extend).unwrap();
    want.resize(49_152, 0);
    assert_eq!(contents(&mut remount(fs), "/f"), want);
}

#[test]
fn a_foreign_device_is_named_as_such() {
    let err = Filesystem::mount(RamDisk::new(1 << 20), MountOptions::default()).map(|_| ()).unwrap_err();
    assert!(matches!(err, FsError::NotCmbfs { .. }), "{err}");
    let mut disk = RamDisk::new(1 << 20);
    assert!(!probe(&mut disk).unwrap());
    format(&mut disk, &FormatOptions::default()).unwrap();
    assert!(probe(&mut disk).unwrap());
    assert!(format(&mut RamDisk::new(4096), &FormatOptions::default()).is_err());
}

#[test]
fn many_checkpoints_and_a_wrapping_log() {
    let mut disk = RamDisk::new(2 << 20);
    format(&mut disk, &FormatOptions { log_bytes: Some(64 << 10), ..Default::default() }).unwrap();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    for round in 0..2_000u32 {
        let name = format!("/f{}", round % 37);
        let f = fs.lookup(&name).or_else(|_| fs.create(&name, &NewInode::file())).unwrap();
        fs.write_at(f, u64::from(round % 5) * 1000, &round.to_le_bytes()).unwrap();
        fs.sync(f).unwrap();
        if round % 11 == 0 {
            fs.unlink(&name).unwrap();
        }
        if round % 100 == 0 {
            let image = fs.disk().clone();
            let all = names(&fs, "/");
            fs.sync_all().unwrap();
            let mut copy = Filesystem::mount(fs.disk().clone(), MountOptions::default()).unwrap();
            assert_eq!(names(&copy, "/"), all);
            for n in all {
                assert_eq!(contents(&mut copy, &n), contents(&mut fs, &n));
            }
            drop(image);
        }
    }
}

#[test]
fn a_full_disk_loses_nothing_and_unlink_works() {
    let mut disk = RamDisk::new(1 << 20);
    format(&mut disk, &FormatOptions { log_bytes: Some(64 << 10), ..Default::default() }).unwrap();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    let total = fs.statfs();
    for round in 0..10 {
        let mut made = Vec::new();
        let full = loop {
            let name = format!("/r{round}-{}", made.len());
            let f = match fs.create(&name, &NewInode::file()) {
                Ok(f) => f,
                Err(e) => break e,
            };
            made.push(name);
            if let Err(e) = fs.write_at(f, 0, &[round; 6000]) {
                break e;
            }
            fs.sync(f).unwrap();
        };
        assert!(matches!(full, FsError::NoSpace { .. }), "{full}");
        assert!(made.len() > 50, "{}", made.len());
        fs.sync_all().unwrap();
        fs = Filesystem::mount(fs.disk().clone(), MountOptions::default()).unwrap();
        for name in &made[..made.len() - 1] {
            assert_eq!(contents(&mut fs, name), [round; 6000]);
        }
        for name in made {
            fs.unlink(&name).unwrap();
        }
        fs.sync_all().unwrap();
        assert_eq!(fs.statfs(), total);
    }
}

#[test]
fn changes_while_a_checkpoint_is_gathered() {
    let mut disk = RamDisk::new(8 << 20);
    format(&mut disk, &FormatOptions { log_bytes: Some(64 << 10), ..Default::default() }).unwrap();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    let name = |i: u32| format!("/{i:0>200}");
    for i in 0..1500 {
        fs.create(name(i), &NewInode::file()).unwrap();
    }
    // Later syncs change inodes that the checkpoint has not come to yet, and remove some.
    for round in 0..300u32 {
        let i = 1499 - (round * 7) % 1500;
        if let Ok(f) = fs.lookup(name(i)) {
            fs.write_at(f, 0, &round.to_le_bytes()).unwrap();
        }
        if round % 3 == 0 && fs.lookup(name(i)).is_ok() {
            fs.rename(name(i), format!("/moved-{round}")).unwrap();
        }
        if round % 5 == 0 {
            let _ = fs.unlink(name(1499 - (round * 11) % 1500));
        }
        fs.sync_all().unwrap();
        if round % 20 == 19 {
            assert_eq!(fs.verify(), []);
            let copy = Filesystem::mount(fs.disk().clone(), MountOptions::default()).unwrap();
            assert!(names(&copy, "/") == names(&fs, "/"), "round {round}");
            let sizes = |fs: &Filesystem<RamDisk>| -> Vec<Stat> {
                fs.readdir(ROOT).unwrap().iter().map(|e| fs.stat(e.ino).unwrap()).collect()
            };
            assert!(sizes(&copy) == sizes(&fs), "round {round}");
        }
    }
    let report = check(&mut fs.disk().clone(), &CheckOptions::default()).unwrap();
    assert!(report.is_clean() && report.generation > 3, "{report:?}");
}

#[test]
fn times_move_as_posix_says_and_attributes_are_kept() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    let mut disk = RamDisk::new(4 << 20);
    format(&mut disk, &FormatOptions { time: Some(1), ..Default::default() }).unwrap();
    let now = Arc::new(AtomicU64::new(10));
    let clock = Arc::clone(&now);
    let options =
        MountOptions { clock: Box::new(move || clock.fetch_add(1, Ordering::Relaxed)), ..Default::default() };
    let mut fs = Filesystem::mount(disk, options).unwrap();
    let f = fs.create("/f", &NewInode::file()).unwrap();
    fs.mkdir("/d", &NewInode::directory()).unwrap();
    fs.write_at(f, 0, &[1; 8192]).unwrap();
    fs.sync_all().unwrap();
    // Which of (file mtime, file ctime, directory mtime, directory ctime) a call moves.
    let moved = |fs: &mut Filesystem<RamDisk>, call: &dyn Fn(&mut Filesystem<RamDisk>)| {
        let look = |fs: &Filesystem<RamDisk>| {
            let (f, d) = (fs.stat(f).unwrap(), fs.stat(ROOT).unwrap());
            assert_eq!(f.atime, 10, "only set_attr moves atime");
            [f.mtime, f.ctime, d.mtime, d.ctime]
        };
        let before = look(fs);
        let begun = now.load(Ordering::Relaxed);
        call(fs);
        let after = look(fs);
        let new = |i: usize| after[i] != before[i];
        assert!((0..4).all(|i| !new(i) || after[i] >= begun), "a time went back");
        [new(0), new(1), new(2), new(3)]
    };
    let contents = [true, true, false, false];
    assert_eq!(moved(&mut fs, &|fs| fs.write_at(f, 0, b"in place").unwrap()), contents);
    assert_eq!(moved(&mut fs, &|fs| fs.write_at(f, 50_000, b"new").unwrap()), contents);
    assert_eq!(moved(&mut fs, &|fs| fs.truncate(f, 100).unwrap()), contents);
    assert_eq!(moved(&mut fs, &|fs| fs.fallocate(f, 0, 9000, Falloc::PunchHole).unwrap()), contents);
    assert_eq!(moved(&mut fs, &|fs| _ = fs.read_at(f, 0, &mut [0; 50]).unwrap()), [false; 4]);
    assert_eq!(moved(&mut fs, &|fs| fs.link("/f", "/g").unwrap()), [false, true, true, true]);
    assert_eq!(moved(&mut fs, &|fs| fs.unlink("/g").unwrap()), [false, true, true, true]);
    assert_eq!(moved(&mut fs, &|fs| fs.rename("/f", "/d/f").unwrap()), [false, true, true, true]);
    let set = SetAttr { mode: Some(0o4640), uid: Some(7), gid: Some(8), ..SetAttr::default() };
    assert_eq!(moved(&mut fs, &|fs| fs.set_attr(f, &set).unwrap()), [false, true, false, false]);
    fs.set_attr(f, &SetAttr { atime: Some(3), mtime: Some(4), ..SetAttr::default() }).unwrap();
    let before = fs.stat(f).unwrap();
    assert_eq!((before.mode, before.uid, before.gid, before.atime, before.mtime), (0o4640, 7, 8, 3, 4));
    // All of it is in the log, and in a checkpoint.
    fs.sync_all().unwrap();
    let mut fs = Filesystem::mount(fs.disk().clone(), MountOptions::default()).unwrap();
    assert_eq!(fs.stat(f).unwrap(), before);
    fs.checkpoint_now().unwrap();
    assert_eq!(remount(fs).stat(f).unwrap(), before);
}

#[test]
fn placements_are_kept_with_the_file_and_the_roots_with_the_filesystem() {
    let place = |placement| SetAttr { placement: Some(placement), ..SetAttr::default() };
    let mut disk = RamDisk::new(4 << 20);
    let options = |placement| FormatOptions { placement, ..Default::default() };
    assert!(matches!(format(&mut disk, &options(PLACEMENT_MAX + 1)), Err(FsError::Invalid { .. })));
    format(&mut disk, &options(3)).unwrap();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    let f = fs.create("/f", &NewInode::file()).unwrap();
    let d = fs.mkdir("/d", &NewInode::directory()).unwrap();
    let placements = |fs: &Filesystem<RamDisk>| [ROOT, f].map(|ino| fs.stat(ino).unwrap().placement);
    assert_eq!(placements(&fs), [3, 0], "a new file has no choice of its own");
    fs.set_attr(f, &place(2)).unwrap();
    fs.set_attr(ROOT, &place(1)).unwrap();
    // Other changes of the same attributes leave it alone.
    fs.set_attr(f, &SetAttr { mode: Some(0o600), ..SetAttr::default() }).unwrap();
    fs.write_at(f, 0, &[1; 5000]).unwrap();
    fs.sync_all().unwrap();
    // Not unmounted: from the log.
    let logged = fs.disk().clone();
    assert_eq!(placements(&Filesystem::mount(logged, MountOptions::default()).unwrap()), [1, 2]);
    fs.checkpoint_now().unwrap();
    let mut fs = remount(fs);
    assert_eq!(placements(&fs), [1, 2]);
    fs.rename("/f", "/d/g").unwrap();
    fs.set_attr(ROOT, &place(0)).unwrap();
    assert_eq!(placements(&fs), [0, 2]);
    assert!(matches!(fs.set_attr(f, &place(PLACEMENT_MAX + 1)), Err(FsError::Invalid { .. })));
    assert!(matches!(fs.set_attr(d, &place(1)), Err(FsError::IsADirectory { .. })));
    fs.sync_all().unwrap();
    let read_only = MountOptions { read_only: true, ..Default::default() };
    let mut fs = Filesystem::mount(fs.unmount().unwrap(), read_only).unwrap();
    let refused = fs.set_attr(f, &place(1)).unwrap_err();
    assert!(matches!(refused, FsError::ReadOnly { .. }));
    assert!(refused.to_string().contains("mounted read-only"), "{refused}");
    assert_eq!(placements(&fs), [0, 2]);
}

#[test]
fn the_log_is_zeros_after_mkfs_whatever_was_there() {
    let mut disk = RamDisk::from_image(vec![0xee; 4 << 20], 512);
    format(&mut disk, &FormatOptions { log_bytes: Some(300 << 10), ..Default::default() }).unwrap();
    let log = 17 * 4096..(17 + 75) * 4096;
    assert!(disk.bytes[log.clone()].iter().all(|&b| b == 0), "a block of the log was not written");
    assert_eq!(disk.bytes[log.end + 4096], 0xee, "more than the log was written");
}

#[test]
fn overwriting_whole_blocks_moves_times_and_nothing_else() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    let mut disk = RamDisk::new(4 << 20);
    format(&mut disk, &FormatOptions { time: Some(1), ..Default::default() }).unwrap();
    let time = Arc::new(AtomicU64::new(10));
    let clock = Arc::clone(&time);
    let options =
        MountOptions { clock: Box::new(move || clock.load(Ordering::Relaxed)), ..Default::default() };
    let mut fs = Filesystem::mount(disk, options).unwrap();
    let f = fs.create("/f", &NewInode::file()).unwrap();
    fs.write_at(f, 0, &[1; 3 * 4096]).unwrap();
    // The first record vouches for the blocks, the second knows the first durable: from here on they may be overwritten.
    fs.sync_all().unwrap();
    fs.create("/g", &NewInode::file()).unwrap();
    fs.sync_all().unwrap();
    let before = (fs.stat(f).unwrap(), fs.query_blocks(f, 0, 3 * 4096).unwrap());
    time.store(20, Ordering::Relaxed);
    fs.write_at(f, 4096, &[2; 4096]).unwrap();
    let want = Stat { mtime: 20, ctime: 20, ..before.0 };
    assert_eq!((fs.stat(f).unwrap(), fs.query_blocks(f, 0, 3 * 4096).unwrap()), (want, before.1));
    fs.sync_all().unwrap();
    // Not unmounted: what the sync made durable is all there is.
    let disk = fs.disk().clone();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    assert_eq!(fs.stat(f).unwrap(), want);
    let bytes = contents(&mut fs, "/f");
    assert!(bytes[..4096].iter().all(|&b| b == 1) && bytes[8192..].iter().all(|&b| b == 1));
    assert!(bytes[4096..8192].iter().all(|&b| b == 2));
    // What somebody may read without asking is not overwritten behind their back.
    fs.sync_all().unwrap();
    let layout = fs.map_blocks(f, 0, 4096, Access::Read).unwrap();
    assert!(matches!(fs.write_at(f, 0, &[3; 4096]), Err(FsError::LeaseConflict { .. })));
    fs.release(layout.lease).unwrap();
    fs.write_at(f, 0, &[3; 4096]).unwrap();
    assert_eq!(contents(&mut fs, "/f")[..4096], [3; 4096]);
}

#[test]
fn large_inodes_change_while_a_checkpoint_saves_them_item_by_item() {
    let mut disk = RamDisk::new(32 << 20);
    format(&mut disk, &FormatOptions { log_bytes: Some(256 << 10), ..Default::default() }).unwrap();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    let name = |i: u32| format!("/{i:0>200}");
    for i in 0..1500 {
        fs.create(name(i), &NewInode::file()).unwrap();
    }
    let comb = |fs: &mut Filesystem<RamDisk>| {
        let f = fs.create("/f", &NewInode::file()).unwrap();
        for i in 0..600 {
            fs.fallocate(f, i * 8192, 4096, Falloc::Extend).unwrap();
        }
    };
    comb(&mut fs);
    let all = |fs: &Filesystem<RamDisk>| {
        let entries = fs.readdir(ROOT).unwrap();
        let stats: Vec<Stat> = entries.iter().map(|e| fs.stat(e.ino).unwrap()).collect();
        (entries, stats, fs.query_blocks(fs.lookup("/f").unwrap(), 0, 5 << 20).unwrap())
    };
    // A step of a full-period generator: names and extents before and behind what is saved already change, appear and go.
    let mut state = 7u64;
    let mut any = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for round in 0..120 {
        for _ in 0..5 {
            let i = any(3000) as u32;
            match any(3) {
                0 => drop(fs.unlink(name(i))),
                1 => drop(fs.create(name(i), &NewInode::file())),
                _ => drop(fs.rename(name(i), name(any(3000) as u32))),
            }
        }
        if round % 19 == 18 {
            // The large file goes, wherever the checkpoint is with it, and there is another one.
            fs.unlink("/f").unwrap();
            comb(&mut fs);
        }
        let (f, at) = (fs.lookup("/f").unwrap(), any(1200) * 4096);
        match any(4) {
            0 => fs.fallocate(f, at, 4096 * 3, Falloc::PunchHole).unwrap(),
            1 => fs.fallocate(f, at, 4096, Falloc::KeepSize).unwrap(),
            2 => fs.write_at(f, at, &[round as u8; 4096]).unwrap(),
            _ => {}
        }
        fs.sync_all().unwrap();
        if round % 10 == 9 {
            assert_eq!(fs.verify(), []);
            let copy = Filesystem::mount(fs.disk().clone(), MountOptions::default()).unwrap();
            assert!(all(&copy) == all(&fs), "round {round}");
        }
    }
    let report = check(&mut fs.disk().clone(), &CheckOptions::default()).unwrap();
    assert!(report.is_clean() && report.generation > 5, "{report:?}");
}
