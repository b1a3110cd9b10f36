//! A move: the six steps of "What revocation must get right" as a state machine that never waits.
//!
//! Here it begins, copies, freezes and drains; how it ends is in `endings`. Per window one move at a time. What is asked for meanwhile
//! is remembered and done after it.

use std::ops::Range;

use super::clients::Holder;
use super::object::Placement;
use super::reclaim::{Claim, PagesOut};
use super::revoke::{Outcome, Ticket};
use super::{Windows, WindowsError};
use crate::backing::Backing;
use crate::counters::Reason;
use crate::layout::{Home, SECTION_SLOTS, SectionKind, SectionWord};
use crate::pages::PageSet;
use crate::protocol::{Native, busy, fence_section, freeze, moved_on};

/// Bytes that one step copies while the window is in use: bounds how long a poll keeps the server.
const COPY_BUDGET: usize = 1 << 20;

/// Where a window is to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) to: Home,
    pub(super) reason: Reason,
    /// Its bytes are no longer wanted: nothing is copied or written back.
    pub(super) discard: bool,
    pub(super) tickets: Vec<Ticket>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Step 1: the bytes are copied while the window is in use.
    Copy,
    /// Step 3: frozen; writers and peers end, or the grace does.
    Drain { deadline: u64 },
    /// Step 4 could not bring the bytes to safety while a fenced writer is still out: try again.
    Stuck { deadline: u64 },
}

#[derive(Clone, Copy, Debug)]
struct Writer {
    client: u32,
    slot: usize,
    word: SectionWord,
}

#[derive(Debug)]
pub(super) struct Move {
    pub(super) request: Request,
    /// The new place, taken already.
    pub(super) dest: u64,
    pub(super) phase: Phase,
    /// Bytes up to which step 1 is done.
    copied: usize,
    /// Pages that step 1 copies, where the new place has the others already (it was the window's spare).
    pub(super) stale: Option<PageSet>,
    /// Pages that changed since step 1 began. Write-back never clears it.
    pub(super) changed: PageSet,
    writers: Vec<Writer>,
    /// Sections that were fenced: the old pages wait for them.
    pub(super) fenced: Vec<Claim>,
    pub(super) hidden: bool,
    /// Why it is [`Phase::Stuck`].
    pub(super) stuck: Option<String>,
    pub(super) began: u64,
}

impl Move {
    pub(super) fn deadline(&self) -> Option<u64> {
        match self.phase {
            Phase::Copy => None,
            Phase::Drain { deadline } | Phase::Stuck { deadline } => Some(deadline),
        }
    }

    /// A dead client makes no more stores.
    pub(super) fn forget_client(&mut self, client: u32) {
        self.writers.retain(|w| w.client != client);
        self.fenced.retain(|c| !c.is_client(client));
    }

    /// Whether the window's bytes are no longer wanted.
    pub(super) fn discards(&self) -> bool {
        self.request.discard
    }

    /// The next pages that step 1 has to copy, from a page on; the window has so many.
    fn to_copy(&self, from: usize, pages: usize) -> Option<Range<usize>> {
        match &self.stale {
            Some(stale) => stale.next_run(from),
            None => (from < pages).then_some(from..pages),
        }
    }

    /// Why it is made.
    pub(super) fn reason(&self) -> Reason {
        self.request.reason
    }

    /// Has it end in the host cache, at `at`, with all of its bytes.
    pub(super) fn turn_to_host(&mut self, at: u64) {
        (self.request.to, self.dest) = (Home::Host, at);
        self.changed.add_all();
    }

    /// Sections that have not ended.
    pub(super) fn writers(&self) -> usize {
        self.writers.len()
    }

    /// Whether writers are kept waiting by it now.
    pub(super) fn frozen(&self) -> bool {
        self.phase != Phase::Copy
    }
}

impl Windows {
    /// Begins to move a window, or has the move that is under way followed by this one.
    pub(super) fn request(&mut self, index: u32, mut request: Request, backing: &mut dyn Backing, now: u64) {
        let Some(w) = self.windows.get_mut(index as usize).and_then(Option::as_deref_mut) else {
            return self.settle_all(&request.tickets, Outcome::Already);
        };
        if w.moving.is_some() {
            if request.discard {
                return self.discard_moving(index, request);
            }
            match w.next.as_mut() {
                None => w.next = Some(request),
                Some(next) => next.merge(request),
            }
            return;
        }
        let (from, len, object) = (w.home, w.len, w.object);
        let raw = self.is_raw(object);
        if from == request.to || from == Home::None {
            return self.settle_all(&request.tickets, Outcome::Already);
        }
        // What was marked before now is in the bytes that step 1 copies; a spare is to know of it.
        self.harvest(index);
        // Raw memory has no other place: those that have one give way.
        if request.to == Home::Host && (raw || self.is_worth_host_room(index, request.reason)) {
            self.make_host_room(index, self.kept_for_raw(index), backing, now);
        }
        let (to, dest, stale) = self.destination(index, &request);
        if from == to {
            return self.settle_all(&request.tickets, Outcome::Already);
        }
        if to == Home::None && !request.discard && raw {
            self.keep_raw(index);
            return self.settle_all(&request.tickets, Outcome::Failed(WindowsError::RawKept.to_string()));
        }
        request.to = to;
        let discard = request.discard;
        let Some(w) = self.window_mut(index) else { return };
        w.moving = Some(Box::new(Move {
            request,
            dest,
            phase: Phase::Copy,
            copied: 0,
            stale,
            changed: PageSet::new(len / 4096),
            writers: Vec::new(),
            fenced: Vec::new(),
            hidden: false,
            stuck: None,
            began: now,
        }));
        if discard {
            self.give_up_bytes(index);
        }
        self.moving.push(index);
        self.step_move(index, backing, now);
    }

