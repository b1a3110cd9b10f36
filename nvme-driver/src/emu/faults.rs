//! Faults on demand: what a bad drive does to commands, to its completions and to itself.

use std::ops::RangeInclusive;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

use super::controller::EmulatedController;
use crate::spec::{Command, Status};

/// What happens to a command instead of, or on top of, what should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is not executed and completes with this status.
    Status(Status),
    /// It is not executed and never completes, until it is aborted, its queue deleted, or the controller reset.
    Stall,
    /// It is executed, DMA included, only so many steps later.
    Delay {
        /// Calls of `step`.
        steps: u32,
    },
    /// It is executed, then the data it delivered is overwritten by random bytes (and dword 0 of the completion is
    /// random, if there is no data). Success is reported.
    Garbage,
    /// It is not executed at all; success is reported.
    Lie,
    /// It is executed, and its completion never posted.
    Lose,
    /// It is executed and completed twice.
    Duplicate,
    /// It is executed; the completion's command identifier is off by this (exclusive or).
    WrongCid(u16),
    /// It is executed; the completion's queue identifier is off by this (exclusive or).
    WrongSqid(u16),
    /// It is executed; the completion is written with the phase tag inverted, so that the host does not see it.
    WrongPhase,
    /// The controller sets CSTS.CFS instead of executing it.
    Fatal,
    /// The controller is gone from here on: all registers read as ones.
    Remove,
}

/// Which commands a fault is for. Empty fields match everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// Submission queue; 0 is the admin queue.
    pub queue: Option<u16>,
    /// Opcode.
    pub opcode: Option<u8>,
    /// Starting LBA (CDW10 and CDW11).
    pub lba: Option<RangeInclusive<u64>>,
}

impl Target {
    /// Every command of the admin queue with this opcode.
    pub fn admin(opcode: u8) -> Self {
        Self { queue: Some(0), opcode: Some(opcode), lba: None }
    }

    /// Every I/O command with this opcode, on any I/O queue.
    pub fn io(opcode: u8) -> Self {
        Self { queue: None, opcode: Some(opcode), lba: None }
    }

    /// `Target::io` means no I/O queue in particular, but never the admin queue: opcodes mean something else there.
    fn matches(&self, qid: u16, cmd: &Command) -> bool {
        self.queue.map_or(qid != 0, |q| q == qid)
            && self.opcode.is_none_or(|op| op == cmd.opcode())
            && self.lba.as_ref().is_none_or(|r| r.contains(&cmd.slba()))
    }
}

/// A fault for some commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Which commands. Without a queue: those of all I/O queues.
    pub target: Target,
    /// Matching commands to let pass first.
    pub skip: u64,
    /// Matching commands to hit then; `u64::MAX`: all.
    pub times: u64,
    /// What happens to them.
    pub fault: Fault,
}

impl Rule {
    /// The next matching command.
    pub fn once(target: Target, fault: Fault) -> Self {
        Self { target, skip: 0, times: 1, fault }
    }

    /// All matching commands.
    pub fn always(target: Target, fault: Fault) -> Self {
        Self { target, skip: 0, times: u64::MAX, fault }
    }
}

/// A wait of the host's that does not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stuck {
    /// CSTS.RDY does not follow CC.EN to 1.
    Enabling,
    /// CSTS.RDY does not follow CC.EN to 0.
    Disabling,
    /// CSTS.SHST stays at "in progress".
    ShuttingDown,
}

/// Faults that are armed, behind the lock.
#[derive(Debug)]
pub(super) struct Armed {
    rules: Vec<Rule>,
    /// One command in so many gets one of these.
    random: Option<(u32, Vec<Fault>)>,
    pub(super) stuck: Option<Stuck>,
    pub(super) rng: Xoshiro256PlusPlus,
}

impl Armed {
    pub(super) fn new(seed: u64) -> Self {
        let rng = Xoshiro256PlusPlus::seed_from_u64(seed ^ 0x6661_756c_7473);
        Self { rules: Vec::new(), random: None, stuck: None, rng }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rules.is_empty() && self.random.is_none()
    }

    /// The fault for this command, if there is one.
    pub(super) fn pick(&mut self, qid: u16, cmd: &Command) -> Option<Fault> {
        for rule in &mut self.rules {
            if !rule.target.matches(qid, cmd) || rule.times == 0 {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
                continue;
            }
            if rule.times != u64::MAX {
                rule.times -= 1;
            }
            let fault = rule.fault;
            self.rules.retain(|r| r.times > 0);
            return Some(fault);
        }
        let (one_in, faults) = self.random.as_ref()?;
        if qid == 0 || faults.is_empty() || !self.rng.next_u32().is_multiple_of(*one_in) {
            return None;
        }
        Some(faults[self.rng.next_u32() as usize % faults.len()])
    }
}

/// The faults of one controller.
#[derive(Debug)]
pub struct Faults<'a> {
    pub(super) controller: &'a EmulatedController,
}

impl Faults<'_> {
    /// Arms a fault. Rules are tried in the order they were added; the first that matches counts.
    pub fn inject(&self, rule: Rule) {
        self.controller.lock().faults.rules.push(rule);
    }

    /// From now on one I/O command in `one_in` (at least 1) gets one of `faults`, by the controller's seed.
    pub fn randomly(&self, one_in: u32, faults: &[Fault]) {
        self.controller.lock().faults.random = Some((one_in.max(1), faults.to_vec()));
    }

    /// Disarms everything. Commands that are stalled stay so.
    pub fn clear(&self) {
        let mut state = self.controller.lock();
        state.faults.rules.clear();
        state.faults.random = None;
        state.faults.stuck = None;
    }

    /// Makes a wait of the host's never end; `None`: no more.
    pub fn set_stuck(&self, stuck: Option<Stuck>) {
        self.controller.lock().faults.stuck = stuck;
    }

    /// Sets CSTS.CFS: nothing goes on until the controller is reset.
    pub fn fatal(&self) {
        self.controller.lock().fatal();
    }

    /// Takes the controller out of its slot: registers and config space read as ones, and so does the CMB.
    pub fn remove(&self) {
        self.controller.lock().remove();
    }

    /// Detaches the namespace or attaches it again, and has the host told (Namespace Attribute Notice).
    pub fn set_namespace_attached(&self, attached: bool) {
        self.controller.lock().set_attached(attached);
    }

    /// Gives the namespace another size, at most what its backing holds, and has the host told.
    pub fn set_namespace_size(&self, bytes: u64) {
        self.controller.lock().resize_namespace(bytes);
    }

    /// Gives the drive another temperature in kelvins (300 until then). Beyond the host's threshold the host is told (SMART / Health).
    pub fn set_temperature(&self, kelvin: u16) {
        self.controller.lock().become_hot(kelvin);
    }

    /// Commands that were fetched and are held: stalled or delayed.
    pub fn held(&self) -> usize {
        self.controller.lock().held.len()
    }
}
