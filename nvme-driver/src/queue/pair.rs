//! Command slots, submission and reaping.

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use super::doorbell::Doorbell;
use super::prp::PrpLists;
use super::ring::{CompletionRing, SubmissionRing};
use crate::mem::{OutOfRange, PAGE};
use crate::pci::PciFunction;
use crate::spec::{Command, Completion, Status};

/// Set in [`Slot::live`] while the slot is free.
const FREE: u32 = 1 << 16;
/// [`Slot::seen`] of a command that no timeout check has seen yet.
const UNSEEN: u64 = u64::MAX;

/// What a command's data pointer describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data {
    /// Bus address of the first byte: a [`DmaBuffer`](crate::dma::DmaBuffer)'s, or the CMB's plus an offset. A multiple of 4.
    pub address: u64,
    /// Length in bytes. All of it is contiguous on the bus.
    pub len: usize,
}

/// A command was not queued. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Every slot is in flight: reap first.
    #[error("the queue is full")]
    Full,
    /// The data pointer is empty, misaligned, wraps around or is longer than the queue was made for.
    #[error("data of {} bytes at {:#x} cannot be described (dword aligned, at most {max} bytes)", .data.len, .data.address)]
    BadData {
        /// What was given.
        data: Data,
        /// The longest transfer, in bytes.
        max: usize,
    },
}

/// The device posted a completion that makes no sense. The entry is skipped, no slot has changed; what it was meant
/// to say is unknown, so a command may be waited for in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The command identifier belongs to no command in flight.
    #[error("queue {qid}: completion for command {cid:#06x}, which is not in flight")]
    UnknownCommand {
        /// The queue.
        qid: u16,
        /// The command identifier in the entry.
        cid: u16,
    },
    /// The command identifier is that of the slot's last command, which has completed already.
    #[error("queue {qid}: second completion for command {cid:#06x}")]
    Duplicate {
        /// The queue.
        qid: u16,
        /// The command identifier in the entry.
        cid: u16,
    },
    /// The submission queue identifier is another queue's.
    #[error("queue {qid}: completion for command {cid:#06x} of queue {sqid}")]
    WrongQueue {
        /// The queue.
        qid: u16,
        /// The submission queue identifier in the entry.
        sqid: u16,
        /// The command identifier in the entry.
        cid: u16,
    },
    /// The submission queue head is outside the queue.
    #[error(
        "queue {qid}: completion for command {cid:#06x} with submission queue head {sqhd} of {entries} entries"
    )]
    BadHead {
        /// The queue.
        qid: u16,
        /// The head in the entry.
        sqhd: u16,
        /// Entries of the submission queue.
        entries: u16,
        /// The command identifier in the entry.
        cid: u16,
    },
}

/// A command that has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// What the submitter gave to tell its commands apart.
    pub token: u64,
    /// The status. Not checked by the queue: every completion carries its own, and the owner looks at each.
    pub status: Status,
    /// Dword 0 of the completion (command specific).
    pub result: u32,
}

/// One command slot. Its index is the low part of its command identifiers; the high part counts its uses, so that a
/// late or repeated completion of an earlier use is recognised.
#[derive(Debug)]
#[repr(align(32))]
struct Slot {
    token: u64,
    /// When a timeout check first saw the command in flight, nanoseconds of the clock; [`UNSEEN`] before.
    seen: u64,
    /// In flight: the command identifier. Free: [`FREE`] and the next one.
    live: u32,
}

/// Where a queue pair lies, for the admin commands that create it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) qid: u16,
    pub(crate) entries: u16,
    pub(crate) sq_address: u64,
    pub(crate) cq_address: u64,
}

/// What a queue pair is made of.
pub(crate) struct Parts {
    pub(crate) qid: u16,
    /// A power of two.
    pub(crate) entries: u16,
    pub(crate) sq: SubmissionRing,
    pub(crate) cq: CompletionRing,
    pub(crate) sq_doorbell: Doorbell,
    pub(crate) cq_doorbell: Doorbell,
    pub(crate) lists: PrpLists,
    pub(crate) max_transfer: usize,
    /// Stepped when a reap finds nothing, for devices that are emulated inline.
    pub(crate) step: Option<Arc<dyn PciFunction>>,
}

