//! MSI-X: the table and the pending bits in a BAR of their own, and the eventfds behind the vectors.
//!
//! Whoever handed over eventfds gets every interrupt there. The table in the BAR matters only once somebody has written
//! a vector's control word there: then its mask bit is honoured.

use std::os::fd::OwnedFd;

/// Size of the BAR.
pub(super) const MSIX_BAR_SIZE: u64 = 0x4000;
/// Offset of the pending bits.
pub(super) const PBA_OFFSET: u64 = 0x2000;

#[derive(Debug)]
pub(super) struct Msix {
    /// Address low, address high, data, control.
    table: Vec<[u32; 4]>,
    /// Vectors whose control word was written.
    programmed: Vec<bool>,
    pending: Vec<bool>,
    eventfds: Vec<OwnedFd>,
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
        self.eventfds = eventfds;
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
        // A full counter has the reader awake already.
        if let Err(e) = rustix::io::write(&self.eventfds[v], &1u64.to_ne_bytes()) {
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
