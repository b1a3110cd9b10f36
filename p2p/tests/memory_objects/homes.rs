//! Where its windows are, and what that moves.

use p2p::counters::{Path, Reason};
use p2p::layout::Home;
use p2p::reader::Outcome;
use p2p::region::RegionKind;
use p2p::windows::{DeviceMemory, Ensured, ObjectOptions, Placement, Scope, WindowsError};
use std::sync::Arc;

use crate::common::{W, config};
use crate::world::{AT, N, OBJECT, options, ordinary, want, world, world_with};

#[test]
fn it_is_what_the_memory_holds_and_takes_no_transfer() {
    let mut w = world();
    w.ensure_all();
    for n in 0..N {
        assert_eq!(w.read(n, 0, W), (Outcome::Copied(Home::Cmb), want(n, 0, W)));
    }
    w.write(1, 5000, b"stored");
    assert_eq!(w.raw(1, 5000, 6), b"stored", "at once, in the device");
    let done = w.commit().unwrap();
    assert_eq!((done.cmb_bytes, done.host_bytes), (0, 0));
    assert_eq!(w.rig.windows.counters().iter().count(), 0, "no byte was moved for it");
    assert_eq!((w.rig.windows.host_bytes().0, w.rig.windows.memory_bytes()), (0, (N * W) as u64));
    // Nowhere loses nothing: the bytes are home.
    let gone = w.rig.windows.evict(&Scope::Everything, &mut w.rig.drive, w.rig.now).unwrap();
    assert_eq!(w.rig.finish(gone).failed, Vec::<String>::new());
    assert_eq!(w.read(1, 5000, 6).0, Outcome::NotResident);
    let mut got = vec![0; 6];
    let at = (W + 5000) as u64;
    w.rig.windows.read_through(OBJECT, at..at + 6, &mut got, &mut w.rig.drive).unwrap();
    assert_eq!(&got, b"stored");
    w.ensure_all();
    assert_eq!(&w.read(1, 5000, 6).1, b"stored");
    // "No longer wanted" is no reason to lose what is there.
    let all = 0..(N * W) as u64;
    let ticket = w.rig.windows.invalidate(OBJECT, &all, &mut w.rig.drive, w.rig.now).unwrap();
    w.rig.finish(ticket);
    assert_eq!(w.raw(1, 5000, 6), b"stored");
}

#[test]
fn revoked_it_is_in_the_host_cache_and_a_commit_brings_it_back() {
    let mut w = world();
    w.ensure_all();
    w.write(0, 0, b"direct");
    let (one, range) = (Scope::Window(w.index(0)), W as u64 + 5..3 * W as u64);
    assert_eq!(w.rig.revoke(&one).moved, 1);
    assert_eq!(w.rig.revoke(&Scope::Range { object: OBJECT, bytes: range }).moved, 2);
    assert_eq!(
        w.rig.revoke(&Scope::Object(OBJECT)),
        p2p::windows::Report { moved: 1, already: 3, freed_bytes: W as u64, ..Default::default() }
    );
    for n in 0..N {
        assert_eq!(w.read(n, 100, W - 100), (Outcome::Copied(Home::Host), want(n, 100, W - 100)));
    }
    assert_eq!(&w.read(0, 0, 6).1, b"direct");
    w.write(0, 0, b"cached");
    w.write(2, 8192, b"as well");
    assert_eq!((w.raw(0, 0, 6), w.raw(2, 8192, 7)), (b"direct".to_vec(), want(2, 8192, 7)));
    let done = w.commit().unwrap();
    assert_eq!((done.cmb_bytes, done.host_bytes), (0, 8192));
    assert_eq!((w.raw(0, 0, 6), w.raw(2, 8192, 7)), (b"cached".to_vec(), b"as well".to_vec()));
    assert_eq!(w.rig.windows.counters().get(Path::HostCache, Reason::WriteBack).bytes, 8192);
    // Back: only what changed since is copied.
    w.write(2, 4096, b"new");
    w.promote(2);
    assert_eq!(w.read(2, 4096, 3), (Outcome::Copied(Home::Cmb), b"new".to_vec()));
    assert_eq!(w.rig.windows.counters().path(Path::Bounce).bytes, 4096);
    assert_eq!(w.raw(2, 4096, 3), b"new");
    assert_eq!(w.read(2, 0, 4096).1, want(2, 0, 4096));
    assert!(w.rig.drive.objects.is_empty() && w.rig.drive.host_bytes == 0, "none of it concerns the drive");
    // Out of the host cache it goes home, committed or not.
    w.write(0, 12_288, b"late");
    let gone = w.rig.windows.evict(&Scope::Object(OBJECT), &mut w.rig.drive, w.rig.now).unwrap();
    assert_eq!(w.rig.finish(gone).failed, Vec::<String>::new());
    assert_eq!((w.raw(0, 12_288, 4), w.rig.windows.host_bytes().0), (b"late".to_vec(), 0));
}

