//! The log: a ring of records in a fixed place. Here is where records go, and how they are found again.

use nvme_driver::disk::Disk;

use crate::codec::Seed;
use crate::error::FsError;
use crate::io::{BLOCK, BLOCK_LEN, BlockIo};
use crate::record::{self, Record};
use crate::superblock::FIRST_LOG_BLOCK;

/// Blocks that are looked at for a log without a superblock.
const REMAINS: u64 = 4096;

/// Longest record in a ring of `size` bytes. Bounded so that looking for records in a hostile image is too.
pub(crate) fn max_record(size: u64) -> u64 {
    (size / 4).min(256 << 10)
}

/// Where the next record goes, and what must not be overwritten.
#[derive(Clone, Debug)]
pub(crate) struct Ring {
    /// Byte address of the ring on the device.
    pub(crate) start: u64,
    pub(crate) size: u64,
    pub(crate) unit: u64,
    /// Offset of the next record.
    pub(crate) tail: u64,
    /// Bytes from the first record still needed to `tail`.
    pub(crate) used: u64,
    pub(crate) sequence: u64,
    pub(crate) epoch: u64,
    pub(crate) prev_crc: u32,
}

impl Ring {
    pub(crate) fn room(&self) -> u64 {
        self.size - self.used
    }

    /// The one or two pieces (byte address, range of the record) that a record of `len` bytes at the tail is written in.
    pub(crate) fn pieces(&self, len: u64) -> [(u64, std::ops::Range<usize>); 2] {
        let first = len.min(self.size - self.tail);
        let (split, end) = (first as usize, len as usize);
        [(self.start + self.tail, 0..split), (self.start, split..end)]
    }

    /// A record of `len` bytes was written at the tail.
    pub(crate) fn advance(&mut self, len: u64, crc: u32) {
        self.tail = (self.tail + len) % self.size;
        self.used += len;
        self.sequence += 1;
        self.prev_crc = crc;
    }
}

/// The bytes of a ring, read for recovery.
pub(crate) struct Image<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) unit: usize,
    pub(crate) seed: Seed,
}

impl Image<'_> {
    /// The record at `offset`, with the bytes that it takes in the ring, copied into `scratch` if it wraps.
    pub(crate) fn record_at<'s>(
        &'s self,
        offset: usize,
        scratch: &'s mut Vec<u8>,
    ) -> Option<(Record<'s>, usize)> {
        let here = self.bytes.get(offset..)?;
        let len = record::peek_len(here)?;
        if len as u64 > max_record(self.bytes.len() as u64) {
            return None;
        }
        let record = if len <= here.len() {
            record::decode(here, self.seed)?
        } else {
            scratch.clear();
            scratch.extend_from_slice(here);
            scratch.extend_from_slice(&self.bytes[..len - here.len()]);
            record::decode(scratch, self.seed)?
        };
        Some((record, len.next_multiple_of(self.unit)))
    }

    /// Looks at every place where a record may begin, whatever its sequence.
    pub(crate) fn survey(&self) -> Survey {
        let mut survey = Survey::default();
        let mut scratch = Vec::new();
        let mut offset = 0;
        while offset < self.bytes.len() {
            let mut step = self.unit;
            if let Some((r, len)) = self.record_at(offset, &mut scratch) {
                survey.epoch = survey.epoch.max(r.header.epoch);
                survey.durable = survey.durable.max(r.header.durable);
                survey.last = survey.last.max(r.header.sequence);
                step = len;
            }
            offset += step;
        }
        survey
    }
}

/// What all valid records in the ring say, taken together.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Survey {
    pub(crate) epoch: u64,
    /// Highest sequence that some record knew durable.
    pub(crate) durable: u64,
    /// Highest sequence of any record.
    pub(crate) last: u64,
}

/// Looks for a log where there is no superblock: the highest sequence of what looks like a record near the front of the device.
pub(crate) fn remains<D: Disk>(io: &mut BlockIo<D>) -> Result<Option<u64>, FsError> {
    let mut last = None;
    let mut block = vec![0; BLOCK_LEN];
    for at in FIRST_LOG_BLOCK..io.blocks().min(FIRST_LOG_BLOCK + REMAINS) {
        io.read(at * BLOCK, &mut block)?;
        // Records begin on logical blocks, of 512 bytes at least.
        last = last.max(block.chunks(512).filter_map(record::sequence_of).max());
    }
    Ok(last)
}
