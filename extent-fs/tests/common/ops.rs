//! Operations that are done to the filesystem and to the model alike.

use extent_fs::{Access, Falloc, Filesystem, FsError, NewInode, PLACEMENT_MAX, SetAttr};
use nvme_driver::disk::Disk;

use super::Dice;
use super::model::Model;

#[derive(Clone, Debug)]
pub enum Op {
    Create(&'static str),
    Mkdir(&'static str),
    Unlink(&'static str),
    Rmdir(&'static str),
    Rename(&'static str, &'static str),
    Link(&'static str, &'static str),
    /// Offset, length, and what makes its bytes its own.
    Write(&'static str, usize, usize, u64),
    /// The same through a layout: map, write to the device, commit, release.
    Direct(&'static str, usize, usize, u64),
    Truncate(&'static str, usize),
    Punch(&'static str, usize, usize),
    Allocate(&'static str, usize, usize),
    /// Of the root: for all that have none of their own.
    Place(&'static str, u8),
    /// Holds a file open (and lets go of the one before); then it may be unlinked and written.
    Open(&'static str),
    WriteOpen(usize, usize, u64),
    Close,
    Sync(&'static str),
    SyncAll,
    Checkpoint,
    Trim,
}

/// Bytes that no other write has: each 8 say which write and where.
pub fn pattern(tag: u64, len: usize) -> Vec<u8> {
    let words = (0..len.div_ceil(8) as u64).flat_map(|i| ((tag << 20) | i | 1 << 63).to_le_bytes());
    words.take(len).collect()
}

fn put(data: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if data.len() < at + bytes.len() {
        data.resize(at + bytes.len(), 0);
    }
    data[at..at + bytes.len()].copy_from_slice(bytes);
}

impl Op {
    /// Whether it promises that everything before it is durable when it returns.
    pub fn is_sync(&self) -> bool {
        matches!(self, Self::Sync(_) | Self::SyncAll | Self::Checkpoint | Self::Trim)
    }

    pub fn on_model(&self, m: &mut Model) -> Result<(), i32> {
        match *self {
            Self::Create(p) => m.create(p),
            Self::Mkdir(p) => m.mkdir(p),
            Self::Unlink(p) => m.unlink(p),
            Self::Rmdir(p) => m.rmdir(p),
            Self::Rename(a, b) => m.rename(a, b),
            Self::Link(a, b) => m.link(a, b),
            Self::Write(p, at, len, tag) | Self::Direct(p, at, len, tag) => {
                let id = m.lookup(p)?;
                put(m.data(id)?, at, &pattern(tag, len));
                Ok(())
            }
            Self::Truncate(p, size) => {
                let id = m.lookup(p)?;
                m.data(id)?.resize(size, 0);
                Ok(())
            }
            Self::Punch(p, at, len) => {
                let id = m.lookup(p)?;
                let data = m.data(id)?;
                let end = (at + len).min(data.len());
                if at < end {
                    data[at..end].fill(0);
                }
                Ok(())
            }
            Self::Allocate(p, at, len) => {
                let id = m.lookup(p)?;
                let data = m.data(id)?;
                if data.len() < at + len {
                    data.resize(at + len, 0);
                }
                Ok(())
            }
            Self::Place(p, placement) => m.place(p, placement),
            Self::Open(p) => {
                let id = m.lookup(p)?;
                m.close();
                m.open = m.nodes.contains_key(&id).then_some(id);
                Ok(())
            }
            Self::WriteOpen(at, len, tag) => match m.open {
                Some(id) => {
                    put(m.data(id)?, at, &pattern(tag, len));
                    Ok(())
                }
                None => Ok(()),
            },
            Self::Close => {
                m.close();
                Ok(())
            }
            Self::Sync(p) => m.lookup(p).map(|_| ()),
            Self::SyncAll | Self::Checkpoint | Self::Trim => Ok(()),
        }
    }

    /// `open` is the inode held open.
    pub fn on_fs<D: Disk>(&self, fs: &mut Filesystem<D>, open: &mut Option<u64>) -> Result<(), FsError> {
        match *self {
            Self::Create(p) => fs.create(p, &NewInode::file()).map(|_| ()),
            Self::Mkdir(p) => fs.mkdir(p, &NewInode::directory()).map(|_| ()),
            Self::Unlink(p) => fs.unlink(p),
            Self::Rmdir(p) => fs.rmdir(p),
            Self::Rename(a, b) => fs.rename(a, b),
            Self::Link(a, b) => fs.link(a, b),
            Self::Write(p, at, len, tag) => {
                let ino = fs.lookup(p)?;
                fs.write_at(ino, at as u64, &pattern(tag, len))
            }
            Self::Direct(p, at, len, tag) => {
                let ino = fs.lookup(p)?;
                direct(fs, ino, at, &pattern(tag, len))
            }
            Self::Truncate(p, size) => {
                let ino = fs.lookup(p)?;
                fs.truncate(ino, size as u64)
            }
            Self::Punch(p, at, len) => {
                let ino = fs.lookup(p)?;
                fs.fallocate(ino, at as u64, len as u64, Falloc::PunchHole)
            }
            Self::Allocate(p, at, len) => {
                let ino = fs.lookup(p)?;
                fs.fallocate(ino, at as u64, len as u64, Falloc::Extend)
            }
            Self::Place(p, placement) => {
                let ino = fs.lookup(p)?;
                fs.set_attr(ino, &SetAttr { placement: Some(placement), ..SetAttr::default() })
            }
            Self::Open(p) => {
                let ino = fs.lookup(p)?;
                if let Some(old) = open.take() {
                    fs.close(old)?;
                }
                if fs.stat(ino).is_ok() {
                    fs.open(ino)?;
                    *open = Some(ino);
                }
                Ok(())
            }
            Self::WriteOpen(at, len, tag) => match *open {
                Some(ino) => fs.write_at(ino, at as u64, &pattern(tag, len)),
                None => Ok(()),
            },
            Self::Close => match open.take() {
                Some(ino) => fs.close(ino),
                None => Ok(()),
            },
            Self::Sync(p) => {
                let ino = fs.lookup(p)?;
                fs.sync(ino)
            }
            Self::SyncAll => fs.sync_all(),
            Self::Checkpoint => fs.checkpoint_now(),
            Self::Trim => fs.trim().map(|_| ()),
        }
    }
}

/// Writes through a layout, as a client with block numbers would; the blocks around it are read first.
fn direct<D: Disk>(fs: &mut Filesystem<D>, ino: u64, at: usize, bytes: &[u8]) -> Result<(), FsError> {
    const BLOCK: usize = 4096;
    let first = at / BLOCK * BLOCK;
    let end = (at + bytes.len()).next_multiple_of(BLOCK);
    let mut old = vec![0; end - first];
    fs.read_at(ino, first as u64, &mut old)?;
    let layout = fs.map_blocks(ino, at as u64, bytes.len() as u64, Access::Write)?;
    old[at - first..][..bytes.len()].copy_from_slice(bytes);
    // Rubbish behind the end of the file, as a careless client leaves it.
    let size = (fs.stat(ino)?.size as usize).max(at + bytes.len());
    if size < end {
        old[size.max(first) - first..].fill(0xbb);
    }
    for e in &layout.extents {
        let from = e.file_offset as usize - first;
        fs.disk_mut().write(e.lba, &old[from..from + e.bytes() as usize])?;
    }
    let done = fs.commit_blocks(layout.lease, &layout.extents, Some((at + bytes.len()) as u64));
    fs.release(layout.lease)?;
    done
}

const FILES: [&str; 6] = ["/a", "/b", "/c", "/d/a", "/d/b", "/d/e/a"];
const DIRS: [&str; 3] = ["/d", "/d/e", "/f"];

/// A random operation over a small set of names.
pub fn random(dice: &mut Dice) -> Op {
    let file = *dice.pick(&FILES);
    let other = *dice.pick(&FILES);
    let any = if dice.one_in(4) { *dice.pick(&DIRS) } else { file };
    let to = if dice.one_in(4) { *dice.pick(&DIRS) } else { other };
    let (at, len) = match dice.below(4) {
        0 => (dice.below(6) as usize * 4096, 4096 * (1 + dice.below(3) as usize)),
        1 => (dice.below(300) as usize, 1 + dice.below(700) as usize),
        2 => (dice.below(12_000) as usize, 1 + dice.below(10_000) as usize),
        _ => (dice.below(24_000) as usize, 1 + dice.below(5000) as usize),
    };
    let tag = dice.next() >> 22;
    match dice.below(30) {
        0..=3 => Op::Create(file),
        4 => Op::Mkdir(dice.pick::<&str>(&DIRS)),
        5 | 6 => Op::Unlink(file),
        7 => Op::Rmdir(dice.pick::<&str>(&DIRS)),
        8 | 9 => Op::Rename(any, to),
        10 => Op::Link(file, other),
        11..=14 => Op::Write(file, at, len, tag),
        15 => Op::Direct(file, at, len, tag),
        16 | 17 => Op::Truncate(file, at),
        18 => Op::Punch(file, at, len),
        19 => Op::Allocate(file, at, len),
        20 => Op::Open(file),
        21 => Op::WriteOpen(at, len, tag),
        22 => Op::Close,
        23 if dice.one_in(4) => Op::Checkpoint,
        23 if dice.one_in(2) => Op::Trim,
        24 | 25 => Op::Sync(file),
        26 | 27 => {
            let placement = dice.below(u64::from(PLACEMENT_MAX) + 1) as u8;
            Op::Place(if dice.one_in(4) { "/" } else { any }, placement)
        }
        _ => Op::SyncAll,
    }
}
