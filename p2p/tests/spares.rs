//! Spares: host pages that a window keeps while it is in the CMB. What they save, what they must never show, and who they make way for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod common;

use std::sync::Arc;

use common::{Client, GRACE, Rig, config, pattern, writing};
use nvme_driver::mem::Mapping;
use p2p::counters::{Path, Reason};
use p2p::layout::Home;
use p2p::peer::EmulatedEngine;
use p2p::reader::Outcome;
use p2p::region::RegionKind;
use p2p::windows::{
    Config, DeviceMemory, Ensured, Hold, ObjectOptions, PeerPath, Placement, Progress, Scope, Want, WriteBack,
};
use p2p::writer::{Finished, Returned};

const W: usize = 16 * 1024;
const PAGES: usize = W / 4096;

/// An object of eight windows, the first of them in the CMB with a spare, and a client that holds it for writing.
fn rig() -> (Rig, Client, Hold) {
    rig_of(config())
}

fn rig_of(config: Config) -> (Rig, Client, Hold) {
    let mut rig = Rig::new(8 * W, config);
    rig.object(7, 8 * W, W);
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 8 * W);
    let hold = rig.hold(&c, 7, 0, true);
    to_cmb_from_host(&mut rig, &hold);
    assert_spare(&rig, &hold, true);
    (rig, c, hold)
}

fn to_cmb_from_host(rig: &mut Rig, hold: &Hold) {
    rig.ensure_want(hold, Want::Host);
    promote(rig, hold);
}

fn promote(rig: &mut Rig, hold: &Hold) {
    rig.windows.promote(hold.handle.index, &mut rig.drive, rig.now);
    rig.poll();
    assert_eq!(home(rig, hold), Home::Cmb);
}

fn home(rig: &Rig, hold: &Hold) -> Home {
    rig.windows.status(hold.handle.index).unwrap().home
}

fn assert_spare(rig: &Rig, hold: &Hold, spare: bool) {
    assert_eq!(rig.windows.status(hold.handle.index).unwrap().spare, spare);
}

/// Revokes the window, and says how many pages were copied.
fn revoke(rig: &mut Rig, hold: &Hold) -> usize {
    let copied = |rig: &Rig| rig.windows.counters().get(Path::HostCache, Reason::Revoked).bytes;
    let (before, spared) = (copied(rig), rig.windows.counters().spared_bytes);
    let report = rig.revoke(&Scope::Window(hold.handle.index));
    assert_eq!((report.moved, home(rig, hold)), (1, Home::Host));
    let pages = (copied(rig) - before) as usize / 4096;
    let saved = (rig.windows.counters().spared_bytes - spared) as usize / 4096;
    assert!(saved == 0 || pages + saved == PAGES, "{pages} pages copied, {saved} not");
    pages
}

fn write(c: &Client, hold: &Hold, offset: usize, bytes: &[u8]) {
    let mut slot = c.slots.take().unwrap();
    let mut s = slot.write(&c.control, writing(hold), &c.view).unwrap();
    s.write(offset, bytes).unwrap();
    assert_eq!(s.finish(), Finished::Done);
}

/// The window as the drive had it, with these bytes in it.
fn with(changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut want: Vec<u8> = (0..W).map(|i| pattern(7, i)).collect();
    for (at, bytes) in changes {
        want[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    want
}

#[track_caller]
fn assert_bytes(c: &Client, hold: &Hold, home: Home, want: &[u8]) {
    let (outcome, got) = c.read(hold.handle, 0, W);
    assert_eq!(outcome, Outcome::Copied(home));
    let wrong = got.iter().zip(want).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "the first wrong byte");
}

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
    write(&c, &hold, 4096, b"one");
    assert_eq!(revoke(&mut rig, &hold), 1);
    assert_bytes(&c, &hold, Home::Host, &with(&[(4096, b"one")]));
    promote(&mut rig, &hold);
    // What was written in the host cache went along, and is in the spare.
    assert_eq!(revoke(&mut rig, &hold), 0);
    write(&c, &hold, 0, b"in the host cache");
    promote(&mut rig, &hold);
    assert_eq!(revoke(&mut rig, &hold), 0);
    assert_bytes(&c, &hold, Home::Host, &with(&[(0, b"in the host cache"), (4096, b"one")]));
}

