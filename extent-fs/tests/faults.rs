//! The device fails at any point: the filesystem is read-only from then on, says why, and loses nothing acknowledged.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]

mod common;

use common::Dice;
use common::crash::{formatted, matches_window, quiet, take_up};
use common::model::{Model, read_all, read_whole};
use common::ops::{Op, random};
use common::tape::TapeDisk;
use extent_fs::*;

#[test]
fn the_first_device_error_latches() {
    let mut dice = Dice::new(7);
    // Without direct writes: their errors are the holder's to notice.
    let direct = |op: &Op| matches!(op, Op::Direct(..));
    let ops: Vec<Op> = (0..400).map(|_| random(&mut dice)).filter(|op| !direct(op)).collect();
    let image = formatted(7);
    let mut latched = 0;
    for fail_after in (0..400).step_by(3) {
        let disk = TapeDisk::new(image.clone());
        let Ok(mut fs) = Filesystem::mount(disk.clone(), quiet()) else { continue };
        disk.tape.lock().unwrap().fail_after = Some(fail_after);
        let mut models = vec![Model::default()];
        let mut synced = 0;
        let mut open = None;
        let mut error = None;
        for op in &ops {
            let mut m = models.last().unwrap().clone();
            let want = op.on_model(&mut m);
            match op.on_fs(&mut fs, &mut open) {
                Err(e @ FsError::Device(_)) => {
                    error = Some(e);
                    models.push(m);
                    break;
                }
                got => assert_eq!(got.is_ok(), want.is_ok(), "{op:?}: {got:?}"),
            }
            if want.is_ok() {
                models.push(m);
                if op.is_sync() {
                    synced = models.len() - 1;
                }
            }
        }
        let Some(error) = error else { continue };
        latched += 1;
        assert_eq!(error.errno(), 5);
        assert!(fs.read_only_reason().unwrap().contains("made to fail"), "{:?}", fs.read_only_reason());
        // The device works again; the filesystem does not trust it.
        disk.tape.lock().unwrap().fail_after = None;
        let events = disk.events();
        assert_eq!(fs.create("/x", &NewInode::file()).unwrap_err().errno(), 30);
        assert_eq!(fs.sync_all().unwrap_err().errno(), 30);
        assert_eq!(fs.checkpoint_now().unwrap_err().errno(), 30);
        assert_eq!(fs.trim().unwrap_err().errno(), 30);
        read_all(&mut fs);
        drop(fs);
        assert_eq!(disk.events(), events, "something was written after the error");
        let (found, _) = take_up(disk.image()).unwrap();
        matches_window(&found, &models[synced..])
            .unwrap_or_else(|e| panic!("failed after {fail_after}: {e}"));
    }
    assert!(latched > 30, "{latched}");
}

#[test]
fn a_read_only_mount_writes_nothing() {
    let disk = TapeDisk::new(formatted(1));
    let mut fs = Filesystem::mount(disk.clone(), MountOptions { read_only: true, ..quiet() }).unwrap();
    assert_eq!(fs.mkdir("/d", &NewInode::directory()).unwrap_err().errno(), 30);
    assert_eq!(read_all(&mut fs), []);
    fs.unmount().unwrap();
    assert_eq!(disk.events(), 0);
}

/// Fills a small disk in many ways; whatever meets ENOSPC, what was there stays, the sums are exact, unlink works.
#[test]
fn no_space_at_any_point_loses_nothing() {
    let mut all_refused = 0;
    for seed in 0..6 {
        let mut dice = Dice::new(seed);
        let disk = TapeDisk::new(formatted(seed));
        let mut fs = Filesystem::mount(disk.clone(), quiet()).unwrap();
        let mut model = Model::default();
        let mut open = None;
        // All but a few blocks are taken.
        let keep = dice.below(6);
        let fill = fs.create("/fill", &NewInode::file()).unwrap();
        model.create("/fill").unwrap();
        let mut at = 0;
        while fs.statfs().free > fs.statfs().reserved + keep && fs.write_at(fill, at, &[0xf1; 4096]).is_ok() {
            let id = model.lookup("/fill").unwrap();
            model.data(id).unwrap().extend([0xf1; 4096]);
            at += 4096;
        }
        let (mut refused, mut done) = (0, 0);
        for _ in 0..400 {
            let op = random(&mut dice);
            let mut m = model.clone();
            let want = op.on_model(&mut m);
            match op.on_fs(&mut fs, &mut open) {
                Err(FsError::NoSpace { .. }) => {
                    refused += 1;
                    assert!(
                        !matches!(
                            op,
                            Op::Unlink(_)
                                | Op::Rmdir(_)
                                | Op::Close
                                | Op::Sync(_)
                                | Op::SyncAll
                                | Op::Checkpoint
                                | Op::Trim
                        ),
                        "{op:?}"
                    );
                }
                got => {
                    assert_eq!(got.is_ok(), want.is_ok(), "{op:?}: {got:?}, {want:?}");
                    if want.is_ok() {
                        model = m;
                        done += 1;
                    }
                }
            }
            assert_eq!(fs.verify(), [], "seed {seed}, {op:?}");
            // Every block is used, free, held back, or has a fixed place: the log, or a checkpoint.
            let space = fs.statfs();
            let fixed = space.blocks - space.used - space.free - space.held;
            assert!((17 + 16 + 1..17 + 16 + 20).contains(&fixed), "seed {seed}, {op:?}: {space:?}");
            let found = read_whole(&mut fs);
            matches_window(&found, std::slice::from_ref(&model))
                .unwrap_or_else(|e| panic!("seed {seed}, {op:?}: {e}"));
        }
        assert!(done > 50, "{done} {refused}");
        all_refused += refused;
        fs.sync_all().unwrap();
        let (found, _) = take_up(disk.image()).unwrap();
        matches_window(&found, std::slice::from_ref(&model)).unwrap();
        for e in fs.readdir(ROOT).unwrap() {
            if e.kind == Kind::File {
                fs.unlink_at(ROOT, &e.name).unwrap();
            }
        }
        fs.sync_all().unwrap();
    }
    assert!(all_refused >= 10, "{all_refused}");
}