    /// The bytes of a window that is moving are no longer wanted: nothing of it may reach the drive from now on, for its blocks may
    /// be another's, or nothing of it may be shown, for its place is lost. The move ends nowhere.
    fn discard_moving(&mut self, index: u32, request: Request) {
        self.redirect(index);
        self.harvest(index);
        let by_reset = request.reason == Reason::Drive;
        let Some(w) = self.window_mut(index) else { return };
        if !by_reset {
            w.dirty.clear();
        }
        let Some(m) = w.moving.as_mut() else { return };
        m.request.discard = true;
        m.request.tickets.extend(request.tickets);
        if by_reset {
            m.request.reason = Reason::Drive;
            self.give_up_bytes(index);
        }
    }

    /// A move that discards has begun. If a reset left something at the window's place, its peers are cut off before anybody is waited for: they
    /// have no second look at the device generation, and what they wrote or still would write is lost.
    fn give_up_bytes(&mut self, index: u32) {
        let lost = |m: &Move| m.request.reason == Reason::Drive;
        if self.window(index).and_then(|w| w.moving.as_deref()).is_some_and(lost) {
            let mut still_mapped = self.unmap_writing_peers(index);
            still_mapped.extend(self.unmap_reading_peers(index));
            if let Some(m) = self.window_mut(index).and_then(|w| w.moving.as_mut()) {
                m.fenced.extend(still_mapped);
            }
        }
        self.drop_dirty(index);
    }

    /// What is dirty of a window whose bytes are no longer wanted stays off the drive. If a reset took it, it is counted as lost here and now,
    /// for whoever commits next is to be told, and does not wait for the end of the move.
    pub(super) fn drop_dirty(&mut self, index: u32) {
        let Some(w) = self.window_mut(index) else { return };
        let pages = w.dirty.len();
        w.dirty.clear();
        if w.moving.as_ref().is_some_and(|m| m.request.reason == Reason::Drive) {
            self.count_lost(index, pages);
        }
    }

    /// The place that a move from the host cache was to end at is lost: it ends nowhere, by way of the drive; or, if there is nothing behind
    /// the window, at another place in the host cache or where it began.
    pub(super) fn redirect_from_cmb(&mut self, index: u32) {
        let Some(w) = self.window(index) else { return };
        if w.moving.as_ref().is_none_or(|m| m.request.to != Home::Cmb) {
            return;
        }
        self.redirect(index);
    }

    /// Has a move end nowhere, and gives back the place that it had taken.
    fn redirect(&mut self, index: u32) {
        let Some(w) = self.windows.get_mut(index as usize).and_then(Option::as_deref_mut) else { return };
        let Some(m) = w.moving.as_mut() else { return };
        let (home, at) = (m.request.to, m.dest);
        (m.request.to, m.dest, m.stale) = (Home::None, 0, None);
        let mut dest = PagesOut::new(w, index, 0, Vec::new());
        (dest.home, dest.at) = (home, at);
        self.let_go(dest, Vec::new());
    }

    /// A new place at the wanted home, or at the next best: the CMB falls back to the host cache, and that to no place at all. And which
    /// pages step 1 has to copy there, if not all.
    fn destination(&mut self, index: u32, request: &Request) -> (Home, u64, Option<PageSet>) {
        if request.to == Home::Cmb {
            return match self.take_cmb(index) {
                Ok(at) => (Home::Cmb, at, None),
                Err(_) => (Home::Host, 0, None),
            };
        }
        if request.to == Home::Host
            && !self.placement_of(index).is_some_and(|p| p == Placement::CmbOnly)
            && !self.window(index).is_some_and(|w| w.for_peers && w.holders.is_empty())
            && let Ok((at, stale)) = self.take_host_again(index)
        {
            return (Home::Host, at, stale);
        }
        (Home::None, 0, None)
    }

