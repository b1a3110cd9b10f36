//! A reader in another language, written from docs/on-disk-format.md alone, finds the same files and bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed call fails the test")]

mod common;

use std::process::Command;

use common::Dice;
use common::model::read_all;
use common::ops::{Op, random};
use common::ram::RamDisk;
use extent_fs::*;

fn line(s: &Stat, path: &str) -> String {
    let kind = if s.kind == Kind::Directory { 'd' } else { '-' };
    let Stat { mode, uid, gid, nlink, size, mtime, placement, .. } = s;
    format!("{kind} {mode:04o} {uid} {gid} {nlink} {size} {mtime} {placement} {path}")
}

fn list(fs: &Filesystem<RamDisk>, dir: Ino, path: &str, out: &mut Vec<String>) {
    for e in fs.readdir(dir).unwrap() {
        let path = format!("{path}/{}", String::from_utf8_lossy(&e.name));
        out.push(line(&fs.stat(e.ino).unwrap(), &path));
        if e.kind == Kind::Directory {
            list(fs, e.ino, &path, out);
        }
    }
}

fn python(args: &[&std::ffi::OsStr]) -> String {
    let reader = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/python/read_image.py");
    let out =
        Command::new("python3").arg(reader).args(args).output().expect("python3 is needed for this test");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn an_independent_reader_finds_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for (seed, lba) in [(1, 512), (2, 4096), (3, 512)] {
        let mut dice = Dice::new(seed);
        let mut disk = RamDisk::with_lba(4 << 20, lba);
        format(&mut disk, &FormatOptions { log_bytes: Some(64 << 10), ..Default::default() }).unwrap();
        let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
        for i in 0..300 {
            fs.mkdir(format!("/dir-{i:0>150}"), &NewInode { mode: 0o700, uid: i, gid: 2 * i }).unwrap();
        }
        let mut open = None;
        for _ in 0..600 {
            let op = random(&mut dice);
            // A kept orphan is nothing that a reader of a tree shows.
            if !matches!(op, Op::Open(_)) {
                let _ = op.on_fs(&mut fs, &mut open);
            }
        }
        fs.sync_all().unwrap();
        let image = dir.path().join(format!("{seed}.img"));
        std::fs::write(&image, &fs.disk().bytes).unwrap();
        let mut want = vec![line(&fs.stat(ROOT).unwrap(), "/")];
        list(&fs, ROOT, "", &mut want);
        let got = python(&[image.as_os_str()]);
        assert_eq!(got.lines().collect::<Vec<_>>(), want, "seed {seed}");
        let target = dir.path().join(format!("{seed}.out"));
        std::fs::create_dir(&target).unwrap();
        python(&[image.as_os_str(), "--all".as_ref(), target.as_os_str()]);
        // The seventh of a line; the operations have set several.
        let placed = want.iter().filter(|l| l.split(' ').nth(7) != Some("0")).count();
        assert!(placed > 0, "seed {seed}: nothing has a placement");
        let mut files = 0;
        for (path, bytes, ..) in read_all(&mut fs) {
            if let Some(bytes) = bytes {
                let extracted = std::fs::read(target.join(&path[1..])).unwrap();
                assert!(extracted == bytes, "seed {seed}: {path} differs");
                files += 1;
            }
        }
        assert!(files > 1, "{files}");
    }
}
