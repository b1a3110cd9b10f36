//! The steps of the protocol, each with its memory orderings, over words of any kind: the shared pages in production,
//! loom's atomics in the models (`tests/loom`). Both run exactly this code.
//!
//! Every order that matters is argued in `docs/revocation.md` under the name it has here.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::layout::{Home, Place, SectionKind, SectionState, SectionWord};

/// A 64-bit atomic word.
pub trait Word {
    /// Loads.
    fn load(&self, order: Ordering) -> u64;
    /// Stores.
    fn store(&self, value: u64, order: Ordering);
    /// Stores `value`, returns what was there.
    fn swap(&self, value: u64, order: Ordering) -> u64;
    /// Sets bits, returns what was there.
    fn fetch_or(&self, bits: u64, order: Ordering) -> u64;
    /// Compare and exchange: the previous value, `Ok` if it was `current`.
    fn compare_exchange(&self, current: u64, new: u64, ok: Ordering, no: Ordering) -> Result<u64, u64>;
}

impl Word for AtomicU64 {
    #[inline(always)]
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }
    #[inline(always)]
    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }
    #[inline(always)]
    fn swap(&self, value: u64, order: Ordering) -> u64 {
        self.swap(value, order)
    }
    #[inline(always)]
    fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        self.fetch_or(bits, order)
    }
    #[inline(always)]
    fn compare_exchange(&self, current: u64, new: u64, ok: Ordering, no: Ordering) -> Result<u64, u64> {
        self.compare_exchange(current, new, ok, no)
    }
}

/// The fences of the protocol, by name, so that a model can leave out one and show what breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fence {
    /// Reader: between the copy and the second look at the generation. Acquire.
    Recheck,
    /// Writer and borrower: between the store to the slot and the look at the generation. SeqCst.
    Enter,
    /// Server: between the odd generation and the look at the slots. SeqCst.
    Freeze,
    /// Server: between taking the place away from a fenced writer's window and the last copy. SeqCst.
    Hide,
    /// Server: between publishing the new place and the look for borrows, and so before any reuse. SeqCst.
    Publish,
}

impl Fence {
    /// Its ordering.
    pub const fn ordering(self) -> Ordering {
        match self {
            Self::Recheck => Ordering::Acquire,
            Self::Enter | Self::Freeze | Self::Hide | Self::Publish => Ordering::SeqCst,
        }
    }
}

/// A kind of memory: its words, and its fences.
pub trait Memory {
    /// The word.
    type Word: Word;
    /// Issues a fence.
    fn fence(which: Fence);
}

/// The processor's own memory.
#[derive(Clone, Copy, Debug)]
pub struct Native;

impl Memory for Native {
    type Word = AtomicU64;
    #[inline(always)]
    fn fence(which: Fence) {
        fence(which.ordering());
    }
}

/// The words that guard one window.
#[derive(Debug)]
pub struct Guard<'a, W> {
    /// The device generation.
    pub device: &'a W,
    /// The window's generation.
    pub generation: &'a W,
    /// The window's place.
    pub place: &'a W,
}

impl<W> Clone for Guard<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<W> Copy for Guard<'_, W> {}

/// What a window looked like before it was used; it must look the same afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The device generation.
    pub device: u64,
    /// The window's generation, odd or even.
    pub generation: u64,
    /// Its place, valid under that device generation.
    pub place: Place,
}

/// Why a window cannot be used now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// It has no place: ask the server for one.
    NotResident,
    /// Its place is from before a reset, removal or mass revocation: ask the server.
    DeviceMoved,
    /// It is frozen: a writer waits until the generation is even again.
    Frozen,
    /// The server fenced this very section while it was being entered: begin again.
    Fenced,
}

/// First half of a read: which bytes to copy.
#[inline(always)]
pub fn look<M: Memory>(guard: Guard<'_, M::Word>) -> Result<Seen, Closed> {
    let device = guard.device.load(Ordering::Acquire);
    let generation = guard.generation.load(Ordering::Acquire);
    // Acquire: whoever sees a place sees the bytes that were put there before it was published.
    let place = Place::from_word(guard.place.load(Ordering::Acquire));
    if place.valid_under(device) {
        Ok(Seen { device, generation, place })
    } else if place.home() == Home::None {
        Err(Closed::NotResident)
    } else {
        Err(Closed::DeviceMoved)
    }
}

/// Second half of a read: whether what was copied may be used.
#[inline(always)]
pub fn unchanged<M: Memory>(guard: Guard<'_, M::Word>, seen: Seen) -> bool {
    M::fence(Fence::Recheck);
    guard.generation.load(Ordering::Relaxed) == seen.generation
        && guard.device.load(Ordering::Relaxed) == seen.device
}

/// Begins a write section: `word` is the slot's next word, in state active.
#[inline]
pub fn enter_write<M: Memory>(
    guard: Guard<'_, M::Word>,
    slot: &M::Word,
    word: SectionWord,
) -> Result<Seen, Closed> {
    slot.store(word.word(), Ordering::Relaxed);
    M::fence(Fence::Enter);
    let seen = match look::<M>(guard) {
        Ok(seen) if seen.generation % 2 == 1 => Err(Closed::Frozen),
        // A writer that slept between its store and its look may have been fenced on behalf of a move that is over by
        // now. It must not go on in a slot that no later move waits for. The move's publication came after the fencing, and
        // we have acquired it; so this load sees the fencing.
        Ok(_) if slot.load(Ordering::Relaxed) != word.word() => Err(Closed::Fenced),
        other => other,
    };
    if seen.is_err() {
        // Nothing was stored, so whatever the server did to the slot meanwhile, this answers it.
        slot.store(word.with_state(SectionState::Idle).word(), Ordering::Release);
    }
    seen
}

