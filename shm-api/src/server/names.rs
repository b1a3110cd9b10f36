//! What goes by path: every step checked against the client's permissions (P8).

use extent_fs::{Filesystem, Ino, Kind, NewInode, ROOT, SetAttr, Stat};
use nvme_driver::disk::Disk;

use super::permission::{Owner, READ, SEARCH, WRITE, allowed};
use crate::protocol::messages::{KIND_DIRECTORY, KIND_FILE, SET_MODE, SET_OWNER, SetAttrRequest, StatReply};
use crate::protocol::records::{DirEntry, DirRecord};
use crate::protocol::{ErrorCode, MAX_PATH, WireError};
use crate::transport::peer::Identity;

/// Bytes of directory records in one reply: well below the longest message.
const LIST_BYTES: usize = 24 * 1024;
/// Entries looked at for one reply.
const LIST_ENTRIES: usize = 256;

/// A filesystem error as it goes to a client.
pub(crate) fn fs_error(error: &extent_fs::FsError) -> WireError {
    use extent_fs::FsError as E;
    let code = match error {
        E::NotFound { .. } => ErrorCode::NotFound,
        E::Exists { .. } => ErrorCode::Exists,
        E::NotADirectory { .. } => ErrorCode::NotADirectory,
        E::IsADirectory { .. } => ErrorCode::IsADirectory,
        E::NotEmpty { .. } => ErrorCode::NotEmpty,
        E::NoSpace { .. } => ErrorCode::NoSpace,
        E::NameTooLong { .. } => ErrorCode::NameTooLong,
        E::ReadOnly { .. } => ErrorCode::ReadOnly,
        E::Damaged { .. } => ErrorCode::Damaged,
        E::Device(e) if e.is_no_space() => ErrorCode::NoSpace,
        E::Device(_) => ErrorCode::Device,
        E::TooLarge { .. } => ErrorCode::TooBig,
        E::Invalid { .. } => ErrorCode::Invalid,
        E::LeaseConflict { .. } => ErrorCode::Leased,
        E::StaleLease { .. } => ErrorCode::StaleLease,
        _ => ErrorCode::Internal,
    };
    WireError { code, errno: error.errno().unsigned_abs(), text: error.to_string() }
}

fn owner(stat: &Stat) -> Owner {
    Owner { uid: stat.uid, gid: stat.gid, mode: u32::from(stat.mode) }
}

fn denied(what: &str, who: &Identity) -> WireError {
    WireError::new(ErrorCode::Denied, format!("uid {} may not {what}", who.uid))
}

/// A filesystem as one client may see it.
pub(crate) struct View<'a, D: Disk> {
    pub(crate) fs: &'a mut Filesystem<D>,
    pub(crate) who: &'a Identity,
    pub(crate) server_uid: u32,
}

