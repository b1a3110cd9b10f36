//! A writer and a revoker: waited for, fenced, or harvested in the middle.

use std::sync::atomic::Ordering::{self, Relaxed};

use loom::sync::Arc;
use loom::thread;

use p2p::layout::{SectionKind, SectionState, SectionWord};
use p2p::protocol::{
    Word, busy, enter_write, fence_section, freeze, harvest, hide, look, publish, unchanged,
};

use crate::world::{
    Loom, NEW, NO_ENTER, NO_FREEZE, OLD, ONE_ORDER, POISON, SOUND, WEAK_DIRTY, World, bounded, model,
    page_of, place,
};

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
