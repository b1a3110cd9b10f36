//! The writing side, and borrows: sections announced in a slot that the server can see and, in need, fence.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nvme_driver::mem::{Access, Mapping, OutOfRange};

use crate::control::{ClientRegion, ControlPages, WindowHandle};
use crate::layout::{Home, Place, SECTION_SLOTS, SectionKind, SectionState, SectionWord};
use crate::protocol::{
    Closed, Native, Seen, enter_borrow, enter_write, leave_borrow, leave_write, mark_dirty, unchanged,
};
use crate::region::{Region, View};

/// Why a section could not begin. Nothing was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotEntered {
    /// The window is moving: try again shortly (writers wait for a move, readers do not).
    Moving,
    /// The window has no place now: ask the server for one.
    NotResident,
    /// Its place is from before a reset, removal or mass revocation: ask the server.
    DeviceMoved,
    /// The server is dead: reconnect.
    ServerGone,
    /// The window is at a place that the view does not cover, or covers read-only: map it.
    Unmapped(Place),
    /// The handle was given back or never existed.
    StaleHandle,
}

/// How a write section ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Finished {
    /// The stores are in the window, and every later reader sees them.
    Done,
    /// The section was fenced, or the server died: its stores may be lost and must be made again.
    Revoked,
}

/// How a borrow ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Returned {
    /// The window was at this place the whole time.
    Current,
    /// It was revoked meanwhile: what was read from then on was a snapshot.
    Snapshot,
}

/// A hold on a window for writing: the handle, and where its dirty bits lie in the client's region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteHandle {
    /// The window.
    pub window: WindowHandle,
    /// Index of the first of its dirty words (one bit per 4 KiB page).
    pub dirty_word: u32,
}

/// A client's section slots, shared by its threads.
#[derive(Debug)]
pub struct Slots {
    region: ClientRegion,
    /// One bit per slot that some thread of this process uses. Private to the process: the server looks at the slots only.
    taken: AtomicU64,
}

impl Slots {
    /// The slots in `region`.
    pub fn new(region: ClientRegion) -> Arc<Self> {
        Arc::new(Self { region, taken: AtomicU64::new(0) })
    }

    /// The region that holds them.
    pub fn region(&self) -> &ClientRegion {
        &self.region
    }

    /// Takes a free slot for as long as the value lives; `None` when all are in use. A thread that writes often keeps one.
    pub fn take(self: &Arc<Self>) -> Option<Slot> {
        let mut taken = self.taken.load(Ordering::Relaxed);
        loop {
            let index = (!taken).trailing_zeros() as usize;
            if index >= SECTION_SLOTS {
                return None;
            }
            let with = taken | 1 << index;
            match self.taken.compare_exchange_weak(taken, with, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => {
                    // The sequence goes on from the previous owner's: a server that waits for change must see one.
                    let last = SectionWord::from_word(self.region.slot(index).0.load(Ordering::Relaxed));
                    return Some(Slot {
                        slots: Arc::clone(self),
                        index,
                        sequence: Cell::new(last.sequence()),
                    });
                }
                Err(now) => taken = now,
            }
        }
    }
}

/// One section slot: one section or borrow at a time, on one thread at a time.
#[derive(Debug)]
pub struct Slot {
    slots: Arc<Slots>,
    index: usize,
    sequence: Cell<u64>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.taken.fetch_and(!(1 << self.index), Ordering::Release);
    }
}

impl Slot {
    fn next(&self, kind: SectionKind, window: u32) -> SectionWord {
        let sequence = self.sequence.get().wrapping_add(1);
        self.sequence.set(sequence);
        SectionWord::new(SectionState::Active, kind, window, sequence)
    }

    fn words(&self) -> (&AtomicU64, &AtomicU64) {
        self.slots.region.slot(self.index)
    }

