//! A map as it was at one moment, handed out in order while the map goes on changing.
//!
//! Who changes the map says what was there before; only that is kept, and only as long as it has not been handed out.

use std::collections::BTreeMap;
use std::ops::Bound;

#[derive(Clone, Debug)]
pub(crate) struct Past<K, V> {
    /// Everything up to this key has been handed out.
    done: Option<K>,
    /// What was behind that and has changed since: as it was; `None`: it was not there.
    was: BTreeMap<K, Option<V>>,
}

impl<K: Ord, V: Copy> Past<K, V> {
    /// From here on the map's changes are to be told.
    pub(crate) fn begin() -> Self {
        Self { done: None, was: BTreeMap::new() }
    }

    /// What was at `key` before a change (`None`: nothing).
    pub(crate) fn note(&mut self, key: K, was: Option<V>) {
        if self.done.as_ref().is_none_or(|d| *d < key) {
            // The first change saw it as it was.
            self.was.entry(key).or_insert(was);
        }
    }

    /// What has not been handed out yet, in order.
    pub(crate) fn rest<'a>(&'a self, map: &'a BTreeMap<K, V>) -> impl Iterator<Item = (&'a K, V)> {
        let behind = (self.done.as_ref().map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let mut now = map.range(behind).peekable();
        let mut was = self.was.iter().peekable();
        std::iter::from_fn(move || {
            loop {
                let changed = match (now.peek(), was.peek()) {
                    (Some(n), Some(w)) if n.0 == w.0 => {
                        now.next();
                        true
                    }
                    (Some(n), Some(w)) => w.0 < n.0,
                    (None, Some(_)) => true,
                    (_, None) => false,
                };
                if !changed {
                    return now.next().map(|(k, &v)| (k, v));
                }
                if let Some((k, &Some(v))) = was.next() {
                    return Some((k, v));
                }
            }
        })
    }

    /// Everything up to `key` has been handed out.
    pub(crate) fn skip(&mut self, key: K) {
        self.was = self.was.split_off(&key);
        self.was.remove(&key);
        self.done = Some(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hands_out_what_was_there_whatever_changes_meanwhile() {
        // A step of a full-period generator, so that the order of changes has no pattern.
        let mut state = 1u32;
        let mut any = move |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % below
        };
        for round in 0..50 {
            let mut map: BTreeMap<u32, u32> = (0..any(200)).map(|_| (any(300), any(1000))).collect();
            let begun = map.clone();
            let mut past = Past::begin();
            let mut got = BTreeMap::new();
            loop {
                for _ in 0..any(20) {
                    let key = any(300);
                    let old = if any(2) == 0 { map.insert(key, any(1000)) } else { map.remove(&key) };
                    past.note(key, old);
                }
                let part: Vec<(u32, u32)> = past.rest(&map).take(7).map(|(k, v)| (*k, v)).collect();
                let Some(&(last, _)) = part.last() else { break };
                past.skip(last);
                assert!(
                    part.iter().all(|&(k, v)| got.insert(k, v).is_none()),
                    "round {round}: handed out twice"
                );
            }
            assert_eq!(got, begun, "round {round}");
        }
    }
}
