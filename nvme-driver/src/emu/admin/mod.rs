//! Admin commands and what they act on (Base Specification, "Admin Command Set").
//!
//! * [`queues`]: create and delete I/O queues
//! * [`identify`]: the Identify data structures
//! * [`features`]: get and set features
//! * [`logs`]: get log page
//! * [`format`]: Format NVM
//!
//! Asynchronous events and Abort are here.

mod features;
mod format;
mod identify;
mod logs;
mod queues;

use std::collections::VecDeque;

use super::bus::Bus;
use super::data::Direction;
use super::state::{Fixed, State};
use super::step::Outcome;
use crate::spec::features::{LOG_ERROR, LOG_SMART};
use crate::spec::{AdminOpcode, Command, Status};
use features::Features;
use logs::{ErrorEntry, Kelvin};

/// Asynchronous Event Requests held at a time (Identify Controller AERL + 1).
const AER_LIMIT: usize = 4;
/// Entries kept in the Error Information log (Identify Controller ELPE + 1).
const ERRORS_KEPT: usize = 64;
/// Events remembered while no request is held.
const EVENTS_KEPT: usize = 16;
/// Log page: Changed Namespace List.
const LOG_CHANGED_NAMESPACES: u8 = 0x04;

/// An asynchronous event: type, information, and the log page that tells more and clears it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    kind: u8,
    info: u8,
    log: u8,
}

impl Event {
    /// Error status: a doorbell of no queue was written.
    pub(super) const INVALID_DOORBELL_REGISTER: Self = Self { kind: 0, info: 0, log: LOG_ERROR };
    /// Error status: a doorbell was written with a value it cannot have.
    pub(super) const INVALID_DOORBELL_VALUE: Self = Self { kind: 0, info: 1, log: LOG_ERROR };
    /// SMART / health status: temperature threshold.
    pub(super) const TEMPERATURE: Self = Self { kind: 1, info: 1, log: LOG_SMART };
    /// Notice: namespace attribute changed.
    pub(super) const NAMESPACE_CHANGED: Self = Self { kind: 2, info: 0, log: LOG_CHANGED_NAMESPACES };

    fn dw0(self) -> u32 {
        u32::from(self.kind) | (u32::from(self.info) << 8) | (u32::from(self.log) << 16)
    }
}

/// State of the admin command set.
#[derive(Debug)]
pub(super) struct Admin {
    features: Features,
    /// Command identifiers of the Asynchronous Event Requests held.
    requests: Vec<u16>,
    events: VecDeque<Event>,
    /// Event types reported and not yet cleared by reading their log page.
    masked: [bool; 8],
    errors: VecDeque<ErrorEntry>,
    error_count: u64,
    /// An I/O queue was created since the controller was enabled.
    queues_created: bool,
    attached: bool,
    namespace_changed: bool,
    started_at: u64,
    temperature: Kelvin,
}

impl Admin {
    pub(super) fn new(fixed: &Fixed) -> Self {
        Self {
            features: Features::new(fixed),
            requests: Vec::with_capacity(AER_LIMIT),
            events: VecDeque::with_capacity(EVENTS_KEPT),
            masked: [false; 8],
            errors: VecDeque::with_capacity(ERRORS_KEPT),
            error_count: 0,
            queues_created: false,
            attached: true,
            namespace_changed: false,
            started_at: (fixed.clock)(),
            temperature: Kelvin::default(),
        }
    }

    /// A controller level reset. The namespace and the error log are not the controller's to forget.
    pub(super) fn reset(&mut self, fixed: &Fixed) {
        self.features.reset(fixed);
        self.requests.clear();
        self.events.clear();
        self.masked = [false; 8];
        self.queues_created = false;
    }

    pub(super) fn namespace_is_attached(&self) -> bool {
        self.attached
    }

    /// Says whether that was a change.
    pub(super) fn set_attached(&mut self, attached: bool) -> bool {
        let changed = self.attached != attached;
        self.attached = attached;
        self.namespace_changed |= changed;
        changed
    }

    /// For the Changed Namespace List.
    pub(super) fn note_namespace_change(&mut self) {
        self.namespace_changed = true;
    }

