//! File contents: read and write.

use nvme_driver::disk::Disk;

use crate::error::FsError;
use crate::extents::{Piece, Run};
use crate::fs::Filesystem;
use crate::inode::{Ino, MAX_FILE_SIZE};
use crate::io::{BLOCK, BlockIo};
use crate::item::Item;
use crate::leases::Access;

/// Most extents that one item carries; a longer operation becomes several, each atomic.
pub(crate) const MAX_PIECES: usize = 96;
/// At most what one `Write` item takes.
pub(crate) const WRITE_ITEM: usize = 64 + MAX_PIECES * (24 + 12);

/// Where a stretch of a write goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) file: u64,
    pub(crate) disk: u64,
    pub(crate) len: u64,
    /// Where the blocks' bytes are now; `None`: they are zeros.
    pub(crate) old: Option<u64>,
    pub(crate) how: How,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// Written blocks, overwritten where they are.
    InPlace,
    /// Unwritten blocks become written.
    Commit,
    /// New blocks are mapped.
    Map,
}

pub(crate) fn check_range(offset: u64, len: u64) -> Result<u64, FsError> {
    match offset.checked_add(len) {
        Some(end) if end <= MAX_FILE_SIZE => Ok(end),
        end => Err(FsError::TooLarge { size: end.unwrap_or(u64::MAX), max: MAX_FILE_SIZE }),
    }
}

/// A length in memory as a length on disk.
pub(crate) fn wide(len: usize) -> u64 {
    len as u64
}

/// Reads `into.len()` bytes from `skip` bytes into the block at `disk`, whatever the alignment.
fn read_bytes<D: Disk>(
    io: &mut BlockIo<D>,
    scratch: &mut [u8],
    disk: u64,
    skip: u64,
    into: &mut [u8],
) -> Result<(), FsError> {
    let mask = io.lba_size() - 1;
    let mut at = disk * BLOCK + skip;
    let mut into = into;
    while !into.is_empty() {
        if at & mask == 0 && wide(into.len()) > mask {
            let whole = into.len() - (wide(into.len()) & mask) as usize;
            let (head, rest) = into.split_at_mut(whole);
            io.read(at, head)?;
            at += wide(whole);
            into = rest;
        } else {
            let lba_len = io.lba_size() as usize;
            let from = (at & mask) as usize;
            let n = into.len().min(lba_len - from);
            io.read(at - wide(from), &mut scratch[..lba_len])?;
            let (head, rest) = into.split_at_mut(n);
            head.copy_from_slice(&scratch[from..from + n]);
            at += wide(n);
            into = rest;
        }
    }
    Ok(())
}

impl<D: Disk> Filesystem<D> {
    /// Reads from `offset`; returns how many bytes, fewer than asked only at the end of the file.
    pub fn read_at(&mut self, ino: Ino, offset: u64, into: &mut [u8]) -> Result<usize, FsError> {
        if !self.leases.is_empty() && !into.is_empty() {
            let end = self.file(ino)?.size.min(offset.saturating_add(wide(into.len())));
            if offset < end {
                self.clear_leases(ino, offset / BLOCK..end.div_ceil(BLOCK), Some(Access::Write))?;
            }
        }
        let Self { io, state, scratch, .. } = self;
        let inode = state.get(ino).ok_or_else(|| FsError::no_inode(ino))?;
        let Some(map) = inode.extents() else {
            return Err(FsError::IsADirectory { what: format!("inode {ino}") });
        };
        let len = inode.size.saturating_sub(offset).min(wide(into.len()));
        let into = &mut into[..len as usize];
        let end = offset + len;
        if let Some(p) = map.at(offset / BLOCK)
            && p.run.written
            && end <= p.end() * BLOCK
            && (offset | len) & (io.lba_size() - 1) == 0
            && len > 0
        {
            // Whole logical blocks of one extent: nothing stands between the caller's buffer and the device.
            io.read(p.run.disk * BLOCK + (offset - p.file * BLOCK), into)?;
            return Ok(into.len());
        }
        let mut done = 0;
        for piece in map.range(offset / BLOCK, (offset + len).div_ceil(BLOCK)) {
            let from = (piece.file * BLOCK).max(offset);
            let to = (piece.end() * BLOCK).min(offset + len);
            let (a, b) = ((from - offset) as usize, (to - offset) as usize);
            into[done..a].fill(0);
            if piece.run.written {
                let skip = from - piece.file * BLOCK;
                let disk = piece.run.disk + skip / BLOCK;
                read_bytes(io, scratch, disk, skip % BLOCK, &mut into[a..b])?;
            } else {
                into[a..b].fill(0);
            }
            done = b;
        }
        into[done..].fill(0);
        Ok(into.len())
    }

