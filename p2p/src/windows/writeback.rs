//! Dirty pages to the drive: on commit, before a window goes nowhere, and in the background. And truncation.

use std::ops::Range;

use super::{Ticket, Windows, WindowsError};
use crate::backing::{Backing, BackingError};
use crate::counters::{Path, Reason};
use crate::layout::{Home, Place};

/// What a commit wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// Windows that had something to write.
    pub windows: u64,
    /// Bytes written from the CMB, none of them through host memory.
    pub cmb_bytes: u64,
    /// Bytes written from the host cache or through it.
    pub host_bytes: u64,
}

impl Windows {
    /// Writes back every dirty page of the windows over a range. Durable after the drive's flush, which is the caller's.
    /// Sections that are open now are not waited for: a client commits after it has finished its own.
    pub fn commit(
        &mut self,
        object: u64,
        bytes: &Range<u64>,
        backing: &mut dyn Backing,
    ) -> Result<Committed, WindowsError> {
        if self.own(object).is_some_and(|own| !own.gone && !own.region.present()) {
            backing.revive_memory(object);
        }
        let mut done = Committed::default();
        for index in self.slots_in(object, bytes) {
            let (cmb, host) = self.write_back(index, backing)?;
            done.windows += u64::from(cmb + host > 0);
            done.cmb_bytes += cmb;
            done.host_bytes += host;
        }
        match self.own(object) {
            Some(own) if own.gone || !own.region.present() => Err(WindowsError::MemoryGone(object)),
            _ => Ok(done),
        }
    }

    /// Whether any page of the windows over a range differs from the drive.
    pub fn is_dirty(&mut self, object: u64, bytes: &Range<u64>) -> bool {
        self.slots_in(object, bytes).into_iter().any(|index| {
            self.harvest(index);
            self.peers.has_writers(index) || self.window(index).is_some_and(|w| !w.dirty.is_empty())
        })
    }

    /// Writes back one window's dirty pages; bytes by path (CMB, host). The bitmap of a move under way is left alone: it is
    /// about the move's copy, not about the drive.
    pub(super) fn write_back(
        &mut self,
        index: u32,
        backing: &mut dyn Backing,
    ) -> Result<(u64, u64), WindowsError> {
        self.write_back_pages(index, usize::MAX, Reason::WriteBack, backing)
    }

    /// The same, for `most` pages at most.
    pub(super) fn write_back_pages(
        &mut self,
        index: u32,
        most: usize,
        why: Reason,
        backing: &mut dyn Backing,
    ) -> Result<(u64, u64), WindowsError> {
        self.harvest(index);
        let written_by_peers = self.peers.has_writers(index);
        let Some(w) = self.window_mut(index) else { return Ok((0, 0)) };
        if w.moving.as_ref().is_some_and(|m| m.discards()) {
            self.drop_dirty(index);
            return Ok((0, 0));
        }
        let object = w.object;
        if self.is_raw(object) {
            return Ok((0, 0));
        }
        let Some(w) = self.window_mut(index) else { return Ok((0, 0)) };
        if written_by_peers {
            w.dirty.add_all();
        }
        let (mut cmb, mut host, mut from, mut left) = (0, 0, 0, most);
        while left > 0
            && let Some(run) = self.window(index).and_then(|w| w.dirty.next_run(from))
        {
            let run = run.start..run.end.min(run.start.saturating_add(left));
            (from, left) = (run.end, left - run.len());
            // Cleared before the bytes are taken: a page that changes meanwhile is marked again.
            if let Some(w) = self.window_mut(index) {
                w.dirty.remove_range(run.clone());
            }
            match self.write_run(index, run.clone(), why, backing) {
                Ok((c, h)) => {
                    cmb += c;
                    host += h;
                }
                Err(e) => {
                    if let Some(w) = self.window_mut(index) {
                        w.dirty.add_range(run);
                    }
                    return Err(e);
                }
            }
        }
        self.count_dirty(index);
        Ok((cmb, host))
    }

