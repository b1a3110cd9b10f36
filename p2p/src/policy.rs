//! Who leaves when memory is short: S3-FIFO (Yang et al., SOSP 2023) over windows of any size.
//!
//! Our own, because no crate fits: see `docs/benchmarks.md`, which has the measurements, too.
//!
//! New windows wait in a small queue, a tenth of the capacity; only those used again there move on to the main queue. So a scan
//! passes through the small queue and never empties the main one. A ghost queue remembers what the small queue threw
//! out: what comes back soon goes straight to the main queue.

use std::collections::{HashMap, VecDeque};

const MAX_USES: u8 = 3;
/// Ghosts that are kept of a memory of only a few windows.
const MIN_GHOSTS: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Queue {
    Small,
    Main,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    queue: Queue,
    bytes: u64,
    uses: u8,
    /// Tells this entry's place in a queue from an older one of the same key.
    ticket: u64,
}

/// Names a window across its stays in memory.
pub type Key = (u64, u64);

/// S3-FIFO by bytes. All operations take constant time on average.
#[derive(Debug)]
pub struct S3Fifo {
    entries: HashMap<Key, Entry>,
    small: VecDeque<(Key, u64)>,
    main: VecDeque<(Key, u64)>,
    small_bytes: u64,
    main_bytes: u64,
    small_target: u64,
    ghosts: HashMap<Key, u64>,
    ghost_queue: VecDeque<(Key, u64)>,
    next_ticket: u64,
}

impl S3Fifo {
    /// For a memory of `capacity` bytes. As many windows that left are remembered as are in: on recorded use, more of them let too
    /// much into the main queue (`benches/benches/eviction.rs`).
    pub fn new(capacity: u64) -> Self {
        Self {
            entries: HashMap::new(),
            small: VecDeque::new(),
            main: VecDeque::new(),
            small_bytes: 0,
            main_bytes: 0,
            small_target: capacity / 10,
            ghosts: HashMap::new(),
            ghost_queue: VecDeque::new(),
            next_ticket: 0,
        }
    }

    /// A window came in.
    pub fn insert(&mut self, key: Key, bytes: u64) {
        if self.entries.contains_key(&key) {
            return self.touch(key);
        }
        let queue = if self.ghosts.remove(&key).is_some() { Queue::Main } else { Queue::Small };
        let ticket = self.push(key, queue, bytes);
        self.entries.insert(key, Entry { queue, bytes, uses: 0, ticket });
    }

    /// It was used again.
    pub fn touch(&mut self, key: Key) {
        if let Some(e) = self.entries.get_mut(&key) {
            e.uses = (e.uses + 1).min(MAX_USES);
        }
    }

    /// It left for a reason other than [`victim`](Self::victim).
    pub fn remove(&mut self, key: Key) {
        // Its place in the queue is found stale when it reaches the front.
        if let Some(e) = self.entries.remove(&key) {
            *self.bytes_of(e.queue) -= e.bytes;
        }
        self.compact();
    }

    /// There is no room for a window that would come in. Says whether it left, or was kept out, not long ago: then it is worth another's place.
    pub fn kept_out(&mut self, key: Key) -> bool {
        let again = self.ghosts.contains_key(&key);
        if !again {
            self.remember(key);
        }
        again
    }

    /// Windows that are in.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none is in.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Chooses who leaves, among those that `may_leave`, and takes it out. Looks at each window at most a few times.
    pub fn victim(&mut self, mut may_leave: impl FnMut(Key) -> bool) -> Option<Key> {
        let mut patience = 2 + self.entries.len() * (usize::from(MAX_USES) + 1);
        // Those in the small queue that may not leave are not to keep the main queue from being looked at.
        let mut small_round = self.small.len();
        while patience > 0 {
            let small_first = self.small_bytes > self.small_target && small_round > 0;
            let from_small = !self.small.is_empty() && (small_first || self.main.is_empty());
            small_round = small_round.saturating_sub(usize::from(from_small));
            let queue = if from_small { Queue::Small } else { Queue::Main };
            let popped = if from_small { self.small.pop_front() } else { self.main.pop_front() };
            let (key, ticket) = popped?;
            let Some(e) = self.entries.get(&key).copied().filter(|e| e.ticket == ticket) else { continue };
            patience -= 1;
            let leaves = e.uses == 0 && may_leave(key);
            if leaves {
                *self.bytes_of(queue) -= e.bytes;
                self.entries.remove(&key);
                if queue == Queue::Small {
                    self.remember(key);
                }
                return Some(key);
            }
            *self.bytes_of(queue) -= e.bytes;
            // Used in the small queue: on to the main one. Used in the main queue, or pinned: another round.
            let (to, uses) = match (queue, e.uses) {
                (Queue::Small, 0) => (Queue::Small, 0),
                (Queue::Small, _) => (Queue::Main, 0),
                (Queue::Main, u) => (Queue::Main, u.saturating_sub(1)),
            };
            let ticket = self.push(key, to, e.bytes);
            self.entries.insert(key, Entry { queue: to, bytes: e.bytes, uses, ticket });
        }
        None
    }

