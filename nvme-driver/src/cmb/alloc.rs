//! Who uses which pages of a CMB.

use crate::mem::PAGE;
use crate::ranges::{FreeRanges, NotAllocated};

/// A 4 KiB-granular allocator over a CMB: best fit, O(log n), and no byte lost to alignment beyond the page.
#[derive(Clone, Debug)]
pub struct CmbAllocator {
    free: FreeRanges,
    size: usize,
}

impl CmbAllocator {
    /// An allocator over `size` bytes; a rest smaller than 4 KiB is not used.
    pub fn new(size: usize) -> Self {
        let size = size - size % PAGE;
        let all = (size > 0).then(|| 0..=size as u64 - 1);
        Self { free: FreeRanges::new(all), size }
    }

    /// Takes `len` bytes (rounded up to 4 KiB) and returns their offset; `None` when no free range is long enough.
    pub fn alloc(&mut self, len: usize) -> Option<usize> {
        let len = len.checked_next_multiple_of(PAGE)?;
        // An offset below `size`, so it fits.
        self.free.take(len as u64, PAGE as u64).map(|at| at as usize)
    }

    /// Gives back what [`alloc`](Self::alloc) returned for the same `len`. Refused if any of it is free already or outside the CMB.
    pub fn free(&mut self, offset: usize, len: usize) -> Result<(), NotAllocated> {
        let bad = NotAllocated { start: offset as u64, len: len as u64 };
        let len = len.checked_next_multiple_of(PAGE).ok_or(bad)?;
        if !offset.is_multiple_of(PAGE) || offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(bad);
        }
        self.free.give(offset as u64, len as u64)
    }

    /// Bytes managed.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Bytes free, in whatever pieces.
    pub fn free_bytes(&self) -> usize {
        self.free.free_bytes() as usize
    }

    /// The longest free range in bytes: the largest [`alloc`](Self::alloc) that would succeed.
    pub fn largest_free(&self) -> usize {
        self.free.largest() as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_usable() {
        let mut a = CmbAllocator::new(5 * PAGE + 100);
        let mut pages: Vec<_> = std::iter::from_fn(|| a.alloc(1)).collect();
        pages.sort_unstable();
        assert_eq!(pages, [0, PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE]);
        assert_eq!((a.free_bytes(), a.largest_free()), (0, 0));
        a.free(PAGE, PAGE).unwrap();
        a.free(2 * PAGE, PAGE).unwrap();
        assert_eq!(a.alloc(2 * PAGE), Some(PAGE));
    }

    #[test]
    fn refuses_what_it_did_not_hand_out() {
        let mut a = CmbAllocator::new(4 * PAGE);
        assert!(a.free(0, PAGE).is_err(), "free already");
        assert_eq!(a.alloc(4 * PAGE), Some(0));
        assert!(a.free(100, PAGE).is_err(), "not a page");
        assert!(a.free(4 * PAGE, PAGE).is_err(), "outside");
        assert!(a.free(0, usize::MAX).is_err());
        assert_eq!(a.alloc(0), None);
        assert!(CmbAllocator::new(100).alloc(1).is_none());
    }
}
