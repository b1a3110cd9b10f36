//! Raw memory: windows with nothing behind them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod common;

use common::{Client, Rig, config, writing};
use p2p::layout::Home;
use p2p::reader::Outcome;
use p2p::refusal::Refusals;
use p2p::windows::{Config, Ensured, Hold, Losses, ObjectOptions, Scope, Want, WindowsError};
use p2p::writer::Finished;

const W: usize = 16 * 1024;
const RAW: u64 = 1 << 63;

fn options() -> ObjectOptions {
    ObjectOptions { window_size: W, ..ObjectOptions::default() }
}

fn rig() -> (Rig, Client) {
    let mut rig = Rig::new(8 * W, Config { host_limit: 16 * W as u64, ..config() });
    rig.windows.add_raw(RAW, 4 * W as u64, options()).unwrap();
    let mut c = rig.client();
    rig.map_host(&mut c, RAW, 4 * W);
    (rig, c)
}

fn write(c: &Client, hold: &Hold, bytes: &[u8]) {
    let mut slot = c.slots.take().unwrap();
    let mut s = slot.write(&c.control, writing(hold), &c.view).unwrap();
    s.write(0, bytes).unwrap();
    assert_eq!(s.finish(), Finished::Done);
}

#[test]
fn it_is_zeros_at_first_and_keeps_its_bytes_wherever_it_goes() {
    let (mut rig, c) = rig();
    rig.drive.cmb.write(0, &[0xee; 8 * W]).unwrap();
    let holds: Vec<_> = (0..4).map(|n| rig.hold(&c, RAW, n * W as u64, true)).collect();
    for h in &holds {
        rig.ensure(h);
        assert_eq!(
            c.read(h.handle, 0, W),
            (Outcome::Copied(Home::Cmb), vec![0; W]),
            "not what was there before"
        );
        write(&c, h, b"raw");
    }
    rig.revoke(&Scope::Object(RAW));
    for h in &holds {
        assert_eq!(c.read(h.handle, 0, 3), (Outcome::Copied(Home::Host), b"raw".to_vec()));
    }
    rig.windows.promote(holds[0].handle.index, &mut rig.drive, rig.now);
    assert_eq!(c.read(holds[0].handle, 0, 3), (Outcome::Copied(Home::Cmb), b"raw".to_vec()));
    // Nowhere is no place for it.
    let evicted = rig.windows.evict(&Scope::Everything, &mut rig.drive, rig.now).unwrap();
    assert_eq!(rig.finish(evicted).failed.len(), 4);
    for h in &holds {
        assert_eq!(&c.read(h.handle, 0, 3).1, b"raw");
    }
    // The host cache fills with files, and their windows go, not these.
    rig.object(7, 64 * W, W);
    for n in 0..64 {
        let h = rig.hold(&c, 7, n * W as u64, false);
        rig.ensure_want(&h, Want::Host);
    }
    for h in &holds {
        assert_eq!(&c.read(h.handle, 0, 3).1, b"raw");
    }
    assert!(!rig.drive.objects.contains_key(&RAW), "nothing of it went to the drive");
}

#[test]
fn it_is_freed_with_its_object_and_limited() {
    let (mut rig, c) = rig();
    let refused = rig.windows.add_raw(RAW | 1, 5 * W as u64, options());
    assert!(
        matches!(refused, Err(WindowsError::NoRoomForRaw { room, .. }) if room == 4 * W as u64),
        "{refused:?}"
    );
    rig.windows.add_raw(RAW | 1, 3 * W as u64 + 1, options()).unwrap();
    assert_eq!(rig.windows.raw_bytes(), 8 * W as u64);
    let hold = rig.hold(&c, RAW, 0, true);
    rig.ensure(&hold);
    write(&c, &hold, b"raw");
    rig.windows.release(c.id, hold.handle.index).unwrap();
    let gone = rig.windows.invalidate(RAW, &(0..4 * W as u64), &mut rig.drive, rig.now).unwrap();
    rig.finish(gone);
    assert!(rig.windows.remove_object(RAW));
    assert_eq!((rig.windows.raw_bytes(), rig.windows.cmb_bytes().0), (4 * W as u64, 8 * W));
}

