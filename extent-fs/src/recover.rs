//! Taking up what is on disk: the checkpoint, then the log behind it.
//!
//! Mounting is strict: the first fault ends it. `check` passes a list instead and goes on behind each fault.

use nvme_driver::disk::Disk;

use crate::alloc::FreeMap;
use crate::chunk::{self, MAX_BLOCKS, Place};
use crate::codec::Take;
use crate::error::FsError;
use crate::fault::{Fault, Faults};
use crate::io::{BLOCK, BLOCK_LEN, BlockIo};
use crate::item::{self, Item};
use crate::log::{Image, Ring, Survey};
use crate::record::Record;
use crate::state::{Freed, State};
use crate::superblock::Superblock;

/// Reads the checkpoint that `sb` names.
pub(crate) fn load_checkpoint<D: Disk>(
    io: &mut BlockIo<D>,
    sb: &Superblock,
    faults: &mut Faults,
) -> Result<(State, Vec<Place>), FsError> {
    let mut state = State::empty(sb.blocks, sb.next_ino);
    let mut places: Vec<Place> = Vec::new();
    let mut stream: Vec<u8> = Vec::new();
    let mut next = Some(Place { block: sb.chunk_block, blocks: u64::from(sb.chunk_blocks) });
    let mut index = 0;
    let mut resync = false;
    let mut bytes = Vec::new();
    while let Some(place) = next {
        let read = read_chunk(io, sb, place, index, &mut bytes)?;
        let Some(c) = read else {
            faults.add(Fault::Chunk { index, block: place.block })?;
            stream.clear();
            resync = true;
            // The chain is broken: look for the chunk behind the break.
            (index, next) = match find_chunk(io, sb, index)? {
                Some((index, place)) => (index, Some(place)),
                None => (index, None),
            };
            continue;
        };
        let body = if resync { c.body.get(c.first..).unwrap_or_default() } else { c.body };
        // A chunk in which no item begins is no place to start again.
        resync &= c.first >= c.body.len();
        stream.extend_from_slice(body);
        next = c.next;
        index = index.saturating_add(1);
        places.push(place);
        if places.len() as u64 > sb.blocks {
            return Err(FsError::damaged("the checkpoint's chain of chunks has no end"));
        }
        let rest = load_items(&stream, &mut state, faults)?;
        let done = stream.len() - rest;
        stream.drain(..done);
    }
    if !stream.is_empty() || state.count() != sb.inodes {
        faults.add(Fault::Inodes { found: state.count(), expected: sb.inodes })?;
    }
    Ok((state, places))
}

fn read_chunk<'b, D: Disk>(
    io: &mut BlockIo<D>,
    sb: &Superblock,
    place: Place,
    index: u32,
    bytes: &'b mut Vec<u8>,
) -> Result<Option<chunk::Chunk<'b>>, FsError> {
    let sound = (1..=MAX_BLOCKS).contains(&place.blocks)
        && place.block.checked_add(place.blocks).is_some_and(|end| end <= sb.blocks);
    if !sound {
        return Ok(None);
    }
    bytes.resize((place.blocks * BLOCK) as usize, 0);
    io.read(place.block * BLOCK, bytes)?;
    Ok(chunk::decode(bytes, sb.generation, index, sb.seed()))
}

/// Looks through the whole device for the first chunk of this checkpoint behind number `after`.
fn find_chunk<D: Disk>(
    io: &mut BlockIo<D>,
    sb: &Superblock,
    after: u32,
) -> Result<Option<(u32, Place)>, FsError> {
    let mut best: Option<(u32, Place)> = None;
    let mut block = vec![0; BLOCK_LEN];
    let mut bytes = Vec::new();
    for at in sb.log_start + sb.log_blocks..sb.blocks {
        io.read(at * BLOCK, &mut block)?;
        let Some((index, blocks)) = chunk::peek(&block, sb.generation) else { continue };
        let place = Place { block: at, blocks };
        if index > after
            && best.is_none_or(|b| index < b.0)
            && read_chunk(io, sb, place, index, &mut bytes)?.is_some()
        {
            best = Some((index, place));
        }
    }
    Ok(best)
}

