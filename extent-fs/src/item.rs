//! The items that records and checkpoints are made of: one change each, or one part of an inode.
//!
//! An item is a header of 8 bytes (kind u16, placement u8 in an `Attr`, zero, body length u32) and a body.

use crate::codec::{Put, Take};
use crate::extents::{Piece, Run};
use crate::inode::{Kind, MAX_FILE_BLOCKS};

/// Longest name in bytes.
pub const NAME_MAX: usize = 255;

/// One change to the metadata, as logged and as replayed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Item<'a> {
    /// A new inode with its first name.
    Create { parent: u64, ino: u64, kind: Kind, mode: u16, uid: u32, gid: u32, time: u64, name: &'a [u8] },
    /// One more name for a file.
    Link { parent: u64, ino: u64, time: u64, name: &'a [u8] },
    /// A name goes; the inode too if it was the last one, unless it is `kept` for those who have it open.
    Unlink { parent: u64, time: u64, keep: bool, name: &'a [u8] },
    /// A name moves, replacing what had the new name.
    Rename { from: u64, to: u64, time: u64, keep: bool, old: &'a [u8], new: &'a [u8] },
    /// An inode without names goes.
    Forget { ino: u64 },
    /// Owner, mode, times, placement.
    Attr { ino: u64, mode: u16, uid: u32, gid: u32, atime: u64, mtime: u64, ctime: u64, placement: u8 },
    /// New blocks at places of a file (what was there is freed), and unwritten ones that are written now.
    Write { ino: u64, size: u64, time: u64, maps: Vec<Piece>, commits: Vec<(u64, u32)> },
    /// A new size; blocks behind it are freed.
    Truncate { ino: u64, size: u64, time: u64 },
    /// A range becomes a hole.
    Punch { ino: u64, first: u64, blocks: u64, time: u64 },
    /// In a checkpoint: one inode without its extents or entries.
    Inode(InodePart),
    /// In a checkpoint: some extents of the file `ino`.
    Extents { ino: u64, pieces: Vec<Piece> },
    /// In a checkpoint: some entries of the directory `ino`.
    Entries { ino: u64, entries: Vec<(u64, &'a [u8])> },
}

/// The fixed part of an inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InodePart {
    pub(crate) ino: u64,
    pub(crate) kind: Kind,
    pub(crate) mode: u16,
    pub(crate) placement: u8,
    pub(crate) nlink: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) size: u64,
    pub(crate) atime: u64,
    pub(crate) mtime: u64,
    pub(crate) ctime: u64,
    pub(crate) parent: u64,
}

pub(crate) const HEADER: usize = 8;
pub(crate) const PIECE: usize = 24;
/// An `Inode` item, whole.
pub(crate) const INODE_LEN: u64 = 8 + 72;
/// An `Extents` or `Entries` item without what it lists.
pub(crate) const PART_LEN: u64 = 8 + 16;
/// Extents in one `Extents` item.
pub(crate) const PIECES_PER_PART: usize = 256;
/// Entries in one `Entries` item.
pub(crate) const ENTRIES_PER_PART: usize = 64;
/// An entry without its name.
pub(crate) const ENTRY_LEN: u64 = 9;

mod kind {
    pub(super) const CREATE: u16 = 1;
    pub(super) const LINK: u16 = 2;
    pub(super) const UNLINK: u16 = 3;
    pub(super) const RENAME: u16 = 4;
    pub(super) const FORGET: u16 = 5;
    pub(super) const ATTR: u16 = 6;
    pub(super) const WRITE: u16 = 7;
    pub(super) const TRUNCATE: u16 = 8;
    pub(super) const PUNCH: u16 = 9;
    pub(super) const INODE: u16 = 16;
    pub(super) const EXTENTS: u16 = 17;
    pub(super) const ENTRIES: u16 = 18;
}

fn put_piece(b: &mut Vec<u8>, p: &Piece) {
    b.u64(p.file);
    b.u64(p.run.disk);
    b.u32(p.run.len);
    b.u32(u32::from(p.run.written));
}

fn take_piece(t: &mut Take<'_>) -> Option<Piece> {
    let (file, disk, len, state) = (t.u64()?, t.u64()?, t.u32()?, t.u32()?);
    let sound = len > 0
        && state <= 1
        && file.checked_add(u64::from(len))? <= MAX_FILE_BLOCKS
        && disk.checked_add(u64::from(len))? <= MAX_FILE_BLOCKS;
    sound.then_some(Piece { file, run: Run { disk, len, written: state == 1 } })
}

fn put_name(b: &mut Vec<u8>, name: &[u8]) {
    // Names are checked before items are made; 255 always fits.
    b.u8(name.len().min(NAME_MAX) as u8);
    b.put(name);
}

fn take_name<'a>(t: &mut Take<'a>) -> Option<&'a [u8]> {
    let len = t.u8()?;
    t.bytes(usize::from(len)).filter(|n| name_is_sound(n))
}

