//! The mounted filesystem: what it consists of, and the calls that only look.

use std::collections::HashMap;

use nvme_driver::disk::Disk;

use crate::alloc::FreeMap;
use crate::checkpoint::Checkpoint;
use crate::chunk::{Place, blocks_for};
use crate::codec::Seed;
use crate::commit::Txn;
use crate::error::{FsError, shown};
use crate::inode::{Ino, Inode, Kind, ROOT, extent_growth};
use crate::io::{BLOCK, BlockIo};
use crate::leases::Leases;
use crate::log::Ring;
use crate::state::State;
use crate::superblock::Superblock;

/// Where the time comes from: nanoseconds since 1970.
pub type Clock = Box<dyn Fn() -> u64 + Send>;

/// A mounted filesystem. One thread owns it.
pub struct Filesystem<D: Disk> {
    pub(crate) io: BlockIo<D>,
    /// As last written.
    pub(crate) sb: Superblock,
    pub(crate) seed: Seed,
    pub(crate) state: State,
    pub(crate) free: FreeMap,
    pub(crate) ring: Ring,
    pub(crate) txn: Txn,
    /// Blocks whose CRCs are in records that no durable record knows durable: not to be overwritten in place. Sorted.
    pub(crate) guarded: Vec<u64>,
    /// Where the last finished checkpoint lies.
    pub(crate) places: Vec<Place>,
    pub(crate) checkpoint: Option<Checkpoint>,
    /// Where the next new file's blocks are looked for.
    pub(crate) goal: u64,
    pub(crate) opens: HashMap<Ino, u32>,
    pub(crate) leases: Leases,
    /// Nanoseconds that a holder has to answer a recall.
    pub(crate) lease_grace: u64,
    pub(crate) clock: Clock,
    /// One block, for partial reads and writes.
    pub(crate) scratch: Box<[u8]>,
    /// A record being built.
    pub(crate) record: Vec<u8>,
}

/// What stat says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// The inode.
    pub ino: Ino,
    /// File or directory.
    pub kind: Kind,
    /// Permission bits (07777).
    pub mode: u16,
    /// Its placement as set by `set_attr`; 0 is no choice, and numbers above [`PLACEMENT_MAX`](crate::PLACEMENT_MAX) are a newer program's.
    pub placement: u8,
    /// Number of names; a directory counts itself and its subdirectories too.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length in bytes; 0 for a directory.
    pub size: u64,
    /// Bytes of blocks allocated.
    pub allocated: u64,
    /// Last access as set by `set_attr` (reads do not move it), in nanoseconds since 1970, as all times here.
    pub atime: u64,
    /// Last change of the contents.
    pub mtime: u64,
    /// Last change of the inode.
    pub ctime: u64,
}

/// What statfs says. Blocks are 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatFs {
    /// Blocks on the device.
    pub blocks: u64,
    /// Blocks that files occupy.
    pub used: u64,
    /// Blocks that can be allocated now.
    pub free: u64,
    /// Blocks of `held` that the next sync makes free. A write that needs them syncs by itself.
    pub pending: u64,
    /// Blocks of those promised to the next checkpoint.
    pub reserved: u64,
    /// Blocks freed but held back: by a record that is not durable yet, or by a layout.
    pub held: u64,
    /// Inodes.
    pub files: u64,
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The name.
    pub name: Box<[u8]>,
    /// Its inode.
    pub ino: Ino,
    /// What it is.
    pub kind: Kind,
}

impl<D: Disk> Filesystem<D> {
    /// The filesystem's identity.
    pub fn uuid(&self) -> [u8; 16] {
        self.sb.uuid
    }

    /// The device below.
    pub fn disk(&self) -> &D {
        &self.io.disk
    }

    /// The device below, for transfers to and from blocks that a layout names. Nothing else may be written through it.
    pub fn disk_mut(&mut self) -> &mut D {
        // Whoever writes through it does so behind our back, and a sync must still flush.
        self.io.unflushed = true;
        &mut self.io.disk
    }

    /// Why the filesystem takes no changes, if it does not.
    pub fn read_only_reason(&self) -> Option<&str> {
        self.io.latched()
    }

    pub(crate) fn now(&self) -> u64 {
        (self.clock)()
    }

    pub(crate) fn inode(&self, ino: Ino) -> Result<&Inode, FsError> {
        self.state.get(ino).ok_or_else(|| FsError::no_inode(ino))
    }