/// The drive has it then, so the window is clean; the spare does not.
#[test]
fn what_a_commit_has_written_back_is_copied_all_the_same() {
    let (mut rig, c, hold) = rig();
    write(&c, &hold, 2 * 4096, b"committed");
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
    write(&other, &its, 3 * 4096, b"left");
    rig.windows.release(other.id, its.handle.index).unwrap();
    write(&c, &hold, 0, b"background");
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
    let mut rig = Rig::new(8 * W, config());
    rig.object(7, W, W);
    let mut c = rig.client();
    rig.map_host(&mut c, 7, W);
    let hold = rig.hold(&c, 7, 0, true);
    rig.ensure_want(&hold, Want::Host);
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
    let mut rig = Rig::new(8 * W, config());
    rig.object(7, W, W);
    let mut c = rig.client();
    rig.map_host(&mut c, 7, W);
    let hold = rig.hold(&c, 7, 0, true);
    rig.ensure_want(&hold, Want::Host);
    let mut slot = c.slots.take().unwrap();
    let borrow = slot.borrow(&c.control, hold.handle, &c.view).unwrap();
    promote(&mut rig, &hold);
    assert_spare(&rig, &hold, false);
    write(&c, &hold, 0, b"new");
    revoke(&mut rig, &hold);
    let mut snapshot = vec![0; W];
    borrow.bytes().read(0, &mut snapshot).unwrap();
    assert_eq!(snapshot, with(&[]));
    assert_eq!(borrow.end(), Returned::Snapshot);
    assert_bytes(&c, &hold, Home::Host, &with(&[(0, b"new")]));
}

#[test]
fn what_a_peer_wrote_is_copied_mapped_or_not_any_more() {
    for still_mapped in [false, true] {
        let (mut rig, c, hold) = rig();
        let engine = EmulatedEngine::new("dma", W).unwrap();
        let peer = rig.windows.register_peer(Box::new(engine.clone()));
        let index = hold.handle.index;
        let path = rig.windows.map_peer(peer, index, true, &mut rig.drive, 0).unwrap();
        let PeerPath::Direct(m) = path else { panic!("{path:?}") };
        assert_spare(&rig, &hold, true);
        engine.local().write(0, b"by DMA").unwrap();
        engine.copy(m.iova + 4096, 0, 6, true).unwrap();
        if !still_mapped {
            rig.windows.unmap_peer(peer, index).unwrap();
        }
        assert_eq!(revoke(&mut rig, &hold), PAGES);
        assert_bytes(&c, &hold, Home::Host, &with(&[(4096, b"by DMA")]));
    }
}

#[test]
fn what_a_peer_wrote_by_way_of_host_memory_is_copied() {
    let (mut rig, c, hold) = rig();
    let theirs = Mapping::memfd("peer", 4096).unwrap();
    theirs.write(0, b"bounced").unwrap();
    let at = 3 * 4096 + 1;
    let stored = rig.windows.bounce_from_peer(
        7,
        at..at + 7,
        (&theirs, 0),
        Reason::NotCoherent,
        &mut rig.drive,
        rig.now,
    );
    assert_eq!(stored.unwrap(), Ensured::Ready(Home::Cmb, Reason::Policy));
    assert_spare(&rig, &hold, true);
    assert_eq!(revoke(&mut rig, &hold), 1);
    assert_bytes(&c, &hold, Home::Host, &with(&[(at as usize, b"bounced")]));
}

#[test]
fn a_truncation_leaves_no_spare_that_could_bring_back_what_was_cut_off() {
    let (mut rig, c, hold) = rig();
    let ticket = rig.windows.truncate(7, 5000, &mut rig.drive, rig.now).unwrap();
    rig.finish(ticket);
    assert_spare(&rig, &hold, false);
    assert_eq!(rig.windows.host_bytes().0, 0);
    revoke(&mut rig, &hold);
    assert_bytes(&c, &hold, Home::Host, &with(&[(5000, &[0; W - 5000])]));
}

