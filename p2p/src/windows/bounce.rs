//! What a peer has for a window and may not put there itself: its bytes go through host memory.

use std::ops::Range;

use nvme_driver::mem::Mapping;

use super::{Ensured, Want, Windows, WindowsError};
use crate::backing::Backing;
use crate::counters::{Path, Reason};

impl Windows {
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
