//! Transactions: changes gather here and become one record; a sync writes it and flushes.

use std::collections::BTreeMap;

use nvme_driver::disk::Disk;

use crate::error::FsError;
use crate::fs::Filesystem;
use crate::inode::Ino;
use crate::io::{BLOCK, BLOCK_LEN};
use crate::item::Item;
use crate::log::max_record;
use crate::record::{self, GUARD, Guard, HEADER, Header};
use crate::state::Freed;

/// Data blocks that may be guarded by a CRC in the record instead of by a flush before it.
pub(crate) const MAX_GUARDS: usize = 32;
/// Inodes with new times that wait for their item.
const MAX_TIMES: usize = 32;
/// At most what an `Attr` item takes.
const ATTR_LEN: usize = 8 + 42;

/// The changes since the last record.
#[derive(Debug, Default)]
pub(crate) struct Txn {
    /// Counts transactions; what `Ticket` refers to.
    pub(crate) number: u64,
    pub(crate) items: Vec<u8>,
    pub(crate) count: u32,
    /// New data blocks and their CRCs.
    pub(crate) guards: BTreeMap<u64, u32>,
    /// New data that is not guarded lies in the device's cache: flush before the record.
    pub(crate) flush_data: bool,
    /// Blocks that these changes freed.
    pub(crate) freed: Freed,
    /// Inodes whose times changed without an item.
    times: Vec<Ino>,
}

/// A place in the order of syncs, see [`Filesystem::ticket`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

impl<D: Disk> Filesystem<D> {
    /// Makes room for an operation whose items take up to `bytes`, committing what waits if they would not fit one record.
    pub(crate) fn begin(&mut self, bytes: usize) -> Result<(), FsError> {
        self.io.writable()?;
        let fixed = HEADER + (MAX_GUARDS * GUARD) + MAX_TIMES * ATTR_LEN;
        let limit = usize::try_from(max_record(self.ring.size)).unwrap_or(usize::MAX);
        if self.txn.items.len() + bytes + fixed > limit {
            self.commit()?;
        }
        Ok(())
    }

    /// Applies an item and queues it for the record.
    pub(crate) fn log(&mut self, item: &Item<'_>) -> Result<(), FsError> {
        let freed_before = self.txn.freed.len();
        if let Err(what) = self.state.apply(item, &mut self.txn.freed) {
            // Memory may have changed halfway: nothing of it may reach the disk.
            self.io.latch(format!("damaged metadata: {what}"));
            return Err(FsError::Damaged { what });
        }
        item.encode(&mut self.txn.items);
        self.txn.count += 1;
        if !self.txn.guards.is_empty() {
            for &(_, first, len) in &self.txn.freed[freed_before..] {
                let gone: Vec<u64> = self.txn.guards.range(first..first + len).map(|g| *g.0).collect();
                for block in gone {
                    self.txn.guards.remove(&block);
                }
            }
        }
        Ok(())
    }

    /// Notes that a file's contents changed in place: its times go into the next record.
    pub(crate) fn touch(&mut self, ino: Ino, time: u64) -> Result<(), FsError> {
        self.state.set_times(ino, time);
        self.note_times(ino)
    }

    /// Notes that an inode's times in memory are newer than those in the log.
    pub(crate) fn note_times(&mut self, ino: Ino) -> Result<(), FsError> {
        if self.txn.times.last() != Some(&ino) && !self.txn.times.contains(&ino) {
            self.txn.times.push(ino);
            if self.txn.times.len() >= MAX_TIMES {
                self.begin(MAX_TIMES * ATTR_LEN)?;
                self.log_times()?;
            }
        }
        Ok(())
    }

    fn log_times(&mut self) -> Result<(), FsError> {
        for ino in std::mem::take(&mut self.txn.times) {
            if let Some(i) = self.state.get(ino) {
                let item = i.attr(ino);
                self.log(&item)?;
            }
        }
        Ok(())
    }

