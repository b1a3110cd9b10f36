//! Read-ahead: when windows of an object are wanted one after the other, the next ones are filled before they are.
//!
//! A reader of a window that is resident asks nobody, so what is seen here are the faults. One at the place where the last read-ahead
//! ended goes on with it, and reads twice as far ahead, up to the limit.

use super::place::Want;
use super::{Windows, WindowsError};
use crate::backing::Backing;
use crate::layout::Home;

/// Where an object's faults are, if they come in order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sequence {
    /// The window that is wanted next then.
    next: u64,
    /// Windows read ahead last time.
    depth: u32,
}

impl Default for Sequence {
    fn default() -> Self {
        Self { next: u64::MAX, depth: 0 }
    }
}

impl Windows {
    /// A window was wanted that was not resident.
    pub(super) fn note_fault(&mut self, index: u32, want: Want) {
        let Some(w) = self.window(index) else { return };
        let (object, number, len) = (w.object, w.offset / w.len as u64, w.len as u64);
        // It goes to the CMB only where there is room, but may push others out of the host cache: few of them.
        let room = self.host_limit / (4 * len);
        let limit = self.read_ahead.min(u32::try_from(room).unwrap_or(u32::MAX));
        let Some(o) = self.objects.get_mut(&object) else { return };
        o.sequence.depth =
            if number == o.sequence.next { (o.sequence.depth * 2).max(1).min(limit) } else { 0 };
        o.sequence.next = number + 1;
        for n in number + 1..=number + u64::from(o.sequence.depth) {
            // Only windows that somebody holds exist: how long the object is, is not known here.
            let Some(&ahead) = o.windows.get(&n) else { break };
            self.ahead.push_back((ahead, want));
            o.sequence.next = n + 1;
        }
    }

    /// Reads one window ahead.
    pub(super) fn read_ahead_some(&mut self, backing: &mut dyn Backing, now: u64) -> bool {
        let Some((index, want)) = self.ahead.pop_front() else { return false };
        let wanted = self.window(index).is_some_and(|w| w.home == Home::None && w.moving.is_none());
        if wanted && let Err(e) = self.place_ahead(index, want, backing, now) {
            tracing::debug!("window {index} is not read ahead: {e}");
        }
        true
    }

    fn place_ahead(
        &mut self,
        index: u32,
        want: Want,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<(), WindowsError> {
        self.place(index, want, true, backing, now).map(drop)
    }
}
