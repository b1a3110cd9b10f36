//! What a sync costs: which writes and flushes, in which order, for each kind of change and for many callers at once.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]

mod common;

use common::crash::quiet;
use common::tape::{Event, Image, TapeDisk};
use extent_fs::*;

/// The log's blocks of a filesystem made by [`rig`].
const LOG: std::ops::Range<usize> = 17 * 4096..33 * 4096;

/// What the disk saw: appends to the log, data, superblocks and flushes.
fn since(disk: &TapeDisk, from: usize) -> String {
    let word = |e: &Event| match e {
        Event::Flush => "flush",
        Event::Write { at, .. } if LOG.contains(at) => "record",
        Event::Write { .. } => "data",
    };
    let mut words: Vec<&str> = disk.tape.lock().unwrap().events[from..].iter().map(word).collect();
    words.dedup_by(|b, a| *a == "data" && *b == "data");
    words.join(" ")
}

fn rig() -> (TapeDisk, Filesystem<TapeDisk>, Ino) {
    let mut disk = TapeDisk::new(Image::poisoned(512));
    format(&mut disk, &FormatOptions { log_bytes: Some(64 << 10), ..Default::default() }).unwrap();
    let mut fs = Filesystem::mount(disk.clone(), quiet()).unwrap();
    let file = fs.create("/f", &NewInode::file()).unwrap();
    fs.write_at(file, 0, &[1; 8192]).unwrap();
    fs.sync_all().unwrap();
    (disk, fs, file)
}

/// What `change` and a sync after it write.
fn cost(change: impl FnOnce(&mut Filesystem<TapeDisk>, Ino)) -> String {
    let (disk, mut fs, file) = rig();
    let from = disk.events();
    change(&mut fs, file);
    fs.sync_all().unwrap();
    since(&disk, from)
}

#[test]
fn a_sync_of_metadata_alone_is_one_append_and_one_flush() {
    let one = "record flush";
    assert_eq!(cost(|fs, _| fs.create("/g", &NewInode::file()).map(drop).unwrap()), one);
    assert_eq!(cost(|fs, _| fs.mkdir("/d", &NewInode::directory()).map(drop).unwrap()), one);
    assert_eq!(cost(|fs, _| fs.rename("/f", "/g").unwrap()), one);
    assert_eq!(cost(|fs, _| fs.link("/f", "/g").unwrap()), one);
    assert_eq!(cost(|fs, _| fs.unlink("/f").unwrap()), one);
    assert_eq!(cost(|fs, f| fs.truncate(f, 4096).unwrap()), one);
    assert_eq!(cost(|fs, f| fs.truncate(f, 1 << 30).unwrap()), one);
    assert_eq!(cost(|fs, f| fs.fallocate(f, 0, 65_536, Falloc::Extend).unwrap()), one);
    assert_eq!(cost(|fs, f| fs.fallocate(f, 0, 4096, Falloc::PunchHole).unwrap()), one);
    let mode = SetAttr { mode: Some(0o600), ..SetAttr::default() };
    assert_eq!(cost(|fs, f| fs.set_attr(f, &mode).unwrap()), one);
}

#[test]
fn a_small_write_needs_one_flush_and_a_large_one_two() {
    // 32 blocks are vouched for by their CRCs in the record; of more the data is made durable first.
    let fresh = |blocks: usize| {
        cost(|fs, _| {
            let g = fs.create("/g", &NewInode::file()).unwrap();
            fs.write_at(g, 0, &vec![7; blocks * 4096]).unwrap();
        })
    };
    assert_eq!(fresh(1), "data record flush");
    assert_eq!(fresh(32), "data record flush");
    assert_eq!(fresh(33), "data flush record flush");
    // A write in place, after the record that vouches for the old bytes is known durable: new times only.
    let in_place = cost(|fs, f| {
        fs.create("/g", &NewInode::file()).unwrap();
        fs.sync_all().unwrap();
        fs.write_at(f, 0, &[9; 4096]).unwrap();
    });
    assert_eq!(in_place, "record flush data record flush");
}

#[test]
fn what_a_layouts_holder_wrote_is_durable_before_the_record_that_shows_it() {
    let direct = cost(|fs, f| {
        let layout = fs.map_blocks(f, 8192, 8192, Access::Write).unwrap();
        let disk = fs.disk_mut();
        for e in &layout.extents {
            nvme_driver::disk::Disk::write(disk, e.lba, &vec![5; e.bytes() as usize]).unwrap();
        }
        fs.commit_blocks(layout.lease, &layout.extents, Some(16_384)).unwrap();
        fs.release(layout.lease).unwrap();
    });
    assert!(direct.ends_with("data flush record flush"), "{direct}");
}

#[test]
fn many_callers_share_one_record_and_one_flush() {
    let (disk, mut fs, _) = rig();
    let from = disk.events();
    let tickets: Vec<Ticket> = (0..10)
        .map(|n| {
            let f = fs.create(format!("/caller-{n}"), &NewInode::file()).unwrap();
            fs.write_at(f, 0, &[n; 3000]).unwrap();
            fs.ticket()
        })
        .collect();
    assert!(tickets.iter().all(|t| !fs.is_durable(*t)), "nobody has synced yet");
    fs.sync_all().unwrap();
    assert_eq!(since(&disk, from), "data record flush");
    assert!(tickets.iter().all(|t| fs.is_durable(*t)));
    // Whoever asks again is told at once; what came later is not durable by that.
    fs.create("/later", &NewInode::file()).unwrap();
    let later = fs.ticket();
    assert!(!fs.is_durable(later) && fs.is_durable(tickets[0]));
}

#[test]
fn a_sync_of_nothing_writes_nothing() {
    let (disk, mut fs, file) = rig();
    let from = disk.events();
    fs.sync_all().unwrap();
    fs.sync(file).unwrap();
    assert_eq!(since(&disk, from), "");
}

#[test]
fn checkpoint_superblocks_are_each_flushed_and_come_last() {
    let (disk, mut fs, _) = rig();
    let from = disk.events();
    fs.checkpoint_now().unwrap();
    assert_eq!(since(&disk, from), "data flush data flush data flush");
    let at: Vec<usize> = disk.tape.lock().unwrap().events[from..]
        .iter()
        .filter_map(|e| if let Event::Write { at, .. } = e { Some(*at) } else { None })
        .collect();
    // The other copy is first the next time.
    let first = at[at.len() - 2];
    assert_eq!([0, 16 * 4096].map(|c| at[at.len() - 2..].contains(&c)), [true; 2], "{at:?}");
    fs.create("/g", &NewInode::file()).unwrap();
    fs.checkpoint_now().unwrap();
    let events = disk.tape.lock().unwrap().events.clone();
    let last: Vec<usize> = events
        .iter()
        .filter_map(|e| if let Event::Write { at, .. } = e { Some(*at) } else { None })
        .collect();
    assert_ne!(last[last.len() - 2], first);
}
