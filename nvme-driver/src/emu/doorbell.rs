//! Doorbells: a page of shared memory that the host writes and the controller looks at.
//!
//! What cannot be seen there is a write of the value that is already there; everything else that the specification calls
//! an invalid doorbell write is reported as an asynchronous event, and the value is ignored.

use std::sync::atomic::Ordering;

use super::admin::Event;
use super::state::State;
use crate::mem::{Mapping, PAGE};
use crate::spec::regs::{DOORBELLS, cq_head_doorbell, sq_tail_doorbell};

/// Queue identifiers whose doorbells one idle step looks at, in case someone wrote one of a queue that does not exist.
const SCANNED_PER_STEP: u16 = 4;

/// Queue identifiers that have doorbells in the page.
const QUEUES_IN_PAGE: u16 = (PAGE / 8) as u16;

/// The value of the doorbell at `offset` of BAR0.
#[inline]
fn load(page: &Mapping, offset: u64) -> u32 {
    page.u32_at((offset - DOORBELLS) as usize).map_or(0, |d| d.load(Ordering::Acquire))
}

impl State {
    /// A doorbell written through a register access rather than through memory.
    pub(super) fn write_doorbell(&mut self, offset: u64, value: u32) {
        if let Ok(word) = self.doorbells.u32_at((offset - DOORBELLS) as usize) {
            word.store(value, Ordering::Release);
        }
    }

    /// Looks at the tail doorbell of a submission queue.
    #[inline]
    pub(super) fn poll_tail(&mut self, qid: u16) {
        let value = load(&self.doorbells, sq_tail_doorbell(qid, 0));
        let Some(Some(sq)) = self.sqs.get_mut(usize::from(qid)) else { return };
        if value == sq.doorbell {
            return;
        }
        sq.doorbell = value;
        if !sq.set_tail(value) {
            self.bad_doorbell(Event::INVALID_DOORBELL_VALUE, qid, value);
        }
    }

    /// Looks at the head doorbell of a completion queue.
    #[inline]
    pub(super) fn poll_head(&mut self, qid: u16) {
        let value = load(&self.doorbells, cq_head_doorbell(qid, 0));
        let Some(Some(cq)) = self.cqs.get_mut(usize::from(qid)) else { return };
        if value == cq.doorbell {
            return;
        }
        cq.doorbell = value;
        if !cq.set_head(value) {
            self.bad_doorbell(Event::INVALID_DOORBELL_VALUE, qid, value);
        }
    }

    fn bad_doorbell(&mut self, event: Event, qid: u16, value: u32) {
        tracing::debug!(qid, value, "invalid doorbell write ignored");
        self.counters.bad_doorbells += 1;
        self.admin.raise(event);
    }

    /// Looks for doorbells of queues that do not exist, a few in each idle step; they read 0 unless someone wrote them.
    pub(super) fn scan_unused_doorbells(&mut self) {
        let first = self.next_scanned;
        self.next_scanned = (first + SCANNED_PER_STEP) % QUEUES_IN_PAGE;
        for qid in first..first + SCANNED_PER_STEP {
            if !matches!(self.sqs.get(usize::from(qid)), Some(Some(_))) {
                self.report_unused(sq_tail_doorbell(qid, 0), qid);
            }
            if !matches!(self.cqs.get(usize::from(qid)), Some(Some(_))) {
                self.report_unused(cq_head_doorbell(qid, 0), qid);
            }
        }
    }

    fn report_unused(&mut self, offset: u64, qid: u16) {
        let value = load(&self.doorbells, offset);
        if value != 0 {
            self.reset_doorbell(offset);
            self.bad_doorbell(Event::INVALID_DOORBELL_REGISTER, qid, value);
        }
    }

    /// A queue comes or goes: its doorbell starts from 0.
    pub(super) fn reset_doorbell(&mut self, offset: u64) {
        self.write_doorbell(offset, 0);
    }
}
