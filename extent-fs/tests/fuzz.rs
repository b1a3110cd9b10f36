//! Mutated images through mount, full read, check and repair: typed errors at most, no panic, no hang, bounded memory.
//!
//! `CMBFS_FUZZ_SECONDS` makes it longer, `CMBFS_SEED` reproduces a run.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]

mod common;

use std::time::{Duration, Instant};

use common::corrupt::Corrupter;
use common::ram::RamDisk;
use common::{Dice, env};
use extent_fs::*;

fn original() -> Vec<u8> {
    let mut disk = RamDisk::new(1 << 20);
    let options = FormatOptions { log_bytes: Some(64 << 10), uuid: Some([9; 16]), ..Default::default() };
    format(&mut disk, &options).unwrap();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    for dir in ["/d", "/d/e", "/f"] {
        fs.mkdir(dir, &NewInode::directory()).unwrap();
    }
    for i in 0..20 {
        let dir = ["", "/d", "/d/e"][i % 3];
        let f = fs.create(format!("{dir}/file-{i}"), &NewInode::file()).unwrap();
        for part in 0..=i as u64 % 4 {
            fs.write_at(f, part * 9000, &[i as u8; 3000]).unwrap();
        }
        if i == 10 {
            fs.checkpoint_now().unwrap();
        }
        fs.sync(f).unwrap();
    }
    fs.link("/file-0", "/f/again").unwrap();
    fs.rename("/d/file-1", "/f/moved").unwrap();
    fs.unlink("/file-3").unwrap();
    let f = fs.lookup("/file-6").unwrap();
    fs.fallocate(f, 0, 100_000, Falloc::KeepSize).unwrap();
    fs.truncate(f, 4000).unwrap();
    fs.unmount().unwrap().bytes
}

/// Changes some bytes, mostly where the metadata is, mostly with the checksum made right again.
fn mutate(c: &mut Corrupter, dice: &mut Dice) {
    for _ in 0..1 + dice.below(4) {
        let structures = match dice.below(4) {
            0 => c.superblocks(),
            1 => c.records(),
            _ => c.chunks(),
        };
        if structures.is_empty() || dice.one_in(10) {
            let at = dice.below(c.bytes.len() as u64) as usize;
            c.bytes[at] = dice.next() as u8;
            continue;
        }
        let s = *dice.pick(&structures);
        for _ in 0..1 + dice.below(3) {
            let at = s.at + dice.below((s.end - s.at).min(4096) as u64) as usize;
            let interesting =
                [0u64, 1, 2, 0x7f, 0xff, 0xffff, 1 << 31, u64::from(u32::MAX), 1 << 51, 1 << 62, u64::MAX];
            match dice.below(4) {
                0 => c.bytes[at] ^= 1 << dice.below(8),
                1 => c.bytes[at] = dice.next() as u8,
                2 if at + 8 <= c.bytes.len() => c.put(at, &dice.pick(&interesting).to_le_bytes()),
                _ if at + 4 <= c.bytes.len() => c.put(at, &(*dice.pick(&interesting) as u32).to_le_bytes()),
                _ => {}
            }
        }
        if s.end <= c.bytes.len() && !dice.one_in(8) {
            c.seal(s);
        }
    }
}

/// Reads everything that there is, and changes a little.
fn use_it<D: nvme_driver::disk::Disk>(fs: &mut Filesystem<D>) {
    let mut todo = vec![ROOT];
    let mut seen = 0;
    let mut buffer = vec![0; 64 << 10];
    while let Some(dir) = todo.pop() {
        seen += 1;
        assert!(seen < 1000, "directories without end");
        for e in fs.readdir(dir).unwrap_or_default() {
            let Ok(stat) = fs.stat(e.ino) else { continue };
            if e.kind == Kind::Directory {
                todo.push(e.ino);
                continue;
            }
            for at in [0, 5000, stat.size / 2, stat.size.saturating_sub(100)] {
                let _ = fs.read_at(e.ino, at, &mut buffer);
            }
            let _ = fs.query_blocks(e.ino, 0, stat.size.max(1));
            let _ = fs.write_at(e.ino, stat.size / 3, b"fuzz");
            let _ = fs.truncate(e.ino, stat.size / 2);
            let _ = fs.unlink_at(dir, &e.name);
        }
    }
    let _ = fs.create("/new", &NewInode::file()).and_then(|f| fs.write_at(f, 0, &[1; 9000]));
    let _ = fs.sync_all();
    let _ = fs.checkpoint_now();
}

#[test]
fn mutated_images() {
    let seconds = env("CMBFS_FUZZ_SECONDS", 2);
    let first = env("CMBFS_SEED", 1);
    let image = original();
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut images, mut mounted, mut repaired) = (0u64, 0u64, 0u64);
    while images < 200 || Instant::now() < end {
        let seed = first + images;
        images += 1;
        let mut dice = Dice::new(seed);
        let mut c = Corrupter { bytes: image.clone() };
        mutate(&mut c, &mut dice);
        let begun = Instant::now();
        let result = std::panic::catch_unwind(|| {
            let mut disk = RamDisk::from_image(c.bytes.clone(), 512);
            let clean = check(&mut disk, &CheckOptions::default()).is_ok_and(|r| r.is_clean());
            let mut did = (false, false);
            if let Ok(mut fs) = Filesystem::mount(disk.clone(), MountOptions::default()) {
                did.0 = true;
                assert!(fs.verify().is_empty(), "after the mount: {:?}", fs.verify());
                let before = fs.read_only_reason().map(str::to_owned);
                use_it(&mut fs);
                assert_eq!(fs.read_only_reason(), before.as_deref());
                assert!(fs.verify().is_empty(), "{:?}", fs.verify());
            } else {
                assert!(!clean, "check finds nothing, mount refuses");
            }
            if let Ok(report) = check(&mut disk, &CheckOptions { repair: true, force: true })
                && report.is_clean()
            {
                did.1 = true;
                let after = check(&mut disk, &CheckOptions::default()).unwrap();
                assert!(after.findings.is_empty(), "after the repair: {:?}", after.findings);
                Filesystem::mount(disk, MountOptions::default()).map(|mut fs| use_it(&mut fs)).unwrap();
            }
            did
        });
        match result {
            Ok((m, r)) => {
                mounted += u64::from(m);
                repaired += u64::from(r);
            }
            Err(_) => panic!("CMBFS_SEED={seed}: see above"),
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "CMBFS_SEED={seed} takes too long");
    }
    println!(
        "{images} images, {mounted} mounted, {repaired} clean after repair; CMBFS_SEED={first} to {}",
        first + images - 1
    );
    assert!(mounted > 0 && repaired > mounted);
}
