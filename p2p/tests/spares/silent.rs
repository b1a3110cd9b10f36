//! Fenced writers and borrows.

use p2p::layout::Home;
use p2p::windows::Scope;
use p2p::writer::{Finished, Returned};

use crate::common::{GRACE, W, writing};
use crate::world::{PAGES, assert_bytes, assert_spare, home, in_host, promote, revoke, rig, with};

/// In the CMB: it may have stored anywhere, and says nothing.
#[test]
fn after_a_writer_was_fenced_or_died_every_page_is_copied() {
    let (mut rig, c, hold) = rig();
    let mut slot = c.slots.take().unwrap();
    let mut section = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    section.write(4096, b"early").unwrap();
    assert_eq!(revoke(&mut rig, &hold), PAGES);
    assert_bytes(&c, &hold, Home::Host, &with(&[(4096, b"early")]));
    section.write(2 * 4096, b"late").unwrap();
    assert_eq!(section.finish(), Finished::Revoked);
    rig.poll();
    assert_bytes(&c, &hold, Home::Host, &with(&[(4096, b"early")]));
    promote(&mut rig, &hold);

    let died = rig.client();
    let its = rig.hold(&died, 7, 0, true);
    let mut slot = died.slots.take().unwrap();
    let mut section = slot.write(&died.control, writing(&its), &died.view).unwrap();
    section.write(0, b"last words").unwrap();
    rig.windows.client_died(died.id, &mut rig.drive, rig.now);
    assert_spare(&rig, &hold, true);
    assert_eq!(revoke(&mut rig, &hold), PAGES);
    assert_bytes(&c, &hold, Home::Host, &with(&[(0, b"last words"), (4096, b"early")]));
}

/// The move is given up because the drive refuses, and the window stays in the CMB: the spare must know of the fencing still.
#[test]
fn a_writer_that_was_fenced_by_a_move_that_failed_makes_the_spare_stale() {
    let (mut rig, c, hold) = rig();
    let mut slot = c.slots.take().unwrap();
    let mut section = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    section.write(4096, b"fenced").unwrap();
    rig.drive.fail_writes = true;
    let ticket = rig.windows.evict(&Scope::Object(7), &mut rig.drive, rig.now).unwrap();
    rig.now += GRACE;
    rig.poll();
    // Killed, so that it marks nothing as changed.
    let keeper = rig.client();
    let its = rig.hold(&keeper, 7, 0, false);
    rig.windows.client_died(c.id, &mut rig.drive, rig.now);
    assert_eq!(rig.finish(ticket).failed.len(), 1);
    assert_eq!(home(&rig, &its), Home::Cmb);
    rig.drive.fail_writes = false;
    let (_, in_cmb) = keeper.read(its.handle, 0, W);
    revoke(&mut rig, &its);
    assert_bytes(&c, &its, Home::Host, &in_cmb);
    std::mem::forget(section);
}

/// In the host cache: the pages that it may still store to are nobody's spare.
#[test]
fn pages_that_a_fenced_writer_may_still_touch_are_no_spare() {
    let (mut rig, c, hold) = in_host();
    let mut slot = c.slots.take().unwrap();
    let mut section = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    section.write(0, b"early").unwrap();
    rig.windows.promote(hold.handle.index, &mut rig.drive, rig.now);
    rig.now += GRACE;
    rig.poll();
    assert_eq!(home(&rig, &hold), Home::Cmb);
    assert_spare(&rig, &hold, false);
    section.write(4096, b"late").unwrap();
    revoke(&mut rig, &hold);
    assert_bytes(&c, &hold, Home::Host, &with(&[(0, b"early")]));
    assert_eq!(section.finish(), Finished::Revoked);
    rig.poll();
    assert_eq!(rig.windows.host_bytes().0, W as u64, "what it held is free");
}

#[test]
fn borrowed_pages_are_no_spare() {
    let (mut rig, c, hold) = in_host();
    let mut slot = c.slots.take().unwrap();
    let borrow = slot.borrow(&c.control, hold.handle, &c.view).unwrap();
    promote(&mut rig, &hold);
    assert_spare(&rig, &hold, false);
    c.write(&hold, 0, b"new");
    revoke(&mut rig, &hold);
    let mut snapshot = vec![0; W];
    borrow.bytes().read(0, &mut snapshot).unwrap();
    assert_eq!(snapshot, with(&[]));
    assert_eq!(borrow.end(), Returned::Snapshot);
    assert_bytes(&c, &hold, Home::Host, &with(&[(0, b"new")]));
}
