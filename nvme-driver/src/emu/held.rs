//! Commands under a fault: held back, executed late, or completed wrongly.

use rand_xoshiro::rand_core::Rng;

use super::admin::Event;
use super::bus::Bus;
use super::faults::Fault;
use super::state::State;
use super::step::Outcome;
use crate::spec::{Command, Completion, Status};

/// A command that was fetched and is not complete.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub(super) qid: u16,
    pub(super) cmd: Command,
    /// The step in which it is executed; `None`: never.
    until: Option<u64>,
}

impl State {
    /// Executes a command while faults are armed or commands are held.
    pub(super) fn execute_disturbed(&mut self, bus: &Bus<'_>, qid: u16, cmd: &Command) -> Outcome {
        if self.is_outstanding(qid, cmd.cid()) {
            return Outcome::Done(Status::COMMAND_ID_CONFLICT, 0);
        }
        let Some(fault) = self.faults.pick(qid, cmd) else {
            return self.execute(bus, qid, cmd, false);
        };
        tracing::debug!(qid, cid = cmd.cid(), ?fault, "injected");
        self.counters.injected += 1;
        match fault {
            Fault::Status(status) => Outcome::Done(status, 0),
            Fault::Lie => Outcome::Done(Status::SUCCESS, 0),
            Fault::Stall => {
                self.held.push(Held { qid, cmd: *cmd, until: None });
                Outcome::Held
            }
            Fault::Delay { steps } => {
                let until = Some(self.steps + u64::from(steps));
                self.held.push(Held { qid, cmd: *cmd, until });
                Outcome::Held
            }
            Fault::Fatal => {
                self.fatal();
                Outcome::Held
            }
            Fault::Remove => {
                self.remove();
                Outcome::Held
            }
            Fault::Garbage => self.execute_to_garbage(bus, qid, cmd),
            Fault::Lose | Fault::Duplicate | Fault::WrongCid(_) | Fault::WrongSqid(_) | Fault::WrongPhase => {
                let outcome = self.execute(bus, qid, cmd, false);
                self.complete_wrongly(bus, qid, cmd.cid(), outcome, fault);
                Outcome::Held
            }
        }
    }

    fn execute_to_garbage(&mut self, bus: &Bus<'_>, qid: u16, cmd: &Command) -> Outcome {
        self.pointers.segments.clear();
        if let Outcome::Held = self.execute(bus, qid, cmd, false) {
            return Outcome::Held;
        }
        // Bits 1:0 of an opcode say which way data goes; 10b: to the host.
        if cmd.opcode() & 3 != 2 {
            return Outcome::Done(Status::SUCCESS, self.faults.rng.next_u32());
        }
        let mut noise = [0u8; 4096];
        for i in 0..self.pointers.segments.len() {
            let s = self.pointers.segments[i];
            let mut done = 0;
            while done < s.len {
                let n = (s.len - done).min(noise.len());
                self.faults.rng.fill_bytes(&mut noise[..n]);
                if bus.write(s.addr.wrapping_add(done as u64), &noise[..n]).is_err() {
                    break;
                }
                done += n;
            }
        }
        Outcome::Done(Status::SUCCESS, 0)
    }

    fn complete_wrongly(&mut self, bus: &Bus<'_>, qid: u16, cid: u16, outcome: Outcome, fault: Fault) {
        let Outcome::Done(status, dw0) = outcome else { return };
        let Some(Some(sq)) = self.sqs.get(usize::from(qid)) else { return };
        let (cqid, sqhd) = (sq.cq, sq.head as u16);
        let mut entry = Completion { dw0, dw1: 0, sqhd, sqid: qid, cid, status_phase: status.field() << 1 };
        match fault {
            Fault::Duplicate => self.post(bus, cqid, entry),
            Fault::WrongCid(x) => entry.cid ^= x,
            Fault::WrongSqid(x) => entry.sqid ^= x,
            Fault::WrongPhase => {
                self.post_inverted(bus, cqid, entry);
                return;
            }
            _ => return,
        }
        self.post(bus, cqid, entry);
    }

    /// Takes an entry of the queue and writes it as if it were not new.
    fn post_inverted(&mut self, bus: &Bus<'_>, cqid: u16, entry: Completion) {
        let Some(Some(cq)) = self.cqs.get_mut(usize::from(cqid)) else { return };
        if !cq.has_room() {
            return;
        }
        let (at, phase) = cq.take();
        let entry = Completion { status_phase: entry.status_phase | u16::from(!phase), ..entry };
        if bus.write(at, bytemuck::bytes_of(&entry)).is_err() {
            self.fatal();
        }
    }

    fn is_outstanding(&self, qid: u16, cid: u16) -> bool {
        self.held.iter().any(|h| h.qid == qid && h.cmd.cid() == cid)
    }

    /// Executes delayed commands whose time has come.
    pub(super) fn release_held(&mut self, bus: &Bus<'_>) -> bool {
        let mut worked = false;
        let mut i = 0;
        while i < self.held.len() && self.is_running() {
            if self.held[i].until.is_none_or(|until| until > self.steps) {
                i += 1;
                continue;
            }
            let Held { qid, cmd, .. } = self.held.remove(i);
            if let Outcome::Done(status, dw0) = self.execute(bus, qid, &cmd, false) {
                self.complete(bus, qid, cmd.cid(), status, dw0);
            }
            worked = true;
        }
        worked
    }

    /// Abort: completes a held command as aborted; says whether it was found.
    pub(super) fn abort_held(&mut self, bus: &Bus<'_>, qid: u16, cid: u16) -> bool {
        let Some(at) = self.held.iter().position(|h| h.qid == qid && h.cmd.cid() == cid) else {
            return false;
        };
        self.held.remove(at);
        self.complete(bus, qid, cid, Status::ABORT_REQUESTED, 0);
        true
    }

    /// A submission queue is about to be deleted: its held commands complete as aborted.
    pub(super) fn abort_queue(&mut self, bus: &Bus<'_>, qid: u16) {
        while let Some(at) = self.held.iter().position(|h| h.qid == qid) {
            let held = self.held.remove(at);
            self.complete(bus, qid, held.cmd.cid(), Status::ABORTED_SQ_DELETION, 0);
        }
    }

    /// See [`Faults::remove`](super::Faults::remove).
    pub(super) fn remove(&mut self) {
        self.forget_work();
        self.removed = true;
        let ones = [0xff; 4096];
        for memory in [&self.cmb, &self.pmr].into_iter().flatten() {
            for at in (0..memory.len()).step_by(ones.len()) {
                if let Err(e) = memory.write(at, &ones) {
                    tracing::error!("device memory: {e}");
                }
            }
        }
    }

    /// See [`Faults::set_namespace_size`](super::Faults::set_namespace_size).
    pub(super) fn resize_namespace(&mut self, bytes: u64) {
        let before = self.namespace.blocks();
        self.namespace.resize(bytes);
        if self.namespace.blocks() != before {
            self.admin.note_namespace_change();
            self.admin.raise(Event::NAMESPACE_CHANGED);
        }
    }

    /// See [`Faults::set_namespace_attached`](super::Faults::set_namespace_attached).
    pub(super) fn set_attached(&mut self, attached: bool) {
        if self.admin.set_attached(attached) {
            self.admin.raise(Event::NAMESPACE_CHANGED);
        }
    }
}
