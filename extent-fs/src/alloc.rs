//! Which blocks are free: runs ordered by place and by length, so that every operation is logarithmic in their number.

use std::collections::{BTreeMap, BTreeSet};

/// The allocatable blocks. Blocks freed by a record that is not durable yet are not here.
#[derive(Debug, Default)]
pub(crate) struct FreeMap {
    by_start: BTreeMap<u64, u64>,
    by_len: BTreeSet<(u64, u64)>,
    free: u64,
}

impl FreeMap {
    /// Everything in `first..end` that is in none of `used` (start, length). Fails with the first block used twice or out of range.
    pub(crate) fn from_used(first: u64, end: u64, used: &mut [(u64, u64)]) -> Result<Self, u64> {
        used.sort_unstable();
        let mut map = Self::default();
        let mut at = first;
        for &(start, len) in used.iter() {
            let stop = start.checked_add(len).ok_or(start)?;
            if start < at || stop > end {
                return Err(start);
            }
            map.insert(at, start - at);
            at = stop;
        }
        map.insert(at, end.saturating_sub(at));
        Ok(map)
    }

    /// The same where some may be used twice.
    pub(crate) fn from_overlapping(first: u64, end: u64, used: &mut [(u64, u64)]) -> Self {
        used.sort_unstable();
        let mut map = Self::default();
        let mut at = first;
        for &(start, len) in used.iter() {
            if start > at && at < end {
                map.insert(at, start.min(end) - at);
            }
            at = at.max(start.saturating_add(len));
        }
        map.insert(at, end.saturating_sub(at));
        map
    }

    /// Takes exactly these blocks. Returns false (and changes nothing) if one of them is not free.
    pub(crate) fn take(&mut self, start: u64, len: u64) -> bool {
        let Some((&s, &l)) = self.by_start.range(..=start).next_back() else { return false };
        if start + len > s + l {
            return false;
        }
        self.remove(s, l);
        self.insert(s, start - s);
        self.insert(start + len, s + l - start - len);
        true
    }

    /// Number of free blocks.
    pub(crate) fn free_blocks(&self) -> u64 {
        self.free
    }

    /// Every free run (start, length), by place.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (u64, u64)> {
        self.by_start.iter().map(|(&s, &l)| (s, l))
    }

    fn insert(&mut self, start: u64, len: u64) {
        if len > 0 {
            self.by_start.insert(start, len);
            self.by_len.insert((len, start));
            self.free += len;
        }
    }

    fn remove(&mut self, start: u64, len: u64) {
        self.by_start.remove(&start);
        self.by_len.remove(&(len, start));
        self.free -= len;
    }

    /// Takes up to `want` adjoining blocks, at `goal` if they are free there, else where the run fits best.
    pub(crate) fn allocate(&mut self, want: u64, goal: u64) -> Option<(u64, u64)> {
        let (start, len, at) = self.choose(want, goal)?;
        let take = want.min(start + len - at);
        self.remove(start, len);
        self.insert(start, at - start);
        self.insert(at + take, start + len - at - take);
        Some((at, take))
    }

    /// A free run and the block in it to begin at.
    fn choose(&self, want: u64, goal: u64) -> Option<(u64, u64, u64)> {
        if let Some((&start, &len)) = self.by_start.range(..=goal).next_back()
            && goal < start + len
            && start + len - goal >= want
        {
            return Some((start, len, goal));
        }
        if let Some((&start, &len)) = self.by_start.range(goal..).next()
            && len >= want
        {
            return Some((start, len, start));
        }
        let fit = self.by_len.range((want, 0)..).next().or_else(|| self.by_len.last());
        fit.map(|&(len, start)| (start, len, start))
    }

    /// Gives blocks back; they adjoin their neighbours again. Returns false (and changes nothing) if one is free already.
    pub(crate) fn release(&mut self, mut start: u64, mut len: u64) -> bool {
        let before = self.by_start.range(..=start).next_back().map(|(&s, &l)| (s, l));
        let after = self.by_start.range(start..).next().map(|(&s, &l)| (s, l));
        if before.is_some_and(|(s, l)| s + l > start) || after.is_some_and(|(s, _)| s < start + len) {
            return false;
        }
        if let Some((s, l)) = before
            && s + l == start
        {
            self.remove(s, l);
            start = s;
            len += l;
        }
        if let Some((s, l)) = after
            && s == start + len
        {
            self.remove(s, l);
            len += l;
        }
        self.insert(start, len);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocates_at_the_goal_then_best_fit_and_merges_back() {
        let mut map = FreeMap::from_used(0, 100, &mut [(10, 10), (50, 1)]).unwrap();
        assert_eq!(map.free_blocks(), 89);
        assert_eq!(map.allocate(5, 22), Some((22, 5)));
        assert_eq!(map.allocate(40, 22), Some((51, 40)));
        assert_eq!(map.allocate(1000, 0), Some((27, 23)));
        assert!(map.release(22, 5));
        assert!(!map.release(24, 1));
        assert!(map.release(27, 23));
        assert!(map.release(51, 40));
        assert_eq!(map.runs().collect::<Vec<_>>(), [(0, 10), (20, 30), (51, 49)]);
        assert_eq!(map.free_blocks(), 89);
    }

    #[test]
    fn names_the_block_used_twice() {
        assert_eq!(FreeMap::from_used(0, 100, &mut [(10, 10), (19, 1)]).unwrap_err(), 19);
        assert_eq!(FreeMap::from_used(5, 100, &mut [(4, 2)]).unwrap_err(), 4);
        assert_eq!(FreeMap::from_used(5, 100, &mut [(99, 2)]).unwrap_err(), 99);
    }
}