    /// A file's inode; directories are refused.
    pub(crate) fn file(&self, ino: Ino) -> Result<&Inode, FsError> {
        let inode = self.inode(ino)?;
        match inode.kind() {
            Kind::File => Ok(inode),
            Kind::Directory => Err(FsError::IsADirectory { what: format!("inode {ino}") }),
        }
    }

    /// The inode behind `name` in directory `dir`.
    pub fn lookup_at(&self, dir: Ino, name: &[u8]) -> Result<Ino, FsError> {
        let inode = self.inode(dir)?;
        let Some(d) = inode.directory() else {
            return Err(FsError::NotADirectory { what: format!("inode {dir}") });
        };
        match name {
            b"." => Ok(dir),
            b".." => Ok(d.parent),
            _ => d.entries.get(name).copied().ok_or_else(|| FsError::NotFound { what: shown(name) }),
        }
    }

    /// The inode behind a path from the root. Empty components and `.` are skipped.
    pub fn lookup(&self, path: impl AsRef<[u8]>) -> Result<Ino, FsError> {
        let path = path.as_ref();
        let mut at = ROOT;
        for name in path.split(|&b| b == b'/').filter(|n| !n.is_empty()) {
            at = self.lookup_at(at, name).map_err(|e| match e {
                FsError::NotFound { .. } => FsError::NotFound { what: shown(path) },
                FsError::NotADirectory { .. } => FsError::NotADirectory { what: shown(path) },
                e => e,
            })?;
        }
        Ok(at)
    }

    /// Attributes of an inode.
    pub fn stat(&self, ino: Ino) -> Result<Stat, FsError> {
        let i = self.inode(ino)?;
        Ok(Stat {
            ino,
            kind: i.kind(),
            mode: i.mode,
            placement: i.placement,
            nlink: i.nlink,
            uid: i.uid,
            gid: i.gid,
            size: i.size,
            allocated: i.blocks * BLOCK,
            atime: i.atime,
            mtime: i.mtime,
            ctime: i.ctime,
        })
    }

    /// Up to `max` entries of a directory in the order of their names (as bytes), those after `after` if given.
    pub fn readdir_from(&self, dir: Ino, after: Option<&[u8]>, max: usize) -> Result<Vec<DirEntry>, FsError> {
        use std::ops::Bound;
        let inode = self.inode(dir)?;
        let Some(d) = inode.directory() else {
            return Err(FsError::NotADirectory { what: format!("inode {dir}") });
        };
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        d.entries
            .range::<[u8], _>((from, Bound::Unbounded))
            .take(max)
            .map(|(name, &ino)| Ok(DirEntry { name: name.clone(), ino, kind: self.inode(ino)?.kind() }))
            .collect()
    }

    /// All entries of a directory in the order of their names.
    pub fn readdir(&self, dir: Ino) -> Result<Vec<DirEntry>, FsError> {
        self.readdir_from(dir, None, usize::MAX)
    }

    /// Space. `free + used + held` and the fixed places and checkpoints make up `blocks`.
    pub fn statfs(&self) -> StatFs {
        StatFs {
            blocks: self.sb.blocks,
            used: self.state.mapped,
            free: self.free.free_blocks(),
            pending: self.pending_blocks(),
            reserved: self.reserve(0),
            held: self.held_blocks(),
            files: self.state.count(),
        }
    }

    fn pending_blocks(&self) -> u64 {
        self.txn.freed.iter().filter(|f| !self.leases.covers(f.0, f.1, f.2)).map(|f| f.2).sum()
    }

    fn held_blocks(&self) -> u64 {
        self.held().map(|h| h.1).sum()
    }

    /// Freed blocks that must not be used yet (first, count).
    pub(crate) fn held(&self) -> impl Iterator<Item = (u64, u64)> {
        self.txn.freed.iter().map(|f| (f.1, f.2)).chain(self.leases.held())
    }

    /// Free blocks that must stay free so that the next checkpoint fits, if the metadata grows by `growth` bytes.
    pub(crate) fn reserve(&self, growth: u64) -> u64 {
        // A checkpoint under way gives the blocks of the one before it back.
        let back = self.checkpoint.as_ref().map_or(0, Checkpoint::old_blocks);
        let splits = extent_growth(self.state.unwritten);
        blocks_for(self.state.cost + splits + growth).saturating_sub(back)
    }
}