    /// Writes all of `data` at `offset`, or nothing of it when there is no space. Durable after the next sync.
    pub fn write_at(&mut self, ino: Ino, offset: u64, data: &[u8]) -> Result<(), FsError> {
        self.io.writable()?;
        if self.overwrite(ino, offset, data)? {
            return Ok(());
        }
        self.file(ino)?;
        let end = check_range(offset, wide(data.len()))?;
        if data.is_empty() {
            return Ok(());
        }
        let (first, last) = (offset / BLOCK, end.div_ceil(BLOCK));
        self.clear_leases(ino, first..last, None)?;
        let size = self.file(ino)?.size;
        if offset > size && first > size / BLOCK {
            self.zero_part(ino, size, size.next_multiple_of(BLOCK))?;
        }
        self.begin(WRITE_ITEM)?;
        let targets = self.plan(ino, first, last)?;
        let result = self.write_targets(ino, offset, data, &targets);
        if result.is_err() {
            self.take_back(ino, &targets);
        }
        result
    }

    /// The shortest way: whole blocks of one written extent, which nobody else has a say in, stay where they are. Nothing
    /// changes but times. Returns false, having done nothing, when it is not that simple.
    fn overwrite(&mut self, ino: Ino, offset: u64, data: &[u8]) -> Result<bool, FsError> {
        let end = offset.saturating_add(wide(data.len()));
        let Self { io, state, txn, guarded, leases, clock, .. } = self;
        if (offset | wide(data.len())) & (BLOCK - 1) != 0 || !leases.is_empty() || !txn.guards.is_empty() {
            return Ok(false);
        }
        let Some(inode) = state.get_to_touch(ino).filter(|i| offset < end && end <= i.size) else {
            return Ok(false);
        };
        let Some(p) = inode.extents().and_then(|m| m.at(offset / BLOCK)) else { return Ok(false) };
        let disk = p.run.disk + (offset / BLOCK - p.file);
        let low = guarded.partition_point(|&b| b < disk);
        let doubted = guarded.get(low).is_some_and(|&b| b < disk + wide(data.len()) / BLOCK);
        if !p.run.written || end > p.end() * BLOCK || doubted {
            return Ok(false);
        }
        io.write(disk * BLOCK, data)?;
        let time = clock();
        inode.mtime = time;
        inode.ctime = time;
        self.note_times(ino)?;
        Ok(true)
    }

    /// After a failed write: new blocks that no item maps go back.
    pub(crate) fn take_back(&mut self, ino: Ino, targets: &[Target]) {
        for t in targets.iter().filter(|t| t.how == How::Map) {
            let mapped = self.state.get(ino).and_then(|i| i.extents()).and_then(|m| m.at(t.file));
            if mapped.is_none_or(|p| p.run.disk + (t.file - p.file) != t.disk) {
                self.free.release(t.disk, t.len);
            }
        }
    }

    fn write_targets(
        &mut self,
        ino: Ino,
        offset: u64,
        data: &[u8],
        targets: &[Target],
    ) -> Result<(), FsError> {
        let end = offset + wide(data.len());
        let time = self.now();
        let old_size = self.file(ino)?.size;
        let mut touched = true;
        for batch in targets.chunks(MAX_PIECES) {
            self.begin(WRITE_ITEM)?;
            let mut maps = Vec::new();
            let mut commits = Vec::new();
            let mut reached = 0;
            for t in batch {
                self.write_target(t, offset, data, old_size)?;
                let len = u32::try_from(t.len).unwrap_or(u32::MAX);
                match t.how {
                    How::InPlace => {}
                    How::Commit => commits.push((t.file, len)),
                    How::Map => {
                        maps.push(Piece { file: t.file, run: Run { disk: t.disk, len, written: true } });
                    }
                }
                reached = ((t.file + t.len) * BLOCK).min(end);
            }
            let size = self.file(ino)?.size;
            if !maps.is_empty() || !commits.is_empty() || reached > size {
                let size = size.max(reached);
                self.log(&Item::Write { ino, size, time, maps, commits })?;
                touched = false;
            }
        }
        if touched { self.touch(ino, time) } else { Ok(()) }
    }

