//! Damage of every kind in random places of random images: found for what it is, mended without losing what could be read,
//! and mended again when the power goes in between.
//!
//! `CMBFS_SEED` reproduces a run, `CMBFS_DAMAGE_IMAGES` makes it longer.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]

mod common;

use std::collections::BTreeMap;

use common::corrupt::{Corrupter, EXTENTS, INODE};
use common::crash::scatter;
use common::model::{Found, read_all};
use common::ops::{Op, random};
use common::ram::RamDisk;
use common::tape::{Event, Image, TapeDisk};
use common::{Dice, env};
use extent_fs::*;

/// A kind of damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Harm {
    Superblock,
    Chunk,
    Record,
    Inodes,
    Item,
    Root,
    Dangling,
    SecondName,
    Parent,
    Links,
    Unreachable,
    OutOfRange,
    BehindEnd,
    Overlap,
}

const HARMS: [Harm; 14] = [
    Harm::Superblock,
    Harm::Chunk,
    Harm::Record,
    Harm::Inodes,
    Harm::Item,
    Harm::Root,
    Harm::Dangling,
    Harm::SecondName,
    Harm::Parent,
    Harm::Links,
    Harm::Unreachable,
    Harm::OutOfRange,
    Harm::BehindEnd,
    Harm::Overlap,
];

impl Harm {
    fn is(self, fault: &Fault) -> bool {
        match self {
            Self::Superblock => matches!(fault, Fault::Superblock { .. }),
            Self::Chunk => matches!(fault, Fault::Chunk { .. }),
            Self::Record => matches!(fault, Fault::Record { .. }),
            Self::Inodes => matches!(fault, Fault::Inodes { .. }),
            Self::Item => matches!(fault, Fault::Item { .. }),
            Self::Root => matches!(fault, Fault::Root),
            Self::Dangling => matches!(fault, Fault::Dangling { .. }),
            Self::SecondName => matches!(fault, Fault::SecondName { .. }),
            Self::Parent => matches!(fault, Fault::Parent { .. }),
            Self::Links => matches!(fault, Fault::Links { .. }),
            Self::Unreachable => matches!(fault, Fault::Unreachable { .. }),
            Self::OutOfRange => matches!(fault, Fault::OutOfRange { .. }),
            Self::BehindEnd => matches!(fault, Fault::BehindEnd { .. }),
            Self::Overlap => matches!(fault, Fault::Overlap { .. }),
        }
    }

    /// Whether mending it gives something up that is on the image, readable or not.
    fn loses(self) -> bool {
        matches!(self, Self::Chunk | Self::Record | Self::Inodes | Self::Item | Self::Root | Self::BehindEnd)
    }
}

/// A random tree, in a checkpoint; with `log` some more of it in records behind that.
fn original(dice: &mut Dice, log: bool) -> Vec<u8> {
    let mut disk = RamDisk::new(2 << 20);
    format(&mut disk, &FormatOptions { log_bytes: Some(64 << 10), time: Some(1), ..Default::default() })
        .unwrap();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    for dir in ["/x", "/x/y", "/x/y/z", "/w"] {
        fs.mkdir(dir, &NewInode::directory()).unwrap();
    }
    for (i, path) in ["/x/1", "/x/y/2", "/x/y/z/3", "/w/4"].into_iter().enumerate() {
        let f = fs.create(path, &NewInode::file()).unwrap();
        fs.write_at(f, 0, &vec![i as u8 + 1; 5000 + 4096 * i]).unwrap();
    }
    let mut step = |fs: &mut Filesystem<RamDisk>| {
        let op = random(dice);
        // What is open without a name is nobody's to read.
        if !matches!(op, Op::Open(_)) {
            let _ = op.on_fs(fs, &mut None);
        }
    };
    (0..60).for_each(|_| step(&mut fs));
    fs.checkpoint_now().unwrap();
    if !log {
        return fs.unmount().unwrap().bytes;
    }
    for i in 0..6 {
        fs.mkdir(format!("/late-{i}"), &NewInode::directory()).unwrap();
        fs.sync_all().unwrap();
    }
    fs.disk().bytes.clone()
}

