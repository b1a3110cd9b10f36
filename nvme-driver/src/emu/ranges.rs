//! Sets of byte ranges.

use std::collections::BTreeMap;

/// Byte ranges, merged where they touch: start to end.
#[derive(Debug, Default)]
pub(super) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    pub(super) fn covers(&self, at: u64) -> bool {
        self.0.range(..=at).next_back().is_some_and(|(_, end)| at < *end)
    }

    pub(super) fn add(&mut self, start: u64, len: u64) {
        let (mut start, mut end) = (start, start + len);
        while let Some((&s, &e)) = self.0.range(..=end).next_back()
            && e >= start
        {
            self.0.remove(&s);
            (start, end) = (start.min(s), end.max(e));
        }
        self.0.insert(start, end);
    }

    /// Takes the first range out: start and length.
    pub(super) fn pop(&mut self) -> Option<(u64, u64)> {
        self.0.pop_first().map(|(start, end)| (start, end - start))
    }
}
