//! The protocol's own code (`p2p::protocol`) under loom, which tries every interleaving and every value that a weak memory may
//! show. Each model comes with a broken twin (a fence or a step left out) that loom must catch.
//!
//! A page is two words, so that a torn copy shows. `POISON` stands for another file's bytes in a page that was reused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use std::sync::atomic::Ordering::{self, Relaxed};

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, fence};
use loom::thread;
use p2p::layout::{Home, Place, SectionKind, SectionState, SectionWord};
use p2p::protocol::{
    Closed, Fence, Guard, Memory, Seen, Word, busy, enter_borrow, enter_write, fence_section, freeze,
    harvest, hide, leave_borrow, leave_write, look, mark_dirty, moved_on, publish, unchanged,
};

const OLD: u64 = 7;
const NEW: u64 = 8;
const POISON: u64 = 99;

/// Nothing is left out.
const SOUND: u8 = 0;
const NO_RECHECK: u8 = 1;
const NO_ENTER: u8 = 2;
const NO_FREEZE: u8 = 3;
const NO_PUBLISH: u8 = 4;
/// Dirty bits are set without release order.
const WEAK_DIRTY: u8 = 5;
/// Nothing is left out, on a machine where all processors see stores in one order (x86-64, AArch64): there an acquire fence between two
/// loads keeps them in that order, which is what loom knows as a SeqCst fence. `docs/revocation.md` says where this matters.
const ONE_ORDER: u8 = 6;

#[derive(Debug)]
struct LoomWord<const BROKEN: u8>(AtomicU64);

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
struct Loom<const BROKEN: u8>;

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
struct World<const BROKEN: u8> {
    device: LoomWord<BROKEN>,
    generation: LoomWord<BROKEN>,
    place: LoomWord<BROKEN>,
    slot: LoomWord<BROKEN>,
    note: LoomWord<BROKEN>,
    dirty: LoomWord<BROKEN>,
    pages: [[AtomicU64; 2]; 2],
}

fn word<const BROKEN: u8>(value: u64) -> LoomWord<BROKEN> {
    LoomWord(AtomicU64::new(value))
}

fn place(page: usize) -> Place {
    Place::new(Home::Cmb, page as u64 * 4096, 1).unwrap()
}

fn page_of(place: Place) -> usize {
    (place.offset() / 4096) as usize
}

impl<const BROKEN: u8> World<BROKEN> {
    fn new() -> Arc<Self> {
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

    fn guard(&self) -> Guard<'_, LoomWord<BROKEN>> {
        Guard { device: &self.device, generation: &self.generation, place: &self.place }
    }

    fn get(&self, page: usize) -> [u64; 2] {
        [self.pages[page][0].load(Relaxed), self.pages[page][1].load(Relaxed)]
    }

    fn put(&self, page: usize, value: [u64; 2]) {
        self.pages[page][0].store(value[0], Relaxed);
        self.pages[page][1].store(value[1], Relaxed);
    }

    fn copy(&self, from: usize, to: usize) {
        self.put(to, self.get(from));
    }

    fn read(&self) -> Option<[u64; 2]> {
        let seen = look::<Loom<BROKEN>>(self.guard()).ok()?;
        let got = self.get(page_of(seen.place));
        unchanged::<Loom<BROKEN>>(self.guard(), seen).then_some(got)
    }

    /// A whole write section; what it came to.
    fn write(&self, enter: Enter<BROKEN>) -> Option<bool> {
        let word = SectionWord::new(SectionState::Active, SectionKind::Write, 0, 1);
        let seen = enter(self.guard(), &self.slot, word).ok()?;
        self.put(page_of(seen.place), [NEW, NEW]);
        mark_dirty::<Loom<BROKEN>>(&self.dirty, 1);
        Some(leave_write::<Loom<BROKEN>>(&self.slot, word))
    }

    fn wait(&self, kind: SectionKind) {
        if let Some(seen) = busy::<Loom<BROKEN>>(&self.slot, 0, kind) {
            while !moved_on::<Loom<BROKEN>>(&self.slot, seen) {
                thread::yield_now();
            }
        }
    }
}

