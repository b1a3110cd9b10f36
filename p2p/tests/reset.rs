//! A reset of the device under windows: announced before it, dealt with after it, and nothing in between is believed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod common;

use std::sync::Arc;

use common::{Midway, Rig, W, in_cmb, pattern, rig, writing};
use p2p::layout::Home;
use p2p::peer::{CopyState, EmulatedEngine};
use p2p::reader::Outcome;
use p2p::windows::{Ensured, PeerPath, Scope, Want};
use p2p::writer::Finished;

/// What a reset does, in its order: it is announced, then the CMB is emptied.
fn reset(rig: &Rig) {
    rig.windows.reset_signal().raise();
    let len = rig.drive.cmb.len();
    rig.drive.cmb.zero(0, len).unwrap();
}

#[test]
fn after_a_reset_windows_are_read_anew_and_what_was_dirty_is_counted_as_lost() {
    let mut rig = rig();
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 4 * W);
    let holds: Vec<_> = (0..3).map(|n| rig.hold(&c, 7, n * W as u64, true)).collect();
    for h in &holds {
        rig.ensure(h);
    }
    rig.revoke(&Scope::Window(holds[2].handle.index));
    let mut slot = c.slots.take().unwrap();
    for h in &holds[1..] {
        let mut s = slot.write(&c.control, writing(h), &c.view).unwrap();
        s.write(4096, b"dirty").unwrap();
        assert_eq!(s.finish(), Finished::Done);
    }
    reset(&rig);
    for h in &holds {
        assert_eq!(c.read(h.handle, 0, 8).0, Outcome::DeviceMoved, "closed before anybody has dealt with it");
    }
    // Nothing is taken from the emptied CMB, by the server either.
    let error = rig.windows.commit(7, &(0..4 * W as u64), &mut rig.drive).unwrap_err();
    assert!(error.to_string().contains("reset"), "{error}");
    assert_eq!(rig.drive.objects[&7][W + 4096], pattern(7, W + 4096));
    let mut bytes = [0; 8];
    rig.windows.read_through(7, 0..8, &mut bytes, &mut rig.drive).unwrap();
    assert_eq!(bytes.to_vec(), (0..8).map(|i| pattern(7, i)).collect::<Vec<_>>());

    let now = rig.now;
    let losses = rig.windows.losses(7, &mut rig.drive, now);
    assert_eq!((losses.events, losses.bytes, losses.reported), (1, 4096, 0));
    for (n, h) in holds.iter().enumerate() {
        while rig.ensure(h) == Ensured::Moving {
            rig.poll();
        }
        let want: Vec<u8> = (n * W..n * W + W).map(|i| pattern(7, i)).collect();
        let got = c.read(h.handle, 0, W);
        if n == 2 {
            assert_eq!((got.0, &got.1[4096..4101]), (Outcome::Copied(Home::Host), &b"dirty"[..]));
        } else {
            assert_eq!(got, (Outcome::Copied(Home::Cmb), want));
        }
    }
    assert_eq!(rig.windows.counters().resets, 1);
    // What was in the host cache is still to be written back, and is.
    rig.windows.commit(7, &(0..4 * W as u64), &mut rig.drive).unwrap();
    assert_eq!(&rig.drive.objects[&7][2 * W + 4096..2 * W + 4101], b"dirty");
    rig.windows.losses_reported(7);
    assert_eq!(rig.windows.losses(7, &mut rig.drive, now).reported, 1);
}