    /// Begins a write section on a window. Short: a revocation waits for it, up to the server's grace.
    pub fn write<'a>(
        &'a mut self,
        control: &'a ControlPages,
        handle: WriteHandle,
        view: &'a View,
    ) -> Result<Section<'a>, NotEntered> {
        let window = handle.window;
        let Some((guard, incarnation)) = control.guard(window.index) else {
            return Err(NotEntered::StaleHandle);
        };
        if incarnation.load(Ordering::Relaxed) != window.incarnation {
            return Err(NotEntered::StaleHandle);
        }
        let word = self.next(SectionKind::Write, window.index);
        let (slot, _) = self.words();
        let seen = enter_write::<Native>(guard, slot, word).map_err(|c| not_entered(control, c))?;
        let place = seen.place;
        let located = usize::try_from(window.len)
            .ok()
            .and_then(|len| view.locate(place, 0, len))
            .filter(|(region, _)| region.memory().access() == Access::ReadWrite);
        let Some((region, base)) = located else {
            let _ = leave_write::<Native>(slot, word);
            return Err(NotEntered::Unmapped(place));
        };
        Ok(Section {
            slot: self,
            control,
            handle,
            word,
            region,
            base,
            home: place.home(),
            changed: None,
            ended: false,
        })
    }

    /// Begins a borrow: the window's bytes in place, without a copy. Its pages are not reused while it lasts.
    pub fn borrow<'a>(
        &'a mut self,
        control: &'a ControlPages,
        window: WindowHandle,
        view: &'a View,
    ) -> Result<Borrow<'a>, NotEntered> {
        let Some((guard, incarnation)) = control.guard(window.index) else {
            return Err(NotEntered::StaleHandle);
        };
        if incarnation.load(Ordering::Relaxed) != window.incarnation {
            return Err(NotEntered::StaleHandle);
        }
        let word = self.next(SectionKind::Borrow, window.index);
        let (slot, note) = self.words();
        let seen = enter_borrow::<Native>(guard, slot, note, word).map_err(|c| not_entered(control, c))?;
        let located = usize::try_from(window.len).ok().and_then(|len| view.locate(seen.place, 0, len));
        let Some((region, base)) = located else {
            leave_borrow::<Native>(slot, word);
            return Err(NotEntered::Unmapped(seen.place));
        };
        let bytes = Borrowed { region, base, len: window.len as usize };
        Ok(Borrow { slot: self, control, window, word, seen, bytes, _not_sync: PhantomData })
    }
}

fn not_entered(control: &ControlPages, closed: Closed) -> NotEntered {
    if !control.server_alive() {
        return NotEntered::ServerGone;
    }
    match closed {
        Closed::Frozen | Closed::Fenced => NotEntered::Moving,
        Closed::NotResident => NotEntered::NotResident,
        Closed::DeviceMoved => NotEntered::DeviceMoved,
    }
}

/// An open write section. Dropped without [`finish`](Self::finish), it ends all the same, but nobody learns whether it was fenced.
#[derive(Debug)]
pub struct Section<'a> {
    slot: &'a Slot,
    control: &'a ControlPages,
    handle: WriteHandle,
    word: SectionWord,
    region: &'a Region,
    base: usize,
    home: Home,
    /// First and last changed page.
    changed: Option<(usize, usize)>,
    ended: bool,
}