/// Loads the whole items at the front of `stream`; returns how many bytes are left.
fn load_items(stream: &[u8], state: &mut State, faults: &mut Faults) -> Result<usize, FsError> {
    let mut t = Take(stream);
    while let Some(len) = item::peek_len(t.0).filter(|&len| len <= t.0.len()) {
        let Some(bytes) = t.bytes(len) else { break };
        match Item::decode(&mut Take(bytes)) {
            Some(item) => {
                if let Err(what) = state.load(&item) {
                    faults.add(Fault::Item { what })?;
                }
            }
            None => {
                faults.add(Fault::Item { what: "an item of the checkpoint makes no sense".to_owned() })?;
            }
        }
    }
    Ok(t.0.len())
}

/// What recovery found in the log.
pub(crate) struct Replay {
    pub(crate) ring: Ring,
    pub(crate) guarded: Vec<u64>,
    /// Records replayed.
    pub(crate) records: u64,
    pub(crate) survey: Survey,
}

/// Applies the records after the checkpoint.
pub(crate) fn replay<D: Disk>(
    io: &mut BlockIo<D>,
    sb: &Superblock,
    state: &mut State,
    faults: &mut Faults,
) -> Result<Replay, FsError> {
    let mut ring = Ring {
        start: sb.log_start * BLOCK,
        size: sb.log_bytes(),
        unit: u64::from(sb.log_unit),
        tail: sb.log_head,
        used: 0,
        sequence: sb.sequence,
        epoch: sb.epoch,
        prev_crc: sb.prev_crc,
    };
    let mut bytes = vec![0; usize::try_from(ring.size).unwrap_or(0)];
    io.read(ring.start, &mut bytes)?;
    let image = Image { bytes: &bytes, unit: sb.log_unit as usize, seed: sb.seed() };
    let survey = image.survey();
    let mut scratch = Vec::new();
    let mut freed = Freed::new();
    let mut guarded = Vec::new();
    loop {
        let record = image
            .record_at(ring.tail as usize, &mut scratch)
            .filter(|(r, len)| follows(r, &ring) && ring.room() >= *len as u64);
        let known_durable = ring.sequence <= survey.durable;
        let Some((record, len)) = record else {
            if known_durable {
                faults.add(Fault::Record { sequence: ring.sequence, last: survey.last })?;
            }
            break;
        };
        if !known_durable {
            if !guards_hold(io, &record, sb)? {
                break;
            }
            guarded.extend(record.guards().map(|g| g.block));
        }
        let mut t = Take(record.items);
        for _ in 0..record.header.items {
            let item = Item::decode(&mut t);
            let applied = match &item {
                Some(item) => state.apply(item, &mut freed),
                None => Err("an item makes no sense".to_owned()),
            };
            if let Err(what) = applied {
                faults.add(Fault::Item { what: format!("log record {}: {what}", ring.sequence) })?;
            }
            if item.is_none() {
                break;
            }
        }
        freed.clear();
        ring.epoch = record.header.epoch;
        ring.advance(len as u64, record.crc);
    }
    ring.epoch = survey.epoch.max(sb.epoch) + 1;
    guarded.sort_unstable();
    let records = ring.sequence - sb.sequence;
    Ok(Replay { ring, guarded, records, survey })
}

/// Whether a record continues the log.
fn follows(r: &Record<'_>, ring: &Ring) -> bool {
    r.header.sequence == ring.sequence && r.header.prev_crc == ring.prev_crc && r.header.epoch >= ring.epoch
}

/// Whether the data that a record relies on is there.
fn guards_hold<D: Disk>(io: &mut BlockIo<D>, record: &Record<'_>, sb: &Superblock) -> Result<bool, FsError> {
    let mut block = vec![0; BLOCK_LEN];
    for g in record.guards() {
        if g.block >= sb.blocks {
            return Ok(false);
        }
        io.read(g.block * BLOCK, &mut block)?;
        if sb.seed().crc(&block) != g.crc {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Builds the free map: what no file, checkpoint or fixed place uses. Fails with a block that is used twice or lies outside.
pub(crate) fn free_map(sb: &Superblock, state: &State, places: &[Place]) -> Result<FreeMap, u64> {
    let mut used: Vec<(u64, u64)> = places.iter().map(|p| (p.block, p.blocks)).collect();
    for (_, inode) in state.iter() {
        if let Some(map) = inode.extents() {
            used.extend(map.iter().map(|p| (p.run.disk, u64::from(p.run.len))));
        }
    }
    FreeMap::from_used(sb.log_start + sb.log_blocks, sb.blocks, &mut used)
}