/// Does the damage somewhere. Returns the inode whose contents it costs, if it does.
fn damage(kind: Harm, c: &mut Corrupter, dice: &mut Dice) -> Option<Ino> {
    let flip = |c: &mut Corrupter, from: usize, to: usize, dice: &mut Dice| {
        let at = from + dice.below((to - from) as u64) as usize;
        c.bytes[at] ^= 1 << dice.below(8);
    };
    let inodes = |c: &Corrupter, what: u8| -> Vec<_> {
        let all = c.items().into_iter().filter(|i| i.kind == INODE);
        all.filter(|i| c.bytes[i.body + 62] == what && c.u64(i.body) != ROOT).collect()
    };
    let extents = |c: &Corrupter| -> Vec<_> {
        c.items().into_iter().filter(|i| i.kind == EXTENTS && c.u64(i.body + 8) > 0).collect()
    };
    match kind {
        Harm::Superblock => {
            let s = *dice.pick(&c.superblocks());
            flip(c, s.at, s.at + 160, dice);
        }
        Harm::Chunk => {
            let s = *dice.pick(&c.chunks());
            flip(c, s.at, s.end, dice);
        }
        Harm::Record => {
            let mut records = c.records();
            records.sort_by_key(|r| c.u64(r.at + 8));
            let newest = records.len() - 1;
            let s = records[newest - 1 - dice.below(4) as usize];
            flip(c, s.at, s.end, dice);
        }
        Harm::Inodes => {
            let more = 1 + dice.below(9);
            for s in c.superblocks() {
                c.put(s.at + 144, &(c.u64(s.at + 144) + more).to_le_bytes());
                c.seal(s);
            }
        }
        Harm::Item => {
            let item = *dice.pick(&c.items());
            c.bytes[item.body - 8] = 19 + dice.below(200) as u8;
            c.seal(item.inside);
        }
        Harm::Root => {
            let item = c.item(INODE, ROOT);
            c.bytes[item.body + 62] = 1;
            c.seal(item.inside);
        }
        Harm::Dangling => {
            let e = *dice.pick(&c.entries());
            c.put(e.at, &(1_000_000 + dice.below(1000)).to_le_bytes());
            c.seal(e.inside);
        }
        Harm::SecondName => {
            let dir = c.u64(dice.pick(&inodes(c, 2)).body);
            let others: Vec<_> = c.entries().into_iter().filter(|e| e.ino != dir && e.dir != dir).collect();
            let e = *dice.pick(&others);
            c.put(e.at, &dir.to_le_bytes());
            c.seal(e.inside);
        }
        Harm::Parent => {
            let item = *dice.pick(&inodes(c, 2));
            let wrong = c.u64(item.body + 40) + 1000;
            c.put(item.body + 40, &wrong.to_le_bytes());
            c.seal(item.inside);
        }
        Harm::Links => {
            let what = 1 + dice.below(2) as u8;
            let item = *dice.pick(&inodes(c, what));
            let wrong = c.u32(item.body + 56) + 1 + dice.below(5) as u32;
            c.put(item.body + 56, &wrong.to_le_bytes());
            c.seal(item.inside);
        }
        Harm::Unreachable => {
            // A directory's name goes to a file that has one already.
            let file = c.u64(dice.pick(&inodes(c, 1)).body);
            let dirs: Vec<Ino> = inodes(c, 2).iter().map(|i| c.u64(i.body)).collect();
            let named: Vec<_> = c.entries().into_iter().filter(|e| dirs.contains(&e.ino)).collect();
            let e = *dice.pick(&named);
            c.put(e.at, &file.to_le_bytes());
            c.seal(e.inside);
        }
        Harm::OutOfRange => {
            let item = *dice.pick(&extents(c));
            c.put(item.body + 16 + 8, &dice.below(17 + 16 - 8).to_le_bytes());
            c.seal(item.inside);
            return Some(c.u64(item.body));
        }
        Harm::BehindEnd => {
            let written = extents(c).into_iter().filter(|i| c.u32(i.body + 16 + 20) == 1);
            let inos: Vec<Ino> = written.map(|i| c.u64(i.body)).collect();
            let ino = *dice.pick(&inos);
            let item = c.item(INODE, ino);
            c.put(item.body + 8, &0u64.to_le_bytes());
            c.seal(item.inside);
            return Some(ino);
        }
        Harm::Overlap => {
            let all = extents(c);
            let victim = *dice.pick(&all);
            let others: Vec<_> = all.into_iter().filter(|i| c.u64(i.body) != c.u64(victim.body)).collect();
            let other = *dice.pick(&others);
            let theirs = c.u64(other.body + 16 + 8);
            c.put(victim.body + 16 + 8, &theirs.to_le_bytes());
            c.seal(victim.inside);
            return Some(c.u64(victim.body));
        }
    }
    None
}

fn found(bytes: &[u8]) -> Result<Found, FsError> {
    Filesystem::mount(RamDisk::from_image(bytes.to_vec(), 512), MountOptions::default())
        .map(|mut fs| read_all(&mut fs))
}

/// The contents of all files, but for those of `lost`.
fn contents(bytes: &[u8], lost: Option<Ino>) -> Vec<Vec<u8>> {
    let mut fs =
        Filesystem::mount(RamDisk::from_image(bytes.to_vec(), 512), MountOptions::default()).unwrap();
    let all = read_all(&mut fs);
    all.into_iter()
        .filter(|f| fs.lookup(&f.0).ok() != lost)
        .filter_map(|f| f.1.filter(|bytes| !bytes.is_empty()))
        .collect()
}

