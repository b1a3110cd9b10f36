//! A checkpoint on disk: a chain of chunks, each with a header of 64 bytes and its own CRC; together they hold one stream of items.

use crate::codec::{Put, Seed, Take};
use crate::io::BLOCK;

const MAGIC: u32 = u32::from_le_bytes(*b"CFSC");
/// Bytes of the header.
pub(crate) const HEADER: usize = 64;
const CRC_FROM: usize = 8;
/// Longest chunk in blocks. A sync waits for at most one or two of them when a checkpoint is under way.
pub(crate) const MAX_BLOCKS: u64 = 32;

/// A chunk's place: first block and number of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) block: u64,
    pub(crate) blocks: u64,
}

impl Place {
    /// Bytes of items that fit.
    pub(crate) fn room(&self) -> u64 {
        self.blocks * BLOCK - HEADER as u64
    }
}

/// Blocks that a checkpoint of `bytes` takes however scattered the free space is.
pub(crate) fn blocks_for(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK - HEADER as u64).max(1)
}

/// Builds the chunk with number `index` of checkpoint `generation`, padded to whole blocks. The first item that begins in
/// it begins at `first`.
pub(crate) fn encode(
    generation: u64,
    index: u32,
    next: Option<Place>,
    first: usize,
    body: &[u8],
    seed: Seed,
    out: &mut Vec<u8>,
) {
    out.clear();
    out.u32(MAGIC);
    out.u32(0);
    out.u64(generation);
    out.u32(index);
    out.u32(body.len() as u32);
    out.u64(next.map_or(0, |p| p.block));
    out.u64(next.map_or(0, |p| p.blocks));
    out.u32(first as u32);
    out.resize(HEADER, 0);
    out.put(body);
    let crc = seed.crc(&out[CRC_FROM..]);
    out[4..8].copy_from_slice(&crc.to_le_bytes());
    out.resize(out.len().next_multiple_of(BLOCK as usize), 0);
}

/// A chunk's items and where the next chunk is.
pub(crate) struct Chunk<'a> {
    pub(crate) body: &'a [u8],
    pub(crate) next: Option<Place>,
    /// Where in the body the first item begins; its length if none does.
    pub(crate) first: usize,
}

/// Decodes and checks the chunk in `bytes`.
pub(crate) fn decode(bytes: &[u8], generation: u64, index: u32, seed: Seed) -> Option<Chunk<'_>> {
    let mut t = Take(bytes);
    let (magic, crc, found_generation, found_index, len) = (t.u32()?, t.u32()?, t.u64()?, t.u32()?, t.u32()?);
    let (block, blocks, first) = (t.u64()?, t.u64()?, t.u32()?);
    let end = usize::try_from(len).ok()?.checked_add(HEADER)?;
    let sound = magic == MAGIC
        && found_generation == generation
        && found_index == index
        && seed.crc(bytes.get(CRC_FROM..end)?) == crc;
    if !sound {
        return None;
    }
    let next = (blocks > 0).then_some(Place { block, blocks });
    Some(Chunk { body: bytes.get(HEADER..end)?, next, first: usize::try_from(first).ok()? })
}

/// Number and length in blocks of what may be a chunk of checkpoint `generation`, by its header alone.
pub(crate) fn peek(bytes: &[u8], generation: u64) -> Option<(u32, u64)> {
    let mut t = Take(bytes);
    let (magic, _crc, found, index, len) = (t.u32()?, t.u32()?, t.u64()?, t.u32()?, t.u32()?);
    let blocks = (u64::from(len) + HEADER as u64).div_ceil(BLOCK);
    (magic == MAGIC && found == generation && blocks <= MAX_BLOCKS).then_some((index, blocks))
}

/// Of a stream whose next `body` bytes become a chunk and whose first `carried` bytes belong to an item begun before: where
/// the first item begins in the chunk, and how many bytes of its last item go on behind it.
pub(crate) fn item_starts(stream: &[u8], body: usize, carried: usize) -> (usize, usize) {
    let mut at = carried;
    while at < body {
        // Items are whole in the stream; an end of it inside one would be a mistake of ours, and only costs resynchronising.
        at += stream.get(at..).and_then(crate::item::peek_len).unwrap_or(body);
    }
    (carried.min(body), at - body)
}
