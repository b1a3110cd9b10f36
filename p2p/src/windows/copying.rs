//! Bytes from one home to another, through a small buffer: the host cache is never mapped here.

use std::ops::Range;

use super::{Windows, WindowsError};
use crate::backing::{Backing, BackingError};
use crate::counters::{Path, Reason};
use crate::layout::{Home, Place};

/// Pages per copy through the buffer: fits the processor's cache.
const CHUNK: usize = 16;

impl Windows {
    /// Copies pages of a window from its place to `dest` at home `to`. The window may be in use.
    pub(super) fn copy_pages(
        &mut self,
        index: u32,
        to: Home,
        dest: u64,
        pages: Range<usize>,
        backing: &mut dyn Backing,
    ) -> Result<(), WindowsError> {
        let w = self.window(index).ok_or(WindowsError::UnknownWindow(index))?;
        let (object, offset, w_len, home, at) = (w.object, w.offset, w.len as u64, w.home, w.at);
        let reason = w.moving.as_ref().map_or(Reason::Revoked, |m| m.reason());
        // Reading a CMB across a bus is slow: what the drive has as well is read from the drive.
        let slow = home == Home::Cmb && self.cmb.as_ref().is_some_and(|c| c.memory.is_device_memory);
        // Under a truncation or a layout the drive may still have what the window has no more.
        let own = self.has_memory(object);
        let taken_out = own || self.is_raw(object) || self.is_excluded(object, offset..offset + w_len);
        let slow = slow && !taken_out;
        let mut direct = !taken_out && self.cmb.as_ref().is_some_and(|c| c.memory.read_data);
        let mut copied = 0;
        let mut bounce = std::mem::take(&mut self.bounce);
        let mut page = pages.start;
        let mut result = Ok(());
        while page < pages.end && result.is_ok() {
            if to == Home::Cmb && own && self.clean(index, page..page + 1) {
                // It is there.
                page += 1;
                continue;
            }
            if to == Home::Cmb && direct && self.clean(index, page..page + 1) {
                // What the drive has as well comes from it, past the processor. What changes meanwhile is in the last copy.
                let n = (page..pages.end).take_while(|p| self.clean(index, *p..*p + 1)).count();
                let (from, at) = ((page * 4096) as u64, dest + (page * 4096) as u64);
                match backing.read_to_cmb(object, offset + from, at as usize, n * 4096) {
                    Ok(()) => {
                        self.counters.add(Path::Cmb, reason, n * 4096);
                        page += n;
                        continue;
                    }
                    Err(BackingError::TimedOut(what)) => {
                        result = Err(BackingError::TimedOut(what).into());
                        break;
                    }
                    Err(e) => {
                        tracing::debug!("window {index} goes to the CMB by way of the processor: {e}");
                        direct = false;
                    }
                }
            }
            let mut n = CHUNK.min(pages.end - page);
            if to == Home::Cmb && own {
                n = (page..page + n).take_while(|p| !self.clean(index, *p..*p + 1)).count().max(1);
            }
            bounce.resize(n * 4096, 0);
            let (from, clean) = (page * 4096, slow && self.clean(index, page..page + n));
            result = if clean {
                backing.read_to_host(object, offset + from as u64, &mut bounce).map_err(Into::into)
            } else {
                let place = Place::new(home, at, 0).unwrap_or(Place::NONE);
                self.read_place(object, place, from, &mut bounce)
            };
            if result.is_ok() {
                result = self.write_place(object, to, dest, from, &bounce);
            }
            page += n;
            copied += n * 4096;
        }
        self.bounce = bounce;
        if copied > 0 {
            // By the processor: host memory is on the way, whichever way that is.
            self.counters.add(if to == Home::Cmb { Path::Bounce } else { Path::HostCache }, reason, copied);
        }
        result
    }

    fn clean(&self, index: u32, mut pages: Range<usize>) -> bool {
        self.window(index).is_some_and(|w| {
            !pages.any(|p| w.dirty.contains(p) || w.moving.as_ref().is_some_and(|m| m.changed.contains(p)))
        })
    }

    /// The last copy: what changed since the first.
    pub(super) fn copy_changed(
        &mut self,
        index: u32,
        to: Home,
        dest: u64,
        backing: &mut dyn Backing,
    ) -> Result<(), WindowsError> {
        let mut from = 0;
        loop {
            let moving = self.window(index).and_then(|w| w.moving.as_ref());
            let Some(run) = moving.and_then(|m| m.changed.next_run(from)) else { return Ok(()) };
            from = run.end;
            self.copy_pages(index, to, dest, run, backing)?;
        }
    }

    pub(super) fn read_place(
        &self,
        object: u64,
        place: Place,
        from: usize,
        into: &mut [u8],
    ) -> Result<(), WindowsError> {
        match (place.home(), self.direct(object)) {
            (Home::Cmb, Some(region)) => {
                region.read(place.offset() as usize + from, into)?;
                // As a reader does: announced meanwhile, it may be what a reset left.
                std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
                if self.reset_matters(object) {
                    return Err(WindowsError::DeviceReset);
                }
                if self.has_memory(object) && !region.present() {
                    return Err(WindowsError::MemoryGone(object));
                }
                Ok(())
            }
            (Home::Host, _) => {
                let host = self.objects.get(&object).and_then(|o| o.host.as_ref());
                let host = host.ok_or(WindowsError::UnknownObject(object))?;
                Ok(host.read(place.offset() + from as u64, into)?)
            }
            _ => Err(WindowsError::UnknownObject(object)),
        }
    }

    pub(super) fn write_place(
        &mut self,
        object: u64,
        home: Home,
        at: u64,
        from: usize,
        bytes: &[u8],
    ) -> Result<(), WindowsError> {
        match (home, self.direct(object)) {
            (Home::Cmb, Some(region)) => Ok(region.write(at as usize + from, bytes)?),
            (Home::Host, _) => Ok(self.host_file(object)?.write(at + from as u64, bytes)?),
            _ => Err(WindowsError::UnknownObject(object)),
        }
    }
}