    fn write_run(
        &mut self,
        index: u32,
        run: Range<usize>,
        why: Reason,
        backing: &mut dyn Backing,
    ) -> Result<(u64, u64), WindowsError> {
        let Some(w) = self.window(index) else { return Ok((0, 0)) };
        let (object, first, home, at) = (w.object, w.offset, w.home, w.at);
        let (from, len) = (run.start * 4096, run.len() * 4096);
        let offset = first + from as u64;
        if home == Home::None || home == Home::Cmb && self.has_memory(object) {
            // In device memory of its own they are where they belong.
            return Ok((0, 0));
        }
        if home == Home::Cmb && self.device_moved() {
            return Err(WindowsError::DeviceReset);
        }
        if home == Home::Cmb && self.cmb.as_ref().is_some_and(|c| c.memory.write_data) {
            match backing.write_from_cmb(object, offset, at as usize + from, len) {
                Ok(()) => {
                    self.counters.add(Path::Cmb, why, len);
                    return Ok((len as u64, 0));
                }
                Err(BackingError::Unsupported(_)) => {}
                Err(e) => {
                    if matches!(e, BackingError::TimedOut(_))
                        && let Some(w) = self.window_mut(index)
                    {
                        w.timed_out = true;
                    }
                    return Err(e.into());
                }
            }
        }
        let path = if home == Home::Cmb { Path::Bounce } else { Path::HostCache };
        let mut bounce = std::mem::take(&mut self.bounce);
        bounce.resize(len, 0);
        let place = Place::new(home, at, 0).unwrap_or(Place::NONE);
        let done = self
            .read_place(object, place, from, &mut bounce)
            .and_then(|()| self.write_behind(object, (first, from as u64), &bounce, backing));
        self.bounce = bounce;
        done?;
        self.counters.add(path, why, len);
        Ok((0, len as u64))
    }

    /// The object now ends at `size`: windows beyond go, and the rest of the last one reads as zeros. If it is [excluded](Self::exclude) from
    /// there to the end of all objects, it reads as zeros wherever the bytes come from, until it is readmitted.
    pub fn truncate(
        &mut self,
        object: u64,
        size: u64,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<Ticket, WindowsError> {
        let known = self.objects.get_mut(&object).ok_or(WindowsError::UnknownObject(object))?;
        let window = known.options.window_size as u64;
        if known.excluded.iter().any(|r| r.contains(&size) && r.end == crate::layout::LANE) {
            known.cut = Some(known.cut.map_or(size, |cut| cut.min(size)));
        }
        let whole = size.div_ceil(window) * window;
        if size < whole
            && let Some(index) = self.slots_in(object, &(size..size + 1)).first().copied()
        {
            self.zero_tail(index, size)?;
        }
        self.invalidate(object, &(whole..crate::layout::LANE), backing, now)
    }

    fn zero_tail(&mut self, index: u32, size: u64) -> Result<(), WindowsError> {
        let Some(w) = self.window_mut(index) else { return Ok(()) };
        let (object, home, at, len) = (w.object, w.home, w.at, w.len);
        let from = (size - w.offset) as usize;
        if let Some(m) = w.moving.as_mut() {
            m.changed.add_range(from / 4096..len / 4096);
        }
        // Not worth keeping up to date.
        self.drop_spare(index);
        let Some(w) = self.window_mut(index) else { return Ok(()) };
        // Pages wholly beyond the end have nothing on the drive to be newer than.
        w.dirty.remove_range(from.div_ceil(4096)..len / 4096);
        if home == Home::None {
            return Ok(());
        }
        let zeros = [0; 4096];
        let mut done = from;
        while done < len {
            let n = (4096 - done % 4096).min(len - done);
            self.write_place(object, home, at, done, &zeros[..n])?;
            done += n;
        }
        Ok(())
    }
}
