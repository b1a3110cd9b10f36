//! An image file, read and written through io_uring: one operation at a time, or several reads together.
#![expect(unsafe_code, reason = "io_uring takes raw pointers")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};
use rustix::fs::{FallocateFlags, SeekFrom};

use super::config::EmuError;
use crate::mem::Mapping;

/// Reads under way together at most.
const MOST_READS: usize = 64;
/// Bytes of memory for them.
const READ_MEMORY: usize = 16 << 20;

/// An open image.
pub(super) struct ImageFile {
    path: PathBuf,
    file: File,
    ring: IoUring,
    /// Where reads under way put their bytes, slot by slot.
    slots: Arc<Mapping>,
    slot_len: usize,
    /// Operations under way; slot 0 is first.
    under_way: usize,
    /// Results by slot.
    results: Vec<i32>,
    /// Kinds of errors that have been told of: a full disk fails every command, and is to be named once.
    told: Vec<io::ErrorKind>,
}

impl std::fmt::Debug for ImageFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageFile").field("file", &self.file).finish_non_exhaustive()
    }
}

impl ImageFile {
    /// Opens the image at `path`, or creates it with `create` bytes of zeros. No read is longer than `transfer` bytes.
    /// Says its size in bytes.
    pub(super) fn open(path: &Path, create: Option<u64>, transfer: usize) -> Result<(Self, u64), EmuError> {
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
        let bytes = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(io::Error::from);
        let bytes = bytes.map_err(fail("find its size"))?;
        let ring = IoUring::new(MOST_READS as u32).map_err(fail("set up io_uring"))?;
        let reads = (READ_MEMORY / transfer).clamp(1, MOST_READS);
        let slots = Mapping::anonymous(reads * transfer)?;
        let results = vec![0; reads];
        Ok((
            Self {
                path: path.to_owned(),
                file,
                ring,
                slots,
                slot_len: transfer,
                under_way: 0,
                results,
                told: Vec::new(),
            },
            bytes,
        ))
    }

    /// Reads all data of the first `bytes` bytes to the same place in memory that is zeros; holes are left out.
    pub(super) fn read_data(&mut self, bytes: u64, to: &Mapping) -> Result<(), EmuError> {
        let fail = |path: &Path, source| EmuError::Image { path: path.to_owned(), what: "read", source };
        let path = self.path.clone();
        let mut at = 0;
        while at < bytes {
            let (data, hole) = match self.next_data(at) {
                Ok(range) => range,
                Err(e) if e.raw_os_error() == Some(libc::ENXIO) => break,
                Err(e) => return Err(fail(&path, e)),
            };
            let end = hole.min(bytes);
            let mut from = data;
            while from < end {
                let n = (end - from).min(self.slot_len as u64) as usize;
                self.read(from, to, from as usize, n).map_err(|e| fail(&path, e))?;
                from += n as u64;
            }
            at = hole;
        }
        Ok(())
    }