    /// Commands that one queue may have executed at a time.
    pub(super) fn arbitration_burst(&self) -> u32 {
        self.features.arbitration_burst()
    }

    /// Something happened that the host may have asked to be told.
    pub(super) fn raise(&mut self, event: Event) {
        if !self.features.wants(event) || self.events.contains(&event) {
            return;
        }
        if self.events.len() < EVENTS_KEPT {
            self.events.push_back(event);
        }
    }
}

impl State {
    pub(super) fn execute_admin(&mut self, bus: &Bus<'_>, cmd: &Command) -> Outcome {
        let Some(op) = AdminOpcode::from_u8(cmd.opcode()) else {
            return Outcome::Done(Status::INVALID_OPCODE, 0);
        };
        if cmd.fuse() != 0 || cmd.psdt() != 0 {
            return Outcome::Done(Status::INVALID_FIELD, 0);
        }
        match op {
            AdminOpcode::CreateIoCq => self.create_cq(bus, cmd),
            AdminOpcode::CreateIoSq => self.create_sq(bus, cmd),
            AdminOpcode::DeleteIoSq => self.delete_sq(bus, cmd),
            AdminOpcode::DeleteIoCq => self.delete_cq(cmd),
            AdminOpcode::Identify => self.identify(bus, cmd),
            AdminOpcode::GetLogPage => self.get_log_page(bus, cmd),
            AdminOpcode::SetFeatures => self.set_features(bus, cmd),
            AdminOpcode::GetFeatures => self.get_features(bus, cmd),
            AdminOpcode::FormatNvm => self.format_nvm(cmd),
            AdminOpcode::Abort => Ok(self.abort(bus, cmd)),
            AdminOpcode::AsyncEventRequest => return self.async_event_request(cmd),
            // KAS is 0: a memory-mapped controller has no keep-alive timer.
            AdminOpcode::KeepAlive => Err(Status::INVALID_OPCODE),
        }
        .into()
    }

    /// Sends a reply of at most the length the command has room for.
    fn reply(&mut self, bus: &Bus<'_>, cmd: &Command, data: &[u8]) -> Result<u32, Status> {
        self.pointers.locate(bus, cmd, data.len(), Direction::In)?;
        self.scatter(bus, data)?;
        Ok(0)
    }

    /// Asynchronous Event Request: held until there is something to say.
    fn async_event_request(&mut self, cmd: &Command) -> Outcome {
        if self.admin.requests.contains(&cmd.cid()) {
            return Outcome::Done(Status::COMMAND_ID_CONFLICT, 0);
        }
        if self.admin.requests.len() >= AER_LIMIT {
            return Outcome::Done(Status::AER_LIMIT_EXCEEDED, 0);
        }
        self.admin.requests.push(cmd.cid());
        Outcome::Held
    }

    /// Completes held requests with the events there are. An event type that was reported is silent until the host has
    /// read its log page.
    pub(super) fn deliver_events(&mut self, bus: &Bus<'_>) -> bool {
        let mut worked = false;
        while !self.admin.requests.is_empty()
            && let Some(at) =
                self.admin.events.iter().position(|e| !self.admin.masked[usize::from(e.kind & 7)])
            && let Some(event) = self.admin.events.remove(at)
        {
            self.admin.masked[usize::from(event.kind & 7)] = true;
            let cid = self.admin.requests.remove(0);
            self.complete(bus, 0, cid, Status::SUCCESS, event.dw0());
            worked = true;
        }
        worked
    }

    /// Abort: a command is found if it is held; all others are complete already. Dword 0, bit 0: not aborted.
    fn abort(&mut self, bus: &Bus<'_>, cmd: &Command) -> u32 {
        let (qid, cid) = (cmd.cdw10 as u16, (cmd.cdw10 >> 16) as u16);
        if self.abort_held(bus, qid, cid) {
            return 0;
        }
        match self.admin.requests.iter().position(|&r| qid == 0 && r == cid) {
            Some(at) => {
                self.admin.requests.remove(at);
                self.complete(bus, 0, cid, Status::ABORT_REQUESTED, 0);
                0
            }
            None => 1,
        }
    }
}
