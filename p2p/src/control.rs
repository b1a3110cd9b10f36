//! The control pages: written by the server, read by everyone, and the words of a client's own region.
#![expect(
    unsafe_code,
    reason = "atomic words in mapped memory, bounds checked once per handle instead of per word"
)]

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nvme_driver::mem::{Access, MapError, Mapping};

use crate::layout::{
    CONTROL_HEADER, CONTROL_MAGIC, CONTROL_SLOT, DIRTY, MAX_WINDOWS, SECTION_SLOT, SECTION_SLOTS, VERSION,
    header, section, server_alive, slot,
};
use crate::protocol::Guard;
use crate::seals;

/// Shared memory could not be set up, or is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It could not be created or mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The system refused to seal or reopen it.
    #[error("cannot {what}: {source}")]
    Seal {
        /// What was attempted.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// These are not control pages of a server that this build understands.
    #[error("not control pages of this version: {0}; server and client must come from compatible builds")]
    NotControl(String),
}

/// A window as a client names it: a control slot, and the incarnation of it that was handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WindowHandle {
    /// Control slot index.
    pub index: u32,
    /// Incarnation of the slot; the slot is not reused while anyone holds the handle.
    pub incarnation: u32,
    /// The window's length in bytes.
    pub len: u64,
}

/// The control pages, read-only in clients.
#[derive(Clone, Debug)]
pub struct ControlPages {
    memory: Arc<Mapping>,
    slots: u32,
    canary: Option<u64>,
}

impl ControlPages {
    /// Bytes of control pages for `slots` windows.
    pub fn bytes(slots: u32) -> usize {
        (CONTROL_HEADER + slots as usize * CONTROL_SLOT).next_multiple_of(4096)
    }

    /// Adopts mapped control pages after checking their header.
    pub fn open(memory: Arc<Mapping>) -> Result<Self, ControlError> {
        let bad = |what: &str| ControlError::NotControl(what.to_owned());
        let short = |_| bad("shorter than their header");
        if memory.len() < CONTROL_HEADER {
            return Err(bad("shorter than their header"));
        }
        if memory.u64_at(header::MAGIC).map_err(short)?.load(Ordering::Relaxed) != CONTROL_MAGIC {
            return Err(bad("wrong magic"));
        }
        let u32_at = |at| memory.u32_at(at).map(|w| w.load(Ordering::Relaxed)).map_err(short);
        let (version, size) = (u32_at(header::VERSION)?, u32_at(header::SLOT_SIZE)?);
        if version != VERSION || size as usize != CONTROL_SLOT {
            return Err(bad(&format!("version {version}, {size} bytes per slot")));
        }
        let slots = u32_at(header::SLOTS)?;
        if slots > MAX_WINDOWS || Self::bytes(slots) > memory.len() {
            return Err(bad(&format!("{slots} slots in {} bytes", memory.len())));
        }
        let canary = memory.u64_at(header::CANARY).map_err(short)?.load(Ordering::Relaxed);
        Ok(Self { memory, slots, canary: (canary != u64::MAX).then_some(canary) })
    }

    /// Creates zeroed control pages and seals them: nobody else will ever map them for writing.
    pub(crate) fn create(slots: u32, canary: Option<u64>) -> Result<Self, ControlError> {
        if slots > MAX_WINDOWS {
            return Err(ControlError::NotControl(format!("{slots} slots are more than {MAX_WINDOWS}")));
        }
        let memory = Mapping::memfd("cmbfs-control", Self::bytes(slots))?;
        let pages = Self { memory, slots, canary };
        pages.u64(header::CANARY).store(canary.unwrap_or(u64::MAX), Ordering::Relaxed);
        pages.u32(header::VERSION).store(VERSION, Ordering::Relaxed);
        pages.u32(header::SLOT_SIZE).store(CONTROL_SLOT as u32, Ordering::Relaxed);
        pages.u32(header::SLOTS).store(slots, Ordering::Relaxed);
        pages.u64(header::DEVICE_GENERATION).store(1, Ordering::Relaxed);
        pages.u64(header::MAGIC).store(CONTROL_MAGIC, Ordering::Release);
        seals::seal_control(&pages.memory)?;
        Ok(pages)
    }

    /// A read-only descriptor of the control pages, to send to a client.
    pub fn reader_fd(&self) -> Result<OwnedFd, ControlError> {
        seals::reopen_read_only(&self.memory)
    }

    /// The mapping.
    pub fn memory(&self) -> &Arc<Mapping> {
        &self.memory
    }

    /// Number of control slots.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Offset of the canary in the CMB, if the CMB is device memory.
    pub fn canary(&self) -> Option<u64> {
        self.canary
    }

