//! Asynchronous events: what a controller reports by itself.

use super::admin::AdminQueue;
use super::{ControllerError, Env};

/// Something the controller reported (Base Specification, "Asynchronous Event Request command").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// What it is about.
    pub kind: EventKind,
    /// Asynchronous Event Information: the details, by kind.
    pub info: u8,
    /// The log page that tells more.
    pub log_page: u8,
}

/// What an event is about (Asynchronous Event Type).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// Error status: a bad doorbell write, a diagnostic failure, an internal error.
    Error,
    /// SMART / health: reliability, temperature, spare.
    Health,
    /// Notice: 0 is "a namespace attribute changed".
    Notice,
    /// A type this driver does not know.
    Other(u8),
}

impl Event {
    /// From dword 0 of the completion.
    pub(super) fn new(result: u32) -> Self {
        let kind = match result & 7 {
            0 => EventKind::Error,
            1 => EventKind::Health,
            2 => EventKind::Notice,
            other => EventKind::Other(other as u8),
        };
        Self { kind, info: (result >> 8) as u8, log_page: (result >> 16) as u8 }
    }

    /// Whether a namespace came, went or changed: its size and format are to be read again.
    pub fn is_namespace_change(&self) -> bool {
        self.kind == EventKind::Notice && self.info == 0
    }
}

/// Events that one call takes at most: a controller that never stops talking is not listened to forever.
const MOST: usize = 16;

/// Takes what was reported: reads the event's log page, which makes the controller report that type again, and asks for the next.
pub(super) fn take(env: &Env, admin: &mut AdminQueue) -> Result<Vec<Event>, ControllerError> {
    let mut events = Vec::new();
    while events.len() < MOST {
        let Some(result) = admin.poll_event(env)? else { break };
        let event = Event::new(result);
        admin.read_log(env, event.log_page)?;
        admin.watch_events()?;
        events.push(event);
    }
    Ok(events)
}
