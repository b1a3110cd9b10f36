//! A regular file or a block device as a [`Disk`], through the page cache. No CMB: always the fallback path.
//!
//! What is one piece is one plain system call: the kernel hands buffered writes of an io_uring to a worker thread, which costs
//! more than the write. Several pieces go through io_uring at once.
#![expect(unsafe_code, reason = "io_uring takes raw pointers")]

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use io_uring::{IoUring, opcode, types};
use rustix::fs::FallocateFlags;

use crate::disk::{Disk, DiskError, Geometry, Op};
use crate::lock::{ImageLock, LockError};

/// Bytes per block. The kernel's page size, so that a write never needs a read first.
const BLOCK: u32 = 4096;
/// Bytes of one operation.
const PIECE: usize = 256 << 10;
/// Operations in flight.
const DEPTH: usize = 32;

/// A file or block device could not be opened as a disk.
#[derive(Debug, thiserror::Error)]
pub enum FileDiskError {
    /// The system refused.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was attempted.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// It is a block device that the kernel uses.
    #[error("{} is mounted, or in use by another block device; unmount it first", .0.display())]
    Mounted(PathBuf),
    /// It is neither a regular file nor a block device.
    #[error("{} is neither a regular file nor a block device", .0.display())]
    NoDisk(PathBuf),
    /// It is smaller than a block.
    #[error("{} has {bytes} bytes: a disk has at least {BLOCK}; `truncate -s 1G` makes it larger", path.display())]
    TooSmall {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Another process has it.
    #[error(transparent)]
    Locked(#[from] LockError),
}

/// A file as a disk. The image is locked as long as any disk on it lives.
pub struct FileDisk {
    name: String,
    path: PathBuf,
    file: File,
    is_block_device: bool,
    geometry: Geometry,
    ring: IoUring,
    /// What the operation with this index still has to do: (offset in the call's memory, bytes).
    pieces: [(usize, usize); DEPTH],
    free: Vec<usize>,
    lock: Arc<ImageLock>,
}

impl std::fmt::Debug for FileDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileDisk")
            .field("path", &self.path)
            .field("geometry", &self.geometry)
            .finish_non_exhaustive()
    }
}

/// The memory of one call, as raw parts. Shared with the kernel until the call returns.
#[derive(Clone, Copy)]
struct Span<'a> {
    start: *mut u8,
    len: usize,
    _memory: PhantomData<&'a [u8]>,
}

impl FileDisk {
    /// Opens and locks `path`.
    pub fn open(path: &Path) -> Result<Self, FileDiskError> {
        let fail = |what| move |source| FileDiskError::Io { path: path.to_owned(), what, source };
        let is_block = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
        // On a block device O_EXCL means: not while it is mounted or part of something else.
        let flags = if is_block { libc::O_EXCL } else { 0 };
        let file = match File::options().read(true).write(true).custom_flags(flags).open(path) {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => {
                return Err(FileDiskError::Mounted(path.to_owned()));
            }
            opened => opened.map_err(fail("open"))?,
        };
        let lock = ImageLock::take(file.try_clone().map_err(fail("open"))?, path)?;
        Self::on(file, path, Arc::new(lock))
    }

    /// Another disk on the same file: its own ring, the same lock.
    pub fn again(&self) -> Result<Self, FileDiskError> {
        let fail = |source| FileDiskError::Io { path: self.path.clone(), what: "open", source };
        Self::on(self.file.try_clone().map_err(fail)?, &self.path, Arc::clone(&self.lock))
    }

