//! Files of a device that this process opened itself.

use cmbfs::extent_fs::{ROOT, SetAttr};
use cmbfs::{DeviceUrl, Filesystem, FsStat, InodeKind, NewInode, Placement};

use super::{Entry, Files, PIECE, WriteJob};
use crate::cli::device::{self, AnyDisk};
use crate::cli::failure::Failure;

pub(super) struct Direct {
    fs: Filesystem<AnyDisk>,
}

impl Direct {
    pub(super) fn open(url: &DeviceUrl) -> Result<Self, Failure> {
        Ok(Self::on(device::mount(&device::open_existing(url)?)?))
    }

    pub(super) fn on(fs: Filesystem<AnyDisk>) -> Self {
        Self { fs }
    }

    pub(super) fn fs(&mut self) -> &mut Filesystem<AnyDisk> {
        &mut self.fs
    }

    /// Attributes for what is made here.
    pub(super) fn new_inode(mode: u32) -> NewInode {
        // Permission bits fit 16 bits.
        let mode = (mode & 0o7777) as u16;
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        NewInode { mode, uid, gid }
    }
}

/// `all`: what the root directory keeps.
fn entry(name: &str, stat: &FsStat, all: u8) -> Entry {
    // No server here that could have been told anything.
    let own = if stat.ino == ROOT { 0 } else { stat.placement };
    let (placement, placed_by) = Placement::decide(Placement::Auto, own, all);
    Entry {
        name: name.to_owned(),
        kind: match stat.kind {
            InodeKind::Directory => "directory",
            InodeKind::File => "file",
        },
        inode: stat.ino,
        size: stat.size,
        allocated: stat.allocated,
        mode: u32::from(stat.mode),
        uid: stat.uid,
        gid: stat.gid,
        links: stat.nlink,
        modified_ns: stat.mtime,
        changed_ns: stat.ctime,
        placement,
        placed_by,
    }
}

impl Files for Direct {
    fn stat(&mut self, path: &str) -> Result<Entry, Failure> {
        let ino = self.fs.lookup(path)?;
        Ok(entry(path, &self.fs.stat(ino)?, self.fs.stat(ROOT)?.placement))
    }

    fn list(&mut self, path: &str) -> Result<Vec<Entry>, Failure> {
        let (ino, all) = (self.fs.lookup(path)?, self.fs.stat(ROOT)?.placement);
        self.fs
            .readdir(ino)?
            .iter()
            .map(|found| Ok(entry(&String::from_utf8_lossy(&found.name), &self.fs.stat(found.ino)?, all)))
            .collect()
    }

    fn names(&mut self, path: &str) -> Result<Vec<String>, Failure> {
        let ino = self.fs.lookup(path)?;
        let found = self.fs.readdir(ino)?;
        Ok(found.iter().map(|entry| String::from_utf8_lossy(&entry.name).into_owned()).collect())
    }

    fn read(
        &mut self,
        path: &str,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let ino = self.fs.lookup(path)?;
        let mut buffer = vec![0; PIECE];
        let mut at = 0;
        loop {
            let n = self.fs.read_at(ino, at, &mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            sink(&buffer[..n])?;
            at += n as u64;
        }
    }

    fn write(&mut self, job: &mut WriteJob<'_>) -> Result<(), Failure> {
        let ino = self.fs.create(&job.temporary, &Self::new_inode(job.mode))?;
        let mut buffer = vec![0; PIECE];
        let mut at = 0;
        loop {
            let piece = job.piece(&mut buffer)?;
            if piece.is_empty() {
                break;
            }
            self.fs.write_at(ino, at, piece)?;
            at += piece.len() as u64;
            (job.progress)(piece.len() as u64);
        }
        self.fs.rename(&job.temporary, job.path)?;
        // One commit for bytes and name: a cut before it leaves neither.
        Ok(self.fs.sync(ino)?)
    }

    fn unlink(&mut self, path: &str) -> Result<(), Failure> {
        Ok(self.fs.unlink(path)?)
    }

    fn rmdir(&mut self, path: &str) -> Result<(), Failure> {
        Ok(self.fs.rmdir(path)?)
    }

    fn mkdir(&mut self, path: &str) -> Result<(), Failure> {
        self.fs.mkdir(path, &Self::new_inode(0o755))?;
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<(), Failure> {
        Ok(self.fs.rename(from, to)?)
    }

    fn place(&mut self, path: &str, wanted: Option<Placement>) -> Result<(), Failure> {
        let ino = self.fs.lookup(path)?;
        if ino != ROOT && self.fs.stat(ino)?.kind == InodeKind::Directory {
            return Err(Failure::new(format!("{path} is a directory"))
                .hint("placement is for one file, or for the whole filesystem: /"));
        }
        let placement = Some(Placement::kept(wanted));
        self.fs.set_attr(ino, &SetAttr { placement, ..SetAttr::default() })?;
        Ok(self.fs.sync(ino)?)
    }

    fn sync(&mut self) -> Result<(), Failure> {
        Ok(self.fs.sync_all()?)
    }

    fn close(self: Box<Self>) -> Result<(), Failure> {
        self.fs.unmount()?;
        Ok(())
    }
}