#[test]
fn a_mass_revocation_and_one_of_the_client_take_it_too_and_it_goes_back() {
    let mut w = world_with(2 * W, config(), RegionKind::Ordinary);
    w.ensure_all();
    let ticket = w.rig.windows.revoke(&Scope::Everything, &mut w.rig.drive, w.rig.now).unwrap();
    assert_eq!(w.read(0, 0, 4).0, Outcome::DeviceMoved, "announced is closed");
    assert_eq!(w.rig.finish(ticket).moved, N as u64);
    for n in 0..N {
        assert_eq!(w.read(n, 0, W), (Outcome::Copied(Home::Host), want(n, 0, W)));
    }
    // By itself, when it is used: though the CMB is full of a file.
    w.rig.object(7, 2 * W, W);
    let other = w.rig.client();
    for n in 0..2 {
        let h = w.rig.hold(&other, 7, n * W as u64, false);
        assert_eq!(w.rig.ensure(&h), Ensured::Ready(Home::Cmb, Reason::Policy));
    }
    for n in 0..N {
        let h = w.holds[n];
        w.rig.ensure(&h);
    }
    for _ in 0..N {
        w.rig.poll();
    }
    assert!((0..N).all(|n| w.home(n) == Home::Cmb));
    assert_eq!(w.rig.windows.cmb_bytes().0, 0, "in its own memory, not in the CMB");
    w.rig.revoke(&Scope::Client(w.c.id));
    assert!((0..N).all(|n| w.home(n) == Home::Host));
    assert!(w.rig.windows.hold(w.c.id, OBJECT, 0, false).is_err());
}

#[test]
fn its_placement_is_its_own() {
    let mut w = world();
    let host_only = ObjectOptions { placement: Placement::HostOnly, ..options() };
    w.rig.windows.add_object(OBJECT, host_only).unwrap();
    assert_eq!(w.rig.ensure(&w.holds[0].clone()), Ensured::Ready(Home::Host, Reason::Asked));
    assert_eq!(w.read(0, 0, W), (Outcome::Copied(Home::Host), want(0, 0, W)));
    let direct = ObjectOptions { placement: Placement::CmbOnly, ..options() };
    w.rig.windows.add_object(OBJECT, direct).unwrap();
    assert_eq!(w.rig.ensure(&w.holds[1].clone()), Ensured::Ready(Home::Cmb, Reason::Policy));
    w.write(1, 0, b"here");
    assert_eq!(w.rig.revoke(&Scope::Window(w.index(1))).moved, 1);
    assert_eq!(w.home(1), Home::None, "no host memory for it");
    assert_eq!(w.raw(1, 0, 4), b"here");
}

#[test]
fn what_cannot_be_an_object_is_refused_with_the_reason() {
    let mut w = world();
    let memory = Arc::clone(&w.memory);
    let mut add = |change: &dyn Fn(&mut DeviceMemory)| {
        let mut m = ordinary(&memory);
        change(&mut m);
        w.rig.windows.add_memory(OBJECT | 1, m, options()).unwrap_err().to_string()
    };
    assert!(add(&|m| m.len += 2 * W).contains("bytes at 8192 of"));
    assert!(add(&|m| m.len = 0).contains("0 bytes"));
    assert!(add(&|m| m.len = W + 4096).contains("not whole windows of 16384"));
    assert!(add(&|m| m.offset = 100).contains("not whole windows"));
    let inside = RegionKind::Device { canary: (AT + N * W - 8) as u64 };
    assert!(add(&|m| m.kind = inside).contains("the canary"));
    assert!(!w.rig.windows.has_object(OBJECT | 1));
    let again = w.rig.windows.add_memory(OBJECT, ordinary(&memory), options());
    assert!(matches!(again, Err(WindowsError::Registered(OBJECT))));
    let beyond = w.rig.windows.hold(w.c.id, OBJECT, (N * W) as u64, false);
    assert!(matches!(beyond, Err(WindowsError::BeyondMemory { len, .. }) if len == (N * W) as u64));
    let mut got = [0; 8];
    let end = (N * W) as u64;
    assert!(w.rig.windows.read_through(OBJECT, end - 4..end + 4, &mut got, &mut w.rig.drive).is_err());
    // It goes when nobody has it; until then it stays.
    assert!(!w.rig.windows.remove_object(OBJECT));
    for n in 0..N {
        w.rig.windows.release(w.c.id, w.index(n)).unwrap();
    }
    let gone = w.rig.windows.evict(&Scope::Object(OBJECT), &mut w.rig.drive, w.rig.now).unwrap();
    w.rig.finish(gone);
    assert!(w.rig.windows.remove_object(OBJECT));
    assert_eq!(w.rig.windows.memory_bytes(), 0);
}
