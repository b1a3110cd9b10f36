//! Objects that are not files: memory that is windows and nothing else, with the same holds, sections, borrows, peers and revocation.
//!
//! Nothing on the drive stands behind it. It is zeros at first; its windows live in the CMB while there is room and in the host cache
//! else, and a move that would lose their bytes is refused. A reset of the device costs what was in the CMB.

use super::{ObjectOptions, Windows, WindowsError};

impl Windows {
    /// Registers `len` bytes of raw memory as an object. All raw memory together is at most half of the host cache, so that it can
    /// always be taken out of the CMB.
    pub fn add_raw(&mut self, object: u64, len: u64, options: ObjectOptions) -> Result<(), WindowsError> {
        let room = (self.host_limit / 2).saturating_sub(self.raw_bytes);
        let whole = len.checked_next_multiple_of(options.window_size as u64).filter(|whole| *whole <= room);
        let Some(whole) = whole else { return Err(WindowsError::NoRoomForRaw { len, room }) };
        if self.has_object(object) {
            return Err(WindowsError::Registered(object));
        }
        self.add_object(object, options)?;
        if let Some(o) = self.objects.get_mut(&object) {
            o.raw = Some(whole);
            self.raw_bytes += whole;
        }
        Ok(())
    }

    /// Bytes of raw memory.
    pub fn raw_bytes(&self) -> u64 {
        self.raw_bytes
    }

    pub(super) fn is_raw(&self, object: u64) -> bool {
        self.objects.get(&object).is_some_and(|o| o.raw.is_some())
    }

    /// Whether a window that goes nowhere is lost.
    pub(super) fn has_nothing_behind(&self, index: u32) -> bool {
        self.window(index).is_some_and(|w| self.is_raw(w.object))
    }

    /// A raw window does not go nowhere: it is where it was, can be chosen again, and is open even if everything was announced to move.
    pub(super) fn keep_raw(&mut self, index: u32) {
        let Some(w) = self.window(index) else { return };
        let (key, len, home) = (w.key(), w.len as u64, w.home);
        self.enlist(home, key, len);
        if let Err(e) = self.restamp(index) {
            tracing::error!("window {index}: {e}");
        }
    }
}