    /// Decides where blocks `first..end` are to be written, and allocates what is missing. All or nothing.
    fn plan(&mut self, ino: Ino, first: u64, end: u64) -> Result<Vec<Target>, FsError> {
        let mut targets = Vec::new();
        let mut missing = 0;
        let mut at = first;
        let guarded = &self.guarded;
        let inode = self.file(ino)?;
        let Some(map) = inode.extents() else { return Err(FsError::no_inode(ino)) };
        // A hole, or blocks whose bytes a record vouches for: new blocks.
        let mut fresh = |targets: &mut Vec<Target>, file: u64, len: u64, old: Option<u64>| {
            if len > 0 {
                missing += len;
                targets.push(Target { file, disk: 0, len, old, how: How::Map });
            }
        };
        for piece in map.range(first, end) {
            fresh(&mut targets, at, piece.file - at, None);
            at = piece.end();
            let (file, disk, len) = (piece.file, piece.run.disk, u64::from(piece.run.len));
            if !piece.run.written {
                targets.push(Target { file, disk, len, old: None, how: How::Commit });
                continue;
            }
            let mut from = 0;
            let low = guarded.partition_point(|&b| b < disk);
            for &block in guarded[low..].iter().take_while(|&&b| b < disk + len) {
                let i = block - disk;
                if i > from {
                    let (file, disk) = (file + from, disk + from);
                    targets.push(Target { file, disk, len: i - from, old: Some(disk), how: How::InPlace });
                }
                fresh(&mut targets, file + i, 1, Some(block));
                from = i + 1;
            }
            if from < len {
                let (file, disk) = (file + from, disk + from);
                targets.push(Target { file, disk, len: len - from, old: Some(disk), how: How::InPlace });
            }
        }
        fresh(&mut targets, at, end - at, None);
        if missing == 0 {
            return Ok(targets);
        }
        let goal = map.before(first).map_or(self.goal, |p| p.run.disk + u64::from(p.run.len));
        self.fill(targets, missing, goal)
    }

    /// Writes the part of `data` (which begins at byte `offset` of the file) that falls into one target. Bytes behind the old
    /// end of the file, `size`, become zeros where `data` does not reach.
    pub(crate) fn write_target(
        &mut self,
        t: &Target,
        offset: u64,
        data: &[u8],
        size: u64,
    ) -> Result<(), FsError> {
        if t.how == How::InPlace {
            self.unguard(t.disk, t.len)?;
        }
        let end = offset + wide(data.len());
        let mut file = t.file;
        let stop = t.file + t.len;
        while file < stop {
            let start = file * BLOCK;
            let disk = t.disk + (file - t.file);
            let whole = if start >= offset { (end.min(stop * BLOCK) - start) / BLOCK } else { 0 };
            if whole > 0 {
                let a = (start - offset) as usize;
                self.put_data(disk, &data[a..a + (whole * BLOCK) as usize], t.how != How::InPlace)?;
                file += whole;
                continue;
            }
            let mut block = std::mem::take(&mut self.scratch);
            let filled = self.fill_block(&mut block, t.old.map(|o| o + (file - t.file)));
            if size < start + BLOCK {
                block[size.saturating_sub(start) as usize..].fill(0);
            }
            let from = start.max(offset);
            let to = (start + BLOCK).min(end);
            block[(from - start) as usize..(to - start) as usize]
                .copy_from_slice(&data[(from - offset) as usize..(to - offset) as usize]);
            let put = filled.and_then(|()| self.put_data(disk, &block, t.how != How::InPlace));
            self.scratch = block;
            put?;
            file += 1;
        }
        Ok(())
    }

    /// Before blocks are overwritten in place: no record that recovery may still doubt vouches for their bytes.
    pub(crate) fn unguard(&mut self, disk: u64, len: u64) -> Result<(), FsError> {
        let low = self.guarded.partition_point(|&b| b < disk);
        if self.guarded.get(low).is_some_and(|&b| b < disk + len) { self.barrier() } else { Ok(()) }
    }

    fn fill_block(&mut self, block: &mut [u8], old: Option<u64>) -> Result<(), FsError> {
        match old {
            Some(disk) => self.io.read(disk * BLOCK, block),
            None => {
                block.fill(0);
                Ok(())
            }
        }
    }
}
