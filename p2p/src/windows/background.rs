//! Dirty pages to the drive in the background, so that a commit, an eviction or a power cut finds few: at a bounded rate, and only
//! what has been dirty for a while, for what is being written to now would have to be written again.

use super::Windows;
use crate::backing::Backing;
use crate::counters::Reason;
use crate::layout::Home;

/// Windows that one poll looks at.
const SWEEP: usize = 256;
/// So much sooner a window of the CMB is written back while the host cache has no room for all that may be dirty there.
const SOONER: u64 = 4;
/// Bytes that one poll writes at most: bounds how long it keeps the server.
const BURST: u64 = 1 << 20;

/// How dirty pages are written back in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteBack {
    /// Only of windows that have been seen dirty for so long, in nanoseconds. Looked at twice in this time.
    pub after: u64,
    /// Bytes per second at most.
    pub rate: u64,
}

impl Default for WriteBack {
    fn default() -> Self {
        Self { after: 2_000_000_000, rate: 128 << 20 }
    }
}

/// How far it is.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// The window looked at last.
    cursor: u32,
    /// Windows to look at in this pass.
    left: u32,
    /// When the next pass begins.
    next: u64,
    /// Bytes that may be written now, as of `filled`.
    credit: u64,
    filled: u64,
    /// Whether the pass has left something dirty.
    pub(super) dirty: bool,
}

impl Pace {
    /// Whether there is more to do at once.
    pub(super) fn is_under_way(&self) -> bool {
        self.left > 0 && self.credit >= 4096
    }
}

impl Windows {
    /// When there is something to do again.
    pub(super) fn next_write_back(&self) -> Option<u64> {
        let wb = self.write_back?;
        if self.pace.left > 0 {
            // A pass that has used up its credit.
            return Some(self.pace.filled.saturating_add(nanoseconds_for(4096, wb.rate)));
        }
        (self.writable_holds > 0 || self.pace.dirty).then_some(self.pace.next)
    }

    pub(super) fn write_back_some(&mut self, backing: &mut dyn Backing, now: u64) -> bool {
        let Some(wb) = self.write_back else { return false };
        if self.pace.left == 0 {
            if self.windows.is_empty() || now < self.pace.next || self.next_write_back().is_none() {
                return false;
            }
            self.pace.left = self.windows.len() as u32;
            self.pace.next = now.saturating_add((self.patience(wb) / 2).max(1));
            self.pace.dirty = false;
        }
        let earned = u128::from(wb.rate) * u128::from(now.saturating_sub(self.pace.filled)) / 1_000_000_000;
        if earned > 0 {
            let earned = u64::try_from(earned).unwrap_or(BURST);
            self.pace.credit = self.pace.credit.saturating_add(earned).min(BURST);
            self.pace.filled = now;
        }
        let mut worked = false;
        for _ in 0..SWEEP {
            if !self.pace.is_under_way() {
                break;
            }
            self.pace.left -= 1;
            self.pace.cursor = (self.pace.cursor + 1) % self.windows.len() as u32;
            worked |= self.write_back_aged(self.pace.cursor, wb, backing, now);
        }
        worked
    }

    /// How long a window of the CMB is left dirty.
    fn patience(&self, wb: WriteBack) -> u64 {
        if self.is_short_of_room() { wb.after / SOONER } else { wb.after }
    }

    /// Writes some of a window back if it has been dirty for long enough.
    fn write_back_aged(&mut self, index: u32, wb: WriteBack, backing: &mut dyn Backing, now: u64) -> bool {
        // A window that moves is seen to by its move. What a peer may write counts as dirty always: written on commit only.
        let idle = self
            .window(index)
            .is_some_and(|w| w.home != Home::None && w.moving.is_none() && !self.is_raw(w.object));
        if !idle || self.peers.has_writers(index) {
            return false;
        }
        self.harvest(index);
        let Some(w) = self.window_mut(index) else { return false };
        if w.dirty.is_empty() {
            w.dirty_since = None;
            return false;
        }
        let (since, home) = (*w.dirty_since.get_or_insert(now), w.home);
        self.pace.dirty = true;
        // What may find no place in the host cache is better on the drive before it is asked to leave.
        let after = if home == Home::Cmb { self.patience(wb) } else { wb.after };
        if now.saturating_sub(since) < after {
            return false;
        }
        let pages = (self.pace.credit / 4096) as usize;
        match self.write_back_pages(index, pages, Reason::Background, backing) {
            Ok((cmb, host)) => {
                self.pace.credit = self.pace.credit.saturating_sub(cmb + host);
                let Some(w) = self.window_mut(index) else { return true };
                if w.dirty.is_empty() {
                    w.dirty_since = None;
                } else {
                    // The rest of it is next.
                    self.pace.left += 1;
                    self.pace.cursor = index.checked_sub(1).unwrap_or(self.windows.len() as u32 - 1);
                }
            }
            Err(e) => {
                // Its pages are dirty still; a commit will say so to those whom it concerns.
                tracing::warn!("window {index} is not written back: {e}");
                if let Some(w) = self.window_mut(index) {
                    w.dirty_since = Some(now);
                }
            }
        }
        true
    }
}

fn nanoseconds_for(bytes: u64, rate: u64) -> u64 {
    (bytes * 1_000_000_000).div_ceil(rate.max(1))
}