#[test]
fn a_reset_during_a_move_out_of_the_cmb_publishes_none_of_what_it_left() {
    let (mut rig, c, hold) = in_cmb();
    let mut slot = c.slots.take().unwrap();
    let mut section = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    section.write(0, b"too late").unwrap();
    let ticket = rig.windows.revoke(&Scope::Object(7), &mut rig.drive, rig.now).unwrap();
    reset(&rig);
    assert_eq!(section.finish(), Finished::Done);
    // The move goes on before anybody has noticed: with what lies in the emptied CMB.
    let bystander = rig.client();
    rig.windows.client_died(bystander.id, &mut rig.drive, rig.now);
    rig.finish(ticket);
    while rig.ensure(&hold) == Ensured::Moving {
        rig.poll();
    }
    let (_, got) = c.read(hold.handle, 0, W);
    assert_eq!(got, (0..W).map(|i| pattern(7, i)).collect::<Vec<_>>());
    assert_eq!(rig.windows.losses(7, &mut rig.drive, rig.now).events, 1);
    assert_eq!(rig.windows.host_bytes().0 as usize + 8 * W - rig.windows.cmb_bytes().0, W);
}

#[test]
fn a_reset_during_a_move_into_the_cmb_loses_nothing() {
    let mut rig = rig();
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 4 * W);
    let hold = rig.hold(&c, 7, 0, true);
    rig.ensure_want(&hold, Want::Host);
    let mut slot = c.slots.take().unwrap();
    let mut section = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    section.write(4096, b"from the host cache").unwrap();
    rig.windows.promote(hold.handle.index, &mut rig.drive, rig.now);
    reset(&rig);
    assert_eq!(section.finish(), Finished::Done);
    // Here too the move goes on first.
    let bystander = rig.client();
    rig.windows.client_died(bystander.id, &mut rig.drive, rig.now);
    rig.poll();
    rig.poll();
    while rig.ensure(&hold) == Ensured::Moving {
        rig.poll();
    }
    let mut want: Vec<u8> = (0..W).map(|i| pattern(7, i)).collect();
    want[4096..4115].copy_from_slice(b"from the host cache");
    assert_eq!(c.read(hold.handle, 0, W).1, want);
    assert_eq!(rig.windows.losses(7, &mut rig.drive, rig.now), p2p::windows::Losses::default());
    assert_eq!(rig.windows.host_bytes().0 as usize + 8 * W - rig.windows.cmb_bytes().0, W);
}

/// The second half is read again by the driver, the first is gone.
#[test]
fn a_fill_that_a_reset_interrupts_is_not_shown() {
    let mut rig = rig();
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 4 * W);
    let hold = rig.hold(&c, 7, 0, false);
    let signal = rig.windows.reset_signal();
    let cmb = Arc::clone(&rig.drive.cmb);
    let mut drive = Midway::new(&mut rig.drive, |_| {
        signal.raise();
        cmb.zero(0, cmb.len()).unwrap();
    });
    rig.windows.ensure(hold.handle.index, Want::Auto, &mut drive, 0).unwrap();
    rig.poll();
    rig.ensure(&hold);
    let want: Vec<u8> = (0..W).map(|i| pattern(7, i)).collect();
    assert_eq!(c.read(hold.handle, 0, W), (Outcome::Copied(Home::Host), want));
    assert_eq!(rig.windows.cmb_bytes().0, 8 * W);
}

/// A client stopped in a section keeps the window waiting, and a peer that reads must not go on meanwhile.
#[test]
fn a_reading_peer_is_cut_off_at_once_even_while_a_writer_is_waited_for() {
    let (mut rig, c, hold) = in_cmb();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    let path = rig.windows.map_peer(peer, hold.handle.index, false, &mut rig.drive, 0).unwrap();
    let PeerPath::Direct(mapped) = path else { panic!("{path:?}") };
    let mut slot = c.slots.take().unwrap();
    let section = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    let flying = engine.submit(mapped.iova, 0, 64, false).unwrap();
    reset(&rig);
    rig.poll();
    assert!(rig.windows.status(hold.handle.index).unwrap().moving, "the writer is waited for");
    engine.step(1);
    let ended = engine.take_result(flying);
    assert!(matches!(ended, Some(CopyState::Failed(_))), "zeros taken for the window's bytes: {ended:?}");
    drop(section);
}