impl<D: Disk> View<'_, D> {
    fn stat_ino(&self, ino: Ino) -> Result<Stat, WireError> {
        self.fs.stat(ino).map_err(|e| fs_error(&e))
    }

    /// Refuses unless the client has these permission bits on the inode.
    pub(crate) fn require(&self, ino: Ino, bits: u32, what: &str) -> Result<Stat, WireError> {
        let stat = self.stat_ino(ino)?;
        if allowed(self.who, owner(&stat), bits) { Ok(stat) } else { Err(denied(what, self.who)) }
    }

    /// As [`require`](Self::require), to do something that only a file has done to it: a directory is refused.
    pub(super) fn require_file(&self, ino: Ino, bits: u32, verb: &str, path: &str) -> Result<(), WireError> {
        match self.require(ino, bits, &format!("{verb} \"{path}\""))?.kind {
            Kind::Directory => {
                Err(WireError::new(ErrorCode::IsADirectory, format!("\"{path}\" is a directory")))
            }
            _ => Ok(()),
        }
    }

    /// Walks to a path's inode; every directory on the way must let the client through.
    pub(crate) fn walk(&self, path: &str) -> Result<Ino, WireError> {
        if path.len() > MAX_PATH {
            return Err(WireError::new(ErrorCode::NameTooLong, "the path is too long"));
        }
        let mut at = ROOT;
        for name in path.split('/').filter(|n| !n.is_empty()) {
            let stat = self.stat_ino(at)?;
            if stat.kind == Kind::Directory && !allowed(self.who, owner(&stat), SEARCH) {
                return Err(denied(&format!("pass through a directory of \"{path}\""), self.who));
            }
            at = self.fs.lookup_at(at, name.as_bytes()).map_err(|e| {
                let error = fs_error(&e);
                WireError { text: format!("\"{path}\": {}", error.text), ..error }
            })?;
        }
        Ok(at)
    }

    /// Walks to the directory that holds a path's last component, in which the client is going to change something.
    fn walk_parent<'p>(&self, path: &'p str) -> Result<(Ino, &'p [u8]), WireError> {
        let trimmed = path.trim_end_matches('/');
        let (dir, name) = trimmed.rsplit_once('/').unwrap_or(("", trimmed));
        if name.is_empty() {
            return Err(WireError::new(
                ErrorCode::Invalid,
                format!("\"{path}\" has no last component to name"),
            ));
        }
        let dir_ino = self.walk(dir)?;
        let stat = self.stat_ino(dir_ino)?;
        if stat.kind != Kind::Directory {
            return Err(WireError::new(ErrorCode::NotADirectory, format!("\"{dir}\" is no directory")));
        }
        self.require(dir_ino, WRITE | SEARCH, &format!("change directory \"/{}\"", dir.trim_matches('/')))?;
        Ok((dir_ino, name.as_bytes()))
    }

    fn new_inode(&self, mode: u32) -> NewInode {
        // At most 12 bits, so the cast cannot lose any.
        NewInode { mode: (mode & 0o7777) as u16, uid: self.who.uid, gid: self.who.gid }
    }

    pub(crate) fn create(&mut self, path: &str, mode: u32) -> Result<Ino, WireError> {
        let (dir, name) = self.walk_parent(path)?;
        let new = self.new_inode(mode);
        self.fs.create_at(dir, name, Kind::File, &new).map_err(|e| fs_error(&e))
    }

    pub(crate) fn mkdir(&mut self, path: &str, mode: u32) -> Result<(), WireError> {
        let (dir, name) = self.walk_parent(path)?;
        let new = self.new_inode(mode);
        self.fs.create_at(dir, name, Kind::Directory, &new).map(drop).map_err(|e| fs_error(&e))
    }

    /// Whether the directory's sticky bit lets the client remove or replace this entry.
    fn sticky(&self, dir: Ino, entry: Ino) -> Result<(), WireError> {
        let (dir, entry) = (self.stat_ino(dir)?, self.stat_ino(entry)?);
        let is_own = self.who.uid == 0 || [dir.uid, entry.uid].contains(&self.who.uid);
        if dir.mode & 0o1000 == 0 || is_own {
            Ok(())
        } else {
            Err(denied("remove another's file here", self.who))
        }
    }

    /// Removes a file's name; returns which inode lost it.
    pub(crate) fn unlink(&mut self, path: &str) -> Result<Ino, WireError> {
        let (dir, name) = self.walk_parent(path)?;
        let ino = self.fs.lookup_at(dir, name).map_err(|e| fs_error(&e))?;
        self.sticky(dir, ino)?;
        self.fs.unlink_at(dir, name).map_err(|e| fs_error(&e))?;
        Ok(ino)
    }

    pub(crate) fn rmdir(&mut self, path: &str) -> Result<(), WireError> {
        let (dir, name) = self.walk_parent(path)?;
        let ino = self.fs.lookup_at(dir, name).map_err(|e| fs_error(&e))?;
        self.sticky(dir, ino)?;
        self.fs.rmdir_at(dir, name).map_err(|e| fs_error(&e))
    }

    /// Renames; returns the inode that lost its name by being replaced, if one did.
    pub(crate) fn rename(&mut self, from: &str, to: &str) -> Result<Option<Ino>, WireError> {
        let (from_dir, old) = self.walk_parent(from)?;
        let (to_dir, new) = self.walk_parent(to)?;
        let moved = self.fs.lookup_at(from_dir, old).map_err(|e| fs_error(&e))?;
        self.sticky(from_dir, moved)?;
        let replaced = self.fs.lookup_at(to_dir, new).ok();
        if let Some(replaced) = replaced {
            self.sticky(to_dir, replaced)?;
        }
        self.fs.rename_at(from_dir, old, to_dir, new).map_err(|e| fs_error(&e))?;
        Ok(replaced)
    }

    pub(crate) fn stat(&self, path: &str) -> Result<StatReply, WireError> {
        Ok(stat_reply(&self.stat_ino(self.walk(path)?)?))
    }

    pub(crate) fn set_attr(&mut self, path: &str, set: &SetAttrRequest) -> Result<(), WireError> {
        if set.fields == 0 || set.fields & !(SET_MODE | SET_OWNER) != 0 {
            return Err(WireError::new(ErrorCode::Invalid, format!("attribute fields {:#x}", set.fields)));
        }
        let ino = self.walk(path)?;
        let stat = self.stat_ino(ino)?;
        let is_server = self.who.uid == 0 || self.who.uid == self.server_uid;
        let mut change = SetAttr::default();
        if set.fields & SET_OWNER != 0 {
            if !is_server {
                return Err(denied("give files away", self.who));
            }
            (change.uid, change.gid) = (Some(set.uid), Some(set.gid));
        }
        if set.fields & SET_MODE != 0 {
            if self.who.uid != stat.uid && self.who.uid != 0 {
                return Err(denied("change this file's mode", self.who));
            }
            change.mode = Some((set.mode & 0o7777) as u16);
        }
        self.fs.set_attr(ino, &change).map_err(|e| fs_error(&e))
    }

    /// Entries after `after`, and whether there are more.
    pub(crate) fn list(&self, path: &str, after: &str) -> Result<(Vec<DirEntry>, bool), WireError> {
        let dir = self.walk(path)?;
        self.require(dir, READ, &format!("list \"{path}\""))?;
        let after = (!after.is_empty()).then_some(after.as_bytes());
        let found = self.fs.readdir_from(dir, after, LIST_ENTRIES).map_err(|e| fs_error(&e))?;
        let mut more = found.len() == LIST_ENTRIES;
        let mut entries = Vec::new();
        let mut bytes = 0;
        for entry in found {
            let stat = self.stat_ino(entry.ino)?;
            let name = String::from_utf8_lossy(&entry.name).into_owned();
            bytes += size_of::<DirRecord>() + name.len();
            if bytes > LIST_BYTES {
                more = true;
                break;
            }
            let record = DirRecord {
                ino: stat.ino,
                size: stat.size,
                kind: kind(stat.kind),
                mode: u32::from(stat.mode),
                uid: stat.uid,
                name_len: u32::try_from(name.len()).unwrap_or(0),
            };
            entries.push(DirEntry { name, record });
        }
        Ok((entries, more))
    }
}

fn kind(kind: Kind) -> u32 {
    match kind {
        Kind::File => KIND_FILE,
        Kind::Directory => KIND_DIRECTORY,
    }
}

/// Attributes as they go to a client.
pub(crate) fn stat_reply(stat: &Stat) -> StatReply {
    StatReply {
        ino: stat.ino,
        size: stat.size,
        allocated: stat.allocated,
        mtime_ns: stat.mtime,
        ctime_ns: stat.ctime,
        kind: kind(stat.kind),
        mode: u32::from(stat.mode),
        uid: stat.uid,
        gid: stat.gid,
        links: stat.nlink,
        ..StatReply::default()
    }
}
