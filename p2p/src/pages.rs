//! A set of a window's 4 KiB pages.

use std::ops::Range;

/// Which pages of a window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PageSet {
    words: Box<[u64]>,
    pages: usize,
}

impl PageSet {
    pub(crate) fn new(pages: usize) -> Self {
        Self { words: vec![0; pages.div_ceil(64)].into_boxed_slice(), pages }
    }

    /// Words of 64 pages.
    pub(crate) fn words(&self) -> usize {
        self.words.len()
    }

    fn mask(&self, word: usize) -> u64 {
        let left = self.pages - word * 64;
        if left >= 64 { u64::MAX } else { (1 << left) - 1 }
    }

    /// Adds the pages in one word; bits beyond the window's end are ignored.
    pub(crate) fn add_word(&mut self, word: usize, bits: u64) {
        let mask = self.mask(word);
        self.words[word] |= bits & mask;
    }

    pub(crate) fn add_all(&mut self) {
        for word in 0..self.words.len() {
            self.words[word] = self.mask(word);
        }
    }

    /// Adds the pages of another set of the same window.
    pub(crate) fn add_set(&mut self, other: &Self) {
        for (word, bits) in self.words.iter_mut().zip(&other.words) {
            *word |= bits;
        }
    }

    pub(crate) fn add_range(&mut self, pages: Range<usize>) {
        for page in pages.start..pages.end.min(self.pages) {
            self.words[page / 64] |= 1 << (page % 64);
        }
    }

    pub(crate) fn remove_range(&mut self, pages: Range<usize>) {
        for page in pages.start..pages.end.min(self.pages) {
            self.words[page / 64] &= !(1 << (page % 64));
        }
    }

    pub(crate) fn clear(&mut self) {
        self.words.fill(0);
    }

    pub(crate) fn contains(&self, page: usize) -> bool {
        page < self.pages && self.words[page / 64] & (1 << (page % 64)) != 0
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    pub(crate) fn len(&self) -> usize {
        self.words.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// The first run of pages at or after `from`.
    pub(crate) fn next_run(&self, from: usize) -> Option<Range<usize>> {
        let start = self.first(from, 0)?;
        Some(start..self.first(start, u64::MAX).unwrap_or(self.pages))
    }

    /// The first page at or after `from` whose bit is not that of `inverted`.
    fn first(&self, from: usize, inverted: u64) -> Option<usize> {
        if from >= self.pages {
            return None;
        }
        let mut word = from / 64;
        let mut bits = (self.words[word] ^ inverted) & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = self.words.get(word)? ^ inverted;
        }
        Some(word * 64 + bits.trailing_zeros() as usize).filter(|page| *page < self.pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_and_the_end_is_respected() {
        let mut s = PageSet::new(70);
        s.add_word(1, u64::MAX);
        assert_eq!((s.len(), s.next_run(0)), (6, Some(64..70)));
        s.add_range(3..5);
        assert_eq!((s.next_run(0), s.next_run(4), s.next_run(5)), (Some(3..5), Some(4..5), Some(64..70)));
        s.remove_range(0..1000);
        assert!(s.is_empty());
        s.add_all();
        assert_eq!((s.len(), s.next_run(7), s.next_run(70)), (70, Some(7..70), None));
        let mut whole = PageSet::new(128);
        whole.add_range(60..128);
        assert_eq!((whole.next_run(0), whole.next_run(64)), (Some(60..128), Some(64..128)));
        let mut other = PageSet::new(128);
        other.add_range(0..2);
        whole.add_set(&other);
        assert_eq!((whole.next_run(0), whole.next_run(2)), (Some(0..2), Some(60..128)));
    }
}
