//! The namespace: logical blocks on [`Media`] behind a volatile write cache.

use std::io;
use std::sync::Arc;

use super::cache::Cache;
use super::config::{Config, EmuError};
use super::media::Media;
use crate::mem::{Mapping, PAGE};

/// Namespace 1.
#[derive(Debug)]
pub(super) struct Namespace {
    pub(super) media: Media,
    /// Capacity in bytes; what is not a whole block at its end is not used.
    pub(super) bytes: u64,
    /// Bytes that the medium holds.
    medium_bytes: u64,
    /// Bytes read, written or zeroed so far: what a step's work is measured by.
    pub(super) effort: u64,
    /// Blocks are `1 << block_shift` bytes.
    pub(super) block_shift: u32,
    pub(super) cache: Option<Cache>,
    /// Sixteen bytes that tell this namespace from others.
    pub(super) identity: [u8; 16],
    /// Where data rests between the bus and media that is not memory.
    bounce: Arc<Mapping>,
    /// Bytes that the host has read and written, and commands for them (SMART log).
    pub(super) traffic: Traffic,
}

/// What the SMART log reports.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Traffic {
    pub(super) bytes_read: u64,
    pub(super) bytes_written: u64,
    pub(super) reads: u64,
    pub(super) writes: u64,
}

impl Namespace {
    pub(super) fn open(config: &Config) -> Result<Self, EmuError> {
        let (media, bytes) = Media::open(config)?;
        let cache = if config.volatile_cache && media.holds_data() {
            Some(Cache::new(config.cache_bytes, config.seed)?)
        } else {
            None
        };
        let bounce = Mapping::anonymous(4096 << config.mdts)?;
        let block_shift = config.lba_size.trailing_zeros();
        let identity = identity(config, &media);
        Ok(Self {
            media,
            bytes,
            medium_bytes: bytes,
            effort: 0,
            block_shift,
            cache,
            identity,
            bounce,
            traffic: Traffic::default(),
        })
    }

    pub(super) fn blocks(&self) -> u64 {
        self.bytes >> self.block_shift
    }

    pub(super) fn block_size(&self) -> u64 {
        1 << self.block_shift
    }

    /// Makes the namespace larger or smaller, at most as large as its medium.
    pub(super) fn resize(&mut self, bytes: u64) {
        self.bytes = bytes.min(self.medium_bytes);
    }

    /// Blocks that will be read or overwritten soon. If their first page is memory, its cache lines are asked for.
    #[inline]
    pub(super) fn expect(&self, slba: u64, blocks: u32) {
        let memory = match &self.media {
            Media::Ram(m) => m,
            Media::Buffered(b) => &b.memory,
            Media::File(_) | Media::Null => return,
        };
        let (offset, len) = (slba << self.block_shift, u64::from(blocks) << self.block_shift);
        memory.prefetch(usize::try_from(offset).unwrap_or(usize::MAX), len.min(PAGE as u64) as usize);
    }

    /// Memory that holds `len` bytes from `offset`, and where in it.
    #[inline]
    pub(super) fn fetch(&mut self, offset: u64, len: usize) -> io::Result<(&Mapping, usize)> {
        self.effort += len as u64;
        match &mut self.media {
            Media::Ram(m) => Ok((m, offset as usize)),
            Media::Buffered(b) => Ok((&b.memory, offset as usize)),
            other => {
                other.read(offset, &self.bounce, 0, len)?;
                Ok((&self.bounce, 0))
            }
        }
    }

    /// Memory for `len` bytes that [`store`](Self::store) will then take: the medium itself or a bounce buffer.
    /// What is there now is kept by the cache first.
    pub(super) fn prepare(
        &mut self,
        offset: u64,
        len: usize,
        durable: bool,
    ) -> io::Result<(&Mapping, usize)> {
        self.effort += len as u64;
        if let Some(cache) = &mut self.cache {
            cache.before_write(&mut self.media, offset, len as u64, durable)?;
        }
        match &mut self.media {
            Media::Ram(m) => Ok((m, offset as usize)),
            Media::Buffered(b) => {
                b.mark(offset, len as u64);
                Ok((&b.memory, offset as usize))
            }
            Media::File(_) | Media::Null => Ok((&self.bounce, 0)),
        }
    }

    /// Writes what was put into the memory that [`prepare`](Self::prepare) returned.
    pub(super) fn store(&mut self, offset: u64, len: usize, durable: bool) -> io::Result<()> {
        if let Media::File(_) = self.media {
            self.media.write(offset, &self.bounce, 0, len)?;
        }
        self.settle(offset, len as u64, durable)
    }

    /// Makes a range read as zeros.
    pub(super) fn zero(&mut self, offset: u64, len: u64, durable: bool) -> io::Result<()> {
        self.effort += len;
        if let Some(cache) = &mut self.cache {
            cache.before_write(&mut self.media, offset, len, durable)?;
        }
        self.media.zero(offset, len)?;
        self.settle(offset, len, durable)
    }

    /// Makes a range that was just written durable, if it has to be. Without a cache it has to be as durable as any
    /// other completed write: in the image, if not on its disk.
    fn settle(&mut self, offset: u64, len: u64, durable: bool) -> io::Result<()> {
        let cached = self.cache.as_ref().is_some_and(Cache::is_enabled);
        let in_memory_only = !cached && matches!(self.media, Media::Buffered(_));
        if durable || in_memory_only { self.media.sync_range(offset, len) } else { Ok(()) }
    }

    /// Everything written so far becomes durable.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.media.sync()?;
        if let Some(cache) = &mut self.cache {
            cache.flushed();
        }
        Ok(())
    }
}

/// Stable for an image (wherever it is moved on its filesystem), different between images, serial numbers and seeds.
fn identity(config: &Config, media: &Media) -> [u8; 16] {
    let file = match media {
        Media::File(f) => f.identity(),
        Media::Buffered(b) => b.file.identity(),
        Media::Ram(_) | Media::Null => [0; 16],
    };
    // FNV-1a, twice with different starts.
    let hash = |start: u64| {
        let bytes = config.serial.bytes().chain(config.seed.to_le_bytes()).chain(file);
        bytes.fold(start, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
    };
    let mut out = [0; 16];
    out[..8].copy_from_slice(&hash(0xcbf2_9ce4_8422_2325).to_be_bytes());
    out[8..].copy_from_slice(&hash(0x6362_f29c_e484_2223).to_be_bytes());
    out
}
