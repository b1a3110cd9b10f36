//! Log records: a header of 64 bytes, the CRCs of data blocks that the record relies on, and items.

use crate::codec::{Put, Seed, Take};

const MAGIC: u32 = u32::from_le_bytes(*b"CFSR");
/// Bytes of the header.
pub(crate) const HEADER: usize = 64;
const CRC_FROM: usize = 8;

/// What a record says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Counts records from 1, without gaps.
    pub(crate) sequence: u64,
    /// Every record up to this one was durable, with its data, before this one was written.
    pub(crate) durable: u64,
    /// Grows with every mount that writes: what an earlier mount left behind the end of the log never fits.
    pub(crate) epoch: u64,
    /// CRC of the record before.
    pub(crate) prev_crc: u32,
    pub(crate) body_len: u32,
    pub(crate) guards: u32,
    pub(crate) items: u32,
}

/// A data block that was written without a flush before the record: valid only with this CRC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Guard {
    pub(crate) block: u64,
    pub(crate) crc: u32,
}

pub(crate) const GUARD: usize = 16;

/// The sequence of what looks like a record's header, for want of the uuid that its CRC would be checked with.
pub(crate) fn sequence_of(header: &[u8]) -> Option<u64> {
    let mut t = Take(header.get(..HEADER)?);
    let (magic, _crc, sequence, durable) = (t.u32()?, t.u32()?, t.u64()?, t.u64()?);
    let padding = header.get(48..HEADER)?;
    (magic == MAGIC && durable < sequence && padding.iter().all(|&b| b == 0)).then_some(sequence)
}

/// Builds a record in `out`, padded to `unit`; returns its CRC.
pub(crate) fn encode(
    header: &Header,
    guards: impl Iterator<Item = Guard>,
    items: &[u8],
    seed: Seed,
    unit: usize,
    out: &mut Vec<u8>,
) -> u32 {
    out.clear();
    out.u32(MAGIC);
    out.u32(0);
    out.u64(header.sequence);
    out.u64(header.durable);
    out.u64(header.epoch);
    out.u32(header.prev_crc);
    out.u32(header.body_len);
    out.u32(header.guards);
    out.u32(header.items);
    out.resize(HEADER, 0);
    for g in guards {
        out.u64(g.block);
        out.u32(g.crc);
        out.u32(0);
    }
    out.put(items);
    let crc = seed.crc(&out[CRC_FROM..]);
    out[4..8].copy_from_slice(&crc.to_le_bytes());
    out.resize(out.len().next_multiple_of(unit), 0);
    crc
}

/// A record found in the log.
pub(crate) struct Record<'a> {
    pub(crate) header: Header,
    pub(crate) crc: u32,
    guards: &'a [u8],
    pub(crate) items: &'a [u8],
}

impl Record<'_> {
    pub(crate) fn guards(&self) -> impl Iterator<Item = Guard> {
        self.guards.chunks_exact(GUARD).filter_map(|g| {
            let mut t = Take(g);
            Some(Guard { block: t.u64()?, crc: t.u32()? })
        })
    }
}

/// Length in bytes (header and body, no padding) of what may be a record at the start of `bytes`, by its header alone.
pub(crate) fn peek_len(bytes: &[u8]) -> Option<usize> {
    let mut t = Take(bytes);
    if t.u32()? != MAGIC {
        return None;
    }
    let body = Take(bytes.get(36..40)?).u32()?;
    usize::try_from(body).ok()?.checked_add(HEADER)
}

/// Decodes and checks the record at the start of `bytes`.
pub(crate) fn decode(bytes: &[u8], seed: Seed) -> Option<Record<'_>> {
    let bytes = bytes.get(..peek_len(bytes)?)?;
    let mut t = Take(bytes.get(4..)?);
    let crc = t.u32()?;
    if seed.crc(&bytes[CRC_FROM..]) != crc {
        return None;
    }
    let header = Header {
        sequence: t.u64()?,
        durable: t.u64()?,
        epoch: t.u64()?,
        prev_crc: t.u32()?,
        body_len: t.u32()?,
        guards: t.u32()?,
        items: t.u32()?,
    };
    let guard_bytes = usize::try_from(header.guards).ok()?.checked_mul(GUARD)?;
    let (guards, items) = bytes.get(HEADER..)?.split_at_checked(guard_bytes)?;
    let sound = header.durable < header.sequence && header.sequence < 1 << 63 && header.epoch < 1 << 63;
    sound.then_some(Record { header, crc, guards, items })
}
