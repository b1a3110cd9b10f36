//! Readers carry on wherever a window goes, and every byte is counted by the path it took.

use p2p::counters::{Path, Reason};
use p2p::layout::Home;
use p2p::reader::Outcome;
use p2p::windows::{Config, Ensured, ObjectOptions, Placement, Scope, Want};
use p2p::writer::{Finished, NotEntered};

use crate::common::{Rig, W, config, in_cmb, pattern, rig, writing};

#[test]
fn readers_carry_on_from_the_host_cache_and_go_back() {
    let mut rig = rig();
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 4 * W);
    let hold = rig.hold(&c, 7, W as u64 + 5, false);
    assert_eq!(hold.offset, W as u64);
    assert_eq!(c.read(hold.handle, 0, 8).0, Outcome::NotResident);
    assert_eq!(rig.ensure(&hold), Ensured::Ready(Home::Cmb, Reason::Policy));
    let want: Vec<u8> = (W..2 * W).map(|i| pattern(7, i)).collect();
    assert_eq!(c.read(hold.handle, 0, W), (Outcome::Copied(Home::Cmb), want.clone()));

    let report = rig.revoke(&Scope::Window(hold.handle.index));
    assert_eq!((report.moved, report.freed_bytes, report.quarantined_bytes), (1, W as u64, 0));
    rig.drive.cmb.zero(0, 8 * W).unwrap();
    assert_eq!(c.read(hold.handle, 0, W), (Outcome::Copied(Home::Host), want.clone()));
    // Again: nothing to do.
    assert_eq!(rig.revoke(&Scope::Window(hold.handle.index)).already, 1);

    rig.windows.promote(hold.handle.index, &mut rig.drive, rig.now);
    assert_eq!(c.read(hold.handle, 0, W), (Outcome::Copied(Home::Cmb), want.clone()));
    let evicted = rig.windows.evict(&Scope::Object(7), &mut rig.drive, rig.now).unwrap();
    rig.finish(evicted);
    assert_eq!(c.read(hold.handle, 0, W).0, Outcome::NotResident);
    assert_eq!(rig.windows.host_bytes().0, 0);
    assert_eq!(rig.windows.cmb_bytes(), (8 * W, 8 * W));
}

#[test]
fn a_mass_revocation_is_announced_at_once() {
    let mut rig = Rig::new(64 * W, config());
    rig.object(7, 128 * W, W);
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 128 * W);
    let holds: Vec<_> = (0..100).map(|n| rig.hold(&c, 7, n * W as u64, true)).collect();
    for h in &holds {
        rig.ensure(h);
    }
    let homes = |rig: &Rig, home| rig.windows.iter().filter(|(_, w)| w.home == home).count();
    assert!(homes(&rig, Home::Cmb) > 50 && homes(&rig, Home::Host) > 20);
    let ticket = rig.windows.revoke(&Scope::Everything, &mut rig.drive, rig.now).unwrap();
    for h in &holds {
        assert_eq!(c.read(h.handle, 0, 8).0, Outcome::DeviceMoved);
    }
    let mut slot = c.slots.take().unwrap();
    assert_eq!(slot.write(&c.control, writing(&holds[0]), &c.view).unwrap_err(), NotEntered::DeviceMoved);
    // Whoever asks is served out of turn.
    assert!(matches!(rig.ensure(&holds[99]), Ensured::Ready(Home::Host, _)));
    assert_eq!(c.read(holds[99].handle, 0, 8).0, Outcome::Copied(Home::Host));
    rig.finish(ticket);
    for (n, h) in holds.iter().enumerate() {
        let want: Vec<u8> = (n * W..n * W + 100).map(|i| pattern(7, i)).collect();
        assert_eq!(c.read(h.handle, 0, 100), (Outcome::Copied(Home::Host), want));
    }
    assert_eq!(rig.windows.cmb_bytes().0, 64 * W);
}

#[test]
fn when_no_memory_takes_it_the_bytes_are_still_served() {
    let mut rig = Rig::new(W, Config { host_limit: 0, ..config() });
    rig.object(7, 4 * W, W);
    let c = rig.client();
    let (a, b) = (rig.hold(&c, 7, 0, false), rig.hold(&c, 7, W as u64, false));
    rig.windows.add_object(7, ObjectOptions { window_size: W, placement: Placement::HostOnly }).unwrap();
    assert_eq!(rig.ensure(&a), Ensured::Refused(Reason::TooLarge));
    assert_eq!(rig.ensure(&b), Ensured::Refused(Reason::TooLarge));
    let mut got = vec![0; 3 * W - 100];
    rig.windows.read_through(7, 50..3 * W as u64 - 50, &mut got, &mut rig.drive).unwrap();
    assert_eq!(got, (50..3 * W - 50).map(|i| pattern(7, i)).collect::<Vec<_>>());
}

#[test]
fn every_byte_is_counted_by_the_path_it_took() {
    let (mut rig, c, hold) = in_cmb();
    assert_eq!(rig.windows.counters().get(Path::Cmb, Reason::Policy).bytes, W as u64);
    let mut slot = c.slots.take().unwrap();
    let mut s = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    s.write(0, &[1; 5000]).unwrap();
    assert_eq!(s.finish(), Finished::Done);
    let done = rig.windows.commit(7, &(0..W as u64), &mut rig.drive).unwrap();
    assert_eq!((done.cmb_bytes, done.host_bytes), (8192, 0));
    assert_eq!(rig.windows.counters().get(Path::Cmb, Reason::WriteBack).bytes, 8192);
    assert_eq!(rig.drive.host_bytes, 0, "no byte through host memory so far");
    rig.revoke(&Scope::Object(7));
    assert_eq!(rig.windows.counters().get(Path::HostCache, Reason::Revoked).bytes, W as u64);
    let second = rig.hold(&c, 7, W as u64, false);
    rig.ensure_want(&second, Want::Host);
    assert_eq!(rig.windows.counters().get(Path::HostCache, Reason::Asked).bytes, W as u64);
}

#[test]
fn the_control_pages_cannot_be_written_by_clients() {
    let rig = rig();
    let fd = rig.windows.control_fd().unwrap();
    let len = rig.windows.control().memory().len();
    use nvme_driver::mem::{Access, Mapping};
    assert!(Mapping::from_fd(fd.try_clone().unwrap(), 0, len, Access::ReadWrite).is_err());
    // Not even by opening the file again.
    use std::os::fd::AsRawFd;
    let again =
        std::fs::File::options().read(true).write(true).open(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    if let Ok(file) = again {
        assert!(Mapping::from_fd(file.into(), 0, len, Access::ReadWrite).is_err());
    }
}
