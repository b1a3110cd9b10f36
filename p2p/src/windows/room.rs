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
        if self.window(index).is_none_or(|w| w.spare.is_none()) {
            return self.take_host(index, 0).map(|at| (at, None));
        }
        if self.refusals.refuse(Point::HostPlace) {
            return Err(Reason::Injected);
        }
        self.take_spare(index).map(|(at, stale)| (at, Some(stale))).ok_or(Reason::Policy)
    }

    /// Bytes of the host cache that fills leave free: for dirty windows of the CMB, should it be taken back. Half of the cache at most.
    pub(super) fn kept_for_dirty(&self) -> u64 {
        self.may_be_dirty.min(self.host_limit / 2)
    }

    /// Keeps the sum of [`Windows::may_be_dirty`], after anything that matters to it has changed.
    pub(super) fn count_dirty(&mut self, index: u32) {
        let by_peers = self.peers.has_writers(index);
        // What is in device memory of its own can go nowhere and loses nothing.
        let in_cmb = self.window(index).is_some_and(|w| self.in_cmb(w));
        let Some(w) = self.windows.get_mut(index as usize).and_then(Option::as_deref_mut) else { return };
        let by_clients = w.holders.iter().any(|h| h.dirty_word.is_some());
        let may = in_cmb && (by_clients || by_peers || !w.dirty.is_empty());
        if may != w.counted_dirty {
            w.counted_dirty = may;
            let len = w.len as u64;
            self.may_be_dirty = if may { self.may_be_dirty + len } else { self.may_be_dirty - len };
        }
    }
}