/// One submission queue and its completion queue. Owned by one thread at a time (it may move, but is not `Sync`).
#[derive(Debug)]
pub struct QueuePair {
    cq: CompletionRing,
    sq: SubmissionRing,
    /// The submission queue tail that the device knows.
    rung: u32,
    /// The completion queue head that the device knows, and by how many entries ours may be ahead of it: less than the queue holds,
    /// so that the device always has room to go on.
    acknowledged: u32,
    slack: u16,
    qid: u16,
    mask: u16,
    max_transfer: usize,
    /// Free slots, the last one next.
    free: Vec<u16>,
    slots: Box<[Slot]>,
    sq_doorbell: Doorbell,
    cq_doorbell: Doorbell,
    lists: PrpLists,
    step: Option<Arc<dyn PciFunction>>,
    _one_thread: PhantomData<std::cell::Cell<()>>,
}

impl QueuePair {
    pub(crate) fn new(parts: Parts) -> Result<Self, OutOfRange> {
        let entries = parts.entries;
        let slots =
            (0..entries).map(|i| Slot { token: 0, seen: UNSEEN, live: FREE | u32::from(i) }).collect();
        let mut pair = Self {
            cq: parts.cq,
            sq: parts.sq,
            rung: 0,
            acknowledged: 0,
            slack: (entries / 8).max(1),
            qid: parts.qid,
            mask: entries - 1,
            max_transfer: parts.max_transfer,
            free: Vec::with_capacity(usize::from(entries)),
            slots,
            sq_doorbell: parts.sq_doorbell,
            cq_doorbell: parts.cq_doorbell,
            lists: parts.lists,
            step: parts.step,
            _one_thread: PhantomData,
        };
        pair.restart(|_| ())?;
        Ok(pair)
    }

    /// As new, in the same memory: after a reset, or before the queue is created. Commands in flight are given up;
    /// `abandoned` gets their tokens. The device must not be using the queue.
    pub(crate) fn restart(&mut self, mut abandoned: impl FnMut(u64)) -> Result<(), OutOfRange> {
        self.cq.restart()?;
        self.sq.restart()?;
        (self.rung, self.acknowledged) = (0, 0);
        for slot in &mut self.slots {
            if slot.live & FREE == 0 {
                abandoned(slot.token);
                slot.live = free_again(slot.live, self.mask);
            }
        }
        self.free.clear();
        // A queue of n entries holds n - 1 commands: a full ring would look empty. So one slot stays unused.
        self.free.extend((0..self.mask).rev());
        Ok(())
    }

    pub(crate) fn layout(&self) -> Layout {
        Layout {
            qid: self.qid,
            entries: self.mask + 1,
            sq_address: self.sq.bus_address(),
            cq_address: self.cq.bus_address(),
        }
    }

    /// Whether polling is what lets the device make progress.
    pub(crate) fn is_inline(&self) -> bool {
        self.step.is_some()
    }

    /// The queue's identifier.
    pub fn qid(&self) -> u16 {
        self.qid
    }

    /// Commands that can be in flight at once.
    pub fn capacity(&self) -> usize {
        usize::from(self.mask)
    }

    /// Commands submitted and not yet reaped.
    pub fn in_flight(&self) -> usize {
        self.capacity() - self.free.len()
    }

    /// The longest data transfer of one command, in bytes.
    pub fn max_transfer(&self) -> usize {
        self.max_transfer
    }

    /// Queues a command; the device learns of it at the next [`ring`](Self::ring). `token` comes back with the
    /// completion. The memory behind `data` must stay allocated until then. Returns the command identifier.
    // Inlined, the command is in registers. In memory it would be read in wider words than it was written in, which has to wait
    // until every store before, those of the last entry included, has got its cache line from the device.
    #[inline(always)]
    pub fn submit(
        &mut self,
        mut command: Command,
        data: Option<Data>,
        token: u64,
    ) -> Result<u16, SubmitError> {
        let Some(&index) = self.free.last() else { return Err(SubmitError::Full) };
        if let Some(data) = data {
            let page = PAGE as u64;
            if data.len.wrapping_sub(1) >= self.max_transfer
                || data.address & 3 != 0
                || data.address > u64::MAX - data.len as u64
            {
                return Err(SubmitError::BadData { data, max: self.max_transfer });
            }
            command.prp1 = data.address;
            let first = page - (data.address & (page - 1));
            let len = data.len as u64;
            if len > first {
                command.prp2 = if len - first <= page {
                    data.address + first
                } else {
                    self.lists.fill(index, data.address, data.len)
                };
            }
        }
        // In range: the slots are as many as `mask + 1`, and free indices are below.
        let Some(slot) = self.slots.get_mut(usize::from(index & self.mask)) else {
            return Err(SubmitError::Full);
        };
        let cid = slot.live as u16;
        slot.live = u32::from(cid);
        slot.token = token;
        slot.seen = UNSEEN;
        self.free.pop();
        self.sq.push(command.with_cid(cid));
        Ok(cid)
    }

