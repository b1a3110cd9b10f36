//! Memory that the device may reach: chunks of 2 MiB pages, mapped into the IOMMU once, handed out in 4 KiB pieces.
//!
//! Chunks are memfds, so that a device in another process (vfio-user) can map them too. Without huge pages they
//! are locked 4 KiB pages: one warning, and [`DmaArena::fallback`] says so to whoever reports.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::iova::{IovaAllocator, IovaExhausted};
use crate::mem::{MapError, Mapping, OutOfRange, PAGE};
use crate::pci::{DmaAccess, PciError, PciFunction};
use crate::ranges::FreeRanges;

/// Chunks are multiples of this, and aligned to it in I/O virtual address space.
const CHUNK: usize = 2 << 20;

/// No DMA memory could be had.
#[derive(Debug, thiserror::Error)]
pub enum DmaError {
    /// The size is zero or absurd.
    #[error("cannot allocate {0} bytes of DMA memory")]
    BadSize(usize),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MapError),
    /// No address.
    #[error(transparent)]
    Iova(#[from] IovaExhausted),
    /// The IOMMU refused.
    #[error(transparent)]
    Map(#[from] PciError),
}

#[derive(Debug)]
struct Chunk {
    memory: Arc<Mapping>,
    iova: u64,
    free: FreeRanges,
}

#[derive(Debug)]
struct Inner {
    function: Arc<dyn PciFunction>,
    iova: Arc<IovaAllocator>,
    chunks: Mutex<Vec<Chunk>>,
    /// Some of it is on 4 KiB pages.
    fallback: OnceLock<String>,
    /// Some of that is not even locked.
    unlocked: OnceLock<String>,
}

/// DMA memory of one function. Cheap to clone; unmapped when the last clone and the last buffer are gone.
#[derive(Clone, Debug)]
pub struct DmaArena {
    inner: Arc<Inner>,
}

impl DmaArena {
    /// An empty arena; memory is mapped as it is needed.
    pub fn new(function: Arc<dyn PciFunction>, iova: Arc<IovaAllocator>) -> Self {
        let inner = Inner {
            function,
            iova,
            chunks: Mutex::new(Vec::new()),
            fallback: OnceLock::new(),
            unlocked: OnceLock::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Allocates `len` bytes (rounded up to 4 KiB), contiguous in I/O virtual address space, 4 KiB aligned. The
    /// content is whatever the last owner left.
    pub fn alloc(&self, len: usize) -> Result<DmaBuffer, DmaError> {
        let len = len.checked_next_multiple_of(PAGE).filter(|&l| l > 0).ok_or(DmaError::BadSize(len))?;
        let mut chunks = self.inner.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        let found = chunks.iter_mut().find_map(|c| {
            let at = c.free.take(len as u64, PAGE as u64)?;
            Some((Arc::clone(&c.memory), c.iova, at))
        });
        let (memory, base, at) = match found {
            Some(found) => found,
            None => {
                let mut chunk = self.inner.new_chunk(len)?;
                let at = chunk.free.take(len as u64, PAGE as u64).ok_or(DmaError::BadSize(len))?;
                let found = (Arc::clone(&chunk.memory), chunk.iova, at);
                chunks.push(chunk);
                found
            }
        };
        drop(chunks);
        // `at` is below the chunk's length, which is a usize.
        Ok(DmaBuffer { arena: Arc::clone(&self.inner), memory, offset: at as usize, len, iova: base + at })
    }

    /// Why 4 KiB pages are used, if they are, and whether they could be locked.
    pub fn fallback(&self) -> Option<&str> {
        self.inner.unlocked.get().or(self.inner.fallback.get()).map(String::as_str)
    }

    /// Bytes allocated and not yet given back (all buffers of the arena together).
    pub fn in_use(&self) -> u64 {
        let chunks = self.inner.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        chunks.iter().map(|c| c.memory.len() as u64 - c.free.free_bytes()).sum()
    }
}

impl Inner {
    fn new_chunk(&self, len: usize) -> Result<Chunk, DmaError> {
        let len = len.checked_next_multiple_of(CHUNK).ok_or(DmaError::BadSize(len))?;
        let memory = match Mapping::huge_memfd("cmbfs-dma", len) {
            Ok(memory) => memory,
            Err(e) => self.small_pages(len, &e)?,
        };
        let iova = self.iova.take(len as u64, CHUNK as u64)?;
        if let Err(e) = self.function.dma_map(&memory, 0, len, iova, DmaAccess::ReadWrite) {
            self.give_iova(iova, len);
            return Err(e.into());
        }
        Ok(Chunk { memory, iova, free: FreeRanges::new([0..=len as u64 - 1]) })
    }

    fn small_pages(&self, len: usize, huge: &MapError) -> Result<Arc<Mapping>, DmaError> {
        let memory = Mapping::memfd("cmbfs-dma", len)?;
        let why = format!(
            "no 2 MiB huge pages ({}; `sysctl vm.nr_hugepages=16` makes some): using 4 KiB pages",
            huge.source
        );
        // Mapping memory for a real device locks it, and counts it against the limit: doing both would count twice.
        let locked = if self.function.bars_are_device_memory() { Ok(()) } else { memory.lock() };
        match locked {
            Ok(()) => self.note(&self.fallback, why),
            Err(e) => {
                self.note(&self.unlocked, format!("{why}, not locked in memory ({e}; raise RLIMIT_MEMLOCK)"));
            }
        }
        Ok(memory)
    }

    /// Notes a fact and warns, the first time only.
    fn note(&self, fact: &OnceLock<String>, why: String) {
        if fact.get().is_none() {
            tracing::warn!("{}: {why}", self.function.name());
            // Set once, under the lock on `chunks`.
            let _ = fact.set(why);
        }
    }

    fn give_iova(&self, iova: u64, len: usize) {
        if let Err(e) = self.iova.give(iova, len as u64) {
            tracing::error!("{}: returning I/O virtual addresses: {e}", self.function.name());
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let chunks = std::mem::take(&mut *self.chunks.lock().unwrap_or_else(PoisonError::into_inner));
        for chunk in chunks {
            let len = chunk.memory.len();
            match self.function.dma_unmap(chunk.iova, len) {
                Ok(()) => self.give_iova(chunk.iova, len),
                // The device may still reach it: neither the address nor the memory is used again.
                Err(e) => {
                    let name = self.function.name();
                    let what = "of DMA memory are kept and never used again, so that whatever the device may still write there \
                                overwrites nothing; the system has them back when this process ends";
                    match &e {
                        // A device that went away answers no more: nothing is wrong on this side.
                        PciError::Removed(_) => tracing::warn!("{name}: {len} bytes {what} ({e})"),
                        _ => tracing::error!("{name}: {len} bytes {what} ({e})"),
                    }
                    std::mem::forget(chunk.memory);
                }
            }
        }
    }
}

/// A piece of DMA memory; given back when dropped. Whoever programs its address into a command keeps it until the
/// command has completed or its queue is gone.
#[derive(Debug)]
pub struct DmaBuffer {
    arena: Arc<Inner>,
    memory: Arc<Mapping>,
    offset: usize,
    len: usize,
    iova: u64,
}

impl DmaBuffer {
    /// The address at which the device reaches the first byte.
    pub fn bus_address(&self) -> u64 {
        self.iova
    }

    /// Length in bytes, a multiple of 4 KiB.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: empty buffers are not allocated.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The mapping that the buffer is part of, and where in it the buffer begins.
    pub fn memory(&self) -> (&Arc<Mapping>, usize) {
        (&self.memory, self.offset)
    }

    #[inline]
    fn at(&self, offset: usize, len: usize) -> Result<usize, OutOfRange> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(OutOfRange { offset, len, size: self.len, access: self.memory.access() });
        }
        Ok(self.offset + offset)
    }

    /// Copies `into.len()` bytes out, from `offset`.
    #[inline]
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), OutOfRange> {
        self.memory.read(self.at(offset, into.len())?, into)
    }

    /// Copies `from` in, at `offset`.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), OutOfRange> {
        self.memory.write(self.at(offset, from.len())?, from)
    }

    /// Sets all of it to zero.
    pub fn zero(&self) -> Result<(), OutOfRange> {
        self.memory.zero(self.offset, self.len)
    }
}

impl Drop for DmaBuffer {
    fn drop(&mut self) {
        let mut chunks = self.arena.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(chunk) = chunks.iter_mut().find(|c| Arc::ptr_eq(&c.memory, &self.memory)) else { return };
        if let Err(e) = chunk.free.give(self.offset as u64, self.len as u64) {
            tracing::error!("{}: returning DMA memory: {e}", self.arena.function.name());
        }
    }
}
