//! Layouts: the blocks behind a file range, handed out under a lease, committed and given back.

use nvme_driver::disk::Disk;

use crate::data::{MAX_PIECES, WRITE_ITEM};
use crate::error::FsError;
use crate::extents::Piece;
use crate::fs::Filesystem;
use crate::inode::{Ino, MAX_FILE_BLOCKS, MAX_FILE_SIZE};
use crate::io::BLOCK;
use crate::item::Item;
use crate::leases::{Access, Lease, Recall};

/// What lies behind a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// No blocks; reads as zeros.
    Hole,
    /// Blocks that read as zeros through the filesystem until they are committed, whatever the device holds.
    Unwritten,
    /// Blocks with the file's bytes.
    Written,
}

/// Adjoining blocks of the device behind adjoining blocks of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where in the file, in bytes.
    pub file_offset: u64,
    /// First logical block on the device (in the device's own block size); 0 for a hole.
    pub lba: u64,
    /// Length in blocks of 4 KiB.
    pub blocks: u64,
    /// What lies there.
    pub state: BlockState,
}

impl Extent {
    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.blocks * BLOCK
    }
}

/// The answer to [`Filesystem::map_blocks`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Names the right to use it.
    pub lease: Lease,
    /// The file.
    pub ino: Ino,
    /// The filesystem.
    pub uuid: [u8; 16],
    /// The blocks, in file order, without gaps, covering the range rounded outwards to blocks.
    pub extents: Vec<Extent>,
}

impl<D: Disk> Filesystem<D> {
    /// Where the bytes of a range are now, without a lease: true until the next call that changes anything.
    pub fn query_blocks(&self, ino: Ino, offset: u64, len: u64) -> Result<Vec<Extent>, FsError> {
        let (first, end) = block_range(offset, len)?;
        let mut extents = Vec::new();
        let Some(map) = self.file(ino)?.extents() else { return Ok(extents) };
        let hole = |from: u64, to: u64| Extent {
            file_offset: from * BLOCK,
            lba: 0,
            blocks: to - from,
            state: BlockState::Hole,
        };
        let mut at = first;
        for p in map.range(first, end) {
            if p.file > at {
                extents.push(hole(at, p.file));
            }
            extents.push(Extent {
                file_offset: p.file * BLOCK,
                lba: self.io.lba(p.run.disk * BLOCK),
                blocks: u64::from(p.run.len),
                state: if p.run.written { BlockState::Written } else { BlockState::Unwritten },
            });
            at = p.end();
        }
        if at < end {
            extents.push(hole(at, end));
        }
        Ok(extents)
    }

    /// Hands out the blocks behind a range. For writing, holes get (unwritten) blocks first, so that a later write never
    /// meets a full disk. A lease in the way is recalled: try again when it is gone.
    pub fn map_blocks(&mut self, ino: Ino, offset: u64, len: u64, access: Access) -> Result<Layout, FsError> {
        let (first, end) = block_range(offset, len)?;
        self.file(ino)?;
        self.clear_leases(ino, first..end, access.conflicts())?;
        if access == Access::Write {
            self.io.writable()?;
            let size = self.file(ino)?.size;
            if self.txn.count > 0 && !size.is_multiple_of(BLOCK) && (first..end).contains(&(size / BLOCK)) {
                // Bytes of the last block that lie behind the end are the holder's to spoil: a crash must not bring back a
                // longer file that they belong to.
                self.commit()?;
            }
            self.allocate_range(ino, first, end)?;
            self.unguard_range(ino, first, end)?;
        }
        let extents = self.query_blocks(ino, offset, len)?;
        let pieces = self.file(ino)?.extents().map(|m| m.range(first, end).collect()).unwrap_or_default();
        let lease = self.leases.grant(ino, access, first..end, pieces);
        Ok(Layout { lease, ino, uuid: self.uuid(), extents })
    }

    /// What a lease covers now, for a process that was handed the lease.
    pub fn layout(&mut self, lease: Lease) -> Result<Layout, FsError> {
        let entry =
            self.leases.get(lease).map_err(|reason| FsError::StaleLease { lease: lease.id, reason })?;
        let (ino, ranges) = (entry.ino, entry.ranges.clone());
        let mut extents = Vec::new();
        for r in ranges {
            extents.append(&mut self.query_blocks(ino, r.start * BLOCK, (r.end - r.start) * BLOCK)?);
        }
        Ok(Layout { lease, ino, uuid: self.uuid(), extents })
    }

