//! A borrow and a revoker.

use std::sync::atomic::Ordering;

use loom::sync::Arc;
use loom::thread;
use p2p::layout::{Home, Place, SectionKind, SectionState, SectionWord};
use p2p::protocol::{Word, busy, enter_borrow, freeze, leave_borrow, moved_on, publish};

use crate::world::{Loom, NO_ENTER, NO_PUBLISH, OLD, POISON, SOUND, World, model, page_of, place};

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
fn broken_no_fence_between_publication_and_the_look_for_borrows() {
    borrow_and_revoker::<NO_PUBLISH>(true);
}

#[test]
#[should_panic(expected = "a borrow that changed")]
fn broken_pages_reused_under_a_borrow() {
    borrow_and_revoker::<SOUND>(false);
}
