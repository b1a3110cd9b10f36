//! Where the namespace's bytes live: in memory, in a file, in both, or nowhere.
//!
//! All of them hand out or take bytes as a range of a [`Mapping`], so that data goes to the bus by one copy and no
//! reference to shared memory is formed.

use std::io;
use std::sync::Arc;

use super::buffered::Buffered;
use super::config::{Backing, Config, EmuError};
use super::file::ImageFile;
use crate::mem::Mapping;

/// The non-volatile part of a namespace.
#[derive(Debug)]
pub(super) enum Media {
    Ram(Arc<Mapping>),
    File(Box<ImageFile>),
    Buffered(Box<Buffered>),
    Null,
}

impl Media {
    /// Opens what the configuration names; says its size in bytes as well.
    pub(super) fn open(config: &Config) -> Result<(Self, u64), EmuError> {
        let block = u64::from(config.lba_size);
        match &config.namespace {
            Backing::Ram { bytes } => {
                let bytes = bytes - bytes % block;
                let len = usize::try_from(bytes.next_multiple_of(4096)).unwrap_or(usize::MAX);
                Ok((Self::Ram(Mapping::anonymous(len)?), bytes))
            }
            Backing::File { path, create } => {
                let (file, bytes) = ImageFile::open(path, *create, 4096 << config.mdts)?;
                if bytes < block {
                    return Err(EmuError::ImageTooSmall {
                        path: path.clone(),
                        bytes,
                        block: config.lba_size,
                    });
                }
                let bytes = bytes - bytes % block;
                if config.lose_on_kill {
                    return Ok((Self::Buffered(Box::new(Buffered::load(file, bytes)?)), bytes));
                }
                Ok((Self::File(Box::new(file)), bytes))
            }
            Backing::Null { bytes } => Ok((Self::Null, bytes - bytes % block)),
        }
    }

    /// Whether there are bytes at all.
    pub(super) fn holds_data(&self) -> bool {
        !matches!(self, Self::Null)
    }

    /// Copies `len` bytes at `offset` into memory of ours.
    pub(super) fn read(&mut self, offset: u64, to: &Mapping, at: usize, len: usize) -> io::Result<()> {
        match self {
            Self::Ram(m) => m.copy_to(place(offset)?, to, at, len).map_err(io::Error::other),
            Self::File(f) => f.read(offset, to, at, len),
            Self::Buffered(b) => b.memory.copy_to(place(offset)?, to, at, len).map_err(io::Error::other),
            Self::Null => Ok(()),
        }
    }

    /// Copies `len` bytes of memory of ours to `offset`.
    pub(super) fn write(&mut self, offset: u64, from: &Mapping, at: usize, len: usize) -> io::Result<()> {
        match self {
            Self::Ram(m) => from.copy_to(at, m, place(offset)?, len).map_err(io::Error::other),
            Self::File(f) => f.write(offset, from, at, len),
            Self::Buffered(b) => {
                b.mark(offset, len as u64);
                from.copy_to(at, &b.memory, place(offset)?, len).map_err(io::Error::other)
            }
            Self::Null => Ok(()),
        }
    }

    /// Makes `len` bytes at `offset` read as zeros.
    pub(super) fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        match self {
            Self::Ram(m) => m.discard(place(offset)?, place(len)?).map_err(io::Error::other),
            Self::File(f) => f.zero(offset, len),
            Self::Buffered(b) => {
                b.mark(offset, len);
                b.memory.discard(place(offset)?, place(len)?).map_err(io::Error::other)
            }
            Self::Null => Ok(()),
        }
    }

    /// Makes a range that was just written durable; others may become so too.
    pub(super) fn sync_range(&mut self, offset: u64, len: u64) -> io::Result<()> {
        match self {
            Self::Buffered(b) => b.sync_range(offset, len),
            _ => self.sync(),
        }
    }

    /// Returns when everything written is as durable as the backing can make it.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        match self {
            Self::File(f) => f.sync(),
            Self::Buffered(b) => b.sync(),
            Self::Ram(_) | Self::Null => Ok(()),
        }
    }
}

fn place(n: u64) -> io::Result<usize> {
    usize::try_from(n).map_err(io::Error::other)
}
