//! Making room when memory is full, and going back to the CMB when there is room.

use super::Windows;
use super::moves::Request;
use super::object::Placement;
use super::reclaim::PagesOut;
use crate::backing::Backing;
use crate::counters::Reason;
use crate::layout::Home;

/// Windows that one request pushes out at most: more would keep the requester waiting for others' sake.
const VICTIMS: usize = 16;
/// Slots that one poll looks at when they run short.
const SWEEP: usize = 64;
/// Windows remembered as candidates for the CMB.
const WANTED: usize = 1024;

impl Windows {
    /// Makes room in the CMB for a window, as far as that goes at once. What has to wait for writers leaves later.
    pub(super) fn make_room(&mut self, index: u32, backing: &mut dyn Backing, now: u64) {
        let Some((object, len)) = self.window(index).map(|w| (w.object, w.len)) else { return };
        if self.has_memory(object) {
            return;
        }
        for _ in 0..VICTIMS {
            let Some(cmb) = self.cmb.as_mut() else { return };
            if cmb.pool.largest_free() >= len {
                return;
            }
            let (objects, windows, out) = (&self.objects, &self.windows, &self.out);
            let victim = cmb.policy.victim(|key| leaves(objects, windows, out, key));
            let Some(victim) =
                victim.and_then(|key| self.slots_in(key.0, &(key.1..key.1 + 1)).first().copied())
            else {
                return;
            };
            self.counters.evicted += 1;
            self.request_eviction(victim, Home::Host, backing, now);
        }
    }

    /// Makes room in the host cache for a window.
    pub(super) fn make_host_room(&mut self, index: u32, keep: u64, backing: &mut dyn Backing, now: u64) {
        let Some(len) = self.window(index).map(|w| w.len as u64) else { return };
        for _ in 0..VICTIMS {
            if self.host_in_use() + len + keep <= self.host_limit {
                return;
            }
            let (objects, windows, out) = (&self.objects, &self.windows, &self.out);
            let victim = self.host_policy.victim(|key| {
                // Raw memory has nowhere else to go.
                objects.get(&key.0).is_some_and(|o| o.raw.is_none()) && leaves(objects, windows, out, key)
            });
            let Some(victim) =
                victim.and_then(|key| self.slots_in(key.0, &(key.1..key.1 + 1)).first().copied())
            else {
                return;
            };
            self.request_eviction(victim, Home::None, backing, now);
        }
    }

    /// Whether a window that is pushed out of the CMB is to push another out of a full host cache: not when it has come by once, in a scan;
    /// but when it comes by again.
    pub(super) fn is_worth_host_room(&mut self, index: u32, why: Reason) -> bool {
        let Some(w) = self.window(index) else { return false };
        let in_use = self.host_in_use() + self.kept_for_raw(index);
        let (key, full) = (w.key(), in_use + w.len as u64 > self.host_limit);
        let goes_there = w.spare.is_none()
            && !w.holders.is_empty()
            && self.placement_of(index) != Some(Placement::CmbOnly);
        why == Reason::Evicted && goes_there && full && self.host_policy.kept_out(key)
    }

    fn request_eviction(&mut self, victim: u32, to: Home, backing: &mut dyn Backing, now: u64) {
        let request = Request { to, reason: Reason::Evicted, discard: false, tickets: Vec::new() };
        self.request(victim, request, backing, now);
    }

    /// A window that has left its home is forgotten by that home's policy and known to the other's.
    pub(super) fn left(&mut self, old: &PagesOut, to: Home, index: u32) {
        // Only uses from now on speak for going back.
        self.wanted.retain(|i| *i != index);
        let Some(w) = self.window(index) else { return };
        let (key, len) = (w.key(), w.len as u64);
        match (old.home, self.cmb.as_mut()) {
            (Home::Cmb, Some(cmb)) => cmb.policy.remove(key),
            (Home::Host, _) => self.host_policy.remove(key),
            _ => {}
        }
        self.enlist(to, key, len);
    }

