//! All metadata in memory, and how one item changes it. Running and replaying use the same code, so they cannot differ.

use std::collections::BTreeMap;

use crate::capture::Capture;
use crate::extents::{ExtentMap, Piece};
use crate::inode::{Body, Directory, Ino, Inode, Kind, MAX_FILE_BLOCKS, MAX_FILE_SIZE, ROOT};
use crate::item::Item;
use crate::names::NewInode;

/// Blocks that an item freed (whose, first, count).
pub(crate) type Freed = Vec<(Ino, u64, u64)>;

/// The metadata.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) inodes: BTreeMap<Ino, Box<Inode>>,
    pub(crate) next_ino: Ino,
    /// Bytes that a checkpoint of all this takes, exactly.
    pub(crate) cost: u64,
    /// Blocks that files occupy.
    pub(crate) mapped: u64,
    /// Those of them that are unwritten. Each may become an extent of its own one day.
    pub(crate) unwritten: u64,
    /// Blocks on the device: no extent may end behind it.
    blocks: u64,
    pub(crate) capture: Option<Capture>,
    /// Number of the last one.
    pub(crate) captures: u32,
}

/// Unwritten blocks in some extents.
fn unwritten(pieces: impl IntoIterator<Item = Piece>) -> u64 {
    pieces.into_iter().filter(|p| !p.run.written).map(|p| u64::from(p.run.len)).sum()
}

pub(crate) type Applied<T = ()> = Result<T, String>;

impl State {
    /// Without any inode.
    pub(crate) fn empty(blocks: u64, next_ino: Ino) -> Self {
        Self {
            inodes: BTreeMap::new(),
            next_ino,
            cost: 0,
            mapped: 0,
            unwritten: 0,
            blocks,
            capture: None,
            captures: 0,
        }
    }

    /// With an empty root directory.
    pub(crate) fn fresh(blocks: u64, time: u64, root: &NewInode, placement: u8) -> Self {
        let NewInode { mode, uid, gid } = *root;
        let mut state = Self::empty(blocks, ROOT + 1);
        let root = Inode {
            mode,
            placement,
            nlink: 2,
            uid,
            gid,
            saved: 0,
            size: 0,
            atime: time,
            mtime: time,
            ctime: time,
            blocks: 0,
            body: Body::Directory(Box::new(Directory::new(ROOT))),
        };
        state.put(ROOT, root);
        state
    }

    pub(crate) fn get(&self, ino: Ino) -> Option<&Inode> {
        self.inodes.get(&ino).map(|i| &**i)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Ino, &Inode)> {
        self.inodes.iter().map(|(&n, i)| (n, &**i))
    }

    pub(crate) fn count(&self) -> u64 {
        self.inodes.len() as u64
    }

    pub(crate) fn put(&mut self, ino: Ino, inode: Inode) {
        self.cost += inode.cost();
        self.inodes.insert(ino, Box::new(inode));
    }

    /// Changes one inode, keeping the capture and the sums right.
    pub(crate) fn change<R>(&mut self, ino: Ino, f: impl FnOnce(&mut Inode) -> R) -> Applied<R> {
        self.save_first(ino);
        let inode = self.inodes.get_mut(&ino).ok_or_else(|| format!("inode {ino} is missing"))?;
        let (cost, blocks) = (inode.cost(), inode.blocks);
        let r = f(inode);
        self.cost = self.cost + inode.cost() - cost;
        self.mapped = self.mapped + inode.blocks - blocks;
        Ok(r)
    }

    pub(crate) fn change_dir<R>(&mut self, ino: Ino, f: impl FnOnce(&mut Inode) -> R) -> Applied<R> {
        if self.get(ino).is_none_or(|i| i.directory().is_none()) {
            return Err(format!("inode {ino} is no directory"));
        }
        self.change(ino, f)
    }