    /// The device generation now.
    pub fn device_generation(&self) -> u64 {
        self.u64(header::DEVICE_GENERATION).load(Ordering::Acquire)
    }

    pub(crate) fn device_word(&self) -> &AtomicU64 {
        self.u64(header::DEVICE_GENERATION)
    }

    /// Whether the server that writes these pages lives.
    #[inline]
    pub fn server_alive(&self) -> bool {
        server_alive(self.u32(header::SERVER).load(Ordering::Acquire))
    }

    pub(crate) fn server_word(&self) -> &AtomicU32 {
        self.u32(header::SERVER)
    }

    /// The words that guard window `index`, and its incarnation; `None` if there is no such slot.
    #[inline]
    pub fn guard(&self, index: u32) -> Option<(Guard<'_, AtomicU64>, &AtomicU32)> {
        if index >= self.slots {
            return None;
        }
        let at = CONTROL_HEADER + index as usize * CONTROL_SLOT;
        let guard = Guard {
            device: self.u64(header::DEVICE_GENERATION),
            generation: self.u64(at + slot::GENERATION),
            place: self.u64(at + slot::PLACE),
        };
        Some((guard, self.u32(at + slot::INCARNATION)))
    }

    #[inline(always)]
    fn u64(&self, at: usize) -> &AtomicU64 {
        debug_assert!(at.is_multiple_of(8) && at + 8 <= self.memory.len());
        // SAFETY: callers pass offsets inside the header or inside slot `index < self.slots`, both checked against the mapping's
        // length when `self` was made; multiples of 8 from a page-aligned start; the mapping outlives the borrow.
        unsafe { AtomicU64::from_ptr(self.memory.as_ptr().add(at).cast()) }
    }

    #[inline(always)]
    fn u32(&self, at: usize) -> &AtomicU32 {
        debug_assert!(at.is_multiple_of(4) && at + 4 <= self.memory.len());
        // SAFETY: as in `u64`, multiples of 4.
        unsafe { AtomicU32::from_ptr(self.memory.as_ptr().add(at).cast()) }
    }
}

/// A client's own region: its section slots and dirty bits. The server trusts no word of it.
#[derive(Clone, Debug)]
pub struct ClientRegion {
    memory: Arc<Mapping>,
    dirty_words: u32,
}

impl ClientRegion {
    /// Bytes of a region with room for `dirty_words` words of dirty bits.
    pub fn bytes(dirty_words: u32) -> usize {
        (DIRTY + dirty_words as usize * 8).next_multiple_of(4096)
    }

    /// Adopts a mapped region (writable in the client and in the server).
    pub fn open(memory: Arc<Mapping>) -> Result<Self, ControlError> {
        if memory.len() < DIRTY || memory.access() == Access::ReadOnly {
            return Err(ControlError::NotControl(
                "a client region is writable and holds its slots".to_owned(),
            ));
        }
        let dirty_words = u32::try_from((memory.len() - DIRTY) / 8).unwrap_or(u32::MAX);
        Ok(Self { memory, dirty_words })
    }

    /// Creates a zeroed region whose size can no longer change.
    pub(crate) fn create(dirty_words: u32) -> Result<Self, ControlError> {
        let memory = Mapping::memfd("cmbfs-client", Self::bytes(dirty_words))?;
        seals::seal_size(&memory)?;
        Self::open(memory)
    }

    /// The mapping, whose descriptor goes to the client.
    pub fn memory(&self) -> &Arc<Mapping> {
        &self.memory
    }

    /// Number of dirty words.
    pub fn dirty_words(&self) -> u32 {
        self.dirty_words
    }

    /// Section slot `index`: its word and its note. The index is taken modulo the number of slots.
    #[inline]
    pub fn slot(&self, index: usize) -> (&AtomicU64, &AtomicU64) {
        let at = (index % SECTION_SLOTS) * SECTION_SLOT;
        (self.u64(at + section::WORD), self.u64(at + section::NOTE))
    }

    /// Dirty word `index`, if there is one.
    #[inline]
    pub fn dirty(&self, index: u32) -> Option<&AtomicU64> {
        (index < self.dirty_words).then(|| self.u64(DIRTY + index as usize * 8))
    }

    #[inline(always)]
    fn u64(&self, at: usize) -> &AtomicU64 {
        debug_assert!(at.is_multiple_of(8) && at + 8 <= self.memory.len());
        // SAFETY: callers pass offsets of a slot (below `DIRTY`, which the mapping covers) or of a dirty word below `dirty_words`;
        // multiples of 8 from a page-aligned start; the mapping outlives the borrow, and its size is sealed.
        unsafe { AtomicU64::from_ptr(self.memory.as_ptr().add(at).cast()) }
    }
}
