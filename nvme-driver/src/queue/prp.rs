//! Physical region pages (Base Specification, "Physical Region Page Entry and List") of a transfer that is contiguous on the bus.
#![expect(unsafe_code, reason = "list entries on the hot path, without a bounds check per word")]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use super::ring::RingMemory;
use crate::mem::{OutOfRange, PAGE};

/// Entries of one list page.
const PER_PAGE: usize = PAGE / 8;

/// PRP lists, the same number of pages for each slot, allocated once.
#[derive(Debug)]
pub(crate) struct PrpLists {
    words: NonNull<AtomicU64>,
    bus_address: u64,
    pages_per_slot: usize,
    slots: usize,
    _memory: RingMemory,
}

// SAFETY: `words` points into `_memory`, which is Send and lives as long as this value; access is atomic.
unsafe impl Send for PrpLists {}

/// Pages of list that a transfer of `max_transfer` bytes may need: each holds a page of 8-byte entries, the last of
/// which points to the next list page if there is one. One page covers 2 MiB with 4 KiB pages.
pub(crate) fn list_pages(max_transfer: usize) -> usize {
    // A transfer that starts in the middle of a page touches one more; but the first page is PRP1.
    let entries = max_transfer.div_ceil(PAGE);
    if entries <= PER_PAGE { 1 } else { (entries - 1).div_ceil(PER_PAGE - 1) }
}

impl PrpLists {
    /// Bytes of memory that the lists of `slots` slots take.
    pub(crate) fn bytes(slots: usize, pages_per_slot: usize) -> Option<usize> {
        slots.checked_mul(pages_per_slot)?.checked_mul(PAGE)
    }

    pub(crate) fn new(memory: RingMemory, slots: usize, pages_per_slot: usize) -> Result<Self, OutOfRange> {
        let bytes = Self::bytes(slots, pages_per_slot).unwrap_or(usize::MAX);
        let words = memory.words(bytes / 8)?;
        let bus_address = memory.bus_address();
        Ok(Self { words, bus_address, pages_per_slot, slots, _memory: memory })
    }

    /// Fills in the list for `len` bytes at `address` and returns PRP2. The caller has checked that the transfer
    /// touches more than two pages and is not longer than the lists were made for.
    pub(crate) fn fill(&self, slot: u16, address: u64, len: usize) -> u64 {
        let page = PAGE as u64;
        let words = self.pages_per_slot * PER_PAGE;
        let base = usize::from(slot).min(self.slots - 1) * words;
        let list = self.bus_address + (base as u64) * 8;
        let first = address & !(page - 1);
        let entries = (address + len as u64 - 1) / page - address / page;
        let mut at = 0usize;
        for n in 1..=entries {
            if at % PER_PAGE == PER_PAGE - 1 && n < entries {
                // The last entry of a full list page points to the next page.
                self.store(base, words, at, list + (at as u64 + 1) * 8);
                at += 1;
            }
            self.store(base, words, at, first + n * page);
            at += 1;
        }
        list
    }

    #[inline]
    fn store(&self, base: usize, words: usize, at: usize, value: u64) {
        debug_assert!(at < words && base + words <= self.slots * words);
        if at < words {
            // SAFETY: `base + words` is within the `slots * words` words that `new` checked, and `at < words`.
            unsafe { self.words.add(base + at).as_ref() }.store(value, Ordering::Relaxed);
        }
    }
}
