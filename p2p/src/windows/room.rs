//! Room for a window: a place in the CMB or in the host cache is taken, and some of the host cache is kept free.

use super::Windows;
use super::object::Placement;
use crate::counters::Reason;
use crate::layout::{Home, LANE, LANES};
use crate::pages::PageSet;
use crate::refusal::Point;

impl Windows {
    /// Takes pages of the CMB for a window.
    pub(super) fn take_cmb(&mut self, index: u32) -> Result<u64, Reason> {
        let Some(w) = self.window(index) else { return Err(Reason::Policy) };
        let (object, offset, len) = (w.object, w.offset, w.len);
        if self.placement_of(index) == Some(Placement::HostOnly) {
            return Err(Reason::Asked);
        }
        // Someone silent holds old pages of this window: were it to move on and on, each move would cost as many again.
        if self.is_quarantined(index) {
            return Err(Reason::Quarantine);
        }
        if let Some(taken) = self.take_own(object, offset) {
            return taken;
        }
        let Some(cmb) = self.cmb.as_mut() else { return Err(Reason::NoCmb) };
        if len > cmb.pool.size() {
            return Err(Reason::TooLarge);
        }
        if self.refusals.refuse(Point::CmbPlace) {
            return Err(Reason::Injected);
        }
        cmb.pool.alloc(len).map(|at| at as u64).ok_or(Reason::CmbFull)
    }

    /// Takes room in the host cache for a window: its own offset, in a lane where nobody silent may still write.
    /// `keep` bytes of the cache stay free.
    pub(super) fn take_host(&mut self, index: u32, keep: u64) -> Result<u64, Reason> {
        let Some(w) = self.window(index) else { return Err(Reason::Policy) };
        let (object, offset, len, home, now_at) = (w.object, w.offset, w.len as u64, w.home, w.at);
        if len > self.host_limit {
            return Err(Reason::TooLarge);
        }
        if self.refusals.refuse(Point::HostPlace) {
            return Err(Reason::Injected);
        }
        if self.host_in_use() + len + keep > self.host_limit {
            return Err(Reason::HostFull);
        }
        let taken =
            |at: u64| self.out.iter().any(|o| o.home == Home::Host && o.object == object && o.at == at);
        let own = |at: u64| home == Home::Host && now_at == at;
        let at = (0..LANES).map(|lane| lane * LANE + offset).find(|at| !taken(*at) && !own(*at));
        let Some(at) = at else { return Err(Reason::Quarantine) };
        if let Err(e) = self.host_file(object) {
            tracing::warn!("no host cache for object {object}: {e}");
            return Err(Reason::HostFull);
        }
        self.drop_spares_for(len);
        self.host_bytes += len;
        Ok(at)
    }

    /// The same for a window that leaves the CMB: its spare, if it has one, and which pages of that are stale; else new pages.
    pub(super) fn take_host_again(&mut self, index: u32) -> Result<(u64, Option<PageSet>), Reason> {
        let keep = self.kept_for_raw(index);
        let Some(w) = self.window(index) else { return Err(Reason::Policy) };
        if w.spare.is_none() {
            return self.take_host(index, keep).map(|at| (at, None));
        }
        if self.host_in_use() + w.len as u64 + keep > self.host_limit {
            return Err(Reason::HostFull);
        }
        if self.refusals.refuse(Point::HostPlace) {
            return Err(Reason::Injected);
        }
        self.take_spare(index).map(|(at, stale)| (at, Some(stale))).ok_or(Reason::Policy)
    }

    /// Bytes of the host cache that the fill of one window of `len` bytes leaves free, should the CMB be taken back: for all raw memory
    /// there, and for what may be dirty there. That has half at most of what is not raw memory's, for raw memory cannot give way; and
    /// never the last window's worth, so that there is a place for a writer.
    pub(super) fn kept_for_cmb(&self, len: u64) -> u64 {
        let dirty = self.may_be_dirty.min(self.room_for_dirty()).min(self.evictable().saturating_sub(len));
        self.raw_in_cmb + dirty
    }

    /// Bytes of the host cache that a window of a file leaves free when it leaves the CMB.
    pub(super) fn kept_for_raw(&self, index: u32) -> u64 {
        if self.has_nothing_behind(index) { 0 } else { self.raw_in_cmb }
    }

    /// Bytes of the host cache that are not raw memory's, were all of that there.
    fn evictable(&self) -> u64 {
        self.host_limit.saturating_sub(self.raw_bytes)
    }

    fn room_for_dirty(&self) -> u64 {
        self.evictable() / 2
    }

    /// Whether more may be dirty in the CMB than the host cache keeps room for: the rest would leave by way of the drive.
    pub(super) fn is_short_of_room(&self) -> bool {
        self.may_be_dirty > self.room_for_dirty()
    }

    /// Keeps the sums of what the host cache keeps room for, after anything that matters to them has changed.
    pub(super) fn count_dirty(&mut self, index: u32) {
        let by_peers = self.peers.has_writers(index);
        // What is in device memory of its own can go nowhere and loses nothing.
        let in_cmb = self.window(index).is_some_and(|w| self.in_cmb(w));
        let raw = self.has_nothing_behind(index);
        let Some(w) = self.windows.get_mut(index as usize).and_then(Option::as_deref_mut) else { return };
        let by_clients = w.holders.iter().any(|h| h.dirty_word.is_some());
        let may = in_cmb && (raw || by_clients || by_peers || !w.dirty.is_empty());
        if may != w.counted_dirty {
            w.counted_dirty = may;
            let len = w.len as u64;
            let sum = if raw { &mut self.raw_in_cmb } else { &mut self.may_be_dirty };
            *sum = if may { *sum + len } else { *sum - len };
        }
    }
}