    /// Touches a file's or directory's change and modification time without a log item; the caller logs an `Attr` later.
    pub(crate) fn set_times(&mut self, ino: Ino, time: u64) {
        // A missing inode has no times to set.
        let _ = self.change(ino, |i| {
            i.mtime = time;
            i.ctime = time;
        });
    }

    /// An inode of which only times are to be changed: the quick way, which there is only while no checkpoint is gathered.
    pub(crate) fn get_to_touch(&mut self, ino: Ino) -> Option<&mut Inode> {
        if self.capture.is_some() {
            return None;
        }
        self.inodes.get_mut(&ino).map(|i| &mut **i)
    }

    /// Applies one item. `Err` says how it contradicts the state; then the state is not to be used any more.
    pub(crate) fn apply(&mut self, item: &Item<'_>, freed: &mut Freed) -> Applied {
        match item {
            Item::Create { parent, ino, kind, mode, uid, gid, time, name } => {
                if *ino < self.next_ino || *ino >= 1 << 62 {
                    return Err(format!("inode number {ino} is used again"));
                }
                self.add_name(*parent, name, *ino, *time, *kind == Kind::Directory)?;
                self.next_ino = ino + 1;
                let (nlink, body) = match kind {
                    Kind::File => (1, Body::File(ExtentMap::default())),
                    Kind::Directory => (2, Body::Directory(Box::new(Directory::new(*parent)))),
                };
                let (mode, uid, gid, time) = (*mode, *uid, *gid, *time);
                let inode = Inode {
                    mode,
                    placement: 0,
                    nlink,
                    uid,
                    gid,
                    saved: 0,
                    size: 0,
                    atime: time,
                    mtime: time,
                    ctime: time,
                    blocks: 0,
                    body,
                };
                self.put(*ino, inode);
                Ok(())
            }
            Item::Link { parent, ino, time, name } => {
                if self.get(*ino).is_none_or(|i| i.kind() == Kind::Directory || i.nlink == 0) {
                    return Err(format!("inode {ino} cannot have another name"));
                }
                self.add_name(*parent, name, *ino, *time, false)?;
                let time = *time;
                self.change(*ino, |i| {
                    i.nlink = i.nlink.saturating_add(1);
                    i.ctime = time;
                })
            }
            Item::Unlink { parent, time, keep, name } => {
                let ino = self.remove_name(*parent, name, *time)?;
                self.drop_link(ino, *parent, *time, *keep, freed)
            }
            Item::Rename { from, to, time, keep, old, new } => {
                self.rename(*from, *to, *time, *keep, old, new, freed)
            }
            Item::Forget { ino } => match self.get(*ino) {
                Some(i) if i.nlink == 0 => self.forget(*ino, freed),
                _ => Err(format!("inode {ino} is forgotten but has names, or is missing")),
            },
            Item::Attr { ino, mode, uid, gid, atime, mtime, ctime, placement } => self.change(*ino, |i| {
                (i.mode, i.uid, i.gid, i.placement) = (*mode, *uid, *gid, *placement);
                (i.atime, i.mtime, i.ctime) = (*atime, *mtime, *ctime);
            }),
            Item::Write { ino, size, time, maps, commits } => {
                let mut known = true;
                for (first, blocks) in commits {
                    let end = first.saturating_add(u64::from(*blocks));
                    let (all, now) = self.change_file(*ino, |_, map| {
                        let now = unwritten(map.range(*first, end));
                        (map.set_written(*first, end), now)
                    })?;
                    known &= all;
                    self.unwritten -= if all { now } else { 0 };
                }
                if !known {
                    return Err(format!("inode {ino}: blocks are committed that were never mapped"));
                }
                for piece in maps {
                    self.map(*ino, piece, freed)?;
                }
                self.set_size(*ino, *size, *time)
            }
            Item::Truncate { ino, size, time } => {
                self.unmap(*ino, size.div_ceil(crate::io::BLOCK), MAX_FILE_BLOCKS, freed)?;
                self.set_size(*ino, *size, *time)
            }
            Item::Punch { ino, first, blocks, time } => {
                self.unmap(*ino, *first, first.saturating_add(*blocks), freed)?;
                let time = *time;
                self.change(*ino, |i| {
                    i.mtime = time;
                    i.ctime = time;
                })
            }
            Item::Inode(_) | Item::Extents { .. } | Item::Entries { .. } => {
                Err("a part of a checkpoint lies in the log".to_owned())
            }
        }
    }

