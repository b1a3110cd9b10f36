//! Submission and completion queues as the controller keeps them.

use std::collections::VecDeque;

use crate::spec::Completion;

/// A submission queue.
#[derive(Debug)]
pub(super) struct Sq {
    pub(super) base: u64,
    pub(super) entries: u32,
    /// Next entry to fetch.
    pub(super) head: u32,
    /// One past the last entry the host has announced.
    pub(super) tail: u32,
    /// The completion queue.
    pub(super) cq: u16,
    /// The doorbell's last value, valid or not.
    pub(super) doorbell: u32,
}

impl Sq {
    pub(super) fn new(base: u64, entries: u32, cq: u16) -> Self {
        Self { base, entries, head: 0, tail: 0, cq, doorbell: 0 }
    }

    /// Takes a new tail; `false`: it is not one that the host may write. A tail names a slot of the queue, and moves
    /// forward by at most what is free, which any slot number does: all that can be wrong is the range.
    pub(super) fn set_tail(&mut self, value: u32) -> bool {
        if value >= self.entries {
            return false;
        }
        self.tail = value;
        true
    }

    /// How many of the waiting entries follow each other in memory.
    pub(super) fn waiting_in_a_row(&self) -> u32 {
        if self.tail >= self.head { self.tail - self.head } else { self.entries - self.head }
    }

    /// The address of the next entry to fetch.
    pub(super) fn next(&self) -> u64 {
        self.base.wrapping_add(u64::from(self.head) * 64)
    }

    /// Takes the next entry.
    pub(super) fn take(&mut self) {
        self.head = if self.head + 1 == self.entries { 0 } else { self.head + 1 };
    }
}

/// A completion queue.
#[derive(Debug)]
pub(super) struct Cq {
    pub(super) base: u64,
    pub(super) entries: u32,
    /// Next entry the host will consume.
    pub(super) head: u32,
    /// Next entry to fill.
    pub(super) tail: u32,
    /// Phase tag of the next entry.
    pub(super) phase: bool,
    /// Interrupt vector, if interrupts are enabled.
    pub(super) vector: Option<u16>,
    /// The doorbell's last value, valid or not.
    pub(super) doorbell: u32,
    /// Completions that found the queue full.
    pub(super) waiting: VecDeque<Completion>,
    /// Something was posted since the last interrupt.
    pub(super) to_signal: bool,
    /// Submission queues that complete here.
    pub(super) users: u32,
}

impl Cq {
    pub(super) fn new(base: u64, entries: u32, vector: Option<u16>) -> Self {
        Self {
            base,
            entries,
            head: 0,
            tail: 0,
            phase: true,
            vector,
            doorbell: 0,
            waiting: VecDeque::new(),
            to_signal: false,
            users: 0,
        }
    }

    /// Entries posted and not yet consumed.
    pub(super) fn unconsumed(&self) -> u32 {
        if self.tail >= self.head { self.tail - self.head } else { self.tail + self.entries - self.head }
    }

    pub(super) fn is_full(&self) -> bool {
        self.unconsumed() + 1 == self.entries
    }

    /// Whether a command may be fetched for this queue: its completion will find a place.
    pub(super) fn has_room(&self) -> bool {
        self.waiting.is_empty() && !self.is_full()
    }

    /// Takes a new head; `false`: it is outside the queue, or would consume what was never posted.
    pub(super) fn set_head(&mut self, value: u32) -> bool {
        if value >= self.entries {
            return false;
        }
        let steps = if value >= self.head { value - self.head } else { value + self.entries - self.head };
        if steps > self.unconsumed() {
            return false;
        }
        self.head = value;
        true
    }

    /// The address of the next entry to fill and its phase; takes it.
    pub(super) fn take(&mut self) -> (u64, bool) {
        let at = self.base.wrapping_add(u64::from(self.tail) * 16);
        let phase = self.phase;
        self.tail += 1;
        if self.tail == self.entries {
            self.tail = 0;
            self.phase = !self.phase;
        }
        self.to_signal = true;
        (at, phase)
    }
}
