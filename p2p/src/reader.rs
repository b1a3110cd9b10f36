//! The reading side: a seqlock read that makes no system call and writes to no shared memory.

use std::sync::atomic::Ordering;

use crate::control::{ControlPages, WindowHandle};
use crate::layout::{Home, Place};
use crate::protocol::{Closed, Native, look, unchanged};
use crate::region::View;

/// How often one call copies again because the window moved meanwhile, before it says so.
const ATTEMPTS: u32 = 64;

/// How a read ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// The bytes are in the buffer and came from here. In every other case the buffer's contents are meaningless.
    Copied(Home),
    /// The window has no place now: ask the server for one, then read again.
    NotResident,
    /// Its place is from before a reset, removal or mass revocation, or the device stopped answering: ask the server.
    DeviceMoved,
    /// The server is dead: reconnect.
    ServerGone,
    /// The window moved under every attempt: read again, perhaps after a pause.
    Moving,
    /// The window is at a place that the view does not cover: map it, then read again.
    Unmapped(Place),
    /// The handle was given back or never existed: open the window again.
    StaleHandle,
    /// The range is not inside the window.
    OutOfRange,
}

impl ControlPages {
    /// Copies `into.len()` bytes from `offset` in the window.
    ///
    /// Per call at most one aligned 8-byte word is atomic against a concurrent write section; against moves, fencing and reuse
    /// the whole copy is: it is the bytes of this window at one moment, or the outcome says otherwise.
    #[inline]
    pub fn read(&self, window: WindowHandle, view: &View, offset: usize, into: &mut [u8]) -> Outcome {
        let Some((guard, incarnation)) = self.guard(window.index) else { return Outcome::StaleHandle };
        match (offset as u64).checked_add(into.len() as u64) {
            Some(end) if end <= window.len => {}
            _ => return Outcome::OutOfRange,
        }
        for _ in 0..ATTEMPTS {
            // The incarnation changes only with the generation odd, so the recheck below covers it.
            if incarnation.load(Ordering::Relaxed) != window.incarnation {
                return Outcome::StaleHandle;
            }
            let seen = match look::<Native>(guard) {
                Ok(seen) => seen,
                Err(closed) => return self.closed(closed),
            };
            let Some((region, at)) = view.locate(seen.place, offset, into.len()) else {
                return Outcome::Unmapped(seen.place);
            };
            if region.read(at, into).is_err() {
                return Outcome::Unmapped(seen.place);
            }
            if unchanged::<Native>(guard, seen) {
                // After the copy: a dead server's successor may have refilled the memory, and does not write these pages.
                if !self.server_alive() {
                    return Outcome::ServerGone;
                }
                if !region.present() {
                    return Outcome::DeviceMoved;
                }
                return Outcome::Copied(seen.place.home());
            }
            std::hint::spin_loop();
        }
        Outcome::Moving
    }

    #[cold]
    fn closed(&self, closed: Closed) -> Outcome {
        if !self.server_alive() {
            return Outcome::ServerGone;
        }
        match closed {
            Closed::DeviceMoved => Outcome::DeviceMoved,
            Closed::NotResident | Closed::Frozen | Closed::Fenced => Outcome::NotResident,
        }
    }
}
