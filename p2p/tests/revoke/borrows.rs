//! Borrows become snapshots, and their pages wait for them.

use p2p::windows::Scope;
use p2p::writer::{Finished, Returned};

use crate::common::{W, in_cmb, pattern, rig, writing};

#[test]
fn a_borrow_becomes_a_snapshot_and_its_pages_wait() {
    let (mut rig, c, hold) = in_cmb();
    let (mut a, mut b) = (c.slots.take().unwrap(), c.slots.take().unwrap());
    let borrow = a.borrow(&c.control, hold.handle, &c.view).unwrap();
    assert!(borrow.is_current());
    let report = rig.revoke(&Scope::Window(hold.handle.index));
    assert_eq!((report.freed_bytes, report.quarantined_bytes), (0, W as u64));
    let mut s = b.write(&c.control, writing(&hold), &c.view).unwrap();
    s.write(0, b"newer").unwrap();
    assert_eq!(s.finish(), Finished::Done);
    let mut old = [0; 5];
    borrow.bytes().read(0, &mut old).unwrap();
    assert_eq!(old.to_vec(), (0..5).map(|i| pattern(7, i)).collect::<Vec<_>>());
    // A borrow that is taken now is of the new place, and does not hold the old pages.
    let newer = b.borrow(&c.control, hold.handle, &c.view).unwrap();
    assert_eq!(borrow.end(), Returned::Snapshot);
    rig.poll();
    assert_eq!(rig.windows.quarantine().count(), 0);
    assert_eq!(newer.end(), Returned::Current);
}

#[test]
fn one_silent_borrow_costs_one_place() {
    let mut rig = rig();
    let (silent, c) = (rig.client(), rig.client());
    let hold = rig.hold(&silent, 7, 0, false);
    let other = rig.hold(&c, 7, 0, false);
    rig.ensure(&hold);
    let mut slot = silent.slots.take().unwrap();
    // Stopped between its slot and its note: the worst case, for nobody knows where the borrow is.
    let borrow = slot.borrow(&silent.control, hold.handle, &silent.view).unwrap();
    silent.slots.region().slot(0).1.store(0, std::sync::atomic::Ordering::Release);
    for _ in 0..20 {
        let evicted = rig.windows.evict(&Scope::Object(7), &mut rig.drive, rig.now).unwrap();
        rig.finish(evicted);
        // Evicted again and again it runs out of lanes; then it is served without a place.
        rig.ensure(&other);
    }
    assert!(rig.windows.cmb_bytes().0 >= 7 * W, "at most one place in the CMB");
    assert!(rig.windows.host_bytes().0 <= p2p::layout::LANES * W as u64);
    drop(borrow);
    rig.poll();
    assert_eq!(rig.windows.quarantine().count(), 0);
}
