//! A client that dies.

use std::sync::atomic::Ordering;

use loom::sync::Arc;
use loom::sync::atomic::AtomicBool;
use loom::thread;
use p2p::layout::{SectionKind, SectionState, SectionWord};
use p2p::protocol::{busy, enter_write, freeze, harvest, moved_on, publish};

use crate::world::{Loom, NEW, NO_ENTER, NO_FREEZE, POISON, SOUND, World, model, page_of, place};

/// A client that dies in its section: its stores were made, its dirty bits were not set.
///
/// `seen_dead`: the ordering with which the server learns of the death. A pidfd that says so is an acquire.
fn client_death<const B: u8>(all_changed: bool, seen_dead: Ordering) {
    model(move || {
        let w = World::<B>::new();
        let dead = Arc::new(AtomicBool::new(false));
        let writer = {
            let (w, dead) = (Arc::clone(&w), Arc::clone(&dead));
            thread::spawn(move || {
                let word = SectionWord::new(SectionState::Active, SectionKind::Write, 0, 1);
                let entered = enter_write::<Loom<B>>(w.guard(), &w.slot, word);
                if let Ok(seen) = entered {
                    w.put(page_of(seen.place), [NEW, NEW]);
                }
                // What the kernel does: after the last store, the pidfd says so.
                dead.store(true, Ordering::Release);
                entered.is_ok()
            })
        };
        w.copy(0, 1);
        let odd = freeze::<Loom<B>>(w.guard(), 2);
        let mut changed = false;
        if let Some(seen) = busy::<Loom<B>>(&w.slot, 0, SectionKind::Write) {
            while !moved_on::<Loom<B>>(&w.slot, seen) && !dead.load(seen_dead) {
                thread::yield_now();
            }
            changed = all_changed;
        }
        if changed || harvest::<Loom<B>>(&w.dirty) != 0 {
            w.copy(0, 1);
        }
        publish::<Loom<B>>(w.guard(), odd, place(1));
        w.put(0, [POISON, POISON]);
        if writer.join().unwrap() {
            assert_eq!(w.get(0), [POISON, POISON], "a late store");
            assert_eq!(w.read(), Some([NEW, NEW]), "a lost store");
        }
    });
}

#[test]
fn a_dead_clients_stores_move_along() {
    client_death::<SOUND>(true, Ordering::Acquire);
}

#[test]
#[should_panic(expected = "a lost store")]
fn broken_a_dead_clients_window_taken_for_clean() {
    client_death::<SOUND>(false, Ordering::Acquire);
}

#[test]
#[should_panic(expected = "store")]
fn broken_a_death_seen_before_the_last_stores() {
    client_death::<SOUND>(true, Ordering::Relaxed);
}

#[test]
#[should_panic(expected = "store")]
fn broken_a_dying_client_that_is_not_seen() {
    client_death::<NO_ENTER>(true, Ordering::Acquire);
}

#[test]
#[should_panic(expected = "store")]
fn broken_a_dying_client_that_does_not_see() {
    client_death::<NO_FREEZE>(true, Ordering::Acquire);
}
