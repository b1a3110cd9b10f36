//! An image file, read and written through io_uring.
#![expect(unsafe_code, reason = "io_uring takes raw pointers")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use io_uring::{IoUring, opcode, squeue, types};
use rustix::fs::FallocateFlags;

use super::config::EmuError;
use crate::mem::Mapping;

/// An open image.
pub(super) struct ImageFile {
    file: File,
    ring: IoUring,
}

impl std::fmt::Debug for ImageFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageFile").field("file", &self.file).finish_non_exhaustive()
    }
}

impl ImageFile {
    /// Opens the image at `path`, or creates it with `create` bytes of zeros. Says its size in bytes.
    pub(super) fn open(path: &Path, create: Option<u64>) -> Result<(Self, u64), EmuError> {
        let fail = |what| move |source| EmuError::Image { path: path.to_owned(), what, source };
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let file = match (options.open(path), create) {
            (Err(e), Some(bytes)) if e.kind() == io::ErrorKind::NotFound => {
                let file = options.create_new(true).open(path).map_err(fail("create"))?;
                file.set_len(bytes).map_err(fail("set its size"))?;
                file
            }
            (opened, _) => opened.map_err(fail("open"))?,
        };
        let bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(io::Error::from);
        let bytes = bytes.map_err(fail("find its size"))?;
        let ring = IoUring::new(8).map_err(fail("set up io_uring"))?;
        Ok((Self { file, ring }, bytes))
    }

    /// The file's device and inode number.
    pub(super) fn identity(&self) -> [u8; 16] {
        let mut id = [0; 16];
        if let Ok(stat) = rustix::fs::fstat(&self.file) {
            id[..8].copy_from_slice(&stat.st_dev.to_le_bytes());
            id[8..].copy_from_slice(&stat.st_ino.to_le_bytes());
        }
        id
    }

    /// Runs one operation to its end; its result is a count of bytes.
    fn run(&mut self, entry: &squeue::Entry) -> io::Result<usize> {
        // SAFETY: the callers' buffers are inside a `Mapping` they hold borrowed until we return, and we return only
        // after the operation has completed.
        unsafe { self.ring.submission().push(entry) }.map_err(io::Error::other)?;
        let result = loop {
            match self.ring.submit_and_wait(1) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The operation may still be running on memory we are about to lose.
                Err(e) => {
                    tracing::error!("io_uring_enter: {e}; waiting for the operation goes on");
                    std::thread::yield_now();
                }
                Ok(_) => {}
            }
            if let Some(cqe) = self.ring.completion().next() {
                break cqe.result();
            }
        };
        if result < 0 {
            return Err(io::Error::from_raw_os_error(-result));
        }
        usize::try_from(result).map_err(io::Error::other)
    }

    /// Reads all of the range; the file was that long when it was opened, so an early end is an error.
    pub(super) fn read(&mut self, offset: u64, to: &Mapping, at: usize, len: usize) -> io::Result<()> {
        check(to, at, len)?;
        let mut done = 0;
        while done < len {
            let to = to.as_ptr().wrapping_add(at + done);
            let n = u32::try_from(len - done).unwrap_or(1 << 30);
            let entry = opcode::Read::new(types::Fd(self.file.as_raw_fd()), to, n)
                .offset(offset + done as u64)
                .build();
            match self.run(&entry) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Writes all of the range.
    pub(super) fn write(&mut self, offset: u64, from: &Mapping, at: usize, len: usize) -> io::Result<()> {
        check(from, at, len)?;
        let mut done = 0;
        while done < len {
            let from = from.as_ptr().wrapping_add(at + done).cast_const();
            let n = u32::try_from(len - done).unwrap_or(1 << 30);
            let entry = opcode::Write::new(types::Fd(self.file.as_raw_fd()), from, n)
                .offset(offset + done as u64)
                .build();
            match self.run(&entry) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Punches a hole, or writes zeros where the filesystem has none.
    pub(super) fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, punch, offset, len) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP) => self.write_zeros(offset, len),
            Err(e) => Err(e.into()),
        }
    }

    fn write_zeros(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let zeros = Mapping::anonymous(1 << 16).map_err(io::Error::other)?;
        let mut done = 0;
        while done < len {
            let n = (len - done).min(zeros.len() as u64);
            self.write(offset + done, &zeros, 0, n as usize)?;
            done += n;
        }
        Ok(())
    }

    /// `fdatasync`.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        let fd = types::Fd(self.file.as_raw_fd());
        self.run(&opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build()).map(|_| ())
    }
}

fn check(memory: &Mapping, at: usize, len: usize) -> io::Result<()> {
    if at.checked_add(len).is_some_and(|end| end <= memory.len()) {
        return Ok(());
    }
    Err(io::Error::other("a buffer range outside its mapping"))
}
