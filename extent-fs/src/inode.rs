//! One inode in memory: attributes, and a file's extents or a directory's names.

use std::collections::BTreeMap;

use crate::extents::ExtentMap;
use crate::item::{
    ENTRIES_PER_PART, ENTRY_LEN, INODE_LEN, InodePart, Item, PART_LEN, PIECE, PIECES_PER_PART,
};

/// Number of an inode. Never used twice in the life of a filesystem.
pub type Ino = u64;
/// The root directory.
pub const ROOT: Ino = 1;
/// Files end before this block.
pub(crate) const MAX_FILE_BLOCKS: u64 = 1 << 51;
/// Largest file size in bytes.
pub const MAX_FILE_SIZE: u64 = 1 << 62;

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Bytes.
    File,
    /// Names.
    Directory,
}

impl Kind {
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::File => 1,
            Self::Directory => 2,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::File),
            2 => Some(Self::Directory),
            _ => None,
        }
    }
}

/// Names in order, each with its inode.
#[derive(Clone, Debug)]
pub(crate) struct Directory {
    pub(crate) parent: Ino,
    pub(crate) entries: BTreeMap<Box<[u8]>, Ino>,
    name_bytes: u64,
}

impl Directory {
    pub(crate) fn new(parent: Ino) -> Self {
        Self { parent, entries: BTreeMap::new(), name_bytes: 0 }
    }

    /// Returns false, and changes nothing, when the name is taken.
    pub(crate) fn add(&mut self, name: &[u8], ino: Ino) -> bool {
        use std::collections::btree_map::Entry;
        match self.entries.entry(name.into()) {
            Entry::Occupied(_) => false,
            Entry::Vacant(v) => {
                v.insert(ino);
                self.name_bytes += name.len() as u64;
                true
            }
        }
    }

    pub(crate) fn remove(&mut self, name: &[u8]) -> Option<Ino> {
        let ino = self.entries.remove(name)?;
        self.name_bytes -= name.len() as u64;
        Some(ino)
    }
}

/// What an inode holds.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    File(ExtentMap),
    Directory(Directory),
}

/// An inode.
#[derive(Clone, Debug)]
pub(crate) struct Inode {
    pub(crate) mode: u16,
    pub(crate) nlink: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Which checkpoint has saved it already (see `State::capture`).
    pub(crate) saved: u32,
    pub(crate) size: u64,
    pub(crate) atime: u64,
    pub(crate) mtime: u64,
    pub(crate) ctime: u64,
    /// Blocks mapped, for stat.
    pub(crate) blocks: u64,
    pub(crate) body: Body,
}

/// Bytes that `count` entries with names of `name_bytes` in all take in a checkpoint.
fn entries_cost(count: u64, name_bytes: u64) -> u64 {
    count.div_ceil(ENTRIES_PER_PART as u64) * PART_LEN + count * ENTRY_LEN + name_bytes
}

/// Bytes that `count` extents take in a checkpoint.
fn extents_cost(count: u64) -> u64 {
    count.div_ceil(PIECES_PER_PART as u64) * PART_LEN + count * PIECE as u64
}

/// At most what one more name of `len` bytes adds to a checkpoint.
pub(crate) fn name_growth(len: usize) -> u64 {
    PART_LEN + ENTRY_LEN + len as u64
}

/// At most what `count` more extents add to a checkpoint.
pub(crate) fn extent_growth(count: u64) -> u64 {
    extents_cost(count) + PART_LEN
}

impl Inode {
    pub(crate) fn kind(&self) -> Kind {
        match self.body {
            Body::File(_) => Kind::File,
            Body::Directory(_) => Kind::Directory,
        }
    }

    pub(crate) fn extents(&self) -> Option<&ExtentMap> {
        match &self.body {
            Body::File(map) => Some(map),
            Body::Directory(_) => None,
        }
    }

    pub(crate) fn directory(&self) -> Option<&Directory> {
        match &self.body {
            Body::File(_) => None,
            Body::Directory(dir) => Some(dir),
        }
    }

    /// Bytes it takes in a checkpoint, exactly.
    pub(crate) fn cost(&self) -> u64 {
        INODE_LEN
            + match &self.body {
                Body::File(map) => extents_cost(map.count() as u64),
                Body::Directory(dir) => entries_cost(dir.entries.len() as u64, dir.name_bytes),
            }
    }

    pub(crate) fn from_part(p: &InodePart) -> Self {
        Self {
            mode: p.mode,
            nlink: p.nlink,
            uid: p.uid,
            gid: p.gid,
            saved: 0,
            size: p.size,
            atime: p.atime,
            mtime: p.mtime,
            ctime: p.ctime,
            blocks: 0,
            body: match p.kind {
                Kind::File => Body::File(ExtentMap::default()),
                Kind::Directory => Body::Directory(Directory::new(p.parent)),
            },
        }
    }

    /// Writes it out as checkpoint items.
    pub(crate) fn save(&self, ino: Ino, out: &mut Vec<u8>) {
        Item::Inode(InodePart {
            ino,
            kind: self.kind(),
            mode: self.mode,
            nlink: self.nlink,
            uid: self.uid,
            gid: self.gid,
            size: self.size,
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
            parent: self.directory().map_or(0, |d| d.parent),
        })
        .encode(out);
        match &self.body {
            Body::File(map) => {
                let mut pieces = map.iter();
                loop {
                    let part: Vec<_> = pieces.by_ref().take(PIECES_PER_PART).collect();
                    if part.is_empty() {
                        break;
                    }
                    Item::Extents { ino, pieces: part }.encode(out);
                }
            }
            Body::Directory(dir) => {
                let mut entries = dir.entries.iter().map(|(name, &child)| (child, &**name));
                loop {
                    let part: Vec<_> = entries.by_ref().take(ENTRIES_PER_PART).collect();
                    if part.is_empty() {
                        break;
                    }
                    Item::Entries { ino, entries: part }.encode(out);
                }
            }
        }
    }
}
