//! An image whose unflushed writes are in this process' memory only: killing the process is a power cut.
//!
//! All of the image's data is read into memory when it is opened, so this is for tests, not for large images.

use std::io;
use std::sync::Arc;

use super::config::EmuError;
use super::file::ImageFile;
use super::ranges::Ranges;
use crate::mem::Mapping;

/// Bytes that one write moves at most.
const PIECE: u64 = 1 << 20;

/// The image and its copy in memory.
#[derive(Debug)]
pub(super) struct Buffered {
    pub(super) memory: Arc<Mapping>,
    pub(super) file: ImageFile,
    /// What the file does not have yet.
    dirty: Ranges,
}

impl Buffered {
    pub(super) fn load(mut file: ImageFile, bytes: u64) -> Result<Self, EmuError> {
        let len = usize::try_from(bytes.next_multiple_of(4096)).unwrap_or(usize::MAX);
        let memory = Mapping::anonymous(len)?;
        file.read_data(bytes, &memory)?;
        Ok(Self { memory, file, dirty: Ranges::default() })
    }

    /// The range of memory is about to change.
    pub(super) fn mark(&mut self, offset: u64, len: u64) {
        self.dirty.add(offset, len);
    }

    fn write(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let n = (len - done).min(PIECE);
            self.file.write(offset + done, &self.memory, (offset + done) as usize, n as usize)?;
            done += n;
        }
        Ok(())
    }

    /// Makes a range durable, and nothing else.
    pub(super) fn sync_range(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.write(offset, len)?;
        self.file.sync()
    }

    /// Makes everything durable.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        while let Some((offset, len)) = self.dirty.pop() {
            if let Err(e) = self.write(offset, len) {
                self.dirty.add(offset, len);
                return Err(e);
            }
        }
        self.file.sync()
    }
}