/// Whether a directory may hold this name.
pub(crate) fn name_is_sound(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= NAME_MAX
        && name != b"."
        && name != b".."
        && !name.iter().any(|&b| b == b'/' || b == 0)
}

/// Number of elements that the rest of a body can hold at most, so that nothing is allocated on a false promise.
fn bounded(count: u32, rest: &Take<'_>, each: usize) -> Option<usize> {
    let count = usize::try_from(count).ok()?;
    (count.checked_mul(each)? <= rest.0.len()).then_some(count)
}

/// Length of the item at the start of `bytes`, header and all, if its header is there.
pub(crate) fn peek_len(bytes: &[u8]) -> Option<usize> {
    let len = Take(bytes.get(4..)?).u32()?;
    usize::try_from(len).ok()?.checked_add(HEADER)
}

impl<'a> Item<'a> {
    /// Appends the item, header and all.
    pub(crate) fn encode(&self, b: &mut Vec<u8>) {
        let start = b.len();
        b.u64(0);
        let kind = self.body(b);
        let len = b.len() - start - HEADER;
        b[start..start + 2].copy_from_slice(&kind.to_le_bytes());
        if let Self::Attr { placement, .. } = self {
            // In the header, where programs that do not know it look past it; a longer body they would take for damage.
            b[start + 2] = *placement;
        }
        b[start + 4..start + 8].copy_from_slice(&(len as u32).to_le_bytes());
    }

    fn body(&self, b: &mut Vec<u8>) -> u16 {
        match self {
            Self::Create { parent, ino, kind, mode, uid, gid, time, name } => {
                b.u64(*parent);
                b.u64(*ino);
                b.u64(*time);
                b.u32(*uid);
                b.u32(*gid);
                b.u16(*mode);
                b.u8(kind.code());
                put_name(b, name);
                kind::CREATE
            }
            Self::Link { parent, ino, time, name } => {
                b.u64(*parent);
                b.u64(*ino);
                b.u64(*time);
                put_name(b, name);
                kind::LINK
            }
            Self::Unlink { parent, time, keep, name } => {
                b.u64(*parent);
                b.u64(*time);
                b.u8(u8::from(*keep));
                put_name(b, name);
                kind::UNLINK
            }
            Self::Rename { from, to, time, keep, old, new } => {
                b.u64(*from);
                b.u64(*to);
                b.u64(*time);
                b.u8(u8::from(*keep));
                put_name(b, old);
                put_name(b, new);
                kind::RENAME
            }
            Self::Forget { ino } => {
                b.u64(*ino);
                kind::FORGET
            }
            Self::Attr { ino, mode, uid, gid, atime, mtime, ctime, placement: _ } => {
                b.u64(*ino);
                b.u64(*atime);
                b.u64(*mtime);
                b.u64(*ctime);
                b.u32(*uid);
                b.u32(*gid);
                b.u16(*mode);
                kind::ATTR
            }
            Self::Write { ino, size, time, maps, commits } => {
                b.u64(*ino);
                b.u64(*size);
                b.u64(*time);
                b.u32(maps.len() as u32);
                b.u32(commits.len() as u32);
                for p in maps {
                    put_piece(b, p);
                }
                for (first, blocks) in commits {
                    b.u64(*first);
                    b.u32(*blocks);
                }
                kind::WRITE
            }
            Self::Truncate { ino, size, time } => {
                b.u64(*ino);
                b.u64(*size);
                b.u64(*time);
                kind::TRUNCATE
            }
            Self::Punch { ino, first, blocks, time } => {
                b.u64(*ino);
                b.u64(*first);
                b.u64(*blocks);
                b.u64(*time);
                kind::PUNCH
            }
            Self::Inode(i) => {
                b.u64(i.ino);
                b.u64(i.size);
                b.u64(i.atime);
                b.u64(i.mtime);
                b.u64(i.ctime);
                b.u64(i.parent);
                b.u32(i.uid);
                b.u32(i.gid);
                b.u32(i.nlink);
                b.u16(i.mode);
                b.u8(i.kind.code());
                b.u8(i.placement);
                b.u64(0);
                kind::INODE
            }
            Self::Extents { ino, pieces } => {
                b.u64(*ino);
                b.u64(pieces.len() as u64);
                for p in pieces {
                    put_piece(b, p);
                }
                kind::EXTENTS
            }
            Self::Entries { ino, entries } => {
                b.u64(*ino);
                b.u64(entries.len() as u64);
                for (child, name) in entries {
                    b.u64(*child);
                    put_name(b, name);
                }
                kind::ENTRIES
            }
        }
    }