    fn on(file: File, path: &Path, lock: Arc<ImageLock>) -> Result<Self, FileDiskError> {
        let fail = |what| move |source| FileDiskError::Io { path: path.to_owned(), what, source };
        let kind = file.metadata().map_err(fail("look at"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(FileDiskError::NoDisk(path.to_owned()));
        }
        let end = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0));
        let bytes = end.map_err(io::Error::from).map_err(fail("find the size of"))?;
        let blocks = bytes / u64::from(BLOCK);
        if blocks == 0 {
            return Err(FileDiskError::TooSmall { path: path.to_owned(), bytes });
        }
        let ring = IoUring::new(DEPTH as u32)
            .map_err(fail("set up io_uring (`sysctl kernel.io_uring_disabled` must say 0) for"))?;
        let geometry = Geometry {
            block_size: BLOCK,
            blocks,
            max_transfer: PIECE,
            volatile_cache: true,
            can_deallocate: true,
        };
        Ok(Self {
            name: format!("file:{}", path.display()),
            path: path.to_owned(),
            file,
            is_block_device: kind.is_block_device(),
            geometry,
            ring,
            pieces: [(0, 0); DEPTH],
            free: (0..DEPTH).rev().collect(),
            lock,
        })
    }

    /// Moves the whole span, in pieces; returns when the kernel is done with all of it.
    fn transfer(&mut self, op: Op, lba: u64, span: Span<'_>) -> Result<(), DiskError> {
        let fail = |source| DiskError::Io { op, lba, source };
        let base = lba * u64::from(BLOCK);
        let mut next = 0;
        let mut error = None;
        loop {
            while error.is_none() && next < span.len {
                let Some(token) = self.free.pop() else { break };
                let len = PIECE.min(span.len - next);
                self.pieces[token] = (next, len);
                if let Err(e) = self.push(op, base, token, span) {
                    self.free.push(token);
                    error = Some(e);
                    break;
                }
                next += len;
            }
            if self.free.len() == DEPTH {
                return error.map_or(Ok(()), |e| Err(fail(e)));
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The kernel may still be using the caller's memory: there is no way out but to wait.
                Err(e) => {
                    tracing::error!("{}: io_uring_enter: {e}; waiting goes on", self.name);
                    std::thread::yield_now();
                }
            }
            loop {
                let Some(cqe) = self.ring.completion().next() else { break };
                let token = cqe.user_data() as usize;
                let (at, len) = self.pieces[token];
                let outcome = match cqe.result() {
                    n if n > 0 => Ok(n.unsigned_abs() as usize),
                    0 => Err(io::ErrorKind::UnexpectedEof.into()),
                    e if -e == libc::EINTR || -e == libc::EAGAIN => Ok(0),
                    e => Err(io::Error::from_raw_os_error(-e)),
                };
                // A short transfer goes on where it stopped.
                let again = match outcome {
                    Ok(n) if n < len => {
                        self.pieces[token] = (at + n, len - n);
                        self.push(op, base, token, span).map(|()| true)
                    }
                    Ok(_) => Ok(false),
                    Err(e) => Err(e),
                };
                match again {
                    Ok(true) => {}
                    Ok(false) => self.free.push(token),
                    Err(e) => {
                        self.free.push(token);
                        error.get_or_insert(e);
                    }
                }
            }
        }
    }

    fn push(&mut self, op: Op, base: u64, token: usize, span: Span<'_>) -> io::Result<()> {
        let (at, len) = self.pieces[token];
        debug_assert!(at + len <= span.len);
        let (fd, offset) = (types::Fd(self.file.as_raw_fd()), base + at as u64);
        let start = span.start.wrapping_add(at);
        let entry = match op {
            Op::Read => opcode::Read::new(fd, start, len as u32).offset(offset).build(),
            _ => opcode::Write::new(fd, start, len as u32).offset(offset).build(),
        };
        // SAFETY: `[at, at + len)` is inside the span, which `transfer` keeps borrowed until every operation it pushed
        // has completed; for a read the span came from a mutable slice. The file lives as long as the ring.
        unsafe { self.ring.submission().push(&entry.user_data(token as u64)) }.map_err(io::Error::other)
    }

    fn fallocate(
        &self,
        op: Op,
        lba: u64,
        blocks: u64,
        flags: FallocateFlags,
    ) -> Result<(), rustix::io::Errno> {
        self.geometry.check_blocks(op, lba, blocks).map_err(|_| rustix::io::Errno::INVAL)?;
        let block = u64::from(BLOCK);
        rustix::fs::fallocate(&self.file, flags | FallocateFlags::KEEP_SIZE, lba * block, blocks * block)
    }
}

