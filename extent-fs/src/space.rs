//! A file's space: truncate, allocate, punch, trim; and where new blocks come from.

use nvme_driver::disk::Disk;

use crate::data::{How, MAX_PIECES, Target, WRITE_ITEM, check_range, wide};
use crate::error::FsError;
use crate::extents::{Piece, Run};
use crate::fs::Filesystem;
use crate::inode::{Ino, MAX_FILE_BLOCKS, extent_growth};
use crate::io::BLOCK;
use crate::item::Item;

/// What [`Filesystem::fallocate`] does to a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Falloc {
    /// Allocates blocks, unwritten; the file grows if the range ends behind it.
    Extend,
    /// Allocates blocks, unwritten; the size stays.
    KeepSize,
    /// Makes the range read as zeros and frees the blocks that lie in it whole. The size stays.
    PunchHole,
}

impl<D: Disk> Filesystem<D> {
    /// Makes the file `size` bytes long. What is cut off is gone; what is added reads as zeros.
    pub fn truncate(&mut self, ino: Ino, size: u64) -> Result<(), FsError> {
        self.io.writable()?;
        let old = self.file(ino)?.size;
        check_range(size, 0)?;
        if size > old && size / BLOCK > old / BLOCK {
            // What a lease holder left behind the end is not to be seen.
            self.zero_part(ino, old, old.next_multiple_of(BLOCK))?;
        }
        if size < old {
            self.recall_leases(ino, size / BLOCK..MAX_FILE_BLOCKS, None);
            // Bytes behind the end are always zeros, so that growing again shows none of the old ones.
            self.zero_part(ino, size, size.next_multiple_of(BLOCK))?;
        }
        self.begin(64)?;
        let time = self.now();
        self.log(&Item::Truncate { ino, size, time })
    }

    /// Makes bytes within one block read as zeros, leaving the size alone.
    pub(crate) fn zero_part(&mut self, ino: Ino, from: u64, to: u64) -> Result<(), FsError> {
        let Some(piece) = self.file(ino)?.extents().and_then(|m| m.at(from / BLOCK)) else { return Ok(()) };
        if from == to || !piece.run.written {
            return Ok(());
        }
        let file = from / BLOCK;
        let old = piece.run.disk + (file - piece.file);
        self.io.read(old * BLOCK, &mut self.scratch)?;
        let (a, b) = ((from - file * BLOCK) as usize, (to - file * BLOCK) as usize);
        if self.scratch[a..b].iter().all(|&b| b == 0) {
            return Ok(());
        }
        self.begin(WRITE_ITEM)?;
        // Into a new block, so that a cut leaves either the old end or the new one; in place on a full disk.
        let moved = self.fill(
            vec![Target { file, disk: 0, len: 1, old: Some(old), how: How::Map }],
            1,
            piece.run.disk + u64::from(piece.run.len),
        );
        let target = match moved {
            Ok(targets) => targets.first().copied(),
            Err(FsError::NoSpace { .. }) => None,
            Err(e) => return Err(e),
        };
        let target = match target {
            Some(t) => t,
            None => Target { file, disk: old, len: 1, old: Some(old), how: How::InPlace },
        };
        let zeros = vec![0; (to - from) as usize];
        if let Err(e) = self.write_target(&target, from, &zeros, u64::MAX) {
            self.take_back(ino, &[target]);
            return Err(e);
        }
        if target.how == How::Map {
            let (size, time) = (self.file(ino)?.size, self.now());
            let maps = vec![Piece { file, run: Run { disk: target.disk, len: 1, written: true } }];
            self.log(&Item::Write { ino, size, time, maps, commits: Vec::new() })?;
        }
        Ok(())
    }

    /// Makes the bytes from the end of the file, `size`, to the end of its block zeros, where they are.
    pub(crate) fn zero_in_place(&mut self, ino: Ino, size: u64) -> Result<(), FsError> {
        let file = size / BLOCK;
        let Some(p) = self.file(ino)?.extents().and_then(|m| m.at(file)).filter(|p| p.run.written) else {
            return Ok(());
        };
        let disk = p.run.disk + (file - p.file);
        let target = Target { file, disk, len: 1, old: Some(disk), how: How::InPlace };
        let zeros = vec![0; (size.next_multiple_of(BLOCK) - size) as usize];
        self.write_target(&target, size, &zeros, u64::MAX)
    }

    /// Allocates or frees the blocks of a range; see [`Falloc`].
    pub fn fallocate(&mut self, ino: Ino, offset: u64, len: u64, what: Falloc) -> Result<(), FsError> {
        self.io.writable()?;
        let size = self.file(ino)?.size;
        let end = check_range(offset, len)?;
        if len == 0 {
            return Err(FsError::invalid("fallocate of 0 bytes"));
        }
        if what == Falloc::PunchHole {
            return self.punch(ino, offset, end.min(size.next_multiple_of(BLOCK)));
        }
        self.allocate_range(ino, offset / BLOCK, end.div_ceil(BLOCK))?;
        if what == Falloc::Extend && end > size {
            self.begin(64)?;
            let time = self.now();
            self.log(&Item::Write { ino, size: end, time, maps: Vec::new(), commits: Vec::new() })?;
        }
        Ok(())
    }

