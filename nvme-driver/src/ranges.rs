//! Free ranges of some address space: best fit, O(log n), merging on return. The one allocator behind IOVAs, DMA
//! buffers and the CMB.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

/// A range was given back that overlaps one that is free already, or that wraps around.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len:#x} bytes at {start:#x} are not allocated")]
pub struct NotAllocated {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// The free ranges. Lengths are kept as `last - first`, so that a range may end at `u64::MAX`.
#[derive(Clone, Debug, Default)]
pub(crate) struct FreeRanges {
    /// First address to last address (inclusive).
    by_start: BTreeMap<u64, u64>,
    /// (last - first, first), for best fit.
    by_size: BTreeSet<(u64, u64)>,
}

impl FreeRanges {
    pub(crate) fn new(ranges: impl IntoIterator<Item = RangeInclusive<u64>>) -> Self {
        let mut free = Self::default();
        for r in ranges.into_iter().filter(|r| !r.is_empty()) {
            // Overlapping input (a sloppy kernel answer) only loses the overlap.
            let _ = free.insert(*r.start(), *r.end());
        }
        free
    }

    fn add(&mut self, first: u64, last: u64) {
        self.by_start.insert(first, last);
        self.by_size.insert((last - first, first));
    }

    fn remove(&mut self, first: u64, last: u64) {
        self.by_start.remove(&first);
        self.by_size.remove(&(last - first, first));
    }

    /// Takes `len` bytes aligned to `align` (a power of two) from the smallest range that holds them; lowest address first among equals.
    pub(crate) fn take(&mut self, len: u64, align: u64) -> Option<u64> {
        let span = len.checked_sub(1)?;
        let (first, last, at) = self.by_size.range((span, 0)..).find_map(|&(size, first)| {
            let last = first + size;
            let at = first.checked_add(align - 1)? & !(align - 1);
            (at <= last && last - at >= span).then_some((first, last, at))
        })?;
        self.carve(first, last, at, at + span);
        Some(at)
    }

    /// Takes exactly `[start, start + len)`, if all of it is free.
    pub(crate) fn take_at(&mut self, start: u64, len: u64) -> bool {
        let Some(end) = len.checked_sub(1).and_then(|span| start.checked_add(span)) else { return false };
        let Some((&first, &last)) = self.by_start.range(..=start).next_back() else { return false };
        if end > last {
            return false;
        }
        self.carve(first, last, start, end);
        true
    }

    fn carve(&mut self, first: u64, last: u64, at: u64, end: u64) {
        self.remove(first, last);
        if at > first {
            self.add(first, at - 1);
        }
        if end < last {
            self.add(end + 1, last);
        }
    }

    /// Gives a range back and merges it with its neighbours.
    pub(crate) fn give(&mut self, start: u64, len: u64) -> Result<(), NotAllocated> {
        let bad = NotAllocated { start, len };
        let last = len.checked_sub(1).and_then(|span| start.checked_add(span)).ok_or(bad)?;
        self.insert(start, last).map_err(|()| bad)
    }

    fn insert(&mut self, mut first: u64, mut last: u64) -> Result<(), ()> {
        let before = self.by_start.range(..=first).next_back().map(|(&f, &l)| (f, l));
        let after = self.by_start.range(first..).next().map(|(&f, &l)| (f, l));
        if before.is_some_and(|(_, l)| l >= first) || after.is_some_and(|(f, _)| f <= last) {
            return Err(());
        }
        if let Some((f, l)) = before
            && l + 1 == first
        {
            self.remove(f, l);
            first = f;
        }
        if let Some((f, l)) = after
            && last + 1 == f
        {
            self.remove(f, l);
            last = l;
        }
        self.add(first, last);
        Ok(())
    }

    /// Free bytes, saturating.
    pub(crate) fn free_bytes(&self) -> u64 {
        self.by_start.iter().fold(0u64, |sum, (f, l)| sum.saturating_add(l - f).saturating_add(1))
    }

    /// The longest free range in bytes, saturating.
    pub(crate) fn largest(&self) -> u64 {
        self.by_size.last().map_or(0, |&(span, _)| span.saturating_add(1))
    }
}

#[cfg(test)]
mod tests {
    use rand_xoshiro::Xoshiro256PlusPlus;
    use rand_xoshiro::rand_core::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn never_hands_out_a_byte_twice_and_merges_back_to_one_range() {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(7);
        let mut free = FreeRanges::new([0x1000..=0x8_0fff]);
        let mut owner = [false; 0x81];
        let mut held: Vec<(u64, u64)> = Vec::new();
        for _ in 0..20_000 {
            if rng.next_u32() % 2 == 0 {
                let pages = 1 + u64::from(rng.next_u32() % 9);
                let align = 0x1000 << (rng.next_u32() % 3);
                if let Some(at) = free.take(pages * 0x1000, align) {
                    assert_eq!(at % align, 0);
                    for page in at >> 12..(at >> 12) + pages {
                        assert!(
                            !std::mem::replace(&mut owner[page as usize], true),
                            "page {page} handed out twice"
                        );
                    }
                    held.push((at, pages * 0x1000));
                }
            } else if !held.is_empty() {
                let (at, len) = held.swap_remove(rng.next_u32() as usize % held.len());
                free.give(at, len).unwrap();
                assert!(free.give(at, len).is_err(), "a second return is refused");
                (at >> 12..(at + len) >> 12).for_each(|p| owner[p as usize] = false);
            }
        }
        held.drain(..).for_each(|(at, len)| free.give(at, len).unwrap());
        assert_eq!(free.by_start, BTreeMap::from([(0x1000, 0x8_0fff)]));
        assert_eq!(free.by_size.len(), 1);
    }

    #[test]
    fn reaches_the_end_of_the_address_space() {
        let mut free = FreeRanges::new([0..=u64::MAX]);
        assert!(free.take_at(u64::MAX - 0xfff, 0x1000));
        assert!(!free.take_at(u64::MAX - 0xfff, 0x1000));
        assert!(free.give(u64::MAX, 2).is_err());
        free.give(u64::MAX - 0xfff, 0x1000).unwrap();
        assert_eq!(free.largest(), u64::MAX);
        assert_eq!(free.take(0, 1), None);
    }
}