    /// Takes one item of a checkpoint in.
    pub(crate) fn load(&mut self, item: &Item<'_>) -> Applied {
        match item {
            Item::Inode(part) => {
                if part.ino == 0 || part.ino >= self.next_ino || self.get(part.ino).is_some() {
                    return Err(format!("inode {} is out of range or there twice", part.ino));
                }
                if part.size > MAX_FILE_SIZE {
                    return Err(format!("inode {} has a size of {} bytes", part.ino, part.size));
                }
                self.put(part.ino, Inode::from_part(part));
                Ok(())
            }
            Item::Extents { ino, pieces } => {
                let mut none = Freed::new();
                for piece in pieces {
                    self.map(*ino, piece, &mut none)?;
                }
                if none.is_empty() { Ok(()) } else { Err(format!("inode {ino}: extents overlap")) }
            }
            Item::Entries { ino, entries } => {
                for (child, name) in entries {
                    let added = self.change_dir(*ino, |i| match &mut i.body {
                        Body::Directory(dir) => dir.add(name, *child),
                        Body::File(_) => false,
                    })?;
                    if !added {
                        return Err(format!("directory {ino} has {} twice", crate::error::shown(name)));
                    }
                }
                Ok(())
            }
            _ => Err("a log item lies in the checkpoint".to_owned()),
        }
    }

    fn change_file<R>(&mut self, ino: Ino, f: impl FnOnce(&mut u64, &mut ExtentMap) -> R) -> Applied<R> {
        self.change(ino, |i| match &mut i.body {
            Body::File(map) => Some(f(&mut i.blocks, map)),
            Body::Directory(_) => None,
        })?
        .ok_or_else(|| format!("inode {ino} is no file"))
    }

    pub(crate) fn map(&mut self, ino: Ino, piece: &Piece, freed: &mut Freed) -> Applied {
        if piece.run.disk + u64::from(piece.run.len) > self.blocks {
            return Err(format!("inode {ino}: an extent ends behind the device"));
        }
        self.unmap(ino, piece.file, piece.end(), freed)?;
        self.unwritten += unwritten([*piece]);
        self.change_file(ino, |blocks, map| {
            map.insert(*piece);
            *blocks += u64::from(piece.run.len);
        })
    }

    pub(crate) fn unmap(&mut self, ino: Ino, first: u64, end: u64, freed: &mut Freed) -> Applied {
        let gone = self.change_file(ino, |blocks, map| {
            let mut removed = Vec::new();
            map.remove(first, end, &mut removed);
            for p in &removed {
                *blocks -= u64::from(p.run.len);
                freed.push((ino, p.run.disk, u64::from(p.run.len)));
            }
            unwritten(removed)
        })?;
        self.unwritten -= gone;
        Ok(())
    }

    fn set_size(&mut self, ino: Ino, size: u64, time: u64) -> Applied {
        if size > MAX_FILE_SIZE {
            return Err(format!("inode {ino} would be {size} bytes long"));
        }
        self.change_file(ino, |_, _| ())?;
        self.change(ino, |i| {
            i.size = size;
            i.mtime = time;
            i.ctime = time;
        })
    }