    /// Begins to recall the leases that are in the way of access to a range by other means, memory windows for example.
    /// `Ok` when there are none (any more).
    pub fn make_way(&mut self, ino: Ino, offset: u64, len: u64, access: Access) -> Result<(), FsError> {
        if self.leases.is_empty() {
            return Ok(());
        }
        let (first, end) = block_range(offset, len)?;
        self.clear_leases(ino, first..end, access.conflicts())
    }

    /// The holder will write these blocks behind our back: no record may vouch for their bytes.
    fn unguard_range(&mut self, ino: Ino, first: u64, end: u64) -> Result<(), FsError> {
        let pieces: Vec<Piece> =
            self.file(ino)?.extents().map(|m| m.range(first, end).collect()).unwrap_or_default();
        let pending = |fs: &Self, p: &Piece| {
            fs.txn.guards.range(p.run.disk..p.run.disk + u64::from(p.run.len)).next().is_some()
        };
        if pieces.iter().any(|p| pending(self, p)) {
            self.commit()?;
        }
        for p in pieces {
            self.unguard(p.run.disk, u64::from(p.run.len))?;
        }
        Ok(())
    }

    /// What the holder of a write lease wrote into `extents` becomes the file's contents, and the file at least `new_size`
    /// long. Durable after the next sync. Blocks behind the end stay unwritten.
    pub fn commit_blocks(
        &mut self,
        lease: Lease,
        extents: &[Extent],
        new_size: Option<u64>,
    ) -> Result<(), FsError> {
        self.io.writable()?;
        let stale = |reason: String| FsError::StaleLease { lease: lease.id, reason };
        let entry = self.leases.get(lease).map_err(stale)?;
        let ino = entry.ino;
        if entry.access != Access::Write {
            return Err(FsError::invalid(format!("lease {} is for reading only", lease.id)));
        }
        for e in extents {
            let (first, end) = block_range(e.file_offset, e.bytes())?;
            if !e.file_offset.is_multiple_of(BLOCK) || !entry.contains(&(first..end)) {
                return Err(FsError::invalid(format!(
                    "lease {} does not cover {} blocks at {}",
                    lease.id, e.blocks, e.file_offset
                )));
            }
        }
        let old_size = self.file(ino)?.size;
        let size = old_size.max(new_size.unwrap_or(0));
        if size > MAX_FILE_SIZE {
            return Err(FsError::TooLarge { size, max: MAX_FILE_SIZE });
        }
        let mut commits = Vec::new();
        for e in extents {
            let now = self.query_blocks(ino, e.file_offset, e.bytes())?;
            let mut lba = e.lba;
            for n in &now {
                if n.state == BlockState::Hole || n.lba != lba {
                    let reason = format!("the file's blocks at {} are others by now", n.file_offset);
                    return Err(FsError::StaleLease { lease: lease.id, reason });
                }
                lba += self.io.lba(n.bytes());
                let (first, end) = (n.file_offset / BLOCK, n.file_offset / BLOCK + n.blocks);
                let end = end.min(size.div_ceil(BLOCK));
                if n.state == BlockState::Unwritten && first < end {
                    commits.push((first, u32::try_from(end - first).unwrap_or(u32::MAX)));
                }
            }
        }
        let covers = |block: u64| {
            extents.iter().any(|e| (e.file_offset / BLOCK..e.file_offset / BLOCK + e.blocks).contains(&block))
        };
        let covers_tail = covers(size / BLOCK);
        // The bytes behind the old end become part of the file: zeros, unless the holder wrote them.
        if old_size < size && !covers(old_size / BLOCK) {
            self.zero_part(ino, old_size, old_size.next_multiple_of(BLOCK).min(size))?;
        }
        // The data is in the device's cache at best: it must be durable before the record that makes it visible.
        self.txn.flush_data = true;
        self.txn.guards.clear();
        self.io.unflushed = true;
        let time = self.now();
        if commits.is_empty() && size == old_size {
            self.touch(ino, time)?;
        }
        let mut batches = commits.chunks(MAX_PIECES).peekable();
        while let Some(batch) = batches.next() {
            self.begin(WRITE_ITEM)?;
            self.txn.flush_data = true;
            let size = if batches.peek().is_none() { size } else { old_size };
            self.log(&Item::Write { ino, size, time, maps: Vec::new(), commits: batch.to_vec() })?;
        }
        if commits.is_empty() && size != old_size {
            self.begin(WRITE_ITEM)?;
            self.log(&Item::Write { ino, size, time, maps: Vec::new(), commits: Vec::new() })?;
        }
        if covers_tail && !size.is_multiple_of(BLOCK) {
            self.zero_in_place(ino, size)?;
        }
        Ok(())
    }