    /// Tells the device of everything submitted since the last time: one doorbell write, or none if there is nothing new.
    #[inline]
    pub fn ring(&mut self) {
        let tail = self.sq.tail();
        if u32::from(tail) != self.rung {
            self.rung = u32::from(tail);
            self.sq_doorbell.ring(tail);
        }
    }

    /// Takes up to `max` (at least one) completions and gives each to `each`, with its own status; returns how many. Never blocks. A
    /// completion that makes no sense ends the batch with an error, after the good ones before it were given out;
    /// the next call goes on behind it.
    #[inline]
    pub fn reap(&mut self, max: usize, mut each: impl FnMut(Done)) -> Result<usize, QueueError> {
        let Some(mut high) = self.cq.peek() else {
            if self.step.is_some() {
                self.step_device();
            }
            return Ok(0);
        };
        let mut count = 0;
        loop {
            let entry = self.cq.take(high);
            let index = entry.cid & self.mask;
            let good = entry.sqid == self.qid && entry.sqhd <= self.mask;
            match self.slots.get_mut(usize::from(index)) {
                Some(slot) if good && slot.live == u32::from(entry.cid) => {
                    slot.live = free_again(slot.live, self.mask);
                    let token = slot.token;
                    self.give_slot(index);
                    count += 1;
                    each(Done { token, status: entry.status(), result: entry.dw0 });
                }
                _ => return Err(self.reject(entry)),
            }
            match self.cq.peek() {
                Some(next) if count < max => high = next,
                _ => break,
            }
        }
        let head = self.cq.head();
        if head.wrapping_sub(self.acknowledged as u16) & self.mask >= self.slack {
            self.acknowledge(head);
        }
        Ok(count)
    }

    /// Gives entries of the completion queue back to the device.
    #[inline]
    fn acknowledge(&mut self, head: u16) {
        self.acknowledged = u32::from(head);
        self.cq_doorbell.ring(head);
    }

    #[cold]
    #[inline(never)]
    fn step_device(&self) {
        if let Some(device) = &self.step {
            device.step();
        }
    }

    /// Skips a completion that makes no sense, and says what is wrong with it.
    #[cold]
    #[inline(never)]
    fn reject(&mut self, entry: Completion) -> QueueError {
        self.acknowledge(self.cq.head());
        self.complain(entry)
    }

    /// Puts a slot back. The stack has room for all slots from the start, so nothing is allocated.
    #[inline]
    fn give_slot(&mut self, index: u16) {
        if self.free.len() < self.free.capacity() {
            self.free.push(index);
        }
    }

    fn complain(&self, entry: Completion) -> QueueError {
        let (qid, cid) = (self.qid, entry.cid);
        if entry.sqid != qid {
            return QueueError::WrongQueue { qid, sqid: entry.sqid, cid };
        }
        if entry.sqhd > self.mask {
            return QueueError::BadHead { qid, sqhd: entry.sqhd, entries: self.mask + 1, cid };
        }
        match self.slots.get(usize::from(cid & self.mask)) {
            Some(slot) if slot.live == free_again(u32::from(cid), self.mask) => {
                QueueError::Duplicate { qid, cid }
            }
            _ => QueueError::UnknownCommand { qid, cid },
        }
    }

    /// Gives `late` the identifier and token of every command that has been in flight for `limit` or longer. A
    /// command's time starts at the first call that sees it, so that submitting does not read the clock.
    pub fn check_timeouts(&mut self, now: Duration, limit: Duration, mut late: impl FnMut(u16, u64)) {
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX - 1);
        let limit = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        for slot in self.slots.iter_mut().filter(|s| s.live & FREE == 0) {
            if slot.seen == UNSEEN {
                slot.seen = now;
            } else if now.saturating_sub(slot.seen) >= limit {
                late(slot.live as u16, slot.token);
            }
        }
    }
}

/// The `live` word of a slot whose command `live` is over: free, and the next identifier.
#[inline]
fn free_again(live: u32, mask: u16) -> u32 {
    FREE | u32::from((live as u16).wrapping_add(mask).wrapping_add(1))
}
