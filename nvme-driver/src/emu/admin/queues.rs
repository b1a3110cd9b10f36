//! Create and delete I/O queues.

use super::super::bus::{Bus, Place};
use super::super::queue::{Cq, Sq};
use super::super::state::State;
use crate::spec::regs::{cq_head_doorbell, sq_tail_doorbell};
use crate::spec::{Command, Status};

/// CDW11 bit 0: physically contiguous.
const PC: u32 = 1;
/// CDW11 bit 1 of Create I/O Completion Queue: interrupts enabled.
const IEN: u32 = 2;

impl State {
    /// QID and QSIZE of a create command, checked. QSIZE is 0's based on the wire, the result is not.
    fn queue_shape(&self, cmd: &Command, exists: impl Fn(usize) -> bool) -> Result<(u16, u32), Status> {
        let (qid, entries) = (cmd.cdw10 as u16, (cmd.cdw10 >> 16) + 1);
        if qid == 0 || qid > self.fixed.io_queues || exists(usize::from(qid)) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        if entries < 2 || entries > self.fixed.max_queue_entries {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        // CAP.CQR: queues must be physically contiguous.
        if cmd.cdw11 & PC == 0 {
            return Err(Status::INVALID_FIELD);
        }
        if !cmd.prp1.is_multiple_of(self.regs.page_size()) {
            return Err(Status::INVALID_PRP_OFFSET);
        }
        Ok((qid, entries))
    }

    /// A queue may lie in the CMB only where CMBSZ says so, and then as a whole.
    fn queue_place(&self, bus: &Bus<'_>, cmd: &Command, bytes: usize, in_cmb: bool) -> Result<(), Status> {
        let place = bus.place(cmd.prp1);
        if (place == Place::Cmb && !in_cmb)
            || place == Place::Pmr
            || bus.len_in_place(cmd.prp1, bytes) < bytes
        {
            return Err(Status::INVALID_USE_OF_CMB);
        }
        Ok(())
    }

    pub(super) fn create_cq(&mut self, bus: &Bus<'_>, cmd: &Command) -> Result<u32, Status> {
        let (qid, entries) = self.queue_shape(cmd, |q| self.cqs[q].is_some())?;
        if self.regs.cc.iocqes() != 4 {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        let vector = (cmd.cdw11 >> 16) as u16;
        let vector = if cmd.cdw11 & IEN != 0 { Some(vector) } else { None };
        if vector.is_some_and(|v| v > self.fixed.io_queues) {
            return Err(Status::INVALID_INTERRUPT_VECTOR);
        }
        self.queue_place(bus, cmd, entries as usize * 16, self.fixed.cmb.completion_queues)?;
        self.reset_doorbell(cq_head_doorbell(qid, 0));
        self.cqs[usize::from(qid)] = Some(Cq::new(cmd.prp1, entries, vector));
        self.admin.queues_created = true;
        Ok(0)
    }

    pub(super) fn create_sq(&mut self, bus: &Bus<'_>, cmd: &Command) -> Result<u32, Status> {
        let (qid, entries) = self.queue_shape(cmd, |q| self.sqs[q].is_some())?;
        if self.regs.cc.iosqes() != 6 {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        let cqid = (cmd.cdw11 >> 16) as u16;
        if cqid == 0 || cqid > self.fixed.io_queues {
            return Err(Status::INVALID_QUEUE_ID);
        }
        self.queue_place(bus, cmd, entries as usize * 64, self.fixed.cmb.submission_queues)?;
        let Some(Some(cq)) = self.cqs.get_mut(usize::from(cqid)) else {
            return Err(Status::INVALID_CQ);
        };
        cq.users += 1;
        self.reset_doorbell(sq_tail_doorbell(qid, 0));
        self.sqs[usize::from(qid)] = Some(Sq::new(cmd.prp1, entries, cqid));
        self.active.push(qid);
        self.admin.queues_created = true;
        Ok(0)
    }

    /// Commands of the queue that were not fetched are forgotten; those that are held complete as aborted.
    pub(super) fn delete_sq(&mut self, bus: &Bus<'_>, cmd: &Command) -> Result<u32, Status> {
        let qid = cmd.cdw10 as u16;
        if qid == 0 {
            return Err(Status::INVALID_QUEUE_ID);
        }
        self.abort_queue(bus, qid);
        let sq = self.sqs.get_mut(usize::from(qid)).and_then(Option::take).ok_or(Status::INVALID_QUEUE_ID)?;
        self.active.retain(|&q| q != qid);
        if let Some(Some(cq)) = self.cqs.get_mut(usize::from(sq.cq)) {
            cq.users -= 1;
        }
        self.reset_doorbell(sq_tail_doorbell(qid, 0));
        Ok(0)
    }

    pub(super) fn delete_cq(&mut self, cmd: &Command) -> Result<u32, Status> {
        let qid = cmd.cdw10 as u16;
        if qid == 0 {
            return Err(Status::INVALID_QUEUE_ID);
        }
        let slot = self.cqs.get_mut(usize::from(qid)).ok_or(Status::INVALID_QUEUE_ID)?;
        match slot {
            None => return Err(Status::INVALID_QUEUE_ID),
            Some(cq) if cq.users > 0 => return Err(Status::INVALID_QUEUE_DELETION),
            Some(cq) => self.completions_waiting -= cq.waiting.len() as u32,
        }
        *slot = None;
        self.reset_doorbell(cq_head_doorbell(qid, 0));
        Ok(0)
    }
}