type Enter<const B: u8> = fn(Guard<'_, LoomWord<B>>, &LoomWord<B>, SectionWord) -> Result<Seen, Closed>;

fn model(body: impl Fn() + Send + Sync + 'static) {
    bounded(3, body);
}

fn bounded(preemptions: usize, body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(body);
}

/// A reader against a move and the reuse of the old page.
fn reader_and_revoker<const B: u8>() {
    model(|| {
        let w = World::<B>::new();
        let server = {
            let w = Arc::clone(&w);
            thread::spawn(move || {
                w.copy(0, 1);
                let odd = freeze::<Loom<B>>(w.guard(), 2);
                publish::<Loom<B>>(w.guard(), odd, place(1));
                w.put(0, [POISON, POISON]);
            })
        };
        if let Some(got) = w.read() {
            assert_eq!(got, [OLD, OLD], "torn or foreign");
        }
        server.join().unwrap();
        assert_eq!(w.read(), Some([OLD, OLD]));
    });
}

#[test]
fn a_reader_sees_one_moment() {
    reader_and_revoker::<SOUND>();
}

#[test]
#[should_panic(expected = "torn or foreign")]
fn broken_no_acquire_before_the_recheck() {
    reader_and_revoker::<NO_RECHECK>();
}

#[test]
#[should_panic(expected = "torn or foreign")]
fn broken_no_fence_between_publication_and_reuse() {
    reader_and_revoker::<NO_PUBLISH>();
}

/// A writer against a move that waits for it, and the reuse of the old page.
fn writer_and_revoker<const B: u8>(drain: bool) {
    model(move || {
        let w = World::<B>::new();
        let writer = {
            let w = Arc::clone(&w);
            thread::spawn(move || w.write(enter_write::<Loom<B>>))
        };
        w.copy(0, 1);
        let odd = freeze::<Loom<B>>(w.guard(), 2);
        if drain {
            w.wait(SectionKind::Write);
        }
        if harvest::<Loom<B>>(&w.dirty) != 0 {
            w.copy(0, 1);
        }
        publish::<Loom<B>>(w.guard(), odd, place(1));
        w.put(0, [POISON, POISON]);
        let wrote = writer.join().unwrap();
        assert_eq!(w.get(0), [POISON, POISON], "a late store");
        let want = if wrote == Some(true) { NEW } else { OLD };
        assert_eq!(w.read(), Some([want, want]), "a lost store");
    });
}

#[test]
fn a_writer_is_seen_or_sees() {
    writer_and_revoker::<SOUND>(true);
}

#[test]
#[should_panic(expected = "store")]
fn broken_no_fence_after_the_slot() {
    writer_and_revoker::<NO_ENTER>(true);
}

#[test]
#[should_panic(expected = "store")]
fn broken_no_fence_after_the_odd_generation() {
    writer_and_revoker::<NO_FREEZE>(true);
}

#[test]
#[should_panic(expected = "store")]
fn broken_no_drain() {
    writer_and_revoker::<SOUND>(false);
}

/// A writer that is fenced at once: it is told, or its bytes are in the new place.
fn writer_and_fencing<const B: u8>(ask_the_exchange: bool) {
    model(move || {
        let w = World::<B>::new();
        let writer = {
            let w = Arc::clone(&w);
            thread::spawn(move || w.write(enter_write::<Loom<B>>))
        };
        w.copy(0, 1);
        let mut odd = freeze::<Loom<B>>(w.guard(), 2);
        let mut quarantined = false;
        if let Some(seen) = busy::<Loom<B>>(&w.slot, 0, SectionKind::Write) {
            if ask_the_exchange {
                quarantined = fence_section::<Loom<B>>(&w.slot, seen).is_some();
            } else {
                w.slot.store(seen.with_state(SectionState::Fenced).word(), Ordering::Release);
            }
            if quarantined {
                odd = hide::<Loom<B>>(w.guard(), odd);
            }
        }
        if quarantined || harvest::<Loom<B>>(&w.dirty) != 0 {
            w.copy(0, 1);
        }
        publish::<Loom<B>>(w.guard(), odd, place(1));
        if !quarantined {
            w.put(0, [POISON, POISON]);
        }
        let wrote = writer.join().unwrap();
        if !quarantined {
            assert_eq!(w.get(0), [POISON, POISON], "a late store");
        }
        if wrote == Some(true) {
            assert_eq!(w.read(), Some([NEW, NEW]), "a lost store");
        }
    });
}

#[test]
fn a_fenced_writer_is_told() {
    writer_and_fencing::<SOUND>(true);
}

#[test]
#[should_panic(expected = "store")]
fn broken_fencing_without_the_exchange() {
    writer_and_fencing::<SOUND>(false);
}

fn enter_without_looking_back<const B: u8>(
    guard: Guard<'_, LoomWord<B>>,
    slot: &LoomWord<B>,
    word: SectionWord,
) -> Result<Seen, Closed> {
    slot.store(word.word(), Relaxed);
    Loom::<B>::fence(Fence::Enter);
    match look::<Loom<B>>(guard) {
        Ok(seen) if seen.generation % 2 == 0 => Ok(seen),
        other => {
            slot.store(word.with_state(SectionState::Idle).word(), Ordering::Release);
            other.and(Err(Closed::Frozen))
        }
    }
}

/// Two revocations, one after the other. The first fences a writer that has shown its slot and not looked yet; the second must
/// not take that slot for an answered one.
fn two_revokers_and_a_slow_writer(enter: Enter<SOUND>) {
    model(move || {
        let w = World::<SOUND>::new();
        let writer = {
            let w = Arc::clone(&w);
            thread::spawn(move || w.write(enter))
        };
        // First: 0 to 1, whoever is in is fenced.
        let mut generation = freeze::<Loom<SOUND>>(w.guard(), 2);
        let fenced = busy::<Loom<SOUND>>(&w.slot, 0, SectionKind::Write)
            .and_then(|seen| fence_section::<Loom<SOUND>>(&w.slot, seen));
        if fenced.is_some() {
            generation = hide::<Loom<SOUND>>(w.guard(), generation);
        }
        w.copy(0, 1);
        generation = publish::<Loom<SOUND>>(w.guard(), generation, place(1));
        // Second: to nowhere, waiting for whoever is in. Then page 1 is another's.
        generation = freeze::<Loom<SOUND>>(w.guard(), generation);
        w.wait(SectionKind::Write);
        publish::<Loom<SOUND>>(w.guard(), generation, Place::NONE);
        w.put(1, [POISON, POISON]);
        writer.join().unwrap();
        assert_eq!(w.get(1), [POISON, POISON], "a late store");
    });
}

#[test]
fn a_writer_fenced_while_entering_does_not_go_on() {
    two_revokers_and_a_slow_writer(enter_write::<Loom<SOUND>>);
}

#[test]
#[should_panic(expected = "a late store")]
fn broken_entering_without_looking_back_at_the_slot() {
    two_revokers_and_a_slow_writer(enter_without_looking_back::<SOUND>);
}

/// Two moves, there and back: a reader that slept through both must notice.
fn two_revokers_and_a_reader(counting: bool) {
    model(move || {
        let w = World::<SOUND>::new();
        let server = {
            let w = Arc::clone(&w);
            thread::spawn(move || {
                w.copy(0, 1);
                let odd = freeze::<Loom<SOUND>>(w.guard(), 2);
                let even = publish::<Loom<SOUND>>(w.guard(), odd, place(1));
                w.put(0, [POISON, POISON]);
                w.copy(1, 0);
                let odd = freeze::<Loom<SOUND>>(w.guard(), if counting { even } else { 2 });
                publish::<Loom<SOUND>>(w.guard(), if counting { odd } else { 1 }, place(0));
            })
        };
        if let Some(got) = w.read() {
            assert_eq!(got, [OLD, OLD], "torn or foreign");
        }
        server.join().unwrap();
    });
}

#[test]
fn a_window_may_come_back_to_its_old_place() {
    two_revokers_and_a_reader(true);
}

#[test]
#[should_panic(expected = "torn or foreign")]
fn broken_a_generation_that_does_not_count() {
    two_revokers_and_a_reader(false);
}

/// A borrow against a move and the reuse of the old page.
fn borrow_and_revoker<const B: u8>(wait: bool) {
    model(move || {
        let w = World::<B>::new();
        let borrower = {
            let w = Arc::clone(&w);
            thread::spawn(move || {
                let word = SectionWord::new(SectionState::Active, SectionKind::Borrow, 0, 1);
                if let Ok(seen) = enter_borrow::<Loom<B>>(w.guard(), &w.slot, &w.note, word) {
                    assert_eq!(w.get(page_of(seen.place)), [OLD, OLD], "a borrow that changed");
                    leave_borrow::<Loom<B>>(&w.slot, word);
                }
            })
        };
        w.copy(0, 1);
        let odd = freeze::<Loom<B>>(w.guard(), 2);
        publish::<Loom<B>>(w.guard(), odd, place(1));
        let here = |note: u64| Place::from_word(note).home() == Home::None || note == place(0).word();
        if let Some(seen) = busy::<Loom<B>>(&w.slot, 0, SectionKind::Borrow)
            && here(w.note.load(Ordering::Acquire))
            && wait
        {
            while !moved_on::<Loom<B>>(&w.slot, seen) {
                thread::yield_now();
            }
        }
        w.put(0, [POISON, POISON]);
        borrower.join().unwrap();
    });
}

#[test]
fn a_borrow_is_a_snapshot() {
    borrow_and_revoker::<SOUND>(true);
}

#[test]
#[should_panic(expected = "a borrow that changed")]
fn broken_a_borrow_without_its_fence() {
    borrow_and_revoker::<NO_ENTER>(true);
}

#[test]
#[should_panic(expected = "a borrow that changed")]
fn broken_pages_reused_under_a_borrow() {
    borrow_and_revoker::<SOUND>(false);
}

/// A client that dies in its section: its stores were made, its dirty bits were not set.
fn client_death(all_changed: bool) {
    model(move || {
        let w = World::<SOUND>::new();
        let dead = Arc::new(AtomicBool::new(false));
        let writer = {
            let (w, dead) = (Arc::clone(&w), Arc::clone(&dead));
            thread::spawn(move || {
                let word = SectionWord::new(SectionState::Active, SectionKind::Write, 0, 1);
                let entered = enter_write::<Loom<SOUND>>(w.guard(), &w.slot, word);
                if let Ok(seen) = entered {
                    w.put(page_of(seen.place), [NEW, NEW]);
                }
                // What the kernel does: after the last store, the pidfd says so.
                dead.store(true, Ordering::Release);
                entered.is_ok()
            })
        };
        w.copy(0, 1);
        let odd = freeze::<Loom<SOUND>>(w.guard(), 2);
        let mut changed = false;
        if let Some(seen) = busy::<Loom<SOUND>>(&w.slot, 0, SectionKind::Write) {
            while !moved_on::<Loom<SOUND>>(&w.slot, seen) && !dead.load(Ordering::Acquire) {
                thread::yield_now();
            }
            changed = all_changed;
        }
        if changed || harvest::<Loom<SOUND>>(&w.dirty) != 0 {
            w.copy(0, 1);
        }
        publish::<Loom<SOUND>>(w.guard(), odd, place(1));
        w.put(0, [POISON, POISON]);
        if writer.join().unwrap() {
            assert_eq!(w.get(0), [POISON, POISON], "a late store");
            assert_eq!(w.read(), Some([NEW, NEW]), "a lost store");
        }
    });
}

#[test]
fn a_dead_clients_stores_move_along() {
    client_death(true);
}

#[test]
#[should_panic(expected = "a lost store")]
fn broken_a_dead_clients_window_taken_for_clean() {
    client_death(false);
}

/// A harvest while the section is open, as a commit does: whoever takes the bit finds the bytes.
fn writer_and_harvest<const B: u8>() {
    model(|| {
        let w = World::<B>::new();
        let writer = {
            let w = Arc::clone(&w);
            thread::spawn(move || w.write(enter_write::<Loom<B>>))
        };
        if harvest::<Loom<B>>(&w.dirty) != 0 {
            assert_eq!(w.get(0), [NEW, NEW], "a bit without its bytes");
        }
        writer.join().unwrap();
    });
}

#[test]
fn dirty_bits_bring_their_bytes() {
    writer_and_harvest::<SOUND>();
}

#[test]
#[should_panic(expected = "a bit without its bytes")]
fn broken_dirty_bits_without_release() {
    writer_and_harvest::<WEAK_DIRTY>();
}

/// A writer that is fenced and stores on, and a reader that looks twice: it may see the late store or not, but having seen it, it
/// may not see the older bytes again at the new place.
fn late_stores(hiding: bool) {
    // Two preemptions are enough for the broken twin to be caught; three take half a minute.
    bounded(2, move || {
        let w = World::<ONE_ORDER>::new();
        let writer = {
            let w = Arc::clone(&w);
            // In its section since before the move, and silent until after it was fenced.
            w.slot.store(SectionWord::new(SectionState::Active, SectionKind::Write, 0, 1).word(), Relaxed);
            thread::spawn(move || w.pages[0][0].store(NEW, Relaxed))
        };
        let server = {
            let w = Arc::clone(&w);
            thread::spawn(move || {
                let mut odd = freeze::<Loom<ONE_ORDER>>(w.guard(), 2);
                let seen = busy::<Loom<ONE_ORDER>>(&w.slot, 0, SectionKind::Write).unwrap();
                fence_section::<Loom<ONE_ORDER>>(&w.slot, seen).unwrap();
                if hiding {
                    odd = hide::<Loom<ONE_ORDER>>(w.guard(), odd);
                }
                w.pages[1][0].store(w.pages[0][0].load(Relaxed), Relaxed);
                publish::<Loom<ONE_ORDER>>(w.guard(), odd, place(1));
            })
        };
        let look_once = || {
            let seen = look::<Loom<ONE_ORDER>>(w.guard()).ok()?;
            let got = w.pages[page_of(seen.place)][0].load(Relaxed);
            unchanged::<Loom<ONE_ORDER>>(w.guard(), seen).then_some(got)
        };
        if let (Some(first), Some(second)) = (look_once(), look_once()) {
            assert!(first <= second, "back to older bytes");
        }
        writer.join().unwrap();
        server.join().unwrap();
    });
}

#[test]
fn a_fenced_writers_late_stores_are_never_accepted() {
    late_stores(true);
}

#[test]
#[should_panic(expected = "back to older bytes")]
fn broken_a_fenced_window_that_stays_open() {
    late_stores(false);
}
