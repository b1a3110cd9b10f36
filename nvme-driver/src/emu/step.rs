//! One step: doorbells are looked at, commands fetched, executed and completed, interrupts sent.

use super::bus::Bus;
use super::queue::Cq;
use super::state::State;
use crate::spec::{Command, Completion, NvmOpcode, Status};

/// Bytes after whose movement a step ends: whoever else wants the controller does not wait for long.
const BYTES_PER_STEP: u64 = 64 << 20;

/// Entries of a submission queue that are fetched together: the cache lines of all of them are on their way at once.
pub(super) const FETCH: usize = 16;

/// What became of a command.
pub(super) enum Outcome {
    /// It completes now, with this status and this dword 0.
    Done(Status, u32),
    /// It completes later, or never.
    Held,
}

impl From<Result<u32, Status>> for Outcome {
    fn from(result: Result<u32, Status>) -> Self {
        match result {
            Ok(dw0) => Self::Done(Status::SUCCESS, dw0),
            Err(status) => Self::Done(status, 0),
        }
    }
}

impl State {
    /// Makes progress; says whether there was any to make.
    pub(super) fn step(&mut self, bus: &Bus<'_>) -> bool {
        if self.removed {
            return false;
        }
        self.steps += 1;
        let mut worked = self.become_ready();
        if !self.is_running() {
            return worked;
        }
        worked |= self.post_waiting(bus);
        if !self.held.is_empty() {
            worked |= self.release_held(bus);
        }
        worked |= self.run_queues(bus);
        worked |= self.deliver_events(bus);
        self.signal();
        if !worked {
            self.scan_unused_doorbells();
        }
        worked
    }

    /// Round robin over the submission queues (Base Specification, "Round Robin Arbitration").
    fn run_queues(&mut self, bus: &Bus<'_>) -> bool {
        let burst = self.admin.arbitration_burst();
        let mut budget = self.fixed.commands_per_step;
        let mut idle_in_a_row = 0;
        let enough = self.namespace.effort + BYTES_PER_STEP;
        // A full round without work ends the step.
        while budget > 0 && idle_in_a_row < self.active.len() && self.is_running() {
            if self.turn >= self.active.len() {
                self.turn = 0;
            }
            let qid = self.active[self.turn];
            let did = self.run_queue(bus, qid, burst.min(budget), enough);
            budget -= did;
            idle_in_a_row = if did == 0 { idle_in_a_row + 1 } else { 0 };
            self.turn += 1;
        }
        self.finish_reads(bus);
        budget < self.fixed.commands_per_step
    }

    /// Fetches and executes up to `limit` commands of one queue, until the namespace's effort is `enough`.
    fn run_queue(&mut self, bus: &Bus<'_>, qid: u16, limit: u32, enough: u64) -> u32 {
        self.poll_tail(qid);
        let Some(Some(sq)) = self.sqs.get(usize::from(qid)) else { return 0 };
        let cqid = sq.cq;
        self.poll_head(cqid);
        let mut did = 0;
        while did < limit {
            let fetched = self.fetch(bus, qid, limit - did);
            for i in 0..fetched {
                let room = matches!(self.cqs.get(usize::from(cqid)), Some(Some(cq)) if cq.has_room());
                if !room || self.namespace.effort >= enough || !self.is_running() {
                    return did;
                }
                let Some(Some(sq)) = self.sqs.get_mut(usize::from(qid)) else { return did };
                sq.take();
                did += 1;
                if let Some(next) = self.fetched[..fetched].get(i + 1) {
                    self.expect(qid, next);
                }
                let cmd = self.fetched[i];
                self.run_command(bus, qid, &cmd);
            }
            if fetched == 0 {
                break;
            }
        }
        did
    }

    /// Reads up to `limit` of the entries that wait in a submission queue; says how many. They stay in the queue.
    fn fetch(&mut self, bus: &Bus<'_>, qid: u16, limit: u32) -> usize {
        let Some(Some(sq)) = self.sqs.get(usize::from(qid)) else { return 0 };
        let n = sq.waiting_in_a_row().min(limit) as usize;
        let into = &mut self.fetched[..n.min(FETCH)];
        if into.is_empty() {
            return 0;
        }
        let n = into.len();
        if let Err(fault) = bus.read(sq.next(), bytemuck::cast_slice_mut(into)) {
            tracing::debug!("submission queue {qid}: {fault}");
            self.counters.iommu_faults += 1;
            self.fatal();
            return 0;
        }
        n
    }

    /// A command will be executed soon: its blocks come closer to the processor meanwhile.
    #[inline]
    fn expect(&self, qid: u16, cmd: &Command) {
        if qid != 0 && (cmd.opcode() == NvmOpcode::Read as u8 || cmd.opcode() == NvmOpcode::Write as u8) {
            self.namespace.expect(cmd.slba(), cmd.blocks());
        }
    }