    pub(crate) fn add_name(
        &mut self,
        parent: Ino,
        name: &[u8],
        ino: Ino,
        time: u64,
        directory: bool,
    ) -> Applied {
        let added = self.change_dir(parent, |i| {
            i.mtime = time;
            i.ctime = time;
            i.nlink = i.nlink.saturating_add(u32::from(directory));
            match &mut i.body {
                Body::Directory(dir) => dir.add(name, ino),
                Body::File(_) => false,
            }
        })?;
        if added {
            Ok(())
        } else {
            Err(format!("directory {parent} has {} twice", crate::error::shown(name)))
        }
    }

    fn remove_name(&mut self, parent: Ino, name: &[u8], time: u64) -> Applied<Ino> {
        self.change_dir(parent, |i| {
            i.mtime = time;
            i.ctime = time;
            match &mut i.body {
                Body::Directory(dir) => dir.remove(name),
                Body::File(_) => None,
            }
        })?
        .ok_or_else(|| format!("directory {parent} has no {}", crate::error::shown(name)))
    }

    /// One name of `ino` less; `parent` is the directory that held it.
    fn drop_link(&mut self, ino: Ino, parent: Ino, time: u64, keep: bool, freed: &mut Freed) -> Applied {
        let inode = self.get(ino).ok_or_else(|| format!("inode {ino} is missing"))?;
        if let Some(dir) = inode.directory() {
            if !dir.entries.is_empty() || ino == ROOT {
                return Err(format!("directory {ino} is removed but not empty"));
            }
            self.change(parent, |i| i.nlink = i.nlink.saturating_sub(1))?;
        }
        let left = self.change(ino, |i| {
            i.nlink = if i.directory().is_some() { 0 } else { i.nlink.saturating_sub(1) };
            i.ctime = time;
            i.nlink
        })?;
        if left == 0 && !keep { self.forget(ino, freed) } else { Ok(()) }
    }

    pub(crate) fn forget(&mut self, ino: Ino, freed: &mut Freed) -> Applied {
        self.save_last(ino);
        let inode = self.inodes.remove(&ino).ok_or_else(|| format!("inode {ino} is missing"))?;
        self.cost -= inode.cost();
        self.mapped -= inode.blocks;
        if let Some(map) = inode.extents() {
            self.unwritten -= unwritten(map.iter());
            freed.extend(map.iter().map(|p| (ino, p.run.disk, u64::from(p.run.len))));
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "they are the fields of one item")]
    fn rename(
        &mut self,
        from: Ino,
        to: Ino,
        time: u64,
        keep: bool,
        old: &[u8],
        new: &[u8],
        freed: &mut Freed,
    ) -> Applied {
        let ino = self.remove_name(from, old, time)?;
        let replaced = self.get(to).and_then(Inode::directory).and_then(|d| d.entries.get(new).copied());
        if let Some(replaced) = replaced {
            self.remove_name(to, new, time)?;
            self.drop_link(replaced, to, time, keep, freed)?;
        }
        let moved_dir = self.get(ino).is_some_and(|i| i.kind() == Kind::Directory);
        if moved_dir && self.is_inside(to, ino) {
            return Err(format!("directory {ino} moves into itself"));
        }
        self.add_name(to, new, ino, time, false)?;
        if moved_dir && from != to {
            self.change(from, |i| i.nlink = i.nlink.saturating_sub(1))?;
            self.change(to, |i| i.nlink = i.nlink.saturating_add(1))?;
        }
        self.change(ino, |i| {
            i.ctime = time;
            if let Body::Directory(dir) = &mut i.body {
                dir.parent = to;
            }
        })
    }

    /// Whether directory `ino` is `top` or lies somewhere below it.
    pub(crate) fn is_inside(&self, mut ino: Ino, top: Ino) -> bool {
        // Bounded, because a hostile image may hold a circle.
        for _ in 0..=self.inodes.len() {
            if ino == top {
                return true;
            }
            match self.get(ino).and_then(Inode::directory) {
                Some(dir) if dir.parent != ino => ino = dir.parent,
                _ => return false,
            }
        }
        true
    }
}