#[test]
fn a_window_that_goes_nowhere_has_no_spare_afterwards() {
    let (mut rig, c, hold) = rig();
    write(&c, &hold, 0, b"not committed");
    revoke(&mut rig, &hold);
    promote(&mut rig, &hold);
    // The reset takes what was dirty; the spare had it.
    rig.windows.reset_signal().raise();
    rig.drive.cmb.zero(0, 8 * W).unwrap();
    rig.poll();
    assert_spare(&rig, &hold, false);
    assert_eq!((rig.windows.host_bytes().0, home(&rig, &hold)), (0, Home::None));
    rig.ensure_want(&hold, Want::Cmb);
    revoke(&mut rig, &hold);
    assert_bytes(&c, &hold, Home::Host, &with(&[]));

    for invalidate in [true, false] {
        promote(&mut rig, &hold);
        assert_spare(&rig, &hold, true);
        let bytes = 0..W as u64;
        let ticket = if invalidate {
            rig.drive.objects.get_mut(&7).unwrap()[0] ^= 0xff;
            rig.windows.invalidate(7, &bytes, &mut rig.drive, rig.now).unwrap()
        } else {
            rig.windows.evict(&Scope::Object(7), &mut rig.drive, rig.now).unwrap()
        };
        rig.finish(ticket);
        assert_eq!((rig.windows.host_bytes().0, home(&rig, &hold)), (0, Home::None));
        rig.ensure_want(&hold, Want::Cmb);
        revoke(&mut rig, &hold);
        assert_bytes(&c, &hold, Home::Host, &with(&[(0, &[pattern(7, 0) ^ 0xff])]));
    }
}

#[test]
fn a_layout_takes_the_spares_of_its_range() {
    let (mut rig, c, hold) = rig();
    let beyond = rig.hold(&c, 7, W as u64, true);
    to_cmb_from_host(&mut rig, &beyond);
    rig.windows.exclude(7, 0..4096).unwrap();
    assert_spare(&rig, &hold, false);
    assert_spare(&rig, &beyond, true);
}

#[test]
fn with_the_last_client_the_spare_goes() {
    for died in [false, true] {
        let (mut rig, c, hold) = rig();
        let other = rig.client();
        let its = rig.hold(&other, 7, 0, false);
        rig.windows.release(c.id, hold.handle.index).unwrap();
        assert_spare(&rig, &hold, true);
        if died {
            rig.windows.client_died(other.id, &mut rig.drive, rig.now);
        } else {
            rig.windows.release(other.id, its.handle.index).unwrap();
        }
        assert_spare(&rig, &hold, false);
        assert_eq!((rig.windows.host_bytes().0, rig.windows.spare_bytes()), (0, 0));
    }
}

#[test]
fn a_window_that_only_peers_use_has_none() {
    let mut rig = Rig::new(8 * W, config());
    rig.object(7, W, W);
    let c = rig.client();
    let hold = rig.hold(&c, 7, 0, false);
    rig.ensure_want(&hold, Want::Host);
    rig.windows.release(c.id, hold.handle.index).unwrap();
    let engine = EmulatedEngine::new("dma", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine));
    let path = rig.windows.map_peer(peer, hold.handle.index, false, &mut rig.drive, 0).unwrap();
    assert!(matches!(path, PeerPath::Direct(_)), "{path:?}");
    assert_spare(&rig, &hold, false);
    assert_eq!(rig.windows.host_bytes().0, 0);
}

#[test]
fn nor_has_one_that_may_not_use_the_host_cache() {
    let (mut rig, _c, hold) = rig();
    let options = ObjectOptions { window_size: W, placement: Placement::CmbOnly };
    rig.windows.add_object(7, options).unwrap();
    assert_spare(&rig, &hold, false);
    assert_eq!(rig.windows.host_bytes().0, 0);
}

#[test]
fn whoever_needs_room_gets_that_of_the_oldest_spare_before_anybody_is_evicted() {
    let (mut rig, c, first) = rig_of(Config { host_limit: 4 * W as u64, ..config() });
    let second = rig.hold(&c, 7, W as u64, false);
    to_cmb_from_host(&mut rig, &second);
    let third = rig.hold(&c, 7, 2 * W as u64, false);
    to_cmb_from_host(&mut rig, &third);
    // The first goes and comes, and is the youngest now.
    revoke(&mut rig, &first);
    promote(&mut rig, &first);
    rig.object(8, 8 * W, W);
    let fill = |rig: &mut Rig, n: u64| {
        let h = rig.hold(&c, 8, n * W as u64, false);
        assert!(matches!(rig.ensure_want(&h, Want::Host), Ensured::Ready(Home::Host, _)));
        assert!(rig.windows.host_bytes().0 <= 4 * W as u64);
        h
    };
    let spares =
        |rig: &Rig| [&first, &second, &third].map(|h| rig.windows.status(h.handle.index).unwrap().spare);
    let fills = [fill(&mut rig, 0)];
    assert_eq!(spares(&rig), [true, true, true]);
    let fills = [fills[0], fill(&mut rig, 1)];
    assert_eq!(spares(&rig), [true, false, true]);
    let fills = [fills[0], fills[1], fill(&mut rig, 2)];
    assert_eq!(spares(&rig), [true, false, false]);
    assert!(fills.iter().all(|h| home(&rig, h) == Home::Host), "nobody was evicted for it");
}