#[test]
fn a_reset_costs_what_was_in_the_cmb_and_nothing_else() {
    let (mut rig, c) = rig();
    let holds: Vec<_> = (0..3).map(|n| rig.hold(&c, RAW, n * W as u64, true)).collect();
    for h in &holds {
        rig.ensure(h);
        write(&c, h, b"raw");
    }
    rig.revoke(&Scope::Window(holds[1].handle.index));
    rig.revoke(&Scope::Window(holds[2].handle.index));
    // The third is on its way into the CMB, held up by a section.
    let mut slot = c.slots.take().unwrap();
    let mut section = slot.write(&c.control, writing(&holds[2]), &c.view).unwrap();
    section.write(4096, b"more").unwrap();
    rig.windows.promote(holds[2].handle.index, &mut rig.drive, rig.now);
    rig.windows.reset_signal().raise();
    rig.drive.cmb.zero(0, 8 * W).unwrap();
    assert_eq!(section.finish(), Finished::Done);
    rig.poll();
    rig.poll();
    let now = rig.now;
    assert_eq!(rig.windows.losses(RAW, &mut rig.drive, now).bytes, 4096);
    for h in &holds {
        while rig.ensure(h) == Ensured::Moving {
            rig.poll();
        }
    }
    assert_eq!(c.read(holds[0].handle, 0, 3).1, [0; 3]);
    assert_eq!(&c.read(holds[1].handle, 0, 3).1, b"raw");
    assert_eq!(&c.read(holds[2].handle, 0, 3).1, b"raw");
    assert_eq!(&c.read(holds[2].handle, 4096, 4).1, b"more");
}

/// Refused a place in the host cache, it has none but where it began.
#[test]
fn a_reset_during_a_move_into_the_cmb_leaves_it_where_it_was() {
    let (mut rig, c) = rig();
    let hold = rig.hold(&c, RAW, 0, true);
    rig.ensure_want(&hold, Want::Host);
    write(&c, &hold, b"raw");
    let mut slot = c.slots.take().unwrap();
    let mut section = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    section.write(4096, b"more").unwrap();
    rig.windows.promote(hold.handle.index, &mut rig.drive, rig.now);
    rig.windows.set_refusals(Refusals::new(1, 1000));
    rig.windows.reset_signal().raise();
    rig.drive.cmb.zero(0, 8 * W).unwrap();
    assert_eq!(section.finish(), Finished::Done);
    rig.poll();
    rig.poll();
    assert_eq!(&c.read(hold.handle, 0, 3).1, b"raw");
    assert_eq!(c.read(hold.handle, 4096, 4), (Outcome::Copied(Home::Host), b"more".to_vec()));
    assert_eq!(rig.windows.losses(RAW, &mut rig.drive, rig.now), Losses::default());
}

#[test]
fn files_make_room_for_raw_memory_that_is_revoked() {
    let (mut rig, c) = rig();
    rig.object(7, 16 * W, W);
    for n in 0..16 {
        let file = rig.hold(&c, 7, n * W as u64, true);
        rig.ensure_want(&file, Want::Host);
    }
    let hold = rig.hold(&c, RAW, 0, true);
    rig.ensure_want(&hold, Want::Cmb);
    write(&c, &hold, b"raw");
    let ticket = rig.windows.revoke(&Scope::Everything, &mut rig.drive, rig.now).unwrap();
    assert_eq!(rig.finish(ticket).failed, Vec::<String>::new());
    assert_eq!(c.read(hold.handle, 0, 3), (Outcome::Copied(Home::Host), b"raw".to_vec()));
}

/// A window so large that the room made when it was placed is not all that it needs.
#[test]
fn files_make_room_again_for_a_large_window_that_leaves() {
    const LARGE: usize = 32 * W;
    let mut rig = Rig::new(LARGE, Config { host_limit: 2 * LARGE as u64, ..config() });
    let large = ObjectOptions { window_size: LARGE, ..ObjectOptions::default() };
    rig.windows.add_raw(RAW, LARGE as u64, large).unwrap();
    let mut c = rig.client();
    rig.map_host(&mut c, RAW, LARGE);
    rig.object(7, 2 * LARGE, W);
    for n in 0..64 {
        let file = rig.hold(&c, 7, n * W as u64, true);
        rig.ensure_want(&file, Want::Host);
    }
    let hold = rig.hold(&c, RAW, 0, true);
    rig.ensure_want(&hold, Want::Cmb);
    write(&c, &hold, b"raw");
    assert!(rig.windows.host_bytes().0 > LARGE as u64, "room enough already");
    let ticket = rig.windows.revoke(&Scope::Everything, &mut rig.drive, rig.now).unwrap();
    assert_eq!(rig.finish(ticket).failed, Vec::<String>::new());
    assert_eq!(c.read(hold.handle, 0, 3), (Outcome::Copied(Home::Host), b"raw".to_vec()));
}

/// A revocation of everything that cannot move it says so, and does not close it for ever.
#[test]
fn raw_memory_that_cannot_be_moved_is_open_where_it_stays() {
    let (mut rig, c) = rig();
    let hold = rig.hold(&c, RAW, 0, true);
    rig.ensure_want(&hold, Want::Cmb);
    write(&c, &hold, b"raw");
    rig.windows.set_refusals(Refusals::new(1, 1000));
    let ticket = rig.windows.revoke(&Scope::Everything, &mut rig.drive, rig.now).unwrap();
    assert_eq!(c.read(hold.handle, 0, 3).0, Outcome::DeviceMoved);
    assert_eq!(rig.finish(ticket).failed.len(), 1);
    assert_eq!(c.read(hold.handle, 0, 3), (Outcome::Copied(Home::Cmb), b"raw".to_vec()));
}
