//! Borrows and silent writers.

use p2p::counters::Reason;
use p2p::layout::Home;
use p2p::reader::Outcome;
use p2p::refusal::Refusals;
use p2p::region::RegionKind;
use p2p::windows::{Config, Ensured, Scope, Want, WindowsError};
use p2p::writer::{Finished, Returned};

use crate::common::{GRACE, W, config, writing};
use crate::world::{OBJECT, World, client, want, world, world_with};

#[test]
fn a_borrow_of_it_is_a_snapshot_and_keeps_a_commit_from_its_pages() {
    let mut w = world();
    w.ensure_all();
    let mut slot = w.c.slots.take().unwrap();
    let (control, view) = (w.c.control.clone(), w.c.view.clone());
    let borrow = slot.borrow(&control, w.holds[0].handle, &view).unwrap();
    let report = w.rig.revoke(&Scope::Window(w.index(0)));
    assert_eq!(report.quarantined_bytes, W as u64);
    w.write(0, 0, b"new");
    assert!(matches!(w.commit(), Err(WindowsError::MemoryHeld { object: OBJECT, offset: 0 })));
    let mut seen = [0; 3];
    borrow.bytes().read(0, &mut seen).unwrap();
    assert_eq!(seen.to_vec(), want(0, 0, 3), "the snapshot changed");
    w.promote(0);
    assert_eq!(w.home(0), Home::Host, "its place is taken");
    let evicted = w.rig.windows.evict(&Scope::Window(w.index(0)), &mut w.rig.drive, w.rig.now).unwrap();
    assert_eq!(w.rig.finish(evicted).failed.len(), 1);
    assert_eq!(&w.read(0, 0, 3).1, b"new");
    assert_eq!(borrow.end(), Returned::Snapshot);
    w.rig.poll();
    assert_eq!(w.commit().unwrap().host_bytes, 4096);
    assert_eq!(w.raw(0, 0, 3), b"new");
    w.promote(0);
    assert_eq!(w.read(0, 0, 3), (Outcome::Copied(Home::Cmb), b"new".to_vec()));
}

/// A writer of window 0 that falls silent in a section; when it wakes up it stores late, and ends.
fn silent_writer(w: &mut World, act: impl FnOnce(&mut World), after: impl FnOnce(&mut World)) {
    let silent = client(&mut w.rig, &w.memory, RegionKind::Ordinary);
    let hold = w.rig.hold(&silent, OBJECT, 0, true);
    let mut slot = silent.slots.take().unwrap();
    let mut section = slot.write(&silent.control, writing(&hold), &silent.view).unwrap();
    section.write(0, b"half").unwrap();
    act(w);
    section.write(64, b"late").unwrap();
    after(w);
    assert_eq!(section.finish(), Finished::Revoked);
    w.rig.poll();
    w.rig.windows.release(silent.id, hold.handle.index).unwrap();
}

#[test]
fn what_a_silent_writer_stores_late_is_not_seen_and_not_kept() {
    let mut w = world();
    w.ensure_all();
    w.write(0, 64, b"good");
    silent_writer(
        &mut w,
        |w| {
            let report = w.rig.revoke(&Scope::Window(w.index(0)));
            assert_eq!((report.silent, report.quarantined_bytes), (1, W as u64));
        },
        |w| {
            assert_eq!(w.raw(0, 64, 4), b"late", "that is what it can reach");
            assert_eq!(w.read(0, 64, 4), (Outcome::Copied(Home::Host), b"good".to_vec()));
            // It stays away from there until the writer answers, and nothing is called durable.
            assert!(matches!(w.commit(), Err(WindowsError::MemoryHeld { .. })));
            w.promote(0);
            let index = w.index(0);
            assert_eq!(
                w.rig.windows.ensure(index, Want::Cmb, &mut w.rig.drive, w.rig.now).unwrap(),
                Ensured::Ready(Home::Host, Reason::Policy)
            );
            let evicted = w.rig.windows.evict(&Scope::Window(index), &mut w.rig.drive, w.rig.now).unwrap();
            assert_eq!(w.rig.finish(evicted).failed.len(), 1);
            assert_eq!(w.read(0, 64, 4), (Outcome::Copied(Home::Host), b"good".to_vec()));
        },
    );
    assert_eq!(w.commit().unwrap().host_bytes, W as u64, "all of it: nobody knows where it stored");
    assert_eq!(w.raw(0, 64, 4), b"good");
    w.promote(0);
    assert_eq!(w.read(0, 64, 4), (Outcome::Copied(Home::Cmb), b"good".to_vec()));
    assert_eq!(w.rig.windows.quarantine().count(), 0);
}