/// Every one of `before` is the contents of some file, wherever it is.
fn all_there(before: &[Vec<u8>], after: &Found) -> bool {
    before.iter().all(|bytes| after.iter().any(|f| f.1.as_ref() == Some(bytes)))
}

/// A damaged image with what could be read before, and the damage's kind.
fn damaged(seed: u64) -> (Harm, Corrupter, Vec<Vec<u8>>) {
    let mut dice = Dice::new(seed);
    let kind = HARMS[(seed % HARMS.len() as u64) as usize];
    let image = original(&mut dice, kind == Harm::Record);
    let mut c = Corrupter { bytes: image.clone() };
    let lost = damage(kind, &mut c, &mut dice);
    (kind, c, contents(&image, lost))
}

#[test]
fn every_kind_of_damage_is_found_and_mended_without_loss_unless_forced() {
    let first = env("CMBFS_SEED", 1);
    let mut seen: BTreeMap<Harm, u64> = BTreeMap::new();
    for seed in first..first + env("CMBFS_DAMAGE_IMAGES", 280) {
        let (kind, c, before) = damaged(seed);
        let at = format!("CMBFS_SEED={seed}, {kind:?}");
        let mut disk = RamDisk::from_image(c.bytes.clone(), 512);
        let report = check(&mut disk, &CheckOptions::default()).unwrap();
        assert!(report.findings.iter().any(|f| kind.is(&f.fault)), "{at}: {:?}", report.findings);
        assert!(disk.bytes == c.bytes, "{at}: a mere check wrote");
        assert_eq!(found(&c.bytes).is_ok(), kind == Harm::Superblock, "{at}: mount");
        let gentle = check(&mut disk, &CheckOptions { repair: true, force: false });
        let gentle = gentle.unwrap_or_else(|e| panic!("{at}: {e}"));
        if kind.loses() {
            assert!(gentle.findings.iter().any(|f| f.outcome == Outcome::NeedsForce), "{at}: {gentle:?}");
            assert!(disk.bytes == c.bytes, "{at}: a repair that loses something wrote without force");
            check(&mut disk, &CheckOptions { repair: true, force: true }).unwrap();
            assert!(found(&disk.bytes).is_ok(), "{at}");
        } else {
            assert!(gentle.is_clean(), "{at}: {gentle:?}");
            let after = found(&disk.bytes).unwrap_or_else(|e| panic!("{at}: {e}"));
            assert!(all_there(&before, &after), "{at}: a file's bytes are gone: {after:?}");
        }
        let after = check(&mut disk, &CheckOptions::default()).unwrap();
        assert!(after.findings.is_empty(), "{at}: after the repair: {:?}", after.findings);
        *seen.entry(kind).or_default() += 1;
    }
    println!("{seen:?}");
    assert_eq!(seen.len(), HARMS.len());
}

#[test]
fn a_repair_that_is_cut_loses_nothing_and_can_be_done_again() {
    let first = env("CMBFS_SEED", 1);
    let mut states = 0;
    for seed in first..first + 4 * HARMS.len() as u64 {
        let (kind, c, before) = damaged(seed);
        if kind.loses() {
            continue;
        }
        let mut disk = TapeDisk::new(Image::from_bytes(&c.bytes));
        let repair = CheckOptions { repair: true, force: false };
        assert!(check(&mut disk, &repair).unwrap().is_clean());
        let events = disk.tape.lock().unwrap().events.clone();
        let mut dice = Dice::new(seed);
        let mut durable = Image::from_bytes(&c.bytes);
        let mut tail: Vec<(usize, &[u8])> = Vec::new();
        for (i, event) in events.iter().enumerate() {
            match event {
                Event::Write { at, data } => tail.push((*at, data)),
                Event::Flush => tail.drain(..).for_each(|(at, data)| durable.write(at, data)),
            }
            let mut cut = durable.clone();
            scatter(&mut cut, &tail, &mut dice);
            states += 1;
            let at = format!("CMBFS_SEED={seed}, {kind:?}, cut after event {i}");
            let mut disk = RamDisk::from_image(cut.to_vec(), 512);
            let again = check(&mut disk, &repair).unwrap_or_else(|e| panic!("{at}: {e}"));
            assert!(again.is_clean(), "{at}: {again:?}");
            let after = found(&disk.bytes).unwrap_or_else(|e| panic!("{at}: {e}"));
            assert!(all_there(&before, &after), "{at}: a file's bytes are gone");
        }
    }
    println!("{states} cuts");
    assert!(states > 100, "{states}");
}
