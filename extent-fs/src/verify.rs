//! Whether the metadata in memory is consistent: every name, link count, extent.

use std::collections::{BTreeMap, BTreeSet};

use crate::chunk::Place;
use crate::error::{FsError, shown};
use crate::fault::{Fault, Faults};
use crate::inode::{Ino, Inode, ROOT};
use crate::io::BLOCK;
use crate::state::State;
use crate::superblock::Superblock;

/// Checks all of it, in time n log n.
pub(crate) fn verify(
    sb: &Superblock,
    state: &State,
    places: &[Place],
    faults: &mut Faults,
) -> Result<(), FsError> {
    names(state, faults)?;
    extents(sb, state, places, faults)
}

/// One name: what it names, where it is, and its place there.
type Name<'a> = (Ino, Ino, &'a [u8]);

fn names(state: &State, faults: &mut Faults) -> Result<(), FsError> {
    if state.get(ROOT).and_then(Inode::directory).is_none() {
        return faults.add(Fault::Root);
    }
    let mut names: Vec<Name<'_>> = Vec::new();
    for (dir, inode) in state.iter() {
        if let Some(d) = inode.directory() {
            names.extend(d.entries.iter().map(|(name, &ino)| (ino, dir, &**name)));
        }
    }
    names.sort_unstable();
    let mut subdirs: BTreeMap<Ino, u32> = BTreeMap::new();
    let mut orphans = BTreeSet::new();
    let mut rest = &names[..];
    let dangling = |names: &[Name<'_>], faults: &mut Faults| {
        names.iter().try_for_each(|n| faults.add(Fault::Dangling { dir: n.1, name: shown(n.2), ino: n.0 }))
    };
    for (ino, inode) in state.iter() {
        let (lost, here) = rest.split_at(rest.iter().take_while(|n| n.0 < ino).count());
        dangling(lost, faults)?;
        let (mine, after) = here.split_at(here.iter().take_while(|n| n.0 == ino).count());
        rest = after;
        match inode.directory() {
            None => file_links(ino, inode, mine.len(), faults)?,
            Some(d) => {
                let own = usize::from(ino != ROOT);
                for n in mine.iter().skip(own) {
                    faults.add(Fault::SecondName { ino, dir: n.1, name: shown(n.2) })?;
                }
                let dir = if ino == ROOT { Some(ROOT) } else { mine.first().map(|n| n.1) };
                match dir {
                    None if inode.nlink == 0 && d.entries.is_empty() => {
                        // Removed while somebody had it open.
                        orphans.insert(ino);
                    }
                    None => faults.add(Fault::Unreachable { ino })?,
                    Some(dir) if d.parent != dir => faults.add(Fault::Parent { ino, dir, says: d.parent })?,
                    _ => {}
                }
                for n in mine {
                    *subdirs.entry(n.1).or_default() += 1;
                }
            }
        }
    }
    dangling(rest, faults)?;
    let mut rooted = BTreeSet::from([ROOT]);
    for (ino, inode) in state.iter().filter(|(n, i)| i.directory().is_some() && !orphans.contains(n)) {
        let found = 2 + subdirs.get(&ino).copied().unwrap_or(0);
        if found != inode.nlink {
            faults.add(Fault::Links { ino, found, says: inode.nlink })?;
        }
        if !reaches_root(state, ino, &mut rooted) {
            faults.add(Fault::Unreachable { ino })?;
        }
    }
    Ok(())
}

fn file_links(ino: Ino, inode: &Inode, names: usize, faults: &mut Faults) -> Result<(), FsError> {
    let found = u32::try_from(names).unwrap_or(u32::MAX);
    match (found, inode.nlink) {
        (0, says) if says > 0 => faults.add(Fault::Unreachable { ino }),
        (found, says) if found != says => faults.add(Fault::Links { ino, found, says }),
        _ => Ok(()),
    }
}

/// Follows the parents up to the root; directories in a circle never get there.
fn reaches_root(state: &State, ino: Ino, rooted: &mut BTreeSet<Ino>) -> bool {
    let mut path = BTreeSet::new();
    let mut at = ino;
    while !rooted.contains(&at) {
        let up = state.get(at).and_then(Inode::directory).map(|d| d.parent);
        match up {
            // A missing or repeated name is reported for what it is.
            Some(up) if path.insert(at) => at = up,
            Some(_) => return false,
            None => return true,
        }
    }
    rooted.append(&mut path);
    true
}

fn extents(sb: &Superblock, state: &State, places: &[Place], faults: &mut Faults) -> Result<(), FsError> {
    // Owner 0 is the checkpoint.
    let mut used: Vec<(u64, u64, Ino)> = places.iter().map(|p| (p.block, p.blocks, 0)).collect();
    for (ino, inode) in state.iter() {
        let Some(map) = inode.extents() else { continue };
        let end = inode.size.div_ceil(BLOCK);
        if let Some(p) = map.range(end, u64::MAX).find(|p| p.run.written) {
            faults.add(Fault::BehindEnd { ino, block: p.file })?;
        }
        used.extend(map.iter().map(|p| (p.run.disk, u64::from(p.run.len), ino)));
    }
    used.sort_unstable();
    let first = sb.log_start + sb.log_blocks;
    let (mut reached, mut owner) = (first, 0);
    for (block, blocks, ino) in used {
        let end = block.saturating_add(blocks);
        if block < first || end > sb.blocks {
            faults.add(Fault::OutOfRange { ino, block, blocks })?;
            continue;
        }
        if block < reached {
            let other = if owner == 0 { "the checkpoint".to_owned() } else { format!("inode {owner}") };
            let shared = reached.min(end) - block;
            faults.add(Fault::Overlap { block, blocks: shared, ino, other })?;
        }
        if end > reached {
            (reached, owner) = (end, ino);
        }
    }
    Ok(())
}