    fn bytes_of(&mut self, queue: Queue) -> &mut u64 {
        match queue {
            Queue::Small => &mut self.small_bytes,
            Queue::Main => &mut self.main_bytes,
        }
    }

    fn push(&mut self, key: Key, queue: Queue, bytes: u64) -> u64 {
        self.next_ticket += 1;
        *self.bytes_of(queue) += bytes;
        let list = if queue == Queue::Small { &mut self.small } else { &mut self.main };
        list.push_back((key, self.next_ticket));
        self.next_ticket
    }

    fn remember(&mut self, key: Key) {
        self.next_ticket += 1;
        self.ghosts.insert(key, self.next_ticket);
        self.ghost_queue.push_back((key, self.next_ticket));
        let limit = self.entries.len().max(MIN_GHOSTS);
        while self.ghost_queue.len() > limit {
            if let Some((old, ticket)) = self.ghost_queue.pop_front()
                && self.ghosts.get(&old) == Some(&ticket)
            {
                self.ghosts.remove(&old);
            }
        }
    }

    /// Stale places must not outnumber the entries for ever.
    fn compact(&mut self) {
        if self.small.len() + self.main.len() > 2 * self.entries.len() + 64 {
            let entries = &self.entries;
            let live = |(k, t): &(Key, u64)| entries.get(k).is_some_and(|e| e.ticket == *t);
            self.small.retain(live);
            self.main.retain(live);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fraction of accesses that hit, for a cache of `capacity` windows of one byte.
    fn hits(capacity: u64, trace: impl Iterator<Item = u64>) -> f64 {
        let mut s = S3Fifo::new(capacity);
        let (mut hit, mut all) = (0u32, 0u32);
        for k in trace {
            all += 1;
            if s.entries.contains_key(&(0, k)) {
                hit += 1;
                s.touch((0, k));
            } else {
                while s.len() as u64 >= capacity {
                    s.victim(|_| true).unwrap();
                }
                s.insert((0, k), 1);
            }
        }
        f64::from(hit) / f64::from(all)
    }

    #[test]
    fn a_scan_does_not_drive_out_what_is_used() {
        // 25 hot windows, each used again after 100 others of a scan, in a memory of 100: plain LRU never hits.
        let trace = (0..200_000u64).map(|i| if i % 5 == 0 { i / 5 % 25 } else { 1000 + i });
        let rate = hits(100, trace);
        assert!(rate > 0.15, "{rate}");
    }

    #[test]
    fn who_is_kept_out_is_worth_a_place_the_second_time() {
        let mut s = S3Fifo::new(4);
        (0..4).for_each(|k| s.insert((0, k), 1));
        assert_eq!([7, 7, 8].map(|k| s.kept_out((0, k))), [false, true, false]);
        // As many are remembered as are in, or a few.
        (100..200).for_each(|k| assert!(!s.kept_out((0, k))));
        assert!(!s.kept_out((0, 7)));
    }

    #[test]
    fn the_pinned_do_not_hide_those_that_may_leave() {
        let mut s = S3Fifo::new(10);
        for k in 0..2 {
            s.insert((0, k), 1);
            s.touch((0, k));
        }
        // Used, so on to the main queue.
        assert_eq!(s.victim(|_| false), None);
        for k in 0..8 {
            s.insert((1, k), 1);
        }
        assert_eq!(s.victim(|key| key.0 == 0), Some((0, 0)));
        // Nor do those that have gone.
        for k in 0..60 {
            s.insert((2, k), 1);
            s.remove((2, k));
        }
        assert_eq!(s.victim(|key| key.0 == 0), Some((0, 1)));
    }

    #[test]
    fn the_pinned_stay_and_the_bookkeeping_balances() {
        let mut s = S3Fifo::new(10);
        for k in 0..10 {
            s.insert((0, k), 1);
        }
        assert_eq!(s.victim(|_| false), None);
        assert_eq!(s.len(), 10);
        assert_eq!(s.victim(|k| k.1 == 7), Some((0, 7)));
        for k in 0..1000 {
            s.insert((1, k), 1);
            s.remove((1, k));
        }
        assert!(s.small.len() + s.main.len() < 200);
        while s.victim(|_| true).is_some() {}
        assert_eq!((s.len(), s.small_bytes, s.main_bytes), (0, 0, 0));
    }
}
