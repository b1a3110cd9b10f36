//! Resets of the drive, which leave it alone, and the end of its own device.

use p2p::layout::Home;
use p2p::peer::EmulatedEngine;
use p2p::reader::Outcome;
use p2p::region::RegionKind;
use p2p::windows::{Config, Scope, Want, WindowsError};
use p2p::writer::Finished;

use crate::common::{W, config, writing};
use crate::world::{AT, N, OBJECT, want, world_with};

#[test]
fn a_reset_of_the_drive_takes_the_cmb_and_leaves_it_alone() {
    let mut w = world_with(4 * W, config(), RegionKind::Ordinary);
    w.rig.object(7, W, W);
    let mut other = w.rig.client();
    w.rig.map_host(&mut other, 7, W);
    let file = w.rig.hold(&other, 7, 0, true);
    w.rig.ensure(&file);
    w.ensure_all();
    w.write(0, 0, b"kept");
    w.rig.revoke(&Scope::Window(w.index(1)));
    w.write(1, 0, b"kept");
    // One goes to the host cache, one comes back, both held up by a section.
    w.rig.revoke(&Scope::Window(w.index(3)));
    let (mut a, mut b) = (w.c.slots.take().unwrap(), w.c.slots.take().unwrap());
    let (control, view) = (w.c.control.clone(), w.c.view.clone());
    let mut out = a.write(&control, writing(&w.holds[2]), &view).unwrap();
    let mut back = b.write(&control, writing(&w.holds[3]), &view).unwrap();
    out.write(0, b"kept").unwrap();
    back.write(0, b"kept").unwrap();
    w.rig.windows.revoke(&Scope::Window(w.holds[2].handle.index), &mut w.rig.drive, w.rig.now).unwrap();
    w.rig.windows.promote(w.holds[3].handle.index, &mut w.rig.drive, w.rig.now);

    w.rig.windows.reset_signal().raise();
    w.rig.drive.cmb.write(0, &[0xee; 4 * W]).unwrap();
    assert_eq!(w.read(0, 0, 4).0, Outcome::DeviceMoved);
    assert_eq!((out.finish(), back.finish()), (Finished::Done, Finished::Done));
    w.rig.poll();
    w.rig.poll();
    for (n, home) in [Home::Cmb, Home::Host, Home::Host, Home::Cmb].into_iter().enumerate() {
        assert_eq!(w.read(n, 0, 4), (Outcome::Copied(home), b"kept".to_vec()), "window {n}");
        assert_eq!(w.read(n, 4, W - 4).1, want(n, 4, W - 4), "window {n}");
    }
    let now = w.rig.now;
    assert_eq!(w.rig.windows.losses(OBJECT, &mut w.rig.drive, now).bytes, 0);
    assert_eq!(other.read(file.handle, 0, 4).0, Outcome::NotResident);
    w.commit().unwrap();
    assert!((0..N).all(|n| w.raw(n, 0, 4) == b"kept"));
}

#[test]
fn a_reset_amid_a_mass_revocation_does_not_call_it_off() {
    let mut w = world_with(W, Config { slots: 1024, ..config() }, RegionKind::Ordinary);
    w.ensure_all();
    w.rig.windows.revoke(&Scope::Everything, &mut w.rig.drive, w.rig.now).unwrap();
    w.rig.windows.reset_signal().raise();
    w.rig.poll();
    w.rig.poll();
    for n in 0..N {
        assert_eq!(w.read(n, 0, W), (Outcome::Copied(Home::Host), want(n, 0, W)));
    }
}

#[test]
fn memory_that_goes_with_its_device_is_lost_and_said_to_be() {
    let canary = (AT + N * W) as u64;
    let mut w = world_with(0, config(), RegionKind::Device { canary });
    w.ensure_all();
    w.rig.revoke(&Scope::Window(w.index(0)));
    w.write(0, 0, b"here");
    w.write(1, 0, b"there");
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = w.rig.windows.register_peer(Box::new(engine.clone()));
    let m = w.map(peer, 2, false);
    // Removed: all ones, everywhere.
    w.memory.write(0, &vec![0xff; AT + N * W + 4096]).unwrap();
    assert_eq!(w.read(1, 0, 5).0, Outcome::DeviceMoved);
    let there = W as u64..(N * W) as u64;
    let commit = w.rig.windows.commit(OBJECT, &there, &mut w.rig.drive);
    assert!(matches!(commit, Err(WindowsError::MemoryGone(OBJECT))), "nothing to copy, and nothing is there");
    let index = w.index(1);
    let asked = w.rig.windows.ensure(index, Want::Auto, &mut w.rig.drive, w.rig.now);
    assert!(matches!(asked, Err(WindowsError::MemoryGone(OBJECT))), "{asked:?}");
    w.rig.poll();
    let now = w.rig.now;
    let lost = w.rig.windows.losses(OBJECT, &mut w.rig.drive, now);
    assert_eq!((lost.events, lost.bytes), (1, 3 * W as u64));
    assert_eq!(w.rig.windows.counters().lost_bytes, 3 * W as u64);
    assert!(engine.copy(m.iova, 0, 8, false).is_err(), "its peers are cut off");
    // What the host cache has is to be had; nothing can be made durable, and nobody reads all ones.
    assert_eq!(w.read(0, 0, 4), (Outcome::Copied(Home::Host), b"here".to_vec()));
    assert!(matches!(w.commit(), Err(WindowsError::MemoryGone(OBJECT))));
    let mut got = [0; 4];
    let through = w.rig.windows.read_through(OBJECT, W as u64..W as u64 + 4, &mut got, &mut w.rig.drive);
    assert!(matches!(through, Err(WindowsError::MemoryGone(OBJECT))));
    w.promote(0);
    assert_eq!(w.read(0, 0, 4), (Outcome::Copied(Home::Host), b"here".to_vec()));
}