    /// Writes whole blocks of data. `fresh` blocks belong to nobody until the record says so, and are guarded by it.
    pub(crate) fn put_data(&mut self, block: u64, data: &[u8], fresh: bool) -> Result<(), FsError> {
        self.io.write(block * BLOCK, data)?;
        let blocks = data.len() / BLOCK_LEN;
        let txn = &mut self.txn;
        if fresh && !txn.flush_data {
            if txn.guards.len() + blocks <= MAX_GUARDS {
                for (b, bytes) in (block..).zip(data.chunks_exact(BLOCK_LEN)) {
                    txn.guards.insert(b, self.seed.crc(bytes));
                }
            } else {
                txn.flush_data = true;
                txn.guards.clear();
            }
        } else if !fresh && !txn.guards.is_empty() {
            for (b, bytes) in (block..).zip(data.chunks_exact(BLOCK_LEN)) {
                if let Some(crc) = txn.guards.get_mut(&b) {
                    *crc = self.seed.crc(bytes);
                }
            }
        }
        Ok(())
    }

    /// Makes everything so far durable, in one record.
    pub fn sync_all(&mut self) -> Result<(), FsError> {
        self.commit()
    }

    /// Makes a file durable: its data, its size, its name. Everything that happened before becomes durable too, in order.
    pub fn sync(&mut self, ino: Ino) -> Result<(), FsError> {
        self.inode(ino)?;
        self.commit()
    }

    /// A ticket for everything done so far. Several callers may take tickets, then one `sync_all` serves them all.
    pub fn ticket(&self) -> Ticket {
        Ticket(self.txn.number)
    }

    /// Whether what the ticket stands for is durable.
    pub fn is_durable(&self, ticket: Ticket) -> bool {
        ticket.0 < self.txn.number
            || (self.txn.items.is_empty() && self.txn.times.is_empty() && !self.io.unflushed)
    }

    /// One record with all that waits, and a flush.
    pub(crate) fn commit(&mut self) -> Result<(), FsError> {
        self.log_times()?;
        if self.txn.count == 0 {
            if self.io.unflushed {
                self.io.flush()?;
            }
            self.txn.number += 1;
            return Ok(());
        }
        self.write_record()
    }

    /// Makes the log know that its last record is durable, so that the blocks it guards may be overwritten.
    pub(crate) fn barrier(&mut self) -> Result<(), FsError> {
        self.log_times()?;
        self.write_record()
    }

    fn write_record(&mut self) -> Result<(), FsError> {
        if self.txn.flush_data {
            self.io.flush()?;
        }
        let body_len = self.txn.guards.len() * GUARD + self.txn.items.len();
        let unit = usize::try_from(self.ring.unit).unwrap_or(BLOCK_LEN);
        let len = (HEADER + body_len).next_multiple_of(unit) as u64;
        if self.make_room(len)? {
            let header = Header {
                sequence: self.ring.sequence,
                durable: self.ring.sequence - 1,
                epoch: self.ring.epoch,
                prev_crc: self.ring.prev_crc,
                body_len: body_len as u32,
                guards: self.txn.guards.len() as u32,
                items: self.txn.count,
            };
            let guards = self.txn.guards.iter().map(|(&block, &crc)| Guard { block, crc });
            let crc = record::encode(&header, guards, &self.txn.items, self.seed, unit, &mut self.record);
            for (at, range) in self.ring.pieces(len) {
                if !range.is_empty() {
                    self.io.write(at, &self.record[range])?;
                }
            }
            self.io.flush()?;
            self.ring.advance(len, crc);
            self.guarded.clear();
            self.guarded.extend(self.txn.guards.keys());
        }
        self.settle();
        self.checkpoint_step(len)
    }

    /// The transaction is durable: what it freed may be used again, and a new one begins.
    fn settle(&mut self) {
        let mut freed = std::mem::take(&mut self.txn.freed);
        for (ino, first, len) in freed.drain(..) {
            if self.leases.may_reuse(ino, first, len) {
                self.free.release(first, len);
            }
        }
        self.txn.freed = freed;
        self.txn.items.clear();
        self.txn.count = 0;
        self.txn.guards.clear();
        self.txn.flush_data = false;
        self.txn.number += 1;
    }
}
