//! `check`: everything on an image looked at, every fault listed, and repaired if that is wanted.

use nvme_driver::disk::Disk;

use crate::error::FsError;
use crate::fault::{Fault, Faults};
use crate::fs::Filesystem;
use crate::inode::Inode;
use crate::io::BlockIo;
use crate::mount::{choose_superblock, read_superblocks};
use crate::recover::{free_map, load_checkpoint, replay};
use crate::repair;
use crate::superblock::Copy;
use crate::verify::verify;

/// What check does about faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckOptions {
    /// Repair what can be repaired without losing anything that is readable.
    pub repair: bool,
    /// With `repair`: also where unreadable metadata means that files are lost, and give up their blocks, or written blocks that
    /// lie behind a file's end.
    pub force: bool,
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is still there.
    Found,
    /// It is repaired.
    Repaired,
    /// Repairing it loses something, and needs `force`.
    NeedsForce,
}

/// A fault and what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The fault.
    pub fault: Fault,
    /// What became of it.
    pub outcome: Outcome,
}

/// What check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The filesystem.
    pub uuid: [u8; 16],
    /// Checkpoints so far.
    pub generation: u64,
    /// Records in the log after the last checkpoint.
    pub records: u64,
    /// Files.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Inodes without a name that go at the next mount.
    pub orphans: u64,
    /// Extents of all files.
    pub extents: u64,
    /// Blocks of 4 KiB that files occupy.
    pub used_blocks: u64,
    /// Free blocks, unless faults make them unknown.
    pub free_blocks: Option<u64>,
    /// All faults.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether nothing is wrong (any more).
    pub fn is_clean(&self) -> bool {
        self.findings.iter().all(|f| f.outcome == Outcome::Repaired)
    }
}

/// Checks an image that is not mounted. An image that is none of ours, of another version, or without a readable superblock
/// is an error; everything else is a finding.
pub fn check<D: Disk>(disk: &mut D, options: &CheckOptions) -> Result<Report, FsError> {
    let mut io = BlockIo::new(disk)?;
    let mut faults = Faults::gather();
    let copies = read_superblocks(&mut io)?;
    for (copy, found) in copies.iter().enumerate() {
        if !matches!(found, Copy::Good(_)) {
            faults.add(Fault::Superblock { copy })?;
        }
    }
    let sb = choose_superblock(&mut io, copies)?;
    if !sb.check_features()? && options.repair {
        return Err(FsError::Features { bits: sb.ro_compat, class: "read-only compatible" });
    }
    if sb.blocks > io.blocks() {
        return Err(FsError::damaged(format!(
            "the filesystem has {} blocks, the device only {}",
            sb.blocks,
            io.blocks()
        )));
    }
    let (mut state, places) = load_checkpoint(&mut io, &sb, &mut faults)?;
    let replay = replay(&mut io, &sb, &mut state, &mut faults)?;
    verify(&sb, &state, &places, &mut faults)?;
    let mut report = Report {
        uuid: sb.uuid,
        generation: sb.generation,
        records: replay.records,
        used_blocks: state.mapped,
        free_blocks: free_map(&sb, &state, &places).ok().map(|f| f.free_blocks()),
        ..Report::default()
    };
    for (_, inode) in state.iter() {
        match inode.extents() {
            Some(map) => {
                report.files += 1;
                report.extents += map.count() as u64;
            }
            None => report.directories += 1,
        }
        report.orphans += u64::from(inode.nlink == 0);
    }
    let loses = |f: &Fault| {
        matches!(
            f,
            Fault::Chunk { .. }
                | Fault::Inodes { .. }
                | Fault::Record { .. }
                | Fault::Item { .. }
                | Fault::Root
                | Fault::BehindEnd { .. }
        )
    };
    let refused = faults.list.iter().any(loses) && !options.force;
    let repair = options.repair && !faults.list.is_empty();
    if repair && !refused {
        repair::repair(io, sb, state, places, replay)?;
    }
    report.findings = faults
        .list
        .into_iter()
        .map(|fault| {
            let outcome = match (repair, refused) {
                (true, false) => Outcome::Repaired,
                _ if loses(&fault) => Outcome::NeedsForce,
                _ => Outcome::Found,
            };
            Finding { fault, outcome }
        })
        .collect();
    Ok(report)
}

impl<D: Disk> Filesystem<D> {
    /// Checks the mounted filesystem's metadata in memory, its sums and its free map. Empty means sound.
    pub fn verify(&self) -> Vec<Fault> {
        let mut faults = Faults::gather();
        let mut places = self.places.clone();
        if let Some(c) = &self.checkpoint {
            places.extend(c.places());
        }
        // Gathering cannot fail.
        let _ = verify(&self.sb, &self.state, &places, &mut faults);
        let mut list = faults.list;
        let mut wrong = |what: String| list.push(Fault::FreeMap { what });
        let cost: u64 = self.state.iter().map(|(_, i)| i.cost()).sum();
        if cost != self.state.cost {
            wrong(format!("a checkpoint takes {cost} bytes, not {}", self.state.cost));
        }
        let pieces = || self.state.iter().filter_map(|(_, i)| Inode::extents(i)).flat_map(|m| m.iter());
        let mapped: u64 = pieces().map(|p| u64::from(p.run.len)).sum();
        let unwritten: u64 = pieces().filter(|p| !p.run.written).map(|p| u64::from(p.run.len)).sum();
        if (mapped, unwritten) != (self.state.mapped, self.state.unwritten) {
            wrong(format!("{mapped} blocks are mapped, {unwritten} of them unwritten; the sums differ"));
        }
        match free_map(&self.sb, &self.state, &places) {
            Err(block) => wrong(format!("block {block} is used twice")),
            Ok(mut free) => {
                for (first, len) in self.held() {
                    if !free.take(first, len) {
                        wrong(format!("block {first} is held back and in use"));
                    }
                }
                if free.runs().ne(self.free.runs()) {
                    wrong("it is not the complement of what is used and held".to_owned());
                }
            }
        }
        list
    }
}