impl Disk for FileDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn read(&mut self, lba: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.geometry.check(Op::Read, lba, into.len() as u64)?;
        if into.len() <= PIECE {
            let read = self.file.read_exact_at(into, lba * u64::from(BLOCK));
            return read.map_err(|source| DiskError::Io { op: Op::Read, lba, source });
        }
        let span = Span { start: into.as_mut_ptr(), len: into.len(), _memory: PhantomData };
        self.transfer(Op::Read, lba, span)
    }

    fn write(&mut self, lba: u64, from: &[u8]) -> Result<(), DiskError> {
        self.geometry.check(Op::Write, lba, from.len() as u64)?;
        if from.len() <= PIECE {
            let written = self.file.write_all_at(from, lba * u64::from(BLOCK));
            return written.map_err(|source| DiskError::Io { op: Op::Write, lba, source });
        }
        let span = Span { start: from.as_ptr().cast_mut(), len: from.len(), _memory: PhantomData };
        self.transfer(Op::Write, lba, span)
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        rustix::fs::fdatasync(&self.file).map_err(|e| DiskError::Io {
            op: Op::Flush,
            lba: 0,
            source: e.into(),
        })
    }

    fn write_zeroes(&mut self, lba: u64, blocks: u64) -> Result<(), DiskError> {
        self.geometry.check_blocks(Op::WriteZeroes, lba, blocks)?;
        if blocks == 0 || self.fallocate(Op::WriteZeroes, lba, blocks, FallocateFlags::ZERO_RANGE).is_ok() {
            return Ok(());
        }
        // Not every filesystem can: write them.
        let zeros = vec![0u8; PIECE];
        let per = (PIECE / BLOCK as usize) as u64;
        let mut done = 0;
        while done < blocks {
            let n = per.min(blocks - done);
            self.write(lba + done, &zeros[..n as usize * BLOCK as usize])?;
            done += n;
        }
        Ok(())
    }

    fn deallocate(&mut self, lba: u64, blocks: u64) -> Result<(), DiskError> {
        self.geometry.check_blocks(Op::Deallocate, lba, blocks)?;
        // A block device's own discard is a hint like this one; punching a hole in it would write zeros where it cannot discard.
        if blocks == 0 || self.is_block_device {
            return Ok(());
        }
        match self.fallocate(Op::Deallocate, lba, blocks, FallocateFlags::PUNCH_HOLE) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            Err(e) => Err(DiskError::Io { op: Op::Deallocate, lba, source: e.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(bytes: u64) -> (tempfile::TempDir, FileDisk) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        File::create(&path).unwrap().set_len(bytes).unwrap();
        let disk = FileDisk::open(&path).unwrap();
        (dir, disk)
    }

    #[test]
    fn reads_back_what_was_written() {
        let (_dir, mut disk) = disk(20 << 20);
        let data: Vec<u8> = (0..12u32 << 20).map(|i| (i / 4096 + i) as u8).collect();
        disk.write(3, &data).unwrap();
        disk.flush().unwrap();
        let mut got = vec![1; data.len()];
        disk.again().unwrap().read(3, &mut got).unwrap();
        assert!(got == data);
        disk.write_zeroes(4, 2).unwrap();
        disk.write(6, &data[3 * 4096..4 * 4096]).unwrap();
        let mut one = [1; 4096];
        disk.read(5, &mut one).unwrap();
        assert_eq!(one, [0; 4096]);
        disk.read(6, &mut one).unwrap();
        assert_eq!(one, data[3 * 4096..4 * 4096]);
        disk.deallocate(7, 1).unwrap();
        disk.read(3, &mut got).unwrap();
        assert_eq!(&got[..4096], &data[..4096]);
        assert_eq!(&got[4096..12288], &[0; 8192]);
        assert_eq!(&got[12288..16384], &data[12288..16384]);
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let (dir, mut disk) = disk(8192 + 100);
        assert_eq!(disk.geometry().blocks, 2);
        assert!(matches!(disk.read(1, &mut [0; 8192]), Err(DiskError::BadRange { .. })));
        assert!(matches!(disk.write(0, &[0; 100]), Err(DiskError::BadRange { .. })));
        assert!(matches!(disk.deallocate(u64::MAX, 2), Err(DiskError::BadRange { .. })));
        assert!(matches!(disk.read_to_cmb(0, 0, 4096), Err(DiskError::Cmb { .. })));
        assert!(matches!(
            FileDisk::open(dir.path()),
            Err(FileDiskError::Io { .. } | FileDiskError::NoDisk(_))
        ));
        assert!(matches!(FileDisk::open(&dir.path().join("disk")), Err(FileDiskError::Locked(_))));
        let small = dir.path().join("small");
        File::create(&small).unwrap();
        assert!(matches!(FileDisk::open(&small), Err(FileDiskError::TooSmall { .. })));
    }

    #[test]
    fn a_file_that_shrank_is_an_error_not_a_hang() {
        let (_dir, mut disk) = disk(1 << 20);
        disk.file.set_len(4096).unwrap();
        assert!(matches!(disk.read(0, &mut [0; 65536]), Err(DiskError::Io { .. })));
        disk.read(0, &mut [0; 4096]).unwrap();
    }
}
