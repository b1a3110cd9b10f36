//! How a move ends: step 4, and 5 and 6 as far as nobody has to be waited for; or where it began, or not yet.

use super::moves::Phase;
use super::reclaim::{Claim, PagesOut};
use super::revoke::{Outcome, Ticket};
use super::{Windows, WindowsError};
use crate::backing::Backing;
use crate::layout::{Home, Place};
use crate::protocol::{Native, hide, publish};

impl Windows {
    /// Step 4, and 5 and 6 as far as nobody has to be waited for.
    pub(super) fn finish(
        &mut self,
        index: u32,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<bool, WindowsError> {
        let mut still_mapped = self.unmap_writing_peers(index);
        // Drained like the writing ones. Told to stop they are of no more use, and must not see what a fenced writer stores later.
        still_mapped.extend(self.unmap_reading_peers(index));
        self.harvest(index);
        let device = self.device;
        let Some(w) = self.windows.get_mut(index as usize).and_then(Option::as_deref_mut) else {
            return Ok(false);
        };
        let Some(m) = w.moving.as_mut() else { return Ok(false) };
        let guard = Self::guard(&self.control, index)?;
        // Like a fenced writer: what it may still store there must not be seen, now or at a second try.
        m.fenced.extend(still_mapped);
        if !m.fenced.is_empty() && !m.hidden {
            w.generation = hide::<Native>(guard, w.generation);
            m.hidden = true;
        }
        let (to, dest, discard) = (m.request.to, m.dest, m.request.discard);
        let in_the_way =
            to == Home::None && !discard && (self.leaves_held(index) || self.has_nothing_behind(index));
        let turned = if in_the_way { self.turn_to_host(index, backing, now) } else { Ok(()) };
        let (to, dest) = if in_the_way { self.goal(index) } else { (to, dest) };
        let safe = if let Err(e) = turned {
            Err(e)
        } else if to == Home::None {
            if discard { Ok(()) } else { self.write_back(index, backing).map(drop) }
        } else {
            self.copy_changed(index, to, dest, backing)
        };
        if let Err(e) = safe {
            return self.unsafe_yet(index, e, now);
        }
        if !discard && to == Home::Cmb && self.window(index).is_some_and(|w| self.reset_matters(w.object)) {
            // What lies there now is what the reset left. Whoever notices it has the move end elsewhere.
            return Ok(false);
        }
        if discard {
            self.drop_dirty(index);
        }
        let Some(w) = self.windows.get_mut(index as usize).and_then(Option::as_deref_mut) else {
            return Ok(false);
        };
        let Some(mut m) = w.moving.take().map(|m| *m) else { return Ok(false) };
        let tickets = std::mem::take(&mut m.request.tickets);
        let old = PagesOut::new(w, index, now.saturating_add(self.grace), tickets);
        let place = Place::new(to, dest, device).unwrap_or(Place::NONE);
        w.generation = publish::<Native>(Self::guard(&self.control, index)?, w.generation, place);
        (w.home, w.at, w.stamp) = (to, dest, device);
        w.settled = now.saturating_add(self.settle);
        if to == Home::None {
            w.dirty.clear();
        }
        let mut claims = m.fenced;
        if std::mem::take(&mut w.timed_out) {
            claims.push(Claim::Device);
        }
        if let Some(stale) = m.stale.as_mut() {
            stale.add_set(&m.changed);
            self.counters.spared_bytes += (old.len - stale.len() * 4096) as u64;
        }
        self.moving.retain(|i| *i != index);
        self.counters.moves += 1;
        tracing::trace!(
            "window {index} moved to {to:?} ({}) in {} ns",
            m.request.reason,
            now.saturating_sub(m.began)
        );
        self.left(&old, to, index);
        self.count_dirty(index);
        claims.extend(self.borrows_of(index, &old));
        self.settle_all(&old.tickets, Outcome::Moved { fenced: claims.len() as u64 });
        // After a fencing the old pages may hold what the writer stored late, even if it has answered meanwhile.
        let kept = claims.is_empty() && !m.hidden && self.keep_spare(&old, m.changed);
        if !kept {
            self.let_go(old, claims);
        }
        if to == Home::None {
            self.drop_spare(index);
        }
        if let Some(next) = self.window_mut(index).and_then(|w| w.next.take()) {
            self.request(index, next, backing, now);
        } else {
            self.forget_if_idle(index);
        }
        Ok(true)
    }

    /// Whether the bytes of a window with device memory of its own, which someone was fenced in, would have to stay or go where someone
    /// silent may still store: the one in its own memory, or in the host cache with another before him in its own memory.
    fn leaves_held(&self, index: u32) -> bool {
        self.window(index).is_some_and(|w| {
            self.has_memory(w.object)
                && w.moving.as_ref().is_some_and(|m| !m.fenced.is_empty())
                && (w.home == Home::Cmb || self.own_place_is_held(w.object, w.offset))
        })
    }

    /// Where a move goes now.
    fn goal(&self, index: u32) -> (Home, u64) {
        let moving = self.window(index).and_then(|w| w.moving.as_ref());
        moving.map_or((Home::None, 0), |m| (m.request.to, m.dest))
    }

    /// The bytes could not be brought to safety. With a fenced writer still out the window stays closed, and this is tried
    /// again: reopened at the old place, it would take that writer's late stores.
    fn unsafe_yet(&mut self, index: u32, error: WindowsError, now: u64) -> Result<bool, WindowsError> {
        let retry = now.saturating_add(self.grace);
        let clients = &self.clients;
        let peers = &self.peers;
        let Some(m) = self
            .windows
            .get_mut(index as usize)
            .and_then(Option::as_deref_mut)
            .and_then(|w| w.moving.as_mut())
        else {
            return Ok(false);
        };
        m.fenced.retain(|claim| claim.still_out(clients, peers));
        if m.fenced.is_empty() {
            return Err(error);
        }
        tracing::warn!("window {index} stays closed until its bytes are safe: {error}");
        m.phase = Phase::Stuck { deadline: retry };
        m.stuck = Some(error.to_string());
        Ok(false)
    }

    /// Ends a move where it began.
    pub(super) fn give_up(&mut self, index: u32, error: &WindowsError, backing: &mut dyn Backing, now: u64) {
        let device = self.device;
        let Some(w) = self.windows.get_mut(index as usize).and_then(Option::as_deref_mut) else { return };
        let Some(m) = w.moving.take() else { return };
        tracing::warn!("window {index} could not be moved: {error}");
        if m.frozen()
            && let Ok(guard) = Self::guard(&self.control, index)
        {
            let place = Place::new(w.home, w.at, device).unwrap_or(Place::NONE);
            w.generation = publish::<Native>(guard, w.generation, place);
            w.stamp = device;
        }
        let (object, len, key, home) = (w.object, w.len, w.key(), w.home);
        w.settled = now.saturating_add(self.settle);
        let next = w.next.take();
        self.enlist(home, key, len as u64);
        self.moving.retain(|i| *i != index);
        self.counters.moves_failed += 1;
        if !m.frozen()
            && let Err(e) = self.restamp(index)
        {
            // It was announced to move: it is open where it stays.
            tracing::error!("window {index}: {e}");
        }
        let timed_out = matches!(error, WindowsError::Backing(crate::backing::BackingError::TimedOut(_)));
        let dest = PagesOut {
            window: index,
            object,
            home: m.request.to,
            at: m.dest,
            len,
            claims: Vec::new(),
            deadline: now,
            tickets: Vec::new(),
            counted: false,
        };
        self.let_go(dest, if timed_out { vec![Claim::Device] } else { Vec::new() });
        self.settle_all(&m.request.tickets, Outcome::Failed(error.to_string()));
        if let Some(next) = next {
            self.request(index, next, backing, now);
        }
    }

    pub(super) fn settle_all(&mut self, tickets: &[Ticket], outcome: Outcome) {
        for ticket in tickets {
            self.tickets.settle(*ticket, &outcome);
        }
    }
}
