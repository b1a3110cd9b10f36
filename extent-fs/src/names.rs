//! Names: create, link, unlink, rename; and who has which inode open.

use nvme_driver::disk::Disk;

use crate::error::{FsError, shown};
use crate::fs::Filesystem;
use crate::inode::{Ino, Inode, Kind, MAX_FILE_BLOCKS, PLACEMENT_MAX, ROOT, name_growth};
use crate::item::{INODE_LEN, Item, NAME_MAX, name_is_sound};

/// Attributes of an inode to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewInode {
    /// Permission bits (07777).
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl NewInode {
    /// A file of root's with mode 0644.
    pub fn file() -> Self {
        Self { mode: 0o644, uid: 0, gid: 0 }
    }

    /// A directory of root's with mode 0755.
    pub fn directory() -> Self {
        Self { mode: 0o755, uid: 0, gid: 0 }
    }
}

/// Attributes to change; `None` leaves one as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits (07777).
    pub mode: Option<u16>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Access time, nanoseconds since 1970.
    pub atime: Option<u64>,
    /// Modification time, nanoseconds since 1970.
    pub mtime: Option<u64>,
    /// Where the file is to be in memory: a number up to [`PLACEMENT_MAX`], 0 for no choice. The root directory's is for all
    /// files without one of their own; other directories have none.
    pub placement: Option<u8>,
}

/// At most what an item with two names takes.
const NAME_ITEM: usize = 64 + 2 * (NAME_MAX + 1);

fn check_name(name: &[u8]) -> Result<(), FsError> {
    if name.len() > NAME_MAX {
        return Err(FsError::NameTooLong { len: name.len() });
    }
    if !name_is_sound(name) {
        return Err(FsError::invalid(format!("{} cannot be the name of a file", shown(name))));
    }
    Ok(())
}

/// Refuses a number that is no placement.
pub(crate) fn check_placement(number: u8) -> Result<(), FsError> {
    if number <= PLACEMENT_MAX {
        return Ok(());
    }
    Err(FsError::invalid(format!("placement {number}: the largest is {PLACEMENT_MAX}")))
}