    fn run_command(&mut self, bus: &Bus<'_>, qid: u16, cmd: &Command) {
        let outcome = if self.held.is_empty() && self.faults.is_empty() {
            self.execute(bus, qid, cmd, true)
        } else {
            self.execute_disturbed(bus, qid, cmd)
        };
        match outcome {
            Outcome::Done(status, dw0) => self.complete(bus, qid, cmd.cid(), status, dw0),
            Outcome::Held => {}
        }
    }

    /// Executes a command of queue `qid`. `defer`: a read may be left under way until the end of the step.
    pub(super) fn execute(&mut self, bus: &Bus<'_>, qid: u16, cmd: &Command, defer: bool) -> Outcome {
        // Whatever is not one more read waits for the reads under way.
        if qid == 0 || cmd.opcode() != NvmOpcode::Read as u8 || !defer {
            self.finish_reads(bus);
        }
        if qid == 0 {
            self.counters.admin_commands[usize::from(cmd.opcode())] += 1;
            self.execute_admin(bus, cmd)
        } else {
            self.counters.io_commands[usize::from(cmd.opcode())] += 1;
            self.execute_io(bus, qid, cmd, defer)
        }
    }

    /// Posts a completion for a command of queue `qid`.
    pub(super) fn complete(&mut self, bus: &Bus<'_>, qid: u16, cid: u16, status: Status, dw0: u32) {
        let Some(Some(sq)) = self.sqs.get(usize::from(qid)) else { return };
        let (cqid, sqhd) = (sq.cq, sq.head as u16);
        let status = with_retry_advice(status);
        if !status.is_success() {
            self.counters.errors += 1;
            self.admin.log_error(qid, cid, status);
        }
        let entry = Completion { dw0, dw1: 0, sqhd, sqid: qid, cid, status_phase: status.field() << 1 };
        self.post(bus, cqid, entry);
    }

    /// Writes a completion entry, or keeps it until the queue has room.
    pub(super) fn post(&mut self, bus: &Bus<'_>, cqid: u16, entry: Completion) {
        let Some(Some(cq)) = self.cqs.get_mut(usize::from(cqid)) else { return };
        if !cq.has_room() {
            cq.waiting.push_back(entry);
            self.completions_waiting += 1;
            return;
        }
        if !cq.to_signal {
            self.to_signal.push(cqid);
        }
        if write_entry(bus, cq, entry).is_err() {
            self.counters.iommu_faults += 1;
            self.fatal();
        }
    }

    /// Posts completions that found their queue full.
    fn post_waiting(&mut self, bus: &Bus<'_>) -> bool {
        let mut worked = false;
        if self.completions_waiting == 0 {
            return false;
        }
        for cqid in 0..self.cqs.len() {
            let Some(cq) = &self.cqs[cqid] else { continue };
            if cq.waiting.is_empty() {
                continue;
            }
            self.poll_head(cqid as u16);
            let Some(cq) = &mut self.cqs[cqid] else { continue };
            while !cq.is_full()
                && let Some(entry) = cq.waiting.pop_front()
            {
                worked = true;
                self.completions_waiting -= 1;
                if !cq.to_signal {
                    self.to_signal.push(cqid as u16);
                }
                if write_entry(bus, cq, entry).is_err() {
                    self.counters.iommu_faults += 1;
                    self.regs.csts.set_cfs(true);
                    return worked;
                }
            }
        }
        worked
    }

    /// Sends one interrupt for each completion queue that got entries in this step.
    fn signal(&mut self) {
        while let Some(cqid) = self.to_signal.pop() {
            let Some(Some(cq)) = self.cqs.get_mut(usize::from(cqid)) else { continue };
            cq.to_signal = false;
            if let Some(vector) = cq.vector
                && self.msix.raise(vector)
            {
                self.counters.interrupts += 1;
            }
        }
    }
}

fn write_entry(bus: &Bus<'_>, cq: &mut Cq, mut entry: Completion) -> Result<(), ()> {
    let (at, phase) = cq.take();
    entry.status_phase = (entry.status_phase & !1) | u16::from(phase);
    let bytes: [u8; 16] = bytemuck::cast(entry);
    let word = |i: usize| {
        let mut w = [0; 8];
        w.copy_from_slice(&bytes[i..i + 8]);
        u64::from_le_bytes(w)
    };
    bus.publish(at, [word(0), word(8)]).map_err(|fault| tracing::debug!("completion queue: {fault}"))
}

/// Sets Do Not Retry where the same command would fail again.
fn with_retry_advice(status: Status) -> Status {
    let again = [
        Status::SUCCESS,
        Status::DATA_TRANSFER_ERROR,
        Status::INTERNAL_ERROR,
        Status::ABORT_REQUESTED,
        Status::ABORTED_SQ_DELETION,
        Status::ABORT_LIMIT_EXCEEDED,
        Status::AER_LIMIT_EXCEEDED,
        Status::COMMAND_ID_CONFLICT,
        Status::NAMESPACE_NOT_READY,
        Status::UNRECOVERED_READ_ERROR,
        Status::WRITE_FAULT,
        // Somebody may make room.
        Status::CAPACITY_EXCEEDED,
        Status::COMMAND_INTERRUPTED,
    ];
    if again.iter().any(|s| status.is(*s)) { status } else { status.with_dnr() }
}
