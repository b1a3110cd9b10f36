//! Every window at once: the mass revocation, and a device that was reset or is gone.
//!
//! Both are announced by the device generation. A reset is announced by whoever resets, before it does; the windows are dealt with by
//! whatever is called next here. Until then no place is published that readers would take for valid, and nothing that was read from
//! the CMB is believed: `Windows::device` is behind the shared word for as long.

use super::moves::Request;
use super::revoke::{Outcome, Ticket};
use super::{Windows, WindowsError};
use crate::backing::Backing;
use crate::control::ControlPages;
use crate::counters::Reason;
use crate::layout::{Home, Place};
use crate::protocol::{Native, move_device};

/// Announces a reset of the device, from any thread, before it happens. Readers then accept nothing more from any window, and ask.
#[derive(Clone, Debug)]
pub struct ResetSignal {
    control: ControlPages,
}

impl ResetSignal {
    /// Says that what the CMB holds is about to be lost.
    pub fn raise(&self) {
        move_device::<Native>(self.control.device_word());
    }
}

/// Dirty bytes of an object that were lost with their device: written, not committed, and gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// How often that happened since the object was registered.
    pub events: u64,
    /// Bytes of dirty pages, all events together.
    pub bytes: u64,
    /// How many of the events somebody has been told of.
    pub reported: u64,
}

impl Windows {
    /// For whoever resets the device.
    pub fn reset_signal(&self) -> ResetSignal {
        ResetSignal { control: self.control.clone() }
    }

    /// What was lost of an object so far. A reset that was announced is dealt with first.
    pub fn losses(&mut self, object: u64, backing: &mut dyn Backing, now: u64) -> Losses {
        self.notice_reset(backing, now);
        self.objects.get(&object).map(|o| o.losses).unwrap_or_default()
    }

    /// Somebody has been told of all of an object's losses.
    pub fn losses_reported(&mut self, object: u64) {
        if let Some(o) = self.objects.get_mut(&object) {
            o.losses.reported = o.losses.events;
        }
    }

    /// The device is gone or was reset, and nobody announced it before. Dirty pages in the CMB are lost, and counted.
    pub fn device_lost(&mut self, backing: &mut dyn Backing, now: u64) -> Result<Ticket, WindowsError> {
        self.reset_signal().raise();
        self.lose_cmb(backing, now)
    }

    /// Whether a reset was announced that has not been dealt with: what is read from the CMB may not be what was there.
    pub fn device_moved(&self) -> bool {
        self.control.device_generation() != self.device
    }

    /// Deals with a reset, if one was announced.
    pub(super) fn notice_reset(&mut self, backing: &mut dyn Backing, now: u64) -> bool {
        if !self.device_moved() {
            return false;
        }
        let lost = self.counters.lost_bytes;
        match self.lose_cmb(backing, now) {
            Ok(ticket) => self.tickets.forget(ticket),
            Err(e) => tracing::error!("after a reset of the device: {e}"),
        }
        tracing::warn!(
            "the device was reset: its CMB is read anew; {} bytes that were not committed are lost so far",
            self.counters.lost_bytes - lost
        );
        true
    }

    /// Windows in the CMB become non-resident without a write-back; those in the host cache are valid as they are.
    fn lose_cmb(&mut self, backing: &mut dyn Backing, now: u64) -> Result<Ticket, WindowsError> {
        let before = std::mem::replace(&mut self.device, self.control.device_generation());
        backing.reset_noticed();
        self.counters.resets += 1;
        if let (Some(cmb), Some(canary)) = (self.cmb.as_ref(), self.control.canary()) {
            // All ones there would mean that the device is gone.
            cmb.memory.memory.u64_at(canary as usize)?.store(0, std::sync::atomic::Ordering::Relaxed);
        }
        // No command from before the reset touches memory any more.
        self.device_drained(now);
        let (mut gone, mut kept) = (Vec::new(), Vec::new());
        let mut behind = Vec::new();
        for (index, w) in self.windows.iter().enumerate() {
            let (index, Some(w)) = (index as u32, w) else { continue };
            match w.home {
                Home::Cmb if self.in_cmb(w) => gone.push(index),
                // Its turn in a mass revocation has not come yet.
                Home::Cmb if w.stamp != before => behind.push(index),
                Home::Cmb | Home::Host => kept.push(index),
                Home::None => {}
            }
        }
        for index in kept {
            if self.window(index).is_some_and(|w| !self.has_memory(w.object)) {
                self.redirect_from_cmb(index);
            }
            self.restamp(index)?;
        }
        for index in behind {
            self.follow(index, backing, now);
        }
        for (left, ticket) in std::mem::take(&mut self.sweep) {
            left.for_each(|_| self.tickets.settle(ticket, &Outcome::Already));
        }
        let ticket = self.request_all(&gone, Home::None, true, Reason::Drive, backing, now);
        self.swept_at = self.device;
        Ok(ticket)
    }

