//! What is copied all the same, and nothing else.

use p2p::counters::{Path, Reason};
use p2p::layout::Home;
use p2p::windows::{Config, Scope, Want, WriteBack};
use p2p::writer::Finished;

use crate::common::{W, config, writing};
use crate::world::{PAGES, assert_bytes, assert_spare, promote, revoke, rig, rig_of, with};

#[test]
fn a_window_comes_back_to_its_own_pages_without_a_copy() {
    let (mut rig, c, hold) = rig();
    for _ in 0..3 {
        assert_eq!((rig.windows.host_bytes().0, rig.windows.spare_bytes()), (W as u64, W as u64));
        assert_eq!(rig.windows.status(hold.handle.index).unwrap().home, Home::Cmb);
        assert_eq!(revoke(&mut rig, &hold), 0);
        assert_eq!((rig.windows.host_bytes().0, rig.windows.spare_bytes()), (W as u64, 0));
        assert_bytes(&c, &hold, Home::Host, &with(&[]));
        promote(&mut rig, &hold);
    }
    assert_eq!(rig.windows.counters().spared_bytes, 3 * W as u64);
    // Straight from the drive into the CMB: there is nothing to come back to.
    let fresh = rig.hold(&c, 7, W as u64, true);
    rig.ensure_want(&fresh, Want::Cmb);
    assert_spare(&rig, &fresh, false);
    assert_eq!(revoke(&mut rig, &fresh), PAGES);
}

#[test]
fn what_was_written_in_the_cmb_is_copied_and_nothing_else() {
    let (mut rig, c, hold) = rig();
    c.write(&hold, 4096, b"one");
    assert_eq!(revoke(&mut rig, &hold), 1);
    assert_bytes(&c, &hold, Home::Host, &with(&[(4096, b"one")]));
    promote(&mut rig, &hold);
    // What was written in the host cache went along, and is in the spare.
    assert_eq!(revoke(&mut rig, &hold), 0);
    c.write(&hold, 0, b"in the host cache");
    promote(&mut rig, &hold);
    assert_eq!(revoke(&mut rig, &hold), 0);
    assert_bytes(&c, &hold, Home::Host, &with(&[(0, b"in the host cache"), (4096, b"one")]));
}

/// The drive has it then, so the window is clean; the spare does not.
#[test]
fn what_a_commit_has_written_back_is_copied_all_the_same() {
    let (mut rig, c, hold) = rig();
    c.write(&hold, 2 * 4096, b"committed");
    rig.windows.commit(7, &(0..W as u64), &mut rig.drive).unwrap();
    assert_eq!(rig.windows.status(hold.handle.index).unwrap().dirty_pages, 0);
    assert_eq!(revoke(&mut rig, &hold), 1);
    assert_bytes(&c, &hold, Home::Host, &with(&[(2 * 4096, b"committed")]));
}

#[test]
fn what_was_written_back_in_the_background_or_left_by_a_client_that_let_go_is_copied() {
    let wb = WriteBack { after: 1000, rate: 1 << 40 };
    let (mut rig, c, hold) = rig_of(Config { write_back: Some(wb), ..config() });
    let other = rig.client();
    let its = rig.hold(&other, 7, 0, true);
    other.write(&its, 3 * 4096, b"left");
    rig.windows.release(other.id, its.handle.index).unwrap();
    c.write(&hold, 0, b"background");
    for now in [1000, 2000, 3000] {
        rig.windows.poll(&mut rig.drive, now);
    }
    rig.now = 3000;
    assert!(rig.windows.counters().get(Path::Cmb, Reason::Background).bytes > 0);
    assert_eq!(revoke(&mut rig, &hold), 2);
    assert_bytes(&c, &hold, Home::Host, &with(&[(0, b"background"), (3 * 4096, b"left")]));
}

#[test]
fn a_section_that_ends_while_the_window_is_frozen_is_in_the_last_copy() {
    let (mut rig, c, hold) = rig();
    let mut slot = c.slots.take().unwrap();
    let mut section = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    section.write(4096, b"before").unwrap();
    let ticket = rig.windows.revoke(&Scope::Object(7), &mut rig.drive, rig.now).unwrap();
    rig.poll();
    section.write(3 * 4096, b"while frozen").unwrap();
    assert_eq!(section.finish(), Finished::Done);
    assert_eq!(rig.finish(ticket).moved, 1);
    assert_bytes(&c, &hold, Home::Host, &with(&[(4096, b"before"), (3 * 4096, b"while frozen")]));
}
