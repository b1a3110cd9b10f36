//! One window, one client slot, two places of one page each, over loom's atomics.
//!
//! A page is two words, so that a torn copy shows. `POISON` stands for another file's bytes in a page that was reused.

use std::sync::atomic::Ordering::{self, Relaxed};

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, fence};
use loom::thread;
use p2p::layout::{Home, Place, SectionKind, SectionState, SectionWord};
use p2p::protocol::{
    Closed, Fence, Guard, Memory, Seen, Word, busy, leave_write, look, mark_dirty, moved_on, unchanged,
};

pub const OLD: u64 = 7;
pub const NEW: u64 = 8;
pub const POISON: u64 = 99;

/// Nothing is left out.
pub const SOUND: u8 = 0;
pub const NO_RECHECK: u8 = 1;
pub const NO_ENTER: u8 = 2;
pub const NO_FREEZE: u8 = 3;
pub const NO_PUBLISH: u8 = 4;
/// Dirty bits are set without release order.
pub const WEAK_DIRTY: u8 = 5;
/// Nothing is left out, on a machine where all processors see stores in one order (x86-64, AArch64): there an acquire fence between two
/// loads keeps them in that order, which is what loom knows as a SeqCst fence. `docs/revocation.md` says where this matters.
pub const ONE_ORDER: u8 = 6;

#[derive(Debug)]
pub struct LoomWord<const BROKEN: u8>(AtomicU64);

impl<const BROKEN: u8> Word for LoomWord<BROKEN> {
    fn load(&self, order: Ordering) -> u64 {
        self.0.load(order)
    }
    fn store(&self, value: u64, order: Ordering) {
        self.0.store(value, order);
    }
    fn swap(&self, value: u64, order: Ordering) -> u64 {
        self.0.swap(value, order)
    }
    fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        self.0.fetch_or(bits, if BROKEN == WEAK_DIRTY { Relaxed } else { order })
    }
    fn compare_exchange(&self, current: u64, new: u64, ok: Ordering, no: Ordering) -> Result<u64, u64> {
        self.0.compare_exchange(current, new, ok, no)
    }
}

#[derive(Debug)]
pub struct Loom<const BROKEN: u8>;

impl<const BROKEN: u8> Memory for Loom<BROKEN> {
    type Word = LoomWord<BROKEN>;
    fn fence(which: Fence) {
        let left_out = match which {
            Fence::Recheck => NO_RECHECK,
            Fence::Enter => NO_ENTER,
            Fence::Freeze => NO_FREEZE,
            Fence::Publish => NO_PUBLISH,
            Fence::Hide => SOUND + 100,
        };
        if BROKEN == ONE_ORDER && which == Fence::Recheck {
            fence(Ordering::SeqCst);
        } else if BROKEN != left_out {
            fence(which.ordering());
        }
    }
}

/// One window, one client slot, two places of one page each.
pub struct World<const BROKEN: u8> {
    pub device: LoomWord<BROKEN>,
    pub generation: LoomWord<BROKEN>,
    pub place: LoomWord<BROKEN>,
    pub slot: LoomWord<BROKEN>,
    pub note: LoomWord<BROKEN>,
    pub dirty: LoomWord<BROKEN>,
    pub pages: [[AtomicU64; 2]; 2],
}

pub fn word<const BROKEN: u8>(value: u64) -> LoomWord<BROKEN> {
    LoomWord(AtomicU64::new(value))
}

pub fn place(page: usize) -> Place {
    Place::new(Home::Cmb, page as u64 * 4096, 1).unwrap()
}

pub fn page_of(place: Place) -> usize {
    (place.offset() / 4096) as usize
}

impl<const BROKEN: u8> World<BROKEN> {
    pub fn new() -> Arc<Self> {
        let page = |v| [AtomicU64::new(v), AtomicU64::new(v)];
        Arc::new(Self {
            device: word(1),
            generation: word(2),
            place: word(place(0).word()),
            slot: word(0),
            note: word(0),
            dirty: word(0),
            pages: [page(OLD), page(POISON)],
        })
    }

    pub fn guard(&self) -> Guard<'_, LoomWord<BROKEN>> {
        Guard { device: &self.device, generation: &self.generation, place: &self.place }
    }

    pub fn get(&self, page: usize) -> [u64; 2] {
        [self.pages[page][0].load(Relaxed), self.pages[page][1].load(Relaxed)]
    }

    pub fn put(&self, page: usize, value: [u64; 2]) {
        self.pages[page][0].store(value[0], Relaxed);
        self.pages[page][1].store(value[1], Relaxed);
    }

    pub fn copy(&self, from: usize, to: usize) {
        self.put(to, self.get(from));
    }

    pub fn read(&self) -> Option<[u64; 2]> {
        let seen = look::<Loom<BROKEN>>(self.guard()).ok()?;
        let got = self.get(page_of(seen.place));
        unchanged::<Loom<BROKEN>>(self.guard(), seen).then_some(got)
    }

    /// A whole write section; what it came to.
    pub fn write(&self, enter: Enter<BROKEN>) -> Option<bool> {
        let word = SectionWord::new(SectionState::Active, SectionKind::Write, 0, 1);
        let seen = enter(self.guard(), &self.slot, word).ok()?;
        self.put(page_of(seen.place), [NEW, NEW]);
        mark_dirty::<Loom<BROKEN>>(&self.dirty, 1);
        Some(leave_write::<Loom<BROKEN>>(&self.slot, word))
    }

    pub fn wait(&self, kind: SectionKind) {
        if let Some(seen) = busy::<Loom<BROKEN>>(&self.slot, 0, kind) {
            while !moved_on::<Loom<BROKEN>>(&self.slot, seen) {
                thread::yield_now();
            }
        }
    }
}

pub type Enter<const B: u8> = fn(Guard<'_, LoomWord<B>>, &LoomWord<B>, SectionWord) -> Result<Seen, Closed>;

pub fn model(body: impl Fn() + Send + Sync + 'static) {
    bounded(3, body);
}

pub fn bounded(preemptions: usize, body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(body);
}