    /// Takes a move as far as it goes without waiting. True if it got anywhere.
    pub(super) fn step_move(&mut self, index: u32, backing: &mut dyn Backing, now: u64) -> bool {
        let mut worked = false;
        loop {
            let Some(phase) = self.window(index).and_then(|w| w.moving.as_ref()).map(|m| m.phase) else {
                return worked;
            };
            let went_on = match phase {
                Phase::Copy => self.copy_in_use(index, backing, now),
                Phase::Drain { deadline } => self.drain(index, now >= deadline, backing, now),
                Phase::Stuck { .. } => self.finish(index, backing, now),
            };
            match went_on {
                Ok(true) => worked = true,
                Ok(false) => return worked,
                Err(e) => {
                    self.give_up(index, &e, backing, now);
                    return true;
                }
            }
            if phase == Phase::Copy
                && self.window(index).and_then(|w| w.moving.as_ref()).is_some_and(|m| m.phase == Phase::Copy)
            {
                // Out of budget for this poll.
                return true;
            }
        }
    }

    /// Step 1.
    fn copy_in_use(&mut self, index: u32, backing: &mut dyn Backing, now: u64) -> Result<bool, WindowsError> {
        let Some(w) = self.window(index) else { return Ok(false) };
        let Some(m) = w.moving.as_ref() else { return Ok(false) };
        let (len, to, dest, discard, from) = (w.len, m.request.to, m.dest, m.request.discard, m.copied);
        if to == Home::None {
            if !discard {
                self.write_back(index, backing)?;
            }
        } else {
            let pages = len / 4096;
            let (mut page, mut left) = (from / 4096, COPY_BUDGET / 4096);
            loop {
                let moving = self.window_mut(index).and_then(|w| w.moving.as_mut());
                let Some(m) = moving else { return Ok(false) };
                m.copied = page * 4096;
                let Some(run) = m.to_copy(page, pages) else { break };
                if left == 0 {
                    return Ok(true);
                }
                let run = run.start..run.end.min(run.start + left);
                (page, left) = (run.end, left - run.len());
                self.copy_pages(index, to, dest, run, backing)?;
            }
        }
        self.freeze_window(index, now)?;
        Ok(true)
    }

    /// Step 2, and the look at the slots that begins step 3.
    fn freeze_window(&mut self, index: u32, now: u64) -> Result<(), WindowsError> {
        let deadline = now.saturating_add(self.grace);
        let Some(w) = self.windows.get_mut(index as usize).and_then(Option::as_deref_mut) else {
            return Ok(());
        };
        w.generation = freeze::<Native>(Self::guard(&self.control, index)?, w.generation);
        let mut writers = Vec::new();
        for Holder { client, dirty_word, .. } in &w.holders {
            let (Some(_), Some(c)) = (dirty_word, self.clients.get(client)) else { continue };
            for slot in 0..SECTION_SLOTS {
                if let Some(word) = busy::<Native>(c.region.slot(slot).0, index, SectionKind::Write) {
                    writers.push(Writer { client: *client, slot, word });
                }
            }
        }
        if let Some(m) = w.moving.as_mut() {
            m.writers = writers;
            m.phase = Phase::Drain { deadline };
        }
        self.peers.stop(index);
        Ok(())
    }

    /// Step 3.
    fn drain(
        &mut self,
        index: u32,
        grace_over: bool,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<bool, WindowsError> {
        let peers_quiet = self.peers.drained(index);
        let clients = &self.clients;
        let Some(w) = self.windows.get_mut(index as usize).and_then(Option::as_deref_mut) else {
            return Ok(false);
        };
        let Some(m) = w.moving.as_mut() else { return Ok(false) };
        m.writers.retain(|writer| {
            clients
                .get(&writer.client)
                .is_some_and(|c| !moved_on::<Native>(c.region.slot(writer.slot).0, writer.word))
        });
        let quiet = m.writers.is_empty() && peers_quiet;
        if !quiet && !grace_over {
            return Ok(false);
        }
        // The grace is over for whoever is left.
        let mut fenced = false;
        for writer in std::mem::take(&mut m.writers) {
            let Some(c) = clients.get(&writer.client) else { continue };
            if let Some(word) = fence_section::<Native>(c.region.slot(writer.slot).0, writer.word) {
                m.fenced.push(Claim::Section { client: writer.client, slot: writer.slot, word });
                w.dirty.add_all();
                fenced = true;
                self.counters.fenced += 1;
            }
        }
        if fenced {
            w.distrust_copies();
        }
        self.finish(index, backing, now)
    }
}

impl Request {
    /// Both wishes at once: the stronger wins, nowhere before the host cache before the CMB.
    fn merge(&mut self, other: Self) {
        let strength = |h: Home| match h {
            Home::Cmb => 0,
            Home::Host => 1,
            Home::None => 2,
        };
        if strength(other.to) > strength(self.to) {
            self.to = other.to;
            self.reason = other.reason;
        }
        self.discard |= other.discard;
        self.tickets.extend(other.tickets);
    }
}