#[test]
fn on_its_way_to_nowhere_a_window_does_not_leave_its_bytes_to_a_silent_writer() {
    // One window of host cache: there is no room for a second one.
    let mut w = world_with(0, Config { host_limit: W as u64, ..config() }, RegionKind::Ordinary);
    w.ensure_all();
    w.write(0, 64, b"good");
    silent_writer(
        &mut w,
        |w| {
            let index = w.index(0);
            let ticket = w.rig.windows.evict(&Scope::Window(index), &mut w.rig.drive, w.rig.now).unwrap();
            assert_eq!(w.rig.finish(ticket).silent, 1);
            assert_eq!(w.home(0), Home::Host);
        },
        |w| assert_eq!(w.read(0, 64, 4), (Outcome::Copied(Home::Host), b"good".to_vec())),
    );
    let ticket = w.rig.windows.evict(&Scope::Object(OBJECT), &mut w.rig.drive, w.rig.now).unwrap();
    assert_eq!(w.rig.finish(ticket).failed, Vec::<String>::new());
    assert_eq!(w.raw(0, 64, 4), b"good");

    // And with none to be had it stays closed, not open to what is stored late.
    w.ensure_all();
    w.rig.windows.set_refusals(Refusals::new(0, 1000));
    silent_writer(
        &mut w,
        |w| {
            let index = w.index(0);
            w.rig.windows.evict(&Scope::Window(index), &mut w.rig.drive, w.rig.now).unwrap();
            w.rig.now += 2 * GRACE;
            w.rig.poll();
        },
        |w| {
            w.rig.now += 2 * GRACE;
            w.rig.poll();
            assert!(!matches!(w.read(0, 64, 4).0, Outcome::Copied(_)));
            w.rig.windows.set_refusals(Refusals::default());
            w.rig.now += 2 * GRACE;
            w.rig.poll();
            assert_eq!(w.read(0, 0, 4).0, Outcome::Copied(Home::Host), "as soon as there is room");
        },
    );
}

/// One is silent in a borrow of its own memory, another in a section in the host cache: there is a third place, and nobody else waits.
#[test]
fn two_silent_clients_do_not_close_a_window() {
    let mut w = world();
    w.ensure_all();
    let borrower = client(&mut w.rig, &w.memory, RegionKind::Ordinary);
    let hold = w.rig.hold(&borrower, OBJECT, 0, false);
    let mut slot = borrower.slots.take().unwrap();
    let borrow = slot.borrow(&borrower.control, hold.handle, &borrower.view).unwrap();
    w.rig.revoke(&Scope::Window(w.index(0)));
    silent_writer(
        &mut w,
        |w| {
            // Clean as far as anybody knows, until the writer is fenced.
            let index = w.index(0);
            let ticket = w.rig.windows.evict(&Scope::Window(index), &mut w.rig.drive, w.rig.now).unwrap();
            assert_eq!(w.rig.finish(ticket).silent, 1);
            assert_eq!(w.home(0), Home::Host);
        },
        |w| assert_eq!(w.read(0, 64, 4), (Outcome::Copied(Home::Host), want(0, 64, 4))),
    );
    assert!(matches!(w.commit(), Err(WindowsError::MemoryHeld { .. })));
    assert_eq!(borrow.end(), Returned::Snapshot);
    w.rig.poll();
    assert_eq!(w.commit().unwrap().host_bytes, W as u64);
    assert_eq!((w.raw(0, 0, 4), w.raw(0, 64, 4)), (b"half".to_vec(), want(0, 64, 4)));
    assert_eq!(w.rig.windows.quarantine().count(), 0);
}
