//! Checkpoints: all metadata written out beside the log, so that the log can begin anew. Syncs go on meanwhile.

use nvme_driver::disk::Disk;

use crate::chunk::{self, MAX_BLOCKS, Place, blocks_for};
use crate::error::FsError;
use crate::fs::Filesystem;
use crate::io::BLOCK;
use crate::superblock::{COMPAT, COPIES, FIRST_LOG_BLOCK, Superblock};

/// A checkpoint under way.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    /// What the superblock will say.
    sb: Superblock,
    /// Where the chunks go; those up to `next` are written.
    places: Vec<Place>,
    next: usize,
    /// Bytes of items still to be written.
    left: u64,
    /// Bytes of the next chunk that belong to an item begun in the one before.
    carried: usize,
    /// Bytes of the ring that it makes free.
    frees: u64,
    /// Blocks of the checkpoint before it, which it makes free.
    old_blocks: u64,
}

impl Checkpoint {
    /// The blocks that it takes.
    pub(crate) fn places(&self) -> &[Place] {
        &self.places
    }

    /// Blocks that it gives back when it is done.
    pub(crate) fn old_blocks(&self) -> u64 {
        self.old_blocks
    }
}

impl<D: Disk> Filesystem<D> {
    /// Sees to it that a record of `len` bytes fits the ring. Returns false when a checkpoint that includes the waiting
    /// changes was written instead, and no record is needed.
    pub(crate) fn make_room(&mut self, len: u64) -> Result<bool, FsError> {
        if self.ring.room() >= len {
            return Ok(true);
        }
        self.finish_checkpoint()?;
        if self.ring.room() >= len {
            return Ok(true);
        }
        self.io.flush()?;
        self.begin_checkpoint()?;
        self.finish_checkpoint()?;
        self.guarded.clear();
        Ok(false)
    }

    /// After a record of `len` bytes: begins a checkpoint when the log is half full, and goes on with one in step with the log.
    pub(crate) fn checkpoint_step(&mut self, len: u64) -> Result<(), FsError> {
        if self.checkpoint.is_none() {
            if self.ring.used < self.ring.size / 2 {
                return Ok(());
            }
            self.begin_checkpoint()?;
        }
        // Done when half of the room that is left has been used.
        let left = self.checkpoint.as_ref().map_or(0, |c| c.left);
        let budget = u128::from(left) * u128::from(len) / u128::from((self.ring.room() / 2).max(1));
        self.write_chunks(u64::try_from(budget).unwrap_or(u64::MAX))
    }

    /// Writes a checkpoint now, whatever the log's fill.
    pub fn checkpoint_now(&mut self) -> Result<(), FsError> {
        self.commit()?;
        self.finish_checkpoint()?;
        self.begin_checkpoint()?;
        self.finish_checkpoint()
    }

    fn begin_checkpoint(&mut self) -> Result<(), FsError> {
        let bytes = self.state.cost;
        let mut places = Vec::new();
        let mut room = 0;
        while room < bytes {
            let want = blocks_for(bytes - room).min(MAX_BLOCKS);
            let Some((block, blocks)) = self.free.allocate(want, FIRST_LOG_BLOCK) else {
                self.free_places(&places);
                return Err(FsError::damaged("no space for a checkpoint, though it was reserved"));
            };
            let place = Place { block, blocks };
            room += place.room();
            places.push(place);
        }
        let first = places.first().copied().unwrap_or(Place { block: 0, blocks: 0 });
        let sb = Superblock {
            // It is written by the rules of all of them now.
            compat: self.sb.compat | COMPAT,
            generation: self.sb.generation + 1,
            log_head: self.ring.tail,
            sequence: self.ring.sequence,
            prev_crc: self.ring.prev_crc,
            epoch: self.ring.epoch,
            chunk_block: first.block,
            chunk_blocks: first.blocks as u32,
            next_ino: self.state.next_ino,
            inodes: self.state.count(),
            ..self.sb.clone()
        };
        self.state.begin_capture();
        let old_blocks = self.places.iter().map(|p| p.blocks).sum();
        let frees = self.ring.used;
        self.checkpoint =
            Some(Checkpoint { sb, places, next: 0, left: bytes, carried: 0, frees, old_blocks });
        Ok(())
    }

    /// Writes chunks until `budget` bytes are written; at the end the superblocks.
    fn write_chunks(&mut self, mut budget: u64) -> Result<(), FsError> {
        while budget > 0
            && let Some(c) = &mut self.checkpoint
        {
            let Some(&place) = c.places.get(c.next).filter(|_| c.left > 0) else {
                return self.end_checkpoint();
            };
            let want = place.room().min(c.left);
            let want_len = usize::try_from(want).unwrap_or(usize::MAX);
            self.state.capture_more(want_len);
            let left = c.left - want;
            let next = c.places.get(c.next + 1).copied().filter(|_| left > 0);
            let Some(body) = self.state.capture.as_ref().and_then(|cap| cap.ready(want_len)) else {
                return Err(FsError::damaged("a checkpoint came out shorter than it was counted"));
            };
            let (first, carried) = chunk::item_starts(body, want_len, c.carried);
            c.carried = carried;
            let (generation, index) = (c.sb.generation, c.next as u32);
            chunk::encode(generation, index, next, first, &body[..want_len], self.seed, &mut self.record);
            c.left = left;
            c.next += 1;
            self.io.write(place.block * BLOCK, &self.record)?;
            if let Some(cap) = &mut self.state.capture {
                cap.take(want_len);
            }
            budget = budget.saturating_sub(want);
        }
        Ok(())
    }

    /// Goes on with a checkpoint under way until it is done.
    pub(crate) fn finish_checkpoint(&mut self) -> Result<(), FsError> {
        while self.checkpoint.is_some() {
            self.write_chunks(u64::MAX)?;
        }
        Ok(())
    }

    fn end_checkpoint(&mut self) -> Result<(), FsError> {
        let Some(c) = self.checkpoint.take() else { return Ok(()) };
        self.state.capture = None;
        self.io.flush()?;
        write_superblocks(&c.sb, |at, bytes| self.io.write(at, bytes).and_then(|()| self.io.flush()))?;
        // Both copies are durable: nothing needs the old checkpoint, or the log before this one, any more.
        let old = std::mem::replace(&mut self.places, c.places[..c.next].to_vec());
        self.free_places(&old);
        self.free_places(&c.places[c.next..]);
        self.sb = c.sb;
        self.ring.used -= c.frees;
        Ok(())
    }

    fn free_places(&mut self, places: &[Place]) {
        for p in places {
            self.free.release(p.block, p.blocks);
        }
    }
}

/// Writes both copies, each durable before the next: at any moment at least one is whole. They take turns in being first.
pub(crate) fn write_superblocks(
    sb: &Superblock,
    mut write: impl FnMut(u64, &[u8]) -> Result<(), FsError>,
) -> Result<(), FsError> {
    let bytes = sb.encode();
    let first = (sb.generation % 2) as usize;
    write(COPIES[first], &bytes)?;
    write(COPIES[1 - first], &bytes)
}
