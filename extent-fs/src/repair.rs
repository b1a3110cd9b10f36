//! Repairing: the metadata is made consistent in memory, then a fresh checkpoint replaces everything.

use std::collections::HashMap;

use nvme_driver::disk::Disk;

use crate::chunk::Place;
use crate::commit::Txn;
use crate::error::FsError;
use crate::fault::{Fault, Faults};
use crate::fs::Filesystem;
use crate::inode::{Ino, Inode, ROOT};
use crate::io::{BLOCK, BLOCK_LEN, BlockIo};
use crate::leases::Leases;
use crate::recover::{Replay, free_map};
use crate::state::State;
use crate::superblock::Superblock;
use crate::verify::verify;

/// Rounds of looking and mending; each fault takes one or two.
const ROUNDS: usize = 8;

/// Mends `state` and writes it out.
pub(crate) fn repair<D: Disk>(
    mut io: BlockIo<D>,
    sb: Superblock,
    mut state: State,
    places: Vec<Place>,
    replay: Replay,
) -> Result<(), FsError> {
    let mut left = Vec::new();
    for _ in 0..ROUNDS {
        let mut faults = Faults::gather();
        verify(&sb, &state, &places, &mut faults)?;
        left = faults.list;
        if left.is_empty() {
            break;
        }
        for fault in &left {
            mend(&mut io, &sb, &mut state, &places, fault)?;
        }
    }
    if let Some(fault) = left.first() {
        return Err(FsError::damaged(format!("{fault}; this could not be repaired")));
    }
    let free = free_map(&sb, &state, &places)
        .map_err(|b| FsError::damaged(format!("block {b} is still used twice")))?;
    let mut ring = replay.ring;
    // Records behind an unreadable one stay in the ring; nothing that they claim to know may reach the new log.
    ring.sequence = ring.sequence.max(replay.survey.last + 1);
    let mut fs = Filesystem {
        io,
        seed: sb.seed(),
        sb,
        state,
        free,
        ring,
        txn: Txn::default(),
        guarded: Vec::new(),
        places,
        checkpoint: None,
        goal: 0,
        opens: HashMap::new(),
        leases: Leases::default(),
        lease_grace: 0,
        clock: Box::new(crate::time::system_time),
        scratch: vec![0; BLOCK_LEN].into_boxed_slice(),
        record: Vec::new(),
    };
    fs.io.flush()?;
    fs.checkpoint_now()
}

fn mend<D: Disk>(
    io: &mut BlockIo<D>,
    sb: &Superblock,
    state: &mut State,
    places: &[Place],
    fault: &Fault,
) -> Result<(), FsError> {
    let mended = match fault {
        Fault::Root => state.new_root(),
        Fault::Dangling { dir, ino, .. } => state.drop_names(*dir, *ino, 0),
        Fault::SecondName { dir, ino, .. } => {
            // Its first name, in the order of directories, stays.
            let first = state.iter().find(|(_, i)| names(i, *ino) > 0).map(|f| f.0);
            let keep = usize::from(*ino != ROOT && first == Some(*dir));
            state.drop_names(*dir, *ino, keep)
        }
        Fault::Parent { ino, dir, .. } => state.set_parent(*ino, *dir),
        Fault::Links { ino, found, .. } => state.set_links(*ino, *found),
        Fault::Unreachable { ino } => adopt(state, *ino),
        Fault::OutOfRange { ino, block, blocks } => state.drop_blocks(*ino, *block, *blocks),
        Fault::BehindEnd { ino, block } => state.drop_behind(*ino, *block),
        Fault::Overlap { block, blocks, ino, .. } => {
            return separate(io, sb, state, places, *ino, *block, *blocks);
        }
        // The faults of the image itself end with the fresh checkpoint.
        Fault::Superblock { .. }
        | Fault::Chunk { .. }
        | Fault::Inodes { .. }
        | Fault::Record { .. }
        | Fault::Item { .. }
        | Fault::FreeMap { .. } => Ok(()),
    };
    mended.map_err(FsError::damaged)
}

fn names(inode: &Inode, ino: Ino) -> usize {
    inode.directory().map_or(0, |d| d.entries.values().filter(|&&e| e == ino).count())
}

/// Gives a lost inode a name in `/lost+found`.
fn adopt(state: &mut State, ino: Ino) -> Result<(), String> {
    let home = state.lost_and_found()?;
    state.adopt(home, ino)
}

/// Gives the second owner of some blocks a copy of its own, so that neither loses a byte.
fn separate<D: Disk>(
    io: &mut BlockIo<D>,
    sb: &Superblock,
    state: &mut State,
    places: &[Place],
    ino: Ino,
    block: u64,
    blocks: u64,
) -> Result<(), FsError> {
    if ino == 0 {
        // The old checkpoint goes anyway; the file that overlaps it comes up as the other owner or is copied below.
        return separate_from_checkpoint(io, sb, state, places, block, blocks);
    }
    let Some(piece) = state
        .get(ino)
        .and_then(Inode::extents)
        .and_then(|m| m.iter().find(|p| p.run.disk <= block && block < p.run.disk + u64::from(p.run.len)))
    else {
        // An earlier mending moved it already.
        return Ok(());
    };
    let mut free = lenient_free(sb, state, places);
    let file = piece.file + (block - piece.run.disk);
    let inside = u64::from(piece.run.len) - (block - piece.run.disk);
    let mut buffer = vec![0; BLOCK_LEN];
    for i in 0..blocks.min(inside) {
        let Some((new, _)) = free.allocate(1, block) else {
            return Err(FsError::NoSpace { needed: blocks - i, free: free.free_blocks() });
        };
        if piece.run.written {
            io.read((block + i) * BLOCK, &mut buffer)?;
            io.write(new * BLOCK, &buffer)?;
        }
        state.replace_block(ino, file + i, new, piece.run.written).map_err(FsError::damaged)?;
    }
    Ok(())
}

fn separate_from_checkpoint<D: Disk>(
    io: &mut BlockIo<D>,
    sb: &Superblock,
    state: &mut State,
    places: &[Place],
    block: u64,
    blocks: u64,
) -> Result<(), FsError> {
    let owner = state.iter().find_map(|(ino, i)| {
        let map = i.extents()?;
        map.iter()
            .any(|p| p.run.disk < block + blocks && block < p.run.disk + u64::from(p.run.len))
            .then_some(ino)
    });
    match owner {
        Some(ino) => separate(io, sb, state, places, ino, block, blocks),
        None => Ok(()),
    }
}

/// The blocks that nobody claims, though some are claimed twice.
fn lenient_free(sb: &Superblock, state: &State, places: &[Place]) -> crate::alloc::FreeMap {
    let mut used: Vec<(u64, u64)> = places.iter().map(|p| (p.block, p.blocks)).collect();
    for (_, inode) in state.iter() {
        if let Some(map) = inode.extents() {
            used.extend(map.iter().map(|p| (p.run.disk, u64::from(p.run.len))));
        }
    }
    crate::alloc::FreeMap::from_overlapping(sb.log_start + sb.log_blocks, sb.blocks, &mut used)
}
