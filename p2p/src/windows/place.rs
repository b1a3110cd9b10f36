//! Making a window resident, wherever there is room.

use super::object::Placement;
use super::reclaim::{Claim, PagesOut};
use super::{Windows, WindowsError};
use crate::backing::{Backing, BackingError};
use crate::counters::Reason;
use crate::layout::Home;
use crate::protocol::{Native, freeze, publish};
use crate::refusal::Point;

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
        if self.has_nothing_behind(index) {
            // It is to have a place when it has to leave, whatever the drive does then.
            self.make_host_room(index, self.raw_in_cmb, backing, now);
        }
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
        let Some(len) = self.window(index).map(|w| w.len as u64) else {
            return Err(Err(WindowsError::UnknownWindow(index)));
        };
        let keep = self.kept_for_cmb(len);
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
}
