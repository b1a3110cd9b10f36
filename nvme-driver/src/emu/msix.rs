//! MSI-X: the table and the pending bits in a BAR of their own, and the eventfds behind the vectors.
//!
//! Whoever handed over eventfds gets every interrupt there. The table in the BAR matters only once somebody has written
//! a vector's control word there: then its mask bit is honoured.

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;

/// Size of the BAR.
pub(super) const MSIX_BAR_SIZE: u64 = 0x4000;
/// Offset of the pending bits.
pub(super) const PBA_OFFSET: u64 = 0x2000;

/// Where a vector's interrupts go.
#[derive(Debug)]
struct Signal {
    eventfd: OwnedFd,
    /// A write may block: when the counter is full. Whoever fills it does not get to stop the controller.
    blocks: bool,
}

impl Signal {
    fn new(eventfd: OwnedFd) -> Self {
        let blocks = !fcntl_getfl(&eventfd).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
        Self { eventfd, blocks }
    }

    fn send(&self) -> Result<(), Errno> {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut ready = [PollFd::new(&self.eventfd, PollFlags::OUT)];
        // A full counter has the reader awake already.
        if self.blocks && poll(&mut ready, Some(&now))? == 0 {
            return Ok(());
        }
        rustix::io::write(&self.eventfd, &1u64.to_ne_bytes()).map(|_| ())
    }
}

#[derive(Debug)]
pub(super) struct Msix {
    /// Address low, address high, data, control.
    table: Vec<[u32; 4]>,
    /// Vectors whose control word was written.
    programmed: Vec<bool>,
    pending: Vec<bool>,
    eventfds: Vec<Signal>,
    /// Function Mask of the capability.
    function_mask: bool,
}

impl Msix {
    pub(super) fn new(vectors: u16) -> Self {
        let n = usize::from(vectors);
        Self {
            table: vec![[0, 0, 0, 1]; n],
            programmed: vec![false; n],
            pending: vec![false; n],
            eventfds: Vec::new(),
            function_mask: false,
        }
    }

    pub(super) fn reset(&mut self) {
        self.table.fill([0, 0, 0, 1]);
        self.programmed.fill(false);
        self.pending.fill(false);
        self.function_mask = false;
    }

    pub(super) fn set_eventfds(&mut self, eventfds: Vec<OwnedFd>) {
        self.eventfds = eventfds.into_iter().map(Signal::new).collect();
    }

    pub(super) fn set_function_mask(&mut self, on: bool) {
        self.function_mask = on;
        if !on {
            self.deliver_pending();
        }
    }

    fn is_masked(&self, vector: usize) -> bool {
        self.function_mask || (self.programmed[vector] && self.table[vector][3] & 1 == 1)
    }

    /// An interrupt on `vector`; says whether one was signalled.
    pub(super) fn raise(&mut self, vector: u16) -> bool {
        let v = usize::from(vector);
        if v >= self.eventfds.len() || v >= self.table.len() {
            return false;
        }
        if self.is_masked(v) {
            self.pending[v] = true;
            return false;
        }
        if let Err(e) = self.eventfds[v].send() {
            tracing::debug!("eventfd of vector {vector}: {e}");
        }
        true
    }

    fn deliver_pending(&mut self) {
        for v in 0..self.pending.len() {
            if self.pending[v] && !self.is_masked(v) {
                self.pending[v] = false;
                self.raise(v as u16);
            }
        }
    }

    /// Reads the aligned 32-bit word at `offset` of the BAR.
    pub(super) fn read(&self, offset: u64) -> u32 {
        if offset >= PBA_OFFSET {
            let first = (offset - PBA_OFFSET) as usize * 8;
            let bits = self.pending.iter().skip(first).take(32).enumerate();
            return bits.fold(0, |word, (i, set)| word | (u32::from(*set) << i));
        }
        self.table.get(offset as usize / 16).map_or(0, |e| e[offset as usize / 4 % 4])
    }

    /// Writes the aligned 32-bit word at `offset` of the BAR; the pending bits are read-only.
    pub(super) fn write(&mut self, offset: u64, value: u32) {
        let v = offset as usize / 16;
        let Some(entry) = self.table.get_mut(v) else { return };
        match offset as usize / 4 % 4 {
            3 => {
                entry[3] = value & 1;
                self.programmed[v] = true;
                self.deliver_pending();
            }
            0 => entry[0] = value & !3,
            word => entry[word] = value,
        }
    }
}