/// Spares do not count against the room that is kept for what may be dirty in the CMB; they are part of it.
#[test]
fn spares_take_no_room_from_what_is_dirty() {
    let (mut rig, c, first) = rig_of(Config { host_limit: 10 * W as u64, ..config() });
    let mut dirty = vec![first];
    for n in 1..4 {
        let h = rig.hold(&c, 7, n * W as u64, true);
        // Two of the four have no spare.
        if n == 1 {
            to_cmb_from_host(&mut rig, &h);
        } else {
            rig.ensure_want(&h, Want::Cmb);
        }
        dirty.push(h);
    }
    dirty.iter().for_each(|h| write(&c, h, 0, b"dirty"));
    rig.object(8, 32 * W, W);
    for n in 0..32 {
        let h = rig.hold(&c, 8, n * W as u64, false);
        rig.ensure_want(&h, Want::Host);
    }
    assert_eq!(rig.windows.host_bytes().0 - rig.windows.spare_bytes(), 6 * W as u64, "as without spares");
    assert_eq!(rig.windows.spare_bytes(), 2 * W as u64, "there was room for them");
    rig.drive.fail_writes = true;
    let ticket = rig.windows.revoke(&Scope::Object(7), &mut rig.drive, rig.now).unwrap();
    let report = loop {
        rig.poll();
        if let Some(Progress::Done(report)) = rig.windows.progress(ticket) {
            break report;
        }
    };
    assert_eq!((report.moved, report.failed.len()), (4, 0), "without the drive");
    for h in &dirty {
        assert_eq!(c.read(h.handle, 0, 5), (Outcome::Copied(Home::Host), b"dirty".to_vec()));
    }
}

#[test]
fn a_refusal_is_a_refusal_spare_or_not() {
    let (mut rig, c, hold) = rig();
    write(&c, &hold, 0, b"kept");
    rig.windows.set_refusals(p2p::refusal::Refusals::new(1, 1000));
    rig.revoke(&Scope::Object(7));
    assert_eq!((home(&rig, &hold), rig.windows.host_bytes().0), (Home::None, 0));
    assert_eq!(&rig.drive.objects[&7][..4], b"kept");
}

/// It may store in its memory by itself, and tells nobody.
#[test]
fn a_window_of_a_devices_own_memory_has_none() {
    let mut rig = Rig::new(8 * W, config());
    let memory = Mapping::memfd("pmr", W).unwrap();
    let options = ObjectOptions { window_size: W, ..ObjectOptions::default() };
    let own = DeviceMemory {
        memory: Arc::clone(&memory),
        bus_address: 0,
        offset: 0,
        len: W,
        kind: RegionKind::Ordinary,
    };
    rig.windows.add_memory(9, own, options).unwrap();
    let mut c = rig.client();
    rig.map_host(&mut c, 9, W);
    let hold = rig.hold(&c, 9, 0, false);
    rig.ensure_want(&hold, Want::Host);
    promote(&mut rig, &hold);
    assert_spare(&rig, &hold, false);
    memory.write(4096, b"by the device").unwrap();
    assert_eq!(revoke(&mut rig, &hold), PAGES);
    assert_eq!(c.read(hold.handle, 4096, 13), (Outcome::Copied(Home::Host), b"by the device".to_vec()));
}

#[test]
fn raw_memory_has_spares_too() {
    let mut rig = Rig::new(8 * W, config());
    let options = ObjectOptions { window_size: W, ..ObjectOptions::default() };
    rig.windows.add_raw(9, W as u64, options).unwrap();
    let mut c = rig.client();
    rig.map_host(&mut c, 9, W);
    let hold = rig.hold(&c, 9, 0, true);
    rig.ensure_want(&hold, Want::Host);
    write(&c, &hold, 0, b"raw");
    promote(&mut rig, &hold);
    assert_spare(&rig, &hold, true);
    write(&c, &hold, 4096, b"memory");
    assert_eq!(revoke(&mut rig, &hold), 1);
    let mut want = vec![0; W];
    want[..3].copy_from_slice(b"raw");
    want[4096..4102].copy_from_slice(b"memory");
    assert_bytes(&c, &hold, Home::Host, &want);
}
