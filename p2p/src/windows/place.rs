//! Making a window resident, wherever there is room, and serving bytes when there is none anywhere.

use std::ops::Range;

use nvme_driver::mem::Mapping;

use super::object::Placement;
use super::reclaim::{Claim, PagesOut};
use super::{Windows, WindowsError};
use crate::backing::{Backing, BackingError};
use crate::counters::{Path, Reason};
use crate::layout::{Home, LANE, LANES, Place};
use crate::pages::PageSet;
use crate::protocol::{Native, freeze, publish};
use crate::refusal::Point;

/// Bytes that go to a peer through host memory at a time.
const BOUNCE: u64 = 1 << 20;

/// Where a caller wants a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Want {
    /// Wherever policy puts it.
    #[default]
    Auto,
    /// In the CMB. Falls back all the same.
    Cmb,
    /// In the CMB, for a peer: anything else is a refusal, for a peer does not reach the host cache.
    Peer,
    /// In the host cache.
    Host,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ensured {
    /// The window has a place: read on. Why it is there and not elsewhere is the reason.
    Ready(Home, Reason),
    /// It is moving: poll, and ask again.
    Moving,
    /// No placement was possible. The bytes are still to be had from [`Windows::read_through`].
    Refused(Reason),
}

impl Windows {
    /// Gives a window a place if it has none, and fills it from the drive.
    pub fn ensure(
        &mut self,
        index: u32,
        want: Want,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<Ensured, WindowsError> {
        self.notice_reset(backing, now);
        self.step_move(index, backing, now);
        let device = self.device;
        let w = self.known(index)?;
        w.for_peers &= want == Want::Peer;
        if w.moving.is_some() {
            return Ok(Ensured::Moving);
        }
        let (home, fresh, key) = (w.home, w.stamp == device, w.key());
        if home != Home::Host && !self.memory_answers(key.0, backing, now) {
            return Err(WindowsError::MemoryGone(key.0));
        }
        match home {
            Home::Cmb if fresh => {
                if let Some(cmb) = self.cmb.as_mut() {
                    cmb.policy.touch(key);
                }
                Ok(Ensured::Ready(Home::Cmb, Reason::Policy))
            }
            Home::Cmb => {
                // Announced, and its turn has not come: move it now, for whoever is waiting.
                self.evacuate(index, backing, now);
                self.ensured(index)
            }
            Home::Host => {
                if !fresh {
                    self.restamp(index)?;
                }
                self.host_policy.touch(key);
                if self.placement_of(index) == Some(Placement::Auto) {
                    self.want_cmb(index);
                }
                if matches!(want, Want::Cmb | Want::Peer) {
                    self.promote(index, backing, now);
                }
                self.ensured(index)
            }
            Home::None => {
                if want != Want::Peer {
                    self.note_fault(index, want);
                }
                self.place(index, want, false, backing, now)
            }
        }
    }

    fn ensured(&self, index: u32) -> Result<Ensured, WindowsError> {
        let w = self.window(index).ok_or(WindowsError::UnknownWindow(index))?;
        Ok(match w.home {
            _ if w.moving.is_some() => Ensured::Moving,
            Home::None => Ensured::Refused(Reason::Revoked),
            home => Ensured::Ready(home, Reason::Policy),
        })
    }

    /// Gives a window a place and fills it; `ahead`: nobody waits for it yet.
    pub(super) fn place(
        &mut self,
        index: u32,
        want: Want,
        ahead: bool,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<Ensured, WindowsError> {
        let w = self.known(index)?;
        let (object, offset, len) = (w.object, w.offset, w.len);
        let known = self.objects.get(&object).ok_or(WindowsError::UnknownObject(object))?;
        if self.is_excluded(object, offset..offset + len as u64) {
            self.counters.refused += 1;
            return Ok(Ensured::Refused(Reason::Revoked));
        }
        let placement = known.options.placement;
        let direct = self.cmb.is_some() || self.has_memory(object);
        let mut why = if direct { Reason::Asked } else { Reason::NoCmb };
        let readers = want == Want::Auto && placement == Placement::PeersFirst;
        if readers {
            why = Reason::Policy;
        } else if want != Want::Host && placement != Placement::HostOnly {
            match self.try_cmb(index, if ahead { Reason::ReadAhead } else { Reason::Policy }, backing, now) {
                Ok(()) => {
                    if let Some(w) = self.window_mut(index) {
                        w.for_peers = want == Want::Peer;
                    }
                    return Ok(Ensured::Ready(Home::Cmb, Reason::Policy));
                }
                Err(refused) => why = refused?,
            }
        }
        if placement != Placement::CmbOnly && want != Want::Peer {
            match self.try_host(index, if ahead { Reason::ReadAhead } else { why }, backing, now) {
                Ok(()) => return Ok(Ensured::Ready(Home::Host, why)),
                Err(refused) => why = refused?,
            }
        }
        self.counters.refused += 1;
        Ok(Ensured::Refused(why))
    }

    /// The inner result is the reason of a refusal, or an error that is not a matter of placement.
    fn try_cmb(
        &mut self,
        index: u32,
        why: Reason,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<(), Result<Reason, WindowsError>> {
        let at = match self.take_cmb(index) {
            Ok(at) => at,
            // What is only read ahead pushes nobody out: it might be the very window that is being read.
            Err(Reason::CmbFull) if why != Reason::ReadAhead => {
                self.make_room(index, backing, now);
                self.take_cmb(index).map_err(Ok)?
            }
            Err(why) => return Err(Ok(why)),
        };
        if self.refusals.refuse(Point::Fill) {
            self.unplaced(index, Home::Cmb, at, Vec::new());
            return Err(Ok(Reason::Injected));
        }
        let filled = self.fill_cmb(index, at, why, backing);
        if self.window(index).is_some_and(|w| self.reset_matters(w.object)) {
            // Reset meanwhile: what had arrived before may be gone.
            self.unplaced(index, Home::Cmb, at, Vec::new());
            return Err(Ok(Reason::Drive));
        }
        self.placed(index, Home::Cmb, at, filled)
    }

    fn try_host(
        &mut self,
        index: u32,
        why: Reason,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<(), Result<Reason, WindowsError>> {
        let keep = self.kept_for_dirty();
        let at = match self.take_host(index, keep) {
            Ok(at) => at,
            Err(Reason::HostFull) => {
                self.make_host_room(index, keep, backing, now);
                self.take_host(index, keep).map_err(Ok)?
            }
            Err(why) => return Err(Ok(why)),
        };
        if self.refusals.refuse(Point::Fill) {
            self.unplaced(index, Home::Host, at, Vec::new());
            return Err(Ok(Reason::Injected));
        }
        let filled = self.fill_host(index, at, why, backing);
        self.placed(index, Home::Host, at, filled)
    }

    /// Publishes a filled place, or gives it back.
    fn placed(
        &mut self,
        index: u32,
        home: Home,
        at: u64,
        filled: Result<(), WindowsError>,
    ) -> Result<(), Result<Reason, WindowsError>> {
        if let Err(e) = filled {
            let timed_out = matches!(e, WindowsError::Backing(BackingError::TimedOut(_)));
            self.unplaced(index, home, at, if timed_out { vec![Claim::Device] } else { Vec::new() });
            return Err(match e {
                WindowsError::Backing(BackingError::Unsupported(_)) => Ok(Reason::CmbUnsupported),
                // The CMB path failed; the host path may still work, and if not, says what is wrong.
                WindowsError::Backing(_) if home == Home::Cmb => Ok(Reason::Drive),
                other => Err(other),
            });
        }
        let device = self.device;
        let place = self.place_of(home, at);
        let Some(w) = self.windows.get_mut(index as usize).and_then(Option::as_deref_mut) else {
            return Err(Err(WindowsError::UnknownWindow(index)));
        };
        let guard = Self::guard(&self.control, index).map_err(Err)?;
        let odd = freeze::<Native>(guard, w.generation);
        w.generation = publish::<Native>(guard, odd, place);
        (w.home, w.at, w.stamp) = (home, at, device);
        w.dirty.clear();
        let (key, len) = (w.key(), w.len as u64);
        self.enlist(home, key, len);
        self.count_dirty(index);
        Ok(())
    }

    /// Bytes of the host cache that fills leave free: for dirty windows of the CMB, should it be taken back. Half of the cache at most.
    fn kept_for_dirty(&self) -> u64 {
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

    /// Gives a place back that was taken and is not used.
    fn unplaced(&mut self, index: u32, home: Home, at: u64, claims: Vec<Claim>) {
        if let Some(w) = self.window(index) {
            let mut pages = PagesOut::new(w, index, 0, Vec::new());
            (pages.home, pages.at) = (home, at);
            self.let_go(pages, claims);
        }
    }

    pub(super) fn placement_of(&self, index: u32) -> Option<Placement> {
        self.objects.get(&self.window(index)?.object).map(|o| o.options.placement)
    }

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

    fn fill_cmb(
        &mut self,
        index: u32,
        at: u64,
        why: Reason,
        backing: &mut dyn Backing,
    ) -> Result<(), WindowsError> {
        let Some(w) = self.window(index) else { return Err(WindowsError::UnknownWindow(index)) };
        let (object, offset, len) = (w.object, w.offset, w.len);
        if self.has_memory(object) {
            return Ok(());
        }
        if self.is_raw(object) {
            let zeros = [0; 4096];
            if let Some(cmb) = self.cmb.as_ref() {
                (0..len).step_by(4096).try_for_each(|page| cmb.region.write(at as usize + page, &zeros))?;
            }
            return Ok(());
        }
        let direct = self.cmb.as_ref().is_some_and(|c| c.memory.read_data);
        if direct {
            backing.read_to_cmb(object, offset, at as usize, len)?;
            self.counters.add(Path::Cmb, why, len);
            return Ok(());
        }
        // A CMB that takes no read data is filled by the processor.
        let mut bounce = std::mem::take(&mut self.bounce);
        bounce.resize(len, 0);
        let done = backing.read_to_host(object, offset, &mut bounce);
        let copied = done.map_err(WindowsError::from).and_then(|()| match self.cmb.as_ref() {
            Some(cmb) => Ok(cmb.region.write(at as usize, &bounce)?),
            None => Ok(()),
        });
        self.bounce = bounce;
        self.counters.add(Path::Bounce, Reason::CmbUnsupported, len);
        copied
    }

    fn fill_host(
        &mut self,
        index: u32,
        at: u64,
        why: Reason,
        backing: &mut dyn Backing,
    ) -> Result<(), WindowsError> {
        let Some(w) = self.window(index) else { return Err(WindowsError::UnknownWindow(index)) };
        let (object, offset, len) = (w.object, w.offset, w.len);
        if self.is_raw(object) {
            return Ok(self.host_file(object)?.punch(at, len as u64)?);
        }
        let mut bounce = std::mem::take(&mut self.bounce);
        bounce.resize(len, 0);
        let done = self
            .read_behind(object, offset, &mut bounce, backing)
            .and_then(|()| Ok(self.host_file(object)?.write(at, &bounce)?));
        self.bounce = bounce;
        self.counters.add(Path::HostCache, why, len);
        done
    }

    /// The last resort: bytes of an object from wherever they are, window by window, without giving them a place.
    pub fn read_through(
        &mut self,
        object: u64,
        bytes: Range<u64>,
        into: &mut [u8],
        backing: &mut dyn Backing,
    ) -> Result<(), WindowsError> {
        self.bytes_of(object, bytes, into, backing)?;
        self.counters.add(Path::Bounce, Reason::Asked, into.len());
        Ok(())
    }

    /// Brings bytes of an object into a peer's own memory the long way, through host memory, because of `why`; counted with that.
    pub fn bounce_to_peer(
        &mut self,
        object: u64,
        bytes: Range<u64>,
        (memory, at): (&Mapping, usize),
        why: Reason,
        backing: &mut dyn Backing,
    ) -> Result<(), WindowsError> {
        let mut buffer = std::mem::take(&mut self.bounce);
        let mut done = bytes.start;
        let mut result = Ok(());
        while done < bytes.end && result.is_ok() {
            let n = (bytes.end - done).min(BOUNCE);
            buffer.resize(n as usize, 0);
            let to = at + (done - bytes.start) as usize;
            result = self
                .bytes_of(object, done..done + n, &mut buffer, backing)
                .and_then(|()| Ok(memory.write(to, &buffer)?));
            done += n;
        }
        self.bounce = buffer;
        result?;
        self.counters.add(Path::Bounce, why, (bytes.end - bytes.start) as usize);
        Ok(())
    }

    fn bytes_of(
        &mut self,
        object: u64,
        bytes: Range<u64>,
        into: &mut [u8],
        backing: &mut dyn Backing,
    ) -> Result<(), WindowsError> {
        let size =
            self.objects.get(&object).ok_or(WindowsError::UnknownObject(object))?.options.window_size as u64;
        let mut at = bytes.start;
        let mut done = 0;
        while done < into.len() {
            let start = at / size * size;
            let within = (at - start) as usize;
            let n = (into.len() - done).min(size as usize - within);
            let index = self.objects.get(&object).and_then(|o| o.windows.get(&(at / size))).copied();
            let resident = index.and_then(|i| self.window(i)).filter(|w| {
                let lost = w.home == Home::Cmb && self.reset_matters(object);
                w.home != Home::None && !lost && w.moving.as_ref().is_none_or(|m| !m.discards())
            });
            if let Some(w) = resident {
                let place = Place::new(w.home, w.at, 0).unwrap_or(Place::NONE);
                match self.read_place(object, place, within, &mut into[done..done + n]) {
                    Err(WindowsError::DeviceReset) => continue,
                    other => other?,
                }
            } else if self.is_raw(object) {
                into[done..done + n].fill(0);
            } else {
                let mut pages = vec![0; (within % 4096 + n).next_multiple_of(4096)];
                self.read_behind(object, at / 4096 * 4096, &mut pages, backing)?;
                into[done..done + n].copy_from_slice(&pages[within % 4096..within % 4096 + n]);
            }
            done += n;
            at += n as u64;
        }
        Ok(())
    }
}
