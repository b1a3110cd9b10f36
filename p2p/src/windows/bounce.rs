//! Bytes that go through host memory: those of a window that has no place, and what a peer may not take from a window or put there itself.

use std::ops::Range;

use nvme_driver::mem::Mapping;

use super::{Ensured, Want, Windows, WindowsError};
use crate::backing::Backing;
use crate::counters::{Path, Reason};
use crate::layout::{Home, Place};

/// Bytes that go to a peer through host memory at a time.
const BOUNCE: u64 = 1 << 20;

impl Windows {
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
                // What is behind the end was zeros to whoever has read it in a window, and is there no more.
                let cut = self.objects.get(&object).and_then(|o| o.cut).unwrap_or(u64::MAX);
                let kept = cut.saturating_sub(at).min(n as u64) as usize;
                pages[within % 4096 + kept..].fill(0);
                into[done..done + n].copy_from_slice(&pages[within % 4096..within % 4096 + n]);
            }
            done += n;
            at += n as u64;
        }
        Ok(())
    }

    /// Stores bytes of a peer's own memory in an object, window by window, because of `why` and counted with that. `Ready`: all are
    /// there. `Moving`: poll, and ask again for all of them. `Refused`: the windows from there on have no place now.
    pub fn bounce_from_peer(
        &mut self,
        object: u64,
        bytes: Range<u64>,
        (memory, from): (&Mapping, usize),
        why: Reason,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<Ensured, WindowsError> {
        let mut buffer = std::mem::take(&mut self.bounce);
        let mut at = bytes.start;
        let mut stored = Ok(Ensured::Refused(Reason::Policy));
        while at < bytes.end {
            let from = from + (at - bytes.start) as usize;
            stored = self.store(object, at..bytes.end, (memory, from), &mut buffer, backing, now);
            match stored {
                Ok(Ensured::Ready(..)) => at += buffer.len() as u64,
                _ => break,
            }
        }
        self.bounce = buffer;
        if at == bytes.end && stored.is_ok() {
            self.counters.add(Path::Bounce, why, (bytes.end - bytes.start) as usize);
        }
        stored
    }

    /// As many of the bytes as lie in the first window; afterwards they are in `buffer`.
    fn store(
        &mut self,
        object: u64,
        bytes: Range<u64>,
        (memory, from): (&Mapping, usize),
        buffer: &mut Vec<u8>,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<Ensured, WindowsError> {
        let index = self.window_at(object, bytes.start)?;
        let ensured = self.ensure(index, Want::Auto, backing, now)?;
        let Ensured::Ready(home, _) = ensured else { return Ok(ensured) };
        let w = self.known(index)?;
        let (within, at) = ((bytes.start - w.offset) as usize, w.at);
        let len = (w.len - within).min((bytes.end - bytes.start) as usize);
        buffer.resize(len, 0);
        memory.read(from, buffer)?;
        self.write_place(object, home, at, within, buffer)?;
        self.known(index)?.note_changed_pages(within / 4096..(within + len).div_ceil(4096));
        self.pace.dirty = true;
        self.count_dirty(index);
        // A reset took what was just stored.
        Ok(if self.reset_matters(object) { Ensured::Moving } else { ensured })
    }
}