    /// Puts unwritten blocks into the holes of `first..end`.
    pub(crate) fn allocate_range(&mut self, ino: Ino, first: u64, end: u64) -> Result<(), FsError> {
        let mut holes = Vec::new();
        let mut at = first;
        let mut goal = self.goal;
        if let Some(map) = self.file(ino)?.extents() {
            for p in map.range(first, end) {
                holes.push((at, p.file - at));
                at = p.end();
            }
            goal = map.before(end).map_or(goal, |p| p.run.disk + u64::from(p.run.len));
        }
        holes.push((at, end.saturating_sub(at)));
        let targets: Vec<Target> = holes
            .into_iter()
            .filter(|h| h.1 > 0)
            .map(|(file, len)| Target { file, disk: 0, len, old: None, how: How::Map })
            .collect();
        let missing = targets.iter().fold(0u64, |sum, t| sum.saturating_add(t.len));
        if missing == 0 {
            return Ok(());
        }
        let targets = self.fill(targets, missing, goal)?;
        for batch in targets.chunks(MAX_PIECES) {
            self.begin(WRITE_ITEM)?;
            let maps = batch
                .iter()
                .map(|t| Piece { file: t.file, run: Run { disk: t.disk, len: t.len as u32, written: false } })
                .collect();
            let (size, time) = (self.file(ino)?.size, self.now());
            self.log(&Item::Write { ino, size, time, maps, commits: Vec::new() })?;
        }
        Ok(())
    }

    fn punch(&mut self, ino: Ino, offset: u64, end: u64) -> Result<(), FsError> {
        if offset >= end {
            return Ok(());
        }
        self.recall_leases(ino, offset / BLOCK..end.div_ceil(BLOCK), None);
        let (first, last) = (offset.div_ceil(BLOCK), end / BLOCK);
        if first > last {
            return self.zero_part(ino, offset, end);
        }
        self.zero_part(ino, offset, first * BLOCK)?;
        self.zero_part(ino, last * BLOCK, end)?;
        if first < last {
            self.begin(64)?;
            self.allow_growth(extent_growth(2))?;
            let time = self.now();
            self.log(&Item::Punch { ino, first, blocks: last - first, time })?;
        }
        Ok(())
    }

    /// Tells the device about every free block (trim). Only blocks whose freeing is durable are told.
    pub fn trim(&mut self) -> Result<u64, FsError> {
        self.commit()?;
        if !self.io.disk.geometry().can_deallocate {
            return Ok(0);
        }
        let mut blocks = 0;
        for (start, len) in self.free.runs() {
            self.io.deallocate(start * BLOCK, len * BLOCK)?;
            blocks += len;
        }
        Ok(blocks)
    }

    /// Gives every `Map` target its blocks.
    pub(crate) fn fill(
        &mut self,
        targets: Vec<Target>,
        missing: u64,
        mut goal: u64,
    ) -> Result<Vec<Target>, FsError> {
        let mut out = Vec::with_capacity(targets.len());
        let mut taken: Vec<(u64, u64)> = Vec::new();
        self.allow_blocks(missing, extent_growth(2 * wide(targets.len())))?;
        for t in targets {
            if t.how != How::Map {
                out.push(t);
                continue;
            }
            let mut from = 0;
            while from < t.len {
                let Some((disk, len)) = self.free.allocate((t.len - from).min(u64::from(u32::MAX)), goal)
                else {
                    break;
                };
                taken.push((disk, len));
                goal = disk + len;
                let old = t.old.map(|o| o + from);
                out.push(Target { file: t.file + from, disk, len, old, how: How::Map });
                from += len;
            }
        }
        // Scattered free space made more extents than were counted on.
        if self.free.free_blocks() < self.reserve(extent_growth(2 * wide(out.len()))) {
            for (disk, len) in taken {
                self.free.release(disk, len);
            }
            return Err(FsError::NoSpace { needed: missing, free: self.free.free_blocks() });
        }
        self.goal = goal;
        Ok(out)
    }

    /// Refuses when `blocks` data blocks and `growth` bytes of metadata do not fit; blocks freed lately are waited for.
    pub(crate) fn allow_blocks(&mut self, blocks: u64, growth: u64) -> Result<(), FsError> {
        let fits = |fs: &Self| {
            fs.free.free_blocks().checked_sub(blocks).is_some_and(|left| left >= fs.reserve(growth))
        };
        if !fits(self) && !self.txn.freed.is_empty() {
            self.commit()?;
        }
        if fits(self) {
            return Ok(());
        }
        let free = self.free.free_blocks().saturating_sub(self.reserve(growth));
        Err(FsError::NoSpace { needed: blocks, free })
    }
}