/// Ends a write section whose dirty bits are set. False: it was fenced, and its stores may be lost.
#[inline]
pub fn leave_write<M: Memory>(slot: &M::Word, word: SectionWord) -> bool {
    let done = word.with_state(SectionState::Done).word();
    if slot.compare_exchange(word.word(), done, Ordering::Release, Ordering::Acquire).is_ok() {
        return true;
    }
    slot.store(word.with_state(SectionState::Idle).word(), Ordering::Release);
    false
}

/// Marks pages of a window as changed; `bits` in one word of the client's dirty region. Before [`leave_write`].
#[inline]
pub fn mark_dirty<M: Memory>(word: &M::Word, bits: u64) {
    // Release: a server that harvests the bit without looking at the slot must find the bytes as well.
    word.fetch_or(bits, Ordering::Release);
}

/// Begins a borrow: the bytes at the returned place stay as they are, or become a snapshot, until [`leave_borrow`].
///
/// The note says where the borrow is, so that only those pages wait for it: else one silent borrow would hold up the pages of
/// every later move of the window too. A client that lies in it harms its own snapshot.
#[inline]
pub fn enter_borrow<M: Memory>(
    guard: Guard<'_, M::Word>,
    slot: &M::Word,
    note: &M::Word,
    word: SectionWord,
) -> Result<Seen, Closed> {
    note.store(0, Ordering::Relaxed);
    // Release: a server that sees this borrow does not see the previous one's note.
    slot.store(word.word(), Ordering::Release);
    M::fence(Fence::Enter);
    match look::<M>(guard) {
        Ok(seen) => {
            note.store(seen.place.word(), Ordering::Release);
            Ok(seen)
        }
        Err(closed) => {
            slot.store(word.with_state(SectionState::Idle).word(), Ordering::Release);
            Err(closed)
        }
    }
}

/// Ends a borrow. Release: the server's reuse comes after the last load through it.
#[inline]
pub fn leave_borrow<M: Memory>(slot: &M::Word, word: SectionWord) {
    slot.store(word.with_state(SectionState::Done).word(), Ordering::Release);
}

/// Server, step 2: makes the generation odd. From the fence on, a writer either shows in its slot or sees the odd generation.
pub fn freeze<M: Memory>(guard: Guard<'_, M::Word>, generation: u64) -> u64 {
    let odd = generation | 1;
    guard.generation.store(odd, Ordering::Release);
    M::fence(Fence::Freeze);
    odd
}

/// Server, steps 3 and 5: the slot's word if it is in a section of this kind on this window.
pub fn busy<M: Memory>(slot: &M::Word, window: u32, kind: SectionKind) -> Option<SectionWord> {
    // Acquire: a section seen to be over has made its stores and its dirty bits visible.
    let word = SectionWord::from_word(slot.load(Ordering::Acquire));
    (word.state() == SectionState::Active && word.kind() == kind && word.window() == window).then_some(word)
}

/// Server: whether the slot has changed since `busy` returned `word`. Only change counts: a new section sees the odd generation.
pub fn moved_on<M: Memory>(slot: &M::Word, word: SectionWord) -> bool {
    slot.load(Ordering::Acquire) != word.word()
}

/// Server, end of the grace: fences a section. `None`: it ended just in time.
pub fn fence_section<M: Memory>(slot: &M::Word, word: SectionWord) -> Option<SectionWord> {
    let fenced = word.with_state(SectionState::Fenced);
    slot.compare_exchange(word.word(), fenced.word(), Ordering::AcqRel, Ordering::Acquire)
        .is_ok()
        .then_some(fenced)
}

/// Server, after fencing a writer: takes the place away, so that no reader accepts bytes that the writer may still store.
/// The generation stays odd. Only after this may the last copy be made.
pub fn hide<M: Memory>(guard: Guard<'_, M::Word>, odd: u64) -> u64 {
    guard.place.store(Place::NONE.word(), Ordering::Release);
    guard.generation.store(odd + 2, Ordering::Release);
    M::fence(Fence::Hide);
    odd + 2
}

/// Server, step 4: publishes the new place and makes the generation even. After it returns, pages of the old place that no
/// borrow holds may be reused.
pub fn publish<M: Memory>(guard: Guard<'_, M::Word>, odd: u64, place: Place) -> u64 {
    guard.place.store(place.word(), Ordering::Release);
    guard.generation.store(odd + 1, Ordering::Release);
    M::fence(Fence::Publish);
    odd + 1
}

/// Server, or whoever resets its device: moves every window at once. Returns the device generation from before. What the CMB may lose
/// next is lost after the fence: a reader that copied any of it finds the device generation changed.
pub fn move_device<M: Memory>(device: &M::Word) -> u64 {
    let mut before = device.load(Ordering::Relaxed);
    while let Err(now) = device.compare_exchange(before, before + 1, Ordering::Release, Ordering::Relaxed) {
        before = now;
    }
    M::fence(Fence::Publish);
    before
}

/// Server: takes the dirty bits. Acquire: their bytes come with them.
pub fn harvest<M: Memory>(word: &M::Word) -> u64 {
    // The load first: most words are clean, and a swap would take the cache line from the client each time.
    if word.load(Ordering::Relaxed) == 0 { 0 } else { word.swap(0, Ordering::Acquire) }
}
