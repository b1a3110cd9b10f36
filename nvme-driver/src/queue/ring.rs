//! The two rings of a queue pair in memory that the device reads and writes.
#![expect(unsafe_code, reason = "ring entries on the hot path, without a bounds check per word")]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::dma::DmaBuffer;
use crate::mem::{Mapping, OutOfRange};
use crate::spec::{Command, Completion};

/// Memory for a ring or for PRP lists: in the host, or in the CMB.
#[derive(Debug)]
pub(crate) struct RingMemory {
    mapping: Arc<Mapping>,
    offset: usize,
    len: usize,
    bus_address: u64,
    _owner: Option<DmaBuffer>,
}

impl RingMemory {
    pub(crate) fn host(buffer: DmaBuffer) -> Self {
        let (mapping, offset) = buffer.memory();
        let mapping = Arc::clone(mapping);
        Self { mapping, offset, len: buffer.len(), bus_address: buffer.bus_address(), _owner: Some(buffer) }
    }

    /// `len` bytes at `offset` of the CMB's queue area, whose first byte the device reaches at `bus_address`.
    pub(crate) fn cmb(mapping: Arc<Mapping>, bus_address: u64, offset: usize, len: usize) -> Self {
        Self { mapping, offset, len, bus_address: bus_address + offset as u64, _owner: None }
    }

    pub(crate) fn bus_address(&self) -> u64 {
        self.bus_address
    }

    /// Zeroes it with aligned 8-byte stores, which a CMB takes too.
    pub(crate) fn zero(&self) -> Result<(), OutOfRange> {
        for at in (self.offset..self.offset + self.len).step_by(8) {
            self.mapping.u64_at(at)?.store(0, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The first of `words` 64-bit words, checked to be in range, aligned and writable.
    pub(crate) fn words(&self, words: usize) -> Result<NonNull<AtomicU64>, OutOfRange> {
        let refuse = |len| OutOfRange {
            offset: self.offset,
            len,
            size: self.mapping.len(),
            access: self.mapping.access(),
        };
        let bytes = words.checked_mul(8).ok_or(refuse(usize::MAX))?;
        if bytes > self.len || self.mapping.access() == crate::mem::Access::ReadOnly {
            return Err(refuse(bytes));
        }
        let last = self.offset + bytes.saturating_sub(8);
        self.mapping.u64_at(last)?;
        Ok(NonNull::from(self.mapping.u64_at(self.offset)?))
    }
}

/// Submission queue entries. Only ever stored to.
#[derive(Debug)]
pub(crate) struct SubmissionRing {
    words: NonNull<AtomicU64>,
    /// Entries, a power of two, less one.
    mask: usize,
    /// Where the next entry goes: at most `mask`. As wide as a load of it or of its neighbour may be: a load that covers more than
    /// the store just before it waits for that store, and so for all before it, to leave the processor.
    tail: usize,
    memory: RingMemory,
}

// SAFETY: `words` points into `memory`, which is Send and lives as long as this value; access is atomic.
unsafe impl Send for SubmissionRing {}

impl SubmissionRing {
    /// `entries` is a power of two.
    pub(crate) fn new(memory: RingMemory, entries: u16) -> Result<Self, OutOfRange> {
        debug_assert!(entries.is_power_of_two());
        Ok(Self {
            words: memory.words(usize::from(entries) * 8)?,
            mask: usize::from(entries) - 1,
            tail: 0,
            memory,
        })
    }

    pub(crate) fn bus_address(&self) -> u64 {
        self.memory.bus_address
    }

    pub(crate) fn tail(&self) -> u16 {
        self.tail as u16
    }

    /// Empty, all zeros.
    pub(crate) fn restart(&mut self) -> Result<(), OutOfRange> {
        self.tail = 0;
        self.memory.zero()
    }

    /// Stores an entry in aligned 8-byte pieces, which real CMBs take.
    #[inline]
    pub(crate) fn push(&mut self, command: Command) {
        let words: [u64; 8] = bytemuck::cast(command);
        let first = self.tail * 8;
        for (i, word) in words.into_iter().enumerate() {
            // SAFETY: `new` checked `(mask + 1) * 8` words, and `tail` is at most `mask`.
            unsafe { self.words.add(first + i).as_ref() }.store(word.to_le(), Ordering::Relaxed);
        }
        self.tail = (self.tail + 1) & self.mask;
    }
}

/// The phase tag in the upper half of a completion queue entry.
const PHASE: u64 = 1 << 48;

/// Completion queue entries. Only ever loaded, but for the zeroing before the queue is created.
#[derive(Debug)]
pub(crate) struct CompletionRing {
    words: NonNull<AtomicU64>,
    /// Entries, a power of two, less one.
    mask: usize,
    /// The entry to look at next: at most `mask`. As wide as it is for the same reason as [`SubmissionRing::tail`].
    head: usize,
    /// The phase tag that makes the entry at `head` a new one: [`PHASE`] or 0.
    phase: u64,
    memory: RingMemory,
}

// SAFETY: as for `SubmissionRing`.
unsafe impl Send for CompletionRing {}

impl CompletionRing {
    /// `entries` is a power of two.
    pub(crate) fn new(memory: RingMemory, entries: u16) -> Result<Self, OutOfRange> {
        debug_assert!(entries.is_power_of_two());
        let words = memory.words(usize::from(entries) * 2)?;
        Ok(Self { words, mask: usize::from(entries) - 1, head: 0, phase: PHASE, memory })
    }

    pub(crate) fn bus_address(&self) -> u64 {
        self.memory.bus_address
    }

    pub(crate) fn head(&self) -> u16 {
        self.head as u16
    }

    /// Empty, all zeros; so the first round's phase tag is 1.
    pub(crate) fn restart(&mut self) -> Result<(), OutOfRange> {
        (self.head, self.phase) = (0, PHASE);
        self.memory.zero()
    }

    /// The upper half of the entry at the head if that is a new one. It is loaded once, with acquire: everything the
    /// device stored before it, the data included, is visible after.
    #[inline]
    pub(crate) fn peek(&self) -> Option<u64> {
        // SAFETY: `new` checked `(mask + 1) * 2` words, and `head` is at most `mask`.
        let high = unsafe { self.words.add(self.head * 2 + 1).as_ref() }.load(Ordering::Acquire).to_le();
        ((high ^ self.phase) & PHASE == 0).then_some(high)
    }

    /// Takes the entry whose upper half [`peek`](Self::peek) returned.
    #[inline]
    pub(crate) fn take(&mut self, high: u64) -> Completion {
        // SAFETY: as in `peek`.
        let low = unsafe { self.words.add(self.head * 2).as_ref() }.load(Ordering::Relaxed).to_le();
        self.head = (self.head + 1) & self.mask;
        if self.head == 0 {
            self.phase ^= PHASE;
        }
        Completion {
            dw0: low as u32,
            dw1: (low >> 32) as u32,
            sqhd: high as u16,
            sqid: (high >> 16) as u16,
            cid: (high >> 32) as u16,
            status_phase: (high >> 48) as u16,
        }
    }
}