impl Section<'_> {
    /// Where the stores go.
    pub fn home(&self) -> Home {
        self.home
    }

    /// Stores `from` at `offset` in the window. Aligned 8-byte words are stored whole.
    pub fn write(&mut self, offset: usize, from: &[u8]) -> Result<(), OutOfRange> {
        self.touch(offset, from.len())?;
        self.region.write(self.base + offset, from)
    }

    /// Stores one aligned 8-byte word, little-endian.
    pub fn write_u64(&mut self, offset: usize, value: u64) -> Result<(), OutOfRange> {
        self.touch(offset, 8)?;
        self.region.memory().u64_at(self.base + offset)?.store(value.to_le(), Ordering::Relaxed);
        Ok(())
    }

    /// Reads back what the window holds now.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), OutOfRange> {
        self.inside(offset, into.len())?;
        self.region.read(self.base + offset, into)
    }

    /// Ends the section.
    pub fn finish(mut self) -> Finished {
        self.end()
    }

    fn end(&mut self) -> Finished {
        self.ended = true;
        if let Some((first, last)) = self.changed.take() {
            let mut page = first;
            while page <= last {
                let (word, end) = (page / 64, (page | 63).min(last));
                let bits = (u64::MAX >> (63 - (end - page))) << (page % 64);
                let index = u32::try_from(word).ok().and_then(|w| self.handle.dirty_word.checked_add(w));
                if let Some(dirty) = index.and_then(|i| self.slot.slots.region.dirty(i)) {
                    mark_dirty::<Native>(dirty, bits);
                }
                page = end + 1;
            }
        }
        let unfenced = leave_write::<Native>(self.slot.words().0, self.word);
        if unfenced && self.control.server_alive() { Finished::Done } else { Finished::Revoked }
    }

    fn inside(&self, offset: usize, len: usize) -> Result<(), OutOfRange> {
        let size = self.handle.window.len as usize;
        if offset.checked_add(len).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(OutOfRange { offset, len, size, access: Access::ReadWrite })
    }

    fn touch(&mut self, offset: usize, len: usize) -> Result<(), OutOfRange> {
        self.inside(offset, len)?;
        if len > 0 {
            let (first, last) = (offset / 4096, (offset + len - 1) / 4096);
            self.changed = Some(self.changed.map_or((first, last), |(a, b)| (a.min(first), b.max(last))));
        }
        Ok(())
    }
}

impl Drop for Section<'_> {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.end();
        }
    }
}

/// The bytes of a borrow.
#[derive(Clone, Copy, Debug)]
pub struct Borrowed<'a> {
    region: &'a Region,
    base: usize,
    len: usize,
}

impl Borrowed<'_> {
    /// The mapping that holds the bytes and where they begin in it. Others may write them: use the mapping's copies and atomics.
    pub fn memory(&self) -> (&Arc<Mapping>, usize) {
        (self.region.memory(), self.base)
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing to read (there always is).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies out `into.len()` bytes from `offset`.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), OutOfRange> {
        if offset.checked_add(into.len()).is_none_or(|end| end > self.len) {
            return Err(OutOfRange { offset, len: into.len(), size: self.len, access: Access::ReadOnly });
        }
        self.region.read(self.base + offset, into)
    }
}

/// A window's bytes, borrowed in place.
#[derive(Debug)]
pub struct Borrow<'a> {
    slot: &'a Slot,
    control: &'a ControlPages,
    window: WindowHandle,
    word: SectionWord,
    seen: Seen,
    bytes: Borrowed<'a>,
    _not_sync: PhantomData<Cell<()>>,
}

impl Borrow<'_> {
    /// The bytes.
    pub fn bytes(&self) -> Borrowed<'_> {
        self.bytes
    }

    /// Where the bytes are. What is borrowed in the host cache stays good whatever happens to the device.
    pub fn home(&self) -> Home {
        self.seen.place.home()
    }

    /// Whether the window is known to be still where it was. False: it has moved, and the bytes are a snapshot from before; or it was only
    /// announced to move, or could not be, and they are the window's still.
    pub fn is_current(&self) -> bool {
        self.control.guard(self.window.index).is_some_and(|(guard, _)| unchanged::<Native>(guard, self.seen))
            && self.control.server_alive()
    }

    /// Ends the borrow.
    pub fn end(self) -> Returned {
        if self.is_current() { Returned::Current } else { Returned::Snapshot }
    }
}

impl Drop for Borrow<'_> {
    fn drop(&mut self) {
        leave_borrow::<Native>(self.slot.words().0, self.word);
    }
}
