//! A reader and a revoker.

use loom::sync::Arc;
use loom::thread;
use p2p::protocol::{freeze, publish};

use crate::world::{Loom, NO_PUBLISH, NO_RECHECK, OLD, POISON, SOUND, World, model, place};

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