    /// Dirty pages of a window went with the device.
    pub(super) fn count_lost(&mut self, index: u32, pages: usize) {
        let Some(object) = self.window(index).map(|w| w.object).filter(|_| pages > 0) else { return };
        if self.has_memory(object) {
            // All of it was counted when it went.
            return;
        }
        let bytes = (pages * 4096) as u64;
        self.counters.lost_bytes += bytes;
        if let Some(o) = self.objects.get_mut(&object) {
            o.losses.events += 1;
            o.losses.bytes += bytes;
        }
    }

    /// Every window is to leave the CMB. The announcement is one store, whatever the number of windows.
    pub(super) fn announce_all(
        &mut self,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<Ticket, WindowsError> {
        self.notice_reset(backing, now);
        // A place carries 16 bits of the device generation: a stamp must be gone before those bits come round again.
        if self.device - self.swept_at >= 0x4000 {
            return Err(WindowsError::TooManyAnnouncements);
        }
        let before = move_device::<Native>(self.control.device_word());
        if before == self.device {
            // Else a reset was announced just now, and is still to be dealt with.
            self.device = before + 1;
        }
        self.counters.announced += 1;
        let windows = self.windows.len() as u32;
        let ticket = self.tickets.open(windows as usize);
        // One entry, whatever the number of windows.
        self.sweep.push_back((0..windows, ticket));
        Ok(ticket)
    }

    /// Has some windows follow the mass revocation: those in the CMB leave it, the others are valid as they are.
    pub(super) fn sweep_some(&mut self, backing: &mut dyn Backing, now: u64) -> bool {
        let mut worked = false;
        for _ in 0..256 {
            let Some((left, ticket)) = self.sweep.front_mut() else { break };
            let ticket = *ticket;
            let next = left.next();
            if left.start >= left.end {
                self.sweep.pop_front();
            }
            let Some(index) = next else { continue };
            worked = true;
            match self.window(index).map(|w| (w.home, w.moving.is_some())) {
                Some((Home::Cmb, _) | (_, true)) => {
                    let request = Request {
                        to: Home::Host,
                        reason: Reason::Revoked,
                        discard: false,
                        tickets: vec![ticket],
                    };
                    self.request(index, request, backing, now);
                }
                home => {
                    if home.is_some()
                        && let Err(e) = self.restamp(index)
                    {
                        tracing::error!("window {index}: {e}");
                    }
                    self.tickets.settle(ticket, &Outcome::Already);
                }
            }
            if self.sweep.is_empty() && self.moving.is_empty() {
                self.swept_at = self.device;
            }
        }
        worked
    }

    /// A window whose bytes are where they were is valid again under the new device generation.
    pub(super) fn restamp(&mut self, index: u32) -> Result<(), WindowsError> {
        let device = self.device;
        let Some(w) = self.windows.get_mut(index as usize).and_then(Option::as_deref_mut) else {
            return Ok(());
        };
        if w.home == Home::None || w.moving.as_ref().is_some_and(|m| m.frozen()) {
            return Ok(());
        }
        w.stamp = device;
        let place = Place::new(w.home, w.at, device).unwrap_or(Place::NONE);
        Self::guard(&self.control, index)?.place.store(place.word(), std::sync::atomic::Ordering::Release);
        Ok(())
    }
}
