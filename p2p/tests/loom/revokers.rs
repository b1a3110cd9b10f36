//! Two revokers, one after the other: the server moves a window once at a time.

use std::sync::atomic::Ordering::{self, Relaxed};

use loom::sync::Arc;
use loom::thread;
use p2p::layout::{Place, SectionKind, SectionState, SectionWord};
use p2p::protocol::{
    Closed, Fence, Guard, Memory, Seen, Word, busy, enter_write, fence_section, freeze, hide, look, publish,
};

use crate::world::{Enter, Loom, LoomWord, NO_FREEZE, NO_RECHECK, OLD, POISON, SOUND, World, model, place};

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
fn two_revokers_and_a_slow_writer<const B: u8>(enter: Enter<B>) {
    model(move || {
        let w = World::<B>::new();
        let writer = {
            let w = Arc::clone(&w);
            thread::spawn(move || w.write(enter))
        };
        // First: 0 to 1, whoever is in is fenced.
        let mut generation = freeze::<Loom<B>>(w.guard(), 2);
        let fenced = busy::<Loom<B>>(&w.slot, 0, SectionKind::Write)
            .and_then(|seen| fence_section::<Loom<B>>(&w.slot, seen));
        if fenced.is_some() {
            generation = hide::<Loom<B>>(w.guard(), generation);
        }
        w.copy(0, 1);
        generation = publish::<Loom<B>>(w.guard(), generation, place(1));
        // Second: to nowhere, waiting for whoever is in. Then page 1 is another's.
        generation = freeze::<Loom<B>>(w.guard(), generation);
        w.wait(SectionKind::Write);
        publish::<Loom<B>>(w.guard(), generation, Place::NONE);
        w.put(1, [POISON, POISON]);
        writer.join().unwrap();
        assert_eq!(w.get(1), [POISON, POISON], "a late store");
    });
}

#[test]
fn a_writer_fenced_while_entering_does_not_go_on() {
    two_revokers_and_a_slow_writer::<SOUND>(enter_write::<Loom<SOUND>>);
}

#[test]
#[should_panic(expected = "a late store")]
fn broken_entering_without_looking_back_at_the_slot() {
    two_revokers_and_a_slow_writer::<SOUND>(enter_without_looking_back::<SOUND>);
}

/// Two moves, there and back: a reader that slept through both must notice.
fn two_revokers_and_a_reader<const B: u8>(counting: bool) {
    model(move || {
        let w = World::<B>::new();
        let server = {
            let w = Arc::clone(&w);
            thread::spawn(move || {
                w.copy(0, 1);
                let odd = freeze::<Loom<B>>(w.guard(), 2);
                let even = publish::<Loom<B>>(w.guard(), odd, place(1));
                w.put(0, [POISON, POISON]);
                w.copy(1, 0);
                let odd = freeze::<Loom<B>>(w.guard(), if counting { even } else { 2 });
                publish::<Loom<B>>(w.guard(), if counting { odd } else { 1 }, place(0));
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
    two_revokers_and_a_reader::<SOUND>(true);
}

#[test]
#[should_panic(expected = "torn or foreign")]
fn broken_a_generation_that_does_not_count() {
    two_revokers_and_a_reader::<SOUND>(false);
}

#[test]
#[should_panic(expected = "torn or foreign")]
fn broken_no_acquire_between_two_moves() {
    two_revokers_and_a_reader::<NO_RECHECK>(true);
}

#[test]
#[should_panic(expected = "a late store")]
fn broken_a_second_revoker_that_does_not_see_the_writer() {
    two_revokers_and_a_slow_writer::<NO_FREEZE>(enter_write::<Loom<NO_FREEZE>>);
}
