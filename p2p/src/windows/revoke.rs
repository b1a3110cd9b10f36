//! What to revoke, and how far it has come.

use std::collections::BTreeMap;
use std::ops::Range;

use super::clients::ClientId;
use super::moves::Request;
use super::peers::PeerId;
use super::{Windows, WindowsError};
use crate::backing::Backing;
use crate::counters::Reason;
use crate::layout::Home;

/// What is revoked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// One window: its bytes leave the CMB for the host cache.
    Window(u32),
    /// The windows over a byte range of an object.
    Range {
        /// The object.
        object: u64,
        /// The bytes.
        bytes: Range<u64>,
    },
    /// Every window of an object.
    Object(u64),
    /// Every window that a client holds; it may hold none from now on.
    Client(ClientId),
    /// Every mapping of a peer. Windows stay where they are.
    Peer(PeerId),
    /// Every window, announced by one store to the device generation; the windows follow one by one.
    Everything,
}

/// Names a revocation under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

/// What a revocation came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Windows that moved.
    pub moved: u64,
    /// Windows that were not where they had to leave.
    pub already: u64,
    /// Bytes that are free: nobody can reach them any more.
    pub freed_bytes: u64,
    /// Bytes that someone silent may still touch. They come back when it answers or is gone.
    pub quarantined_bytes: u64,
    /// Parties that had not answered when their window moved.
    pub silent: u64,
    /// Windows that could not be moved, and why. Their bytes are where they were.
    pub failed: Vec<String>,
}

/// How far a revocation is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Windows to go, and stretches of old pages that somebody may still hold within the grace.
    Pending(u64),
    /// Done. The ticket is spent.
    Done(Report),
}

pub(super) enum Outcome {
    Already,
    Moved { fenced: u64 },
    Failed(String),
}

#[derive(Debug, Default)]
struct Open {
    windows: u64,
    pages: u64,
    report: Report,
}

#[derive(Debug, Default)]
pub(super) struct Tickets {
    next: u64,
    open: BTreeMap<Ticket, Open>,
}

/// Tickets kept before those that are done, and that nobody asked for, are forgotten.
const UNASKED: usize = 4096;

impl Tickets {
    pub(super) fn open(&mut self, windows: usize) -> Ticket {
        if self.open.len() >= UNASKED {
            self.open.retain(|_, o| o.windows + o.pages > 0);
        }
        self.next += 1;
        let ticket = Ticket(self.next);
        self.open.insert(ticket, Open { windows: windows as u64, ..Open::default() });
        ticket
    }

    pub(super) fn settle(&mut self, ticket: Ticket, outcome: &Outcome) {
        let Some(open) = self.open.get_mut(&ticket) else { return };
        open.windows = open.windows.saturating_sub(1);
        match outcome {
            Outcome::Already => open.report.already += 1,
            Outcome::Moved { fenced } => {
                open.report.moved += 1;
                open.report.silent += fenced;
            }
            Outcome::Failed(why) => open.report.failed.push(why.clone()),
        }
    }

    pub(super) fn pages_out(&mut self, ticket: Ticket) {
        if let Some(open) = self.open.get_mut(&ticket) {
            open.pages += 1;
        }
    }

    pub(super) fn freed(&mut self, ticket: Ticket, bytes: usize) {
        if let Some(open) = self.open.get_mut(&ticket) {
            open.pages -= 1;
            open.report.freed_bytes += bytes as u64;
        }
    }

    pub(super) fn quarantined(&mut self, ticket: Ticket, bytes: usize) {
        if let Some(open) = self.open.get_mut(&ticket) {
            open.pages -= 1;
            open.report.quarantined_bytes += bytes as u64;
        }
    }

    /// Nobody will ask for it.
    pub(super) fn forget(&mut self, ticket: Ticket) {
        self.open.remove(&ticket);
    }

    fn progress(&mut self, ticket: Ticket) -> Option<Progress> {
        let open = self.open.get(&ticket)?;
        let left = open.windows + open.pages;
        if left > 0 {
            return Some(Progress::Pending(left));
        }
        self.open.remove(&ticket).map(|o| Progress::Done(o.report))
    }
}

impl Windows {
    /// Begins to revoke: the windows leave the CMB for the host cache, or for nowhere if that refuses. Drive it with
    /// [`poll`](Self::poll) and ask [`progress`](Self::progress). Revoking what is revoked already is done at once.
    pub fn revoke(
        &mut self,
        scope: &Scope,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<Ticket, WindowsError> {
        self.revoke_to(scope, Home::Host, backing, now)
    }

    /// As [`revoke`](Self::revoke), but the windows give up the host cache too: afterwards their bytes are on the drive alone.
    pub fn evict(
        &mut self,
        scope: &Scope,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<Ticket, WindowsError> {
        self.revoke_to(scope, Home::None, backing, now)
    }

    /// Revokes windows whose bytes are no longer wanted (unlinked, punched, overwritten through a layout): nothing is written back.
    pub fn invalidate(
        &mut self,
        object: u64,
        bytes: &Range<u64>,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<Ticket, WindowsError> {
        let windows = self.slots_in(object, bytes);
        // What is in device memory of its own is there, wanted or not.
        let discard = !self.has_memory(object);
        Ok(self.request_all(&windows, Home::None, discard, Reason::Revoked, backing, now))
    }

    /// How far a revocation is; `None` for a ticket that is spent or never was.
    pub fn progress(&mut self, ticket: Ticket) -> Option<Progress> {
        self.tickets.progress(ticket)
    }

    fn revoke_to(
        &mut self,
        scope: &Scope,
        to: Home,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<Ticket, WindowsError> {
        let windows: Vec<u32> = match scope {
            Scope::Window(index) => {
                self.known(*index)?;
                vec![*index]
            }
            Scope::Range { object, bytes } => self.slots_in(*object, bytes),
            Scope::Object(object) => self.slots_in(*object, &(0..crate::layout::LANE)),
            Scope::Client(id) => {
                let c = self.clients.get_mut(&id.0).ok_or(WindowsError::UnknownClient(id.0))?;
                c.barred = true;
                c.holds.iter().copied().collect()
            }
            Scope::Peer(peer) => return self.revoke_peer(*peer, now),
            Scope::Everything if to == Home::Host => return self.announce_all(backing, now),
            Scope::Everything => self.iter().map(|(i, _)| i).collect(),
        };
        Ok(self.request_all(&windows, to, false, Reason::Revoked, backing, now))
    }

    pub(super) fn request_all(
        &mut self,
        windows: &[u32],
        to: Home,
        discard: bool,
        reason: Reason,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Ticket {
        let ticket = self.tickets.open(windows.len());
        for index in windows {
            self.request(*index, Request { to, reason, discard, tickets: vec![ticket] }, backing, now);
        }
        ticket
    }
}
