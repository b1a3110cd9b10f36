//! One inode in memory: attributes, and a file's extents or a directory's names.

use std::collections::BTreeMap;

use crate::extents::ExtentMap;
use crate::item::{
    ENTRIES_PER_PART, ENTRY_LEN, INODE_LEN, InodePart, Item, PART_LEN, PIECE, PIECES_PER_PART,
};
use crate::past::Past;

/// Number of an inode. Never used twice in the life of a filesystem.
pub type Ino = u64;
/// The root directory.
pub const ROOT: Ino = 1;
/// Files end before this block.
pub(crate) const MAX_FILE_BLOCKS: u64 = 1 << 51;
/// Largest number that an inode can be given as its placement. What the numbers mean is for those who place (`docs/on-disk-format.md`);
/// 0 is no choice.
pub const PLACEMENT_MAX: u8 = 3;
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
    /// What a checkpoint that is being gathered has not saved yet.
    past: Option<Past<Box<[u8]>, Ino>>,
}

impl Directory {
    pub(crate) fn new(parent: Ino) -> Self {
        Self { parent, entries: BTreeMap::new(), name_bytes: 0, past: None }
    }

    /// Returns false, and changes nothing, when the name is taken.
    pub(crate) fn add(&mut self, name: &[u8], ino: Ino) -> bool {
        use std::collections::btree_map::Entry;
        match self.entries.entry(name.into()) {
            Entry::Occupied(_) => false,
            Entry::Vacant(v) => {
                v.insert(ino);
                self.name_bytes += name.len() as u64;
                if let Some(past) = &mut self.past {
                    past.note(name.into(), None);
                }
                true
            }
        }
    }

    pub(crate) fn remove(&mut self, name: &[u8]) -> Option<Ino> {
        let ino = self.entries.remove(name)?;
        self.name_bytes -= name.len() as u64;
        if let Some(past) = &mut self.past {
            past.note(name.into(), Some(ino));
        }
        Some(ino)
    }

    /// Writes out the next names of what it was when `past` began; false if none are left.
    fn save_more(&mut self, ino: Ino, out: &mut Vec<u8>) -> bool {
        let Some(past) = &mut self.past else { return false };
        let rest = past.rest(&self.entries);
        let part: Vec<(Ino, &[u8])> =
            rest.take(ENTRIES_PER_PART).map(|(name, child)| (child, &**name)).collect();
        let last = part.last().map(|e| Box::from(e.1));
        Item::Entries { ino, entries: part }.encode(out);
        if let Some(last) = last {
            past.skip(last);
        }
        let more = past.rest(&self.entries).next().is_some();
        if !more {
            self.past = None;
        }
        more
    }
}

/// What an inode holds.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    File(ExtentMap),
    Directory(Box<Directory>),
}

/// An inode.
#[derive(Clone, Debug)]
pub(crate) struct Inode {
    pub(crate) mode: u16,
    pub(crate) placement: u8,
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

    /// An item that sets its attributes to what they are.
    pub(crate) fn attr(&self, ino: Ino) -> Item<'static> {
        let Self { mode, uid, gid, atime, mtime, ctime, placement, .. } = *self;
        Item::Attr { ino, mode, uid, gid, atime, mtime, ctime, placement }
    }

    pub(crate) fn from_part(p: &InodePart) -> Self {
        Self {
            mode: p.mode,
            placement: p.placement,
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
                Kind::Directory => Body::Directory(Box::new(Directory::new(p.parent))),
            },
        }
    }

    /// Writes it out as checkpoint items, or, when it takes many, only its attributes: then it remembers what it was, returns true,
    /// and `save_more` writes the rest, whatever changes meanwhile.
    pub(crate) fn save_begin(&mut self, ino: Ino, out: &mut Vec<u8>) -> bool {
        Item::Inode(InodePart {
            ino,
            kind: self.kind(),
            mode: self.mode,
            placement: self.placement,
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
        match &mut self.body {
            Body::File(map) if map.count() > PIECES_PER_PART => map.begin_past(),
            Body::Directory(dir) if dir.entries.len() > ENTRIES_PER_PART => dir.past = Some(Past::begin()),
            Body::File(map) if map.count() == 0 => return false,
            Body::Directory(dir) if dir.entries.is_empty() => return false,
            Body::File(map) => {
                Item::Extents { ino, pieces: map.iter().collect() }.encode(out);
                return false;
            }
            Body::Directory(dir) => {
                let entries = dir.entries.iter().map(|(name, &child)| (child, &**name)).collect();
                Item::Entries { ino, entries }.encode(out);
                return false;
            }
        }
        true
    }

    /// Writes out the next item of what it was when `save_begin` returned true; false if it was the last one.
    pub(crate) fn save_more(&mut self, ino: Ino, out: &mut Vec<u8>) -> bool {
        match &mut self.body {
            Body::File(map) => {
                let (pieces, more) = map.past_part(PIECES_PER_PART);
                Item::Extents { ino, pieces }.encode(out);
                more
            }
            Body::Directory(dir) => dir.save_more(ino, out),
        }
    }
}