    /// Where data begins at or after `at`, and where it ends.
    fn next_data(&self, at: u64) -> io::Result<(u64, u64)> {
        let data = rustix::fs::seek(&self.file, SeekFrom::Data(at))?;
        Ok((data, rustix::fs::seek(&self.file, SeekFrom::Hole(data))?))
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
    fn run(&mut self, entry: squeue::Entry) -> io::Result<usize> {
        self.finish_reads();
        // SAFETY: the callers' buffers are inside a `Mapping` they hold borrowed until we return, and we return only
        // after the operation has completed.
        unsafe { self.ring.submission().push(&entry.user_data(0)) }.map_err(io::Error::other)?;
        self.under_way = 1;
        self.finish_reads();
        self.result(0)
    }

    /// The result of the operation in `slot`.
    fn result(&self, slot: usize) -> io::Result<usize> {
        let result = self.results.get(slot).copied().unwrap_or(-libc::EINVAL);
        usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.saturating_neg()))
    }

    /// Starts a read of at most one transfer into the next slot, whose number it returns; `None`: there is no free one.
    pub(super) fn begin_read(&mut self, offset: u64, len: usize) -> Option<usize> {
        let slot = self.under_way;
        if slot >= self.results.len() || len > self.slot_len {
            return None;
        }
        let to = self.slots.as_ptr().wrapping_add(slot * self.slot_len);
        let fd = types::Fd(self.file.as_raw_fd());
        let entry = opcode::Read::new(fd, to, len as u32).offset(offset).build().user_data(slot as u64);
        // SAFETY: the slot is inside `slots`, which we keep until nothing is under way (see `drop`), and no other
        // operation under way uses it.
        unsafe { self.ring.submission().push(&entry) }.ok()?;
        self.under_way += 1;
        Some(slot)
    }

    /// Waits until nothing is under way. The slots are free then, their bytes and results good until the next operation.
    pub(super) fn finish_reads(&mut self) {
        while self.under_way > 0 {
            match self.ring.submit_and_wait(self.under_way) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Operations may be running on memory that is in use elsewhere once we return.
                Err(e) => {
                    tracing::error!("io_uring_enter: {e}; waiting goes on");
                    std::thread::yield_now();
                }
            }
            for cqe in self.ring.completion() {
                if let Some(result) = self.results.get_mut(cqe.user_data() as usize) {
                    *result = cqe.result();
                }
                self.under_way = self.under_way.saturating_sub(1);
            }
        }
    }

    /// The bytes of a finished read of `len` bytes at `offset`: the mapping and where in it.
    pub(super) fn take_read(
        &mut self,
        slot: usize,
        offset: u64,
        len: usize,
    ) -> io::Result<(Arc<Mapping>, usize)> {
        let at = slot * self.slot_len;
        let slots = Arc::clone(&self.slots);
        if self.result(slot)? < len {
            // Cut short: the rest, or the reason, by itself.
            let done = self.results.clone();
            self.read(offset, &slots, at, len)?;
            self.results = done;
        }
        Ok((slots, at))
    }

    /// Names an error of the image where people look, once: over NVMe goes a status only.
    fn tell<T>(&mut self, what: &str, result: io::Result<T>) -> io::Result<T> {
        if let Err(e) = &result
            && !self.told.contains(&e.kind())
        {
            self.told.push(e.kind());
            let path = self.path.display();
            match e.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    tracing::error!(
                        "no space left on the host for the image {path}; free some: until then writes to the drive fail"
                    );
                }
                _ => tracing::error!("cannot {what} the image {path}: {e}"),
            }
        }
        result
    }

    /// Reads all of the range; the file was that long when it was opened, so an early end is an error.
    pub(super) fn read(&mut self, offset: u64, to: &Mapping, at: usize, len: usize) -> io::Result<()> {
        let read = self.read_all(offset, to, at, len);
        self.tell("read", read)
    }

    fn read_all(&mut self, offset: u64, to: &Mapping, at: usize, len: usize) -> io::Result<()> {
        check(to, at, len)?;
        let mut done = 0;
        while done < len {
            let to = to.as_ptr().wrapping_add(at + done);
            let n = u32::try_from(len - done).unwrap_or(1 << 30);
            let entry = opcode::Read::new(types::Fd(self.file.as_raw_fd()), to, n)
                .offset(offset + done as u64)
                .build();
            match self.run(entry) {
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
        let written = self.write_all(offset, from, at, len);
        self.tell("write to", written)
    }

    fn write_all(&mut self, offset: u64, from: &Mapping, at: usize, len: usize) -> io::Result<()> {
        check(from, at, len)?;
        let mut done = 0;
        while done < len {
            let from = from.as_ptr().wrapping_add(at + done).cast_const();
            let n = u32::try_from(len - done).unwrap_or(1 << 30);
            let entry = opcode::Write::new(types::Fd(self.file.as_raw_fd()), from, n)
                .offset(offset + done as u64)
                .build();
            match self.run(entry) {
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
            Err(e) => self.tell("punch a hole into", Err(e.into())),
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
        let synced = self.run(opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build());
        self.tell("sync", synced).map(|_| ())
    }
}

impl Drop for ImageFile {
    fn drop(&mut self) {
        self.finish_reads();
    }
}

fn check(memory: &Mapping, at: usize, len: usize) -> io::Result<()> {
    if at.checked_add(len).is_some_and(|end| end <= memory.len()) {
        return Ok(());
    }
    Err(io::Error::other("a buffer range outside its mapping"))
}