    /// A window in the host cache was used: it would like to be in the CMB.
    pub(super) fn want_cmb(&mut self, index: u32) {
        let somewhere = self.cmb.is_some() || self.window(index).is_some_and(|w| self.has_memory(w.object));
        if somewhere && self.wanted.len() < WANTED && self.wanted.back() != Some(&index) {
            self.wanted.push_back(index);
        }
    }

    /// Leaves the CMB now, because its place there is no place any more.
    pub(super) fn evacuate(&mut self, index: u32, backing: &mut dyn Backing, now: u64) {
        let request =
            Request { to: Home::Host, reason: Reason::Revoked, discard: false, tickets: Vec::new() };
        self.request(index, request, backing, now);
    }

    /// Moves a window from the host cache to the CMB if it may go there and there is room. Pushes nobody out.
    pub fn promote(&mut self, index: u32, backing: &mut dyn Backing, now: u64) {
        let may = self.window(index).is_some_and(|w| w.home == Home::Host && w.moving.is_none())
            && matches!(self.placement_of(index), Some(Placement::Auto | Placement::PeersFirst))
            && !self.is_quarantined(index);
        let Some((object, room)) = self.window(index).map(|w| (w.object, w.len)) else { return };
        if may
            && (self.has_memory(object) || self.cmb.as_ref().is_some_and(|c| c.pool.largest_free() >= room))
        {
            let request =
                Request { to: Home::Cmb, reason: Reason::Policy, discard: false, tickets: Vec::new() };
            self.request(index, request, backing, now);
        }
    }

    /// Background: when control slots run short, windows that nobody holds give theirs up, a few per poll.
    pub(super) fn spare_slots(&mut self, backing: &mut dyn Backing, now: u64) -> bool {
        let total = self.control.slots() as usize;
        let used = self.windows.len() - self.free_slots.len();
        if self.windows.is_empty() || used + total.div_ceil(16) <= total {
            return false;
        }
        let mut worked = false;
        for _ in 0..SWEEP.min(self.windows.len()) {
            self.slot_cursor = (self.slot_cursor + 1) % self.windows.len() as u32;
            let index = self.slot_cursor;
            let unheld = self
                .window(index)
                .filter(|w| w.holders.is_empty() && w.peers == 0 && w.moving.is_none())
                .is_some_and(|w| !self.is_raw(w.object));
            if unheld {
                self.request_eviction(index, Home::None, backing, now);
                self.forget_if_idle(index);
                worked = true;
            }
        }
        worked
    }

    /// Background: one used window per poll goes back to the CMB, if it has settled and an eighth of the CMB is free.
    pub(super) fn promote_some(&mut self, backing: &mut dyn Backing, now: u64) -> bool {
        let (free, size) = self.cmb_bytes();
        let crowded = free < size / 8;
        // An object's own memory is never crowded.
        let next = self
            .wanted
            .iter()
            .position(|i| !crowded || self.window(*i).is_some_and(|w| self.has_memory(w.object)));
        let Some(index) = next.and_then(|at| self.wanted.remove(at)) else { return false };
        let Some(w) = self.window(index) else { return false };
        if w.home != Home::Host {
            return false;
        }
        if now < w.settled {
            self.wanted.push_back(index);
            return false;
        }
        self.promote(index, backing, now);
        true
    }
}

/// Whether a window can be pushed out: not while it moves or is mapped by a peer, and not while someone silent holds old pages
/// of it, for that would cost more of them.
fn leaves(
    objects: &std::collections::BTreeMap<u64, super::object::Object>,
    windows: &[Option<Box<super::window::Window>>],
    out: &[PagesOut],
    key: crate::policy::Key,
) -> bool {
    objects.get(&key.0).is_some_and(|o| {
        let index = o.windows.get(&(key.1 / o.options.window_size as u64));
        let w = index.and_then(|i| windows.get(*i as usize)).and_then(Option::as_deref);
        let index = index.copied();
        w.is_some_and(|w| w.moving.is_none() && w.peers == 0) && !out.iter().any(|o| Some(o.window) == index)
    })
}