impl<D: Disk> Filesystem<D> {
    /// The directory that holds the last component of a path, and that component.
    pub fn lookup_parent<'p>(&self, path: &'p [u8]) -> Result<(Ino, &'p [u8]), FsError> {
        let end = path.iter().rposition(|&b| b != b'/').map_or(0, |i| i + 1);
        let path = &path[..end];
        let cut = path.iter().rposition(|&b| b == b'/').map_or(0, |i| i + 1);
        let (dir, name) = path.split_at(cut);
        Ok((self.lookup(dir)?, name))
    }

    /// Makes an empty file.
    pub fn create(&mut self, path: impl AsRef<[u8]>, new: &NewInode) -> Result<Ino, FsError> {
        let (dir, name) = self.lookup_parent(path.as_ref())?;
        self.create_at(dir, name, Kind::File, new)
    }

    /// Makes an empty directory.
    pub fn mkdir(&mut self, path: impl AsRef<[u8]>, new: &NewInode) -> Result<Ino, FsError> {
        let (dir, name) = self.lookup_parent(path.as_ref())?;
        self.create_at(dir, name, Kind::Directory, new)
    }

    /// Removes a file's name; the file goes with its last name, when nobody has it open any more.
    pub fn unlink(&mut self, path: impl AsRef<[u8]>) -> Result<(), FsError> {
        let (dir, name) = self.lookup_parent(path.as_ref())?;
        self.unlink_at(dir, name)
    }

    /// Removes an empty directory.
    pub fn rmdir(&mut self, path: impl AsRef<[u8]>) -> Result<(), FsError> {
        let (dir, name) = self.lookup_parent(path.as_ref())?;
        self.rmdir_at(dir, name)
    }

    /// Gives what `old` names the name `new`, replacing atomically what had it.
    pub fn rename(&mut self, old: impl AsRef<[u8]>, new: impl AsRef<[u8]>) -> Result<(), FsError> {
        let (from, old) = self.lookup_parent(old.as_ref())?;
        let (to, new) = self.lookup_parent(new.as_ref())?;
        self.rename_at(from, old, to, new)
    }

    /// Gives a file one more name.
    pub fn link(&mut self, old: impl AsRef<[u8]>, new: impl AsRef<[u8]>) -> Result<(), FsError> {
        let ino = self.lookup(old)?;
        let (dir, name) = self.lookup_parent(new.as_ref())?;
        self.link_at(ino, dir, name)
    }

    fn directory(&self, ino: Ino) -> Result<&Inode, FsError> {
        let inode = self.inode(ino)?;
        match inode.kind() {
            Kind::Directory if inode.nlink == 0 => Err(FsError::no_inode(ino)),
            Kind::Directory => Ok(inode),
            Kind::File => Err(FsError::NotADirectory { what: format!("inode {ino}") }),
        }
    }

    /// Makes an empty file or directory called `name` in `dir`.
    pub fn create_at(&mut self, dir: Ino, name: &[u8], kind: Kind, new: &NewInode) -> Result<Ino, FsError> {
        self.begin(NAME_ITEM)?;
        let parent = self.directory(dir)?;
        check_new_name(parent, name)?;
        if kind == Kind::Directory && parent.nlink == u32::MAX {
            return Err(FsError::TooManyLinks { ino: dir });
        }
        self.allow_growth(name_growth(name.len()) + INODE_LEN)?;
        let (ino, time) = (self.state.next_ino, self.now());
        let NewInode { mode, uid, gid } = *new;
        self.log(&Item::Create { parent: dir, ino, kind, mode: mode & 0o7777, uid, gid, time, name })?;
        Ok(ino)
    }

    /// Gives file `ino` the name `name` in `dir` too.
    pub fn link_at(&mut self, ino: Ino, dir: Ino, name: &[u8]) -> Result<(), FsError> {
        self.begin(NAME_ITEM)?;
        let file = self.file(ino)?;
        if file.nlink == 0 {
            return Err(FsError::no_inode(ino));
        }
        if file.nlink == u32::MAX {
            return Err(FsError::TooManyLinks { ino });
        }
        check_new_name(self.directory(dir)?, name)?;
        self.allow_growth(name_growth(name.len()))?;
        let time = self.now();
        self.log(&Item::Link { parent: dir, ino, time, name })
    }

    /// Removes the name of a file.
    pub fn unlink_at(&mut self, dir: Ino, name: &[u8]) -> Result<(), FsError> {
        self.begin(NAME_ITEM)?;
        let ino = self.entry(dir, name)?;
        if self.inode(ino)?.kind() == Kind::Directory {
            return Err(FsError::IsADirectory { what: shown(name) });
        }
        let keep = self.opens.contains_key(&ino);
        let time = self.now();
        self.log(&Item::Unlink { parent: dir, time, keep, name })?;
        self.recall_if_gone(ino);
        Ok(())
    }

    /// A file that is gone cannot be written any more; its blocks wait for the leases on them.
    fn recall_if_gone(&mut self, ino: Ino) {
        if self.state.get(ino).is_none() {
            self.recall_leases(ino, 0..MAX_FILE_BLOCKS, None);
        }
    }

    /// Removes the name of an empty directory, and the directory.
    pub fn rmdir_at(&mut self, dir: Ino, name: &[u8]) -> Result<(), FsError> {
        self.begin(NAME_ITEM)?;
        let ino = self.entry(dir, name)?;
        match self.inode(ino)?.directory() {
            None => return Err(FsError::NotADirectory { what: shown(name) }),
            Some(d) if !d.entries.is_empty() => return Err(FsError::NotEmpty { what: shown(name) }),
            Some(_) => {}
        }
        let keep = self.opens.contains_key(&ino);
        let time = self.now();
        self.log(&Item::Unlink { parent: dir, time, keep, name })
    }

    /// An entry that may be removed or moved.
    fn entry(&self, dir: Ino, name: &[u8]) -> Result<Ino, FsError> {
        self.directory(dir)?;
        if matches!(name, b"" | b"." | b"..") {
            return Err(FsError::invalid(format!("{} cannot be removed or renamed", shown(name))));
        }
        self.lookup_at(dir, name)
    }

    /// Moves an entry, replacing atomically what is at its new place.
    pub fn rename_at(&mut self, from: Ino, old: &[u8], to: Ino, new: &[u8]) -> Result<(), FsError> {
        self.begin(NAME_ITEM)?;
        let ino = self.entry(from, old)?;
        let target = self.directory(to)?;
        check_name(new)?;
        let replaced = target.directory().and_then(|d| d.entries.get(new).copied());
        if replaced == Some(ino) {
            // Two names of one file: POSIX leaves both.
            return Ok(());
        }
        let moves_dir = self.inode(ino)?.kind() == Kind::Directory;
        if moves_dir && (ino == ROOT || self.state.is_inside(to, ino)) {
            return Err(FsError::invalid(format!("directory {} cannot move into itself", shown(old))));
        }
        if let Some(replaced) = replaced {
            match (moves_dir, self.inode(replaced)?.directory()) {
                (false, Some(_)) => return Err(FsError::IsADirectory { what: shown(new) }),
                (true, None) => return Err(FsError::NotADirectory { what: shown(new) }),
                (true, Some(d)) if !d.entries.is_empty() => {
                    return Err(FsError::NotEmpty { what: shown(new) });
                }
                _ => {}
            }
        } else if moves_dir && target.nlink == u32::MAX {
            return Err(FsError::TooManyLinks { ino: to });
        }
        if replaced.is_none() && (from != to || new.len() > old.len()) {
            self.allow_growth(name_growth(new.len()))?;
        }
        let keep = replaced.is_some_and(|r| self.opens.contains_key(&r));
        let time = self.now();
        self.log(&Item::Rename { from, to, time, keep, old, new })?;
        if let Some(replaced) = replaced {
            self.recall_if_gone(replaced);
        }
        Ok(())
    }

    /// Changes attributes; the change time becomes now.
    pub fn set_attr(&mut self, ino: Ino, set: &SetAttr) -> Result<(), FsError> {
        self.begin(NAME_ITEM)?;
        let i = self.inode(ino)?;
        if let Some(placement) = set.placement {
            check_placement(placement)?;
            if ino != ROOT && i.kind() == Kind::Directory {
                return Err(FsError::IsADirectory { what: format!("inode {ino}") });
            }
        }
        let item = Item::Attr {
            ino,
            mode: set.mode.unwrap_or(i.mode) & 0o7777,
            uid: set.uid.unwrap_or(i.uid),
            gid: set.gid.unwrap_or(i.gid),
            atime: set.atime.unwrap_or(i.atime),
            mtime: set.mtime.unwrap_or(i.mtime),
            ctime: self.now(),
            placement: set.placement.unwrap_or(i.placement),
        };
        self.log(&item)
    }

    /// Keeps an inode alive without a name, until as many calls of [`Self::close`].
    pub fn open(&mut self, ino: Ino) -> Result<(), FsError> {
        self.inode(ino)?;
        let count = self.opens.entry(ino).or_insert(0);
        *count = count.saturating_add(1);
        Ok(())
    }

    /// Gives back what [`Self::open`] took; the last one lets a nameless inode go.
    pub fn close(&mut self, ino: Ino) -> Result<(), FsError> {
        let Some(count) = self.opens.get_mut(&ino) else {
            return Err(FsError::invalid(format!("inode {ino} is not open")));
        };
        *count -= 1;
        if *count > 0 {
            return Ok(());
        }
        self.opens.remove(&ino);
        if self.inode(ino)?.nlink == 0 && self.io.latched().is_none() {
            self.begin(NAME_ITEM)?;
            self.log(&Item::Forget { ino })?;
            self.recall_if_gone(ino);
        }
        Ok(())
    }

    /// Refuses when a checkpoint of metadata that is `growth` bytes larger might not fit.
    pub(crate) fn allow_growth(&mut self, growth: u64) -> Result<(), FsError> {
        if self.free.free_blocks() < self.reserve(growth) && !self.txn.freed.is_empty() {
            self.commit()?;
        }
        let (free, needed) = (self.free.free_blocks(), self.reserve(growth));
        if free < needed { Err(FsError::NoSpace { needed, free }) } else { Ok(()) }
    }
}

/// Whether `name` may become an entry of `dir`.
fn check_new_name(dir: &Inode, name: &[u8]) -> Result<(), FsError> {
    if matches!(name, b"" | b"." | b"..") || dir.directory().is_some_and(|d| d.entries.contains_key(name)) {
        return Err(FsError::Exists { what: shown(name) });
    }
    check_name(name)
}