    /// One more holder of a lease, for a process that was handed it.
    pub fn share_lease(&mut self, lease: Lease) -> Result<(), FsError> {
        let entry =
            self.leases.get(lease).map_err(|reason| FsError::StaleLease { lease: lease.id, reason })?;
        entry.holders = entry.holders.saturating_add(1);
        Ok(())
    }

    /// One holder gives a lease back; with the last one it ends.
    pub fn release(&mut self, lease: Lease) -> Result<(), FsError> {
        let entry =
            self.leases.known(lease).map_err(|reason| FsError::StaleLease { lease: lease.id, reason })?;
        entry.holders -= 1;
        if entry.holders == 0 {
            self.end_lease(lease.id, 0..MAX_FILE_BLOCKS);
        }
        Ok(())
    }

    /// All holders give part of a lease back, as a recall asks for: bytes rounded outwards to blocks.
    pub fn release_range(&mut self, lease: Lease, offset: u64, len: u64) -> Result<(), FsError> {
        self.leases.get(lease).map_err(|reason| FsError::StaleLease { lease: lease.id, reason })?;
        let (first, end) = block_range(offset, len)?;
        self.end_lease(lease.id, first..end);
        Ok(())
    }

    fn end_lease(&mut self, id: u64, range: std::ops::Range<u64>) {
        for (block, len) in self.leases.give_back(id, &range) {
            self.free.release(block, len);
        }
    }

    /// Recalls that holders are to be told about; each is returned once.
    pub fn take_recalls(&mut self) -> Vec<Recall> {
        self.leases.news()
    }

    /// When [`Self::expire_leases`] has something to do next, by the filesystem's clock.
    pub fn next_lease_deadline(&self) -> Option<u64> {
        self.leases.next_deadline()
    }

    /// Fences holders that let their deadline pass. `fence` makes further access of theirs impossible and says whether it
    /// could; only then the lease ends and its blocks may be reused. Where it could not, see [`sever`](Self::sever).
    pub fn expire_leases(&mut self, mut fence: impl FnMut(&Recall) -> bool) -> usize {
        let mut ended = 0;
        for late in self.leases.overdue(self.now()) {
            if fence(&late) {
                self.end_lease(late.lease.id, 0..MAX_FILE_BLOCKS);
                ended += 1;
            }
        }
        ended
    }

    /// The device has another generation: a reset, a removal, a restart. Leases of the one before are stale; the caller has
    /// made sure that nobody can reach the device by them.
    pub fn set_device_generation(&mut self, generation: u64) {
        self.leases.device_generation = generation;
        for (block, len) in self.leases.end_all() {
            self.free.release(block, len);
        }
    }

    /// The device generation that leases are given under.
    pub fn device_generation(&self) -> u64 {
        self.leases.device_generation
    }

    /// Goes on only when no lease (of kind `only`, if given) is on the range; otherwise recalls them.
    pub(crate) fn clear_leases(
        &mut self,
        ino: Ino,
        range: std::ops::Range<u64>,
        only: Option<Access>,
    ) -> Result<(), FsError> {
        match self.recall_leases(ino, range, only) {
            Some(lease) => Err(FsError::LeaseConflict { ino, lease }),
            None => Ok(()),
        }
    }

    /// Begins to recall the leases on a range; what they cover is not reused before they end.
    pub(crate) fn recall_leases(
        &mut self,
        ino: Ino,
        range: std::ops::Range<u64>,
        only: Option<Access>,
    ) -> Option<u64> {
        if self.leases.is_empty() {
            return None;
        }
        let deadline = self.now().saturating_add(self.lease_grace);
        self.leases.recall(ino, range, only, deadline)
    }
}

fn block_range(offset: u64, len: u64) -> Result<(u64, u64), FsError> {
    match offset.checked_add(len) {
        Some(end) if end <= MAX_FILE_SIZE && len > 0 => Ok((offset / BLOCK, end.div_ceil(BLOCK))),
        _ => Err(FsError::invalid(format!("no range: {len} bytes at {offset}"))),
    }
}
