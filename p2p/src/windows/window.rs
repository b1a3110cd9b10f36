//! One window's state on the server's side.

use std::sync::atomic::Ordering;

use super::clients::Holder;
use super::moves::Move;
use super::spares::Spare;
use super::{Windows, WindowsError};
use crate::control::WindowHandle;
use crate::layout::{Home, MAX_WINDOWS, Place};
use crate::pages::PageSet;

#[derive(Debug)]
pub(super) struct Window {
    pub(super) object: u64,
    pub(super) offset: u64,
    pub(super) len: usize,
    pub(super) incarnation: u32,
    /// The server's own copy; the page is never read back.
    pub(super) generation: u64,
    pub(super) home: Home,
    /// Where in that home: a CMB offset, or an offset in the host-cache file.
    pub(super) at: u64,
    /// The device generation that its place is stamped with.
    pub(super) stamp: u64,
    /// Pages that differ from the drive.
    pub(super) dirty: PageSet,
    /// Since when it has been seen to be dirty.
    pub(super) dirty_since: Option<u64>,
    /// Counted in [`Windows::may_be_dirty`] or [`Windows::raw_in_cmb`].
    pub(super) counted_dirty: bool,
    /// Made resident for a peer, and nobody else has asked for it since: while no client holds it either, it takes no host memory.
    pub(super) for_peers: bool,
    /// Sorted by client.
    pub(super) holders: Vec<Holder>,
    pub(super) moving: Option<Box<Move>>,
    /// Host pages that it keeps while it is in the CMB.
    pub(super) spare: Option<Spare>,
    /// What to do when the move that is under way is over.
    pub(super) next: Option<super::moves::Request>,
    /// Stays out of the CMB until this time, so that it does not bounce to and fro.
    pub(super) settled: u64,
    /// Peer mappings of it that exist.
    pub(super) peers: u32,
    /// A drive command on its pages did not complete: they wait for the device when the window leaves them.
    pub(super) timed_out: bool,
}

impl Window {
    /// Where a client is among the holders, or would be.
    pub(super) fn holder(&self, client: u32) -> Result<usize, usize> {
        self.holders.binary_search_by_key(&client, |h| h.client)
    }

    pub(super) fn key(&self) -> crate::policy::Key {
        (self.object, self.offset)
    }
}

/// A window as others may see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowStatus {
    /// Its object.
    pub object: u64,
    /// Offset in the object, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: usize,
    /// Its generation.
    pub generation: u64,
    /// Where it is.
    pub home: Home,
    /// Offset in the CMB or in the host-cache file.
    pub at: u64,
    /// Dirty pages known to the server.
    pub dirty_pages: usize,
    /// Clients that hold it.
    pub holders: usize,
    /// Clients of those that hold it for writing.
    pub writers: usize,
    /// Whether it is moving.
    pub moving: bool,
    /// Whether the host cache keeps pages for it while it is in the CMB.
    pub spare: bool,
    /// Peer mappings of it.
    pub peers: u32,
}

impl Windows {
    /// What a window looks like now.
    pub fn status(&self, index: u32) -> Option<WindowStatus> {
        let w = self.window(index)?;
        Some(WindowStatus {
            object: w.object,
            offset: w.offset,
            len: w.len,
            generation: w.generation,
            home: w.home,
            at: w.at,
            dirty_pages: w.dirty.len(),
            holders: w.holders.len(),
            writers: w.holders.iter().filter(|h| h.dirty_word.is_some()).count(),
            moving: w.moving.is_some(),
            spare: w.spare.is_some(),
            peers: w.peers,
        })
    }

    /// Every window, by control slot.
    pub fn iter(&self) -> impl Iterator<Item = (u32, WindowStatus)> + '_ {
        (0..self.windows.len() as u32).filter_map(|i| Some((i, self.status(i)?)))
    }

    /// The handle of a window, for whoever holds it.
    pub fn handle(&self, index: u32) -> Option<WindowHandle> {
        let w = self.window(index)?;
        Some(WindowHandle { index, incarnation: w.incarnation, len: w.len as u64 })
    }

    pub(super) fn new_slot(&mut self, object: u64, number: u64, size: usize) -> Result<u32, WindowsError> {
        let index = match self.free_slots.pop() {
            Some(index) => index,
            None if self.windows.len() < self.control.slots().min(MAX_WINDOWS) as usize => {
                self.windows.push(None);
                self.windows.len() as u32 - 1
            }
            None => self.reuse_slot()?,
        };
        let Some((guard, incarnation)) = self.control.guard(index) else {
            return Err(WindowsError::UnknownWindow(index));
        };
        // The generation goes on counting, odd while the incarnation changes: a reader with an old handle cannot miss it.
        let generation = guard.generation.load(Ordering::Relaxed);
        guard.generation.store(generation | 1, Ordering::Release);
        guard.place.store(Place::NONE.word(), Ordering::Release);
        let next = incarnation.load(Ordering::Relaxed).wrapping_add(1);
        incarnation.store(next, Ordering::Release);
        let generation = (generation | 1) + 1;
        guard.generation.store(generation, Ordering::Release);
        self.windows[index as usize] = Some(Box::new(Window {
            object,
            offset: number * size as u64,
            len: size,
            incarnation: next,
            generation,
            home: Home::None,
            at: 0,
            stamp: 0,
            dirty: PageSet::new(size / 4096),
            dirty_since: None,
            counted_dirty: false,
            for_peers: false,
            holders: Vec::new(),
            moving: None,
            spare: None,
            next: None,
            settled: 0,
            peers: 0,
            timed_out: false,
        }));
        Ok(index)
    }

    /// Frees a window's slot if nobody holds it and it is nowhere.
    pub(super) fn forget_if_idle(&mut self, index: u32) {
        let idle = self.window(index).is_some_and(|w| {
            w.holders.is_empty() && w.home == Home::None && w.moving.is_none() && w.peers == 0
        });
        if !idle {
            return;
        }
        if let Some(w) = self.windows.get_mut(index as usize).and_then(Option::take) {
            if let Some(o) = self.objects.get_mut(&w.object) {
                o.windows.remove(&(w.offset / w.len as u64));
            }
            self.free_slots.push(index);
        }
    }

    /// Finds a slot whose window is nowhere and unheld.
    fn reuse_slot(&mut self) -> Result<u32, WindowsError> {
        for index in 0..self.windows.len() as u32 {
            self.forget_if_idle(index);
        }
        self.free_slots.pop().ok_or(WindowsError::TooManyWindows(self.control.slots()))
    }
}