    /// Takes one item from the front. `None` when it is cut short or its fields are out of range.
    pub(crate) fn decode(t: &mut Take<'a>) -> Option<Self> {
        let (kind, placement, _zero, len) = (t.u16()?, t.u8()?, t.u8()?, t.u32()?);
        let mut body = Take(t.bytes(usize::try_from(len).ok()?)?);
        let item = Self::decode_body(kind, placement, &mut body)?;
        body.is_empty().then_some(item)
    }

    fn decode_body(kind: u16, placement: u8, t: &mut Take<'a>) -> Option<Self> {
        Some(match kind {
            kind::CREATE => {
                let (parent, ino, time, uid, gid, mode) =
                    (t.u64()?, t.u64()?, t.u64()?, t.u32()?, t.u32()?, t.u16()?);
                let kind = Kind::from_code(t.u8()?)?;
                Self::Create { parent, ino, kind, mode, uid, gid, time, name: take_name(t)? }
            }
            kind::LINK => Self::Link { parent: t.u64()?, ino: t.u64()?, time: t.u64()?, name: take_name(t)? },
            kind::UNLINK => {
                Self::Unlink { parent: t.u64()?, time: t.u64()?, keep: t.u8()? != 0, name: take_name(t)? }
            }
            kind::RENAME => Self::Rename {
                from: t.u64()?,
                to: t.u64()?,
                time: t.u64()?,
                keep: t.u8()? != 0,
                old: take_name(t)?,
                new: take_name(t)?,
            },
            kind::FORGET => Self::Forget { ino: t.u64()? },
            kind::ATTR => {
                let (ino, atime, mtime, ctime) = (t.u64()?, t.u64()?, t.u64()?, t.u64()?);
                let (uid, gid, mode) = (t.u32()?, t.u32()?, t.u16()?);
                Self::Attr { ino, mode, uid, gid, atime, mtime, ctime, placement }
            }
            kind::WRITE => {
                let (ino, size, time, maps, commits) = (t.u64()?, t.u64()?, t.u64()?, t.u32()?, t.u32()?);
                let maps = (0..bounded(maps, t, PIECE)?).map(|_| take_piece(t)).collect::<Option<_>>()?;
                let commits = (0..bounded(commits, t, 12)?)
                    .map(|_| Some((t.u64()?, t.u32()?)).filter(|c| c.0 < MAX_FILE_BLOCKS))
                    .collect::<Option<_>>()?;
                Self::Write { ino, size, time, maps, commits }
            }
            kind::TRUNCATE => Self::Truncate { ino: t.u64()?, size: t.u64()?, time: t.u64()? },
            kind::PUNCH => Self::Punch { ino: t.u64()?, first: t.u64()?, blocks: t.u64()?, time: t.u64()? },
            kind::INODE => {
                let (ino, size, atime, mtime, ctime) = (t.u64()?, t.u64()?, t.u64()?, t.u64()?, t.u64()?);
                let (parent, uid, gid, nlink, mode) = (t.u64()?, t.u32()?, t.u32()?, t.u32()?, t.u16()?);
                let kind = Kind::from_code(t.u8()?)?;
                let placement = t.u8()?;
                t.bytes(8)?;
                Self::Inode(InodePart {
                    ino,
                    kind,
                    mode,
                    placement,
                    nlink,
                    uid,
                    gid,
                    size,
                    atime,
                    mtime,
                    ctime,
                    parent,
                })
            }
            kind::EXTENTS => {
                let ino = t.u64()?;
                let count = bounded(u32::try_from(t.u64()?).ok()?, t, PIECE)?;
                Self::Extents { ino, pieces: (0..count).map(|_| take_piece(t)).collect::<Option<_>>()? }
            }
            kind::ENTRIES => {
                let ino = t.u64()?;
                let count = bounded(u32::try_from(t.u64()?).ok()?, t, 10)?;
                let entries = (0..count).map(|_| Some((t.u64()?, take_name(t)?))).collect::<Option<_>>()?;
                Self::Entries { ino, entries }
            }
            _ => return None,
        })
    }
}
