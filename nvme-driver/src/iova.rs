//! I/O virtual addresses: which ones the IOMMU accepts, and which of them are in use.

use std::ops::RangeInclusive;
use std::sync::{Mutex, PoisonError};

use crate::ranges::{FreeRanges, NotAllocated};

/// Addresses below this are never handed out: an address of 0 looks like "none", and bridges and legacy devices live there.
const FLOOR: u64 = 2 << 20;

/// No range of that length is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no {len:#x} bytes of I/O virtual address space left (aligned to {align:#x}; largest free range {largest:#x})"
)]
pub struct IovaExhausted {
    /// Length asked for, in bytes.
    pub len: u64,
    /// Alignment asked for, in bytes.
    pub align: u64,
    /// Longest free range, in bytes.
    pub largest: u64,
}

/// Hands out I/O virtual addresses of one function (one IOMMU domain). Shared by its DMA arena, its CMB and whoever maps peers.
#[derive(Debug)]
pub struct IovaAllocator {
    free: Mutex<FreeRanges>,
}

impl IovaAllocator {
    /// From the ranges the IOMMU accepts ([`PciFunction::iova_ranges`](crate::pci::PciFunction::iova_ranges)): reserved ranges are holes between them.
    pub fn new(ranges: impl IntoIterator<Item = RangeInclusive<u64>>) -> Self {
        let usable = ranges.into_iter().map(|r| (*r.start()).max(FLOOR)..=*r.end());
        Self { free: Mutex::new(FreeRanges::new(usable)) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, FreeRanges> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `len` bytes aligned to `align` (a power of two).
    pub fn take(&self, len: u64, align: u64) -> Result<u64, IovaExhausted> {
        let mut free = self.lock();
        free.take(len, align.max(1)).ok_or_else(|| IovaExhausted { len, align, largest: free.largest() })
    }

    /// Takes exactly this range; `false` if any of it is reserved or in use.
    pub fn take_at(&self, iova: u64, len: u64) -> bool {
        self.lock().take_at(iova, len)
    }

    /// Gives a range back.
    pub fn give(&self, iova: u64, len: u64) -> Result<(), NotAllocated> {
        self.lock().give(iova, len)
    }

    /// Bytes not in use.
    pub fn free_bytes(&self) -> u64 {
        self.lock().free_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What VFIO says on a machine with the usual MSI hole, for IOMMUs of 39 and 48 bits.
    fn ranges(bits: u32) -> Vec<RangeInclusive<u64>> {
        vec![0..=0xfedf_ffff, 0xfef0_0000..=(1 << bits) - 1]
    }

    #[test]
    fn stays_below_the_address_width_and_out_of_reserved_ranges() {
        for bits in [39, 48] {
            let a = IovaAllocator::new(ranges(bits));
            let mut held = Vec::new();
            let step = 1u64 << (bits - 5);
            while let Ok(at) = a.take(step, 2 << 20) {
                let last = at + step - 1;
                assert!(at >= FLOOR && last < 1 << bits);
                assert!(last < 0xfee0_0000 || at > 0xfeef_ffff, "{at:#x} touches the MSI window");
                assert_eq!(at % (2 << 20), 0);
                held.push(at);
            }
            assert!(held.len() >= 30, "only {} of 32 pieces of {bits} bits were usable", held.len());
            let full = a.take(step, 2 << 20).unwrap_err();
            assert!(full.largest < step + (2 << 20));
            held.drain(..).for_each(|at| a.give(at, step).unwrap());
            assert!(a.give(FLOOR, 1).is_err());
        }
    }

    #[test]
    fn a_named_range_is_taken_once() {
        let a = IovaAllocator::new(ranges(39));
        assert!(a.take_at(0x1_0000_0000, 0x1000));
        assert!(!a.take_at(0x1_0000_0000, 0x1000));
        assert!(!a.take_at(0xfee0_0000, 0x1000), "reserved");
        assert!(!a.take_at(1 << 39, 0x1000), "beyond the width");
        assert!(!a.take_at(0, 0x1000), "below the floor");
    }
}