/// Whoever commits next is told, and does not have to wait for anybody who is still in a section there.
#[test]
fn what_was_lost_is_told_while_a_writer_is_still_waited_for() {
    let (mut rig, c, hold) = in_cmb();
    let (mut a, mut b) = (c.slots.take().unwrap(), c.slots.take().unwrap());
    let mut s = a.write(&c.control, writing(&hold), &c.view).unwrap();
    s.write(0, b"lost").unwrap();
    assert_eq!(s.finish(), Finished::Done);
    let mut late = b.write(&c.control, writing(&hold), &c.view).unwrap();
    reset(&rig);
    rig.poll();
    assert!(rig.windows.status(hold.handle.index).unwrap().moving, "the writer is waited for");
    rig.windows.commit(7, &(0..W as u64), &mut rig.drive).unwrap();
    let losses = rig.windows.losses(7, &mut rig.drive, rig.now);
    assert_eq!((losses.events, losses.bytes), (1, 4096), "acknowledged, and lost");
    // And its own bytes are lost as well, whoever harvests them.
    late.write(8192, b"late").unwrap();
    assert_eq!(late.finish(), Finished::Done);
    rig.windows.commit(7, &(0..W as u64), &mut rig.drive).unwrap();
    let losses = rig.windows.losses(7, &mut rig.drive, rig.now);
    assert_eq!((losses.events, losses.bytes), (2, 8192));
    rig.poll();
    assert!(!rig.windows.status(hold.handle.index).unwrap().moving);
    assert_eq!(rig.windows.losses(7, &mut rig.drive, rig.now).bytes, 8192, "counted once");
}

/// What a peer writes after a reset is lost like what it wrote before, and its commits are not to be acknowledged.
#[test]
fn a_writing_peer_is_cut_off_at_once_and_told_once() {
    let (mut rig, c, hold) = in_cmb();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    let path = rig.windows.map_peer(peer, hold.handle.index, true, &mut rig.drive, 0).unwrap();
    let PeerPath::Direct(mapped) = path else { panic!("{path:?}") };
    let mut slot = c.slots.take().unwrap();
    let section = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    let flying = engine.submit(mapped.iova, 0, 64, true).unwrap();
    reset(&rig);
    rig.poll();
    assert!(rig.windows.status(hold.handle.index).unwrap().moving, "the writer is waited for");
    engine.step(1);
    assert!(matches!(engine.take_result(flying), Some(CopyState::Failed(_))), "done, and lost");
    rig.windows.commit(7, &(0..W as u64), &mut rig.drive).unwrap();
    assert_eq!(rig.windows.losses(7, &mut rig.drive, rig.now).bytes, W as u64, "nobody knows what it wrote");
    assert_eq!(section.finish(), Finished::Done);
    rig.poll();
    assert!(!rig.windows.status(hold.handle.index).unwrap().moving);
    assert_eq!(rig.windows.losses(7, &mut rig.drive, rig.now).events, 1);
}

/// Its own mapping is there still when it asks, and shows what the reset left.
#[test]
fn a_peer_that_asks_again_after_a_reset_is_not_shown_what_it_left() {
    let (mut rig, _c, hold) = in_cmb();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    for round in 0..3 {
        let mapped = loop {
            match rig.windows.map_peer(peer, hold.handle.index, false, &mut rig.drive, rig.now).unwrap() {
                PeerPath::Direct(mapped) => break mapped,
                PeerPath::Moving => rig.poll(),
                PeerPath::Bounce(why) => panic!("{why}"),
            }
        };
        engine.copy(mapped.iova, 0, W, false).unwrap();
        let mut got = vec![0; W];
        engine.local().read(0, &mut got).unwrap();
        let wrong = got.iter().enumerate().find(|(i, byte)| **byte != pattern(7, *i));
        assert_eq!(wrong, None, "after {round} resets");
        reset(&rig);
    }
}
