//! Spares: the host pages that a window leaves when it goes to the CMB stay its own, for when it comes back. They need not be allocated
//! then, clients have them mapped still, and what has not changed since need not be copied.
//!
//! * A window has a spare only while it is in the CMB and a client holds it, and only of pages that nobody claimed when it left them: so
//!   nobody but the server touches them.
//! * What is noted as changed anywhere (for the drive, for a move) is noted for the spare too: see [`Window::note_changed`]. Whenever the
//!   window's bytes change by other means (it goes nowhere, it is cut off), the spare goes.
//! * Spares are memory that is free for the asking: counted as used, and the first to go, the oldest before all others.

use std::collections::BTreeMap;
use std::ops::Range;

use super::Windows;
use super::object::Placement;
use super::reclaim::PagesOut;
use super::window::Window;
use crate::layout::Home;
use crate::pages::PageSet;

/// One window's spare.
#[derive(Debug)]
pub(super) struct Spare {
    /// Offset in the host-cache file.
    at: u64,
    /// Its place in the order of age.
    age: u64,
    /// Pages that have changed since they were left, or may have.
    stale: PageSet,
}

/// All spares.
#[derive(Debug, Default)]
pub(super) struct Spares {
    /// Their windows, the oldest first.
    by_age: BTreeMap<u64, u32>,
    next: u64,
    bytes: u64,
}

impl Window {
    /// Pages have changed, those in one word of a set: they differ from the drive, from what a move has copied, and from the spare.
    pub(super) fn note_changed(&mut self, word: usize, bits: u64) {
        self.dirty.add_word(word, bits);
        if let Some(m) = self.moving.as_mut() {
            m.changed.add_word(word, bits);
        }
        if let Some(spare) = self.spare.as_mut() {
            spare.stale.add_word(word, bits);
        }
    }

    /// The same for a range of pages.
    pub(super) fn note_changed_pages(&mut self, pages: Range<usize>) {
        self.dirty.add_range(pages.clone());
        if let Some(m) = self.moving.as_mut() {
            m.changed.add_range(pages.clone());
        }
        if let Some(spare) = self.spare.as_mut() {
            spare.stale.add_range(pages);
        }
    }

    /// Every page may have changed since it was copied anywhere in memory.
    pub(super) fn distrust_copies(&mut self) {
        if let Some(m) = self.moving.as_mut() {
            m.changed.add_all();
        }
        if let Some(spare) = self.spare.as_mut() {
            spare.stale.add_all();
        }
    }
}

impl Windows {
    /// Bytes of the host cache that are kept for windows of the CMB, until somebody needs the room.
    pub fn spare_bytes(&self) -> u64 {
        self.spares.bytes
    }

    /// Bytes of the host cache that only an eviction would free.
    pub(super) fn host_in_use(&self) -> u64 {
        self.host_bytes - self.spares.bytes
    }

    /// A window has gone to the CMB, and nobody claims the host pages that it left: they become its spare, if it may have one.
    /// `stale` is any set of its size.
    pub(super) fn keep_spare(&mut self, old: &PagesOut, mut stale: PageSet) -> bool {
        // What a device stores in its own memory is noted by nobody.
        let wanted =
            self.placement_of(old.window) != Some(Placement::CmbOnly) && !self.has_memory(old.object);
        let Some(w) = self.windows.get_mut(old.window as usize).and_then(Option::as_deref_mut) else {
            return false;
        };
        if !wanted || w.home != Home::Cmb || old.home != Home::Host || w.holders.is_empty() {
            return false;
        }
        stale.clear();
        let age = self.spares.next;
        w.spare = Some(Spare { at: old.at, age, stale });
        self.spares.next += 1;
        self.spares.by_age.insert(age, old.window);
        self.spares.bytes += old.len as u64;
        true
    }

    /// The spare of a window that moves to the host cache: where it is, and which pages of it are stale.
    pub(super) fn take_spare(&mut self, index: u32) -> Option<(u64, PageSet)> {
        let w = self.windows.get_mut(index as usize).and_then(Option::as_deref_mut)?;
        let spare = w.spare.take()?;
        self.spares.by_age.remove(&spare.age);
        self.spares.bytes -= w.len as u64;
        Some((spare.at, spare.stale))
    }

    /// Frees a window's spare, if it has one.
    pub(super) fn drop_spare(&mut self, index: u32) {
        if let Some((at, _)) = self.take_spare(index)
            && let Some(w) = self.window(index)
        {
            let mut pages = PagesOut::new(w, index, 0, Vec::new());
            (pages.home, pages.at) = (Home::Host, at);
            self.let_go(pages, Vec::new());
        }
    }

    /// Frees spares until `len` bytes more fit into the host cache, or none is left.
    pub(super) fn drop_spares_for(&mut self, len: u64) {
        while self.host_bytes + len > self.host_limit
            && let Some((_, index)) = self.spares.by_age.first_key_value()
        {
            self.drop_spare(*index);
        }
    }

    /// Frees the spares of these windows.
    pub(super) fn drop_spares_of(&mut self, windows: &[u32]) {
        windows.iter().for_each(|index| self.drop_spare(*index));
    }
}
