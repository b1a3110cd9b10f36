//! Writers are waited for; those who are silent are fenced, and keep their pages.

use p2p::counters::Reason;
use p2p::layout::Home;
use p2p::reader::Outcome;
use p2p::windows::{Ensured, Progress, Scope, Want};
use p2p::writer::{Finished, NotEntered};

use crate::common::{GRACE, Midway, Rig, W, Way, config, in_cmb, rig, writing};

#[test]
fn a_write_section_is_waited_for_and_its_bytes_move_along() {
    let (mut rig, c, hold) = in_cmb();
    let mut slot = c.slots.take().unwrap();
    let mut other = c.slots.take().unwrap();
    let mut section = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    section.write(100, b"before").unwrap();
    let ticket = rig.windows.revoke(&Scope::Window(hold.handle.index), &mut rig.drive, 0).unwrap();
    rig.poll();
    assert!(matches!(rig.windows.progress(ticket), Some(Progress::Pending(_))));
    // Frozen: readers go on, writers wait, and the first copy has been made already.
    assert_eq!(c.read(hold.handle, 100, 6), (Outcome::Copied(Home::Cmb), b"before".to_vec()));
    assert_eq!(other.write(&c.control, writing(&hold), &c.view).unwrap_err(), NotEntered::Moving);
    section.write(8000, b"after the copy").unwrap();
    assert_eq!(section.finish(), Finished::Done);
    let report = rig.finish(ticket);
    assert_eq!((report.moved, report.silent, report.freed_bytes), (1, 0, W as u64));
    assert_eq!(c.read(hold.handle, 8000, 14), (Outcome::Copied(Home::Host), b"after the copy".to_vec()));
    assert_eq!(c.read(hold.handle, 100, 6).1, b"before");
    // Not lost on the way to the drive either.
    rig.windows.commit(7, &(0..W as u64), &mut rig.drive).unwrap();
    assert_eq!(&rig.drive.objects[&7][8000..8014], b"after the copy");
}

#[test]
fn a_silent_writer_is_fenced_and_its_pages_are_quarantined() {
    let mut rig = rig();
    let (mut silent, mut c) = (rig.client(), rig.client());
    rig.map_host(&mut silent, 7, 4 * W);
    rig.map_host(&mut c, 7, 4 * W);
    let hold = rig.hold(&silent, 7, 0, true);
    let reading = rig.hold(&c, 7, 0, true);
    rig.ensure(&hold);
    let mut slot = silent.slots.take().unwrap();
    let mut section = slot.write(&silent.control, writing(&hold), &silent.view).unwrap();
    section.write(0, b"half a thought").unwrap();

    let begun = rig.now;
    let report = rig.revoke(&Scope::Window(hold.handle.index));
    assert!(rig.now - begun <= 3 * GRACE, "bounded by the grace");
    assert_eq!((report.moved, report.silent), (1, 1));
    assert_eq!((report.freed_bytes, report.quarantined_bytes), (0, W as u64));
    // P2: the silent writer's late store reaches the old page, which nobody else has.
    section.write(0, b"a late store!!").unwrap();
    assert_eq!(c.read(reading.handle, 0, 14), (Outcome::Copied(Home::Host), b"half a thought".to_vec()));
    assert_eq!(rig.windows.quarantine().count(), 1);
    let filler = rig.client();
    rig.object(8, 16 * W, W);
    for n in 0..16 {
        let h = rig.hold(&filler, 8, n * W as u64, false);
        rig.ensure_want(&h, Want::Cmb);
    }
    let kept = rig.windows.quarantine().next().unwrap();
    let at: Vec<u64> = rig.windows.iter().filter(|(_, w)| w.home == Home::Cmb).map(|(_, w)| w.at).collect();
    assert_eq!(at.len(), 7, "one of eight is in quarantine");
    assert!(!at.contains(&kept.at));
    // P3: others write on.
    c.write(&reading, 4096, b"others go on");
    // While someone silent has old pages of it, the window stays out of the CMB.
    rig.windows.promote(hold.handle.index, &mut rig.drive, rig.now);
    assert_eq!(rig.windows.status(hold.handle.index).unwrap().home, Home::Host);
    // It answers, is told, and the pages come back.
    assert_eq!(section.finish(), Finished::Revoked);
    rig.poll();
    assert_eq!(rig.windows.quarantine().count(), 0);
    assert_eq!(rig.windows.counters().reclaimed_bytes, W as u64);
    assert_eq!(rig.windows.counters().fenced, 1);
}

#[test]
fn a_fenced_writer_in_the_host_cache_keeps_its_lane() {
    let mut rig = Rig::new(0, config());
    rig.object(7, 4 * W, W);
    let (mut silent, mut c) = (rig.client(), rig.client());
    rig.map_host(&mut silent, 7, 4 * W);
    rig.map_host(&mut c, 7, 4 * W);
    let hold = rig.hold(&silent, 7, 0, true);
    let reading = rig.hold(&c, 7, 0, false);
    assert_eq!(rig.ensure(&hold), Ensured::Ready(Home::Host, Reason::NoCmb));
    let mut slot = silent.slots.take().unwrap();
    let mut section = slot.write(&silent.control, writing(&hold), &silent.view).unwrap();
    section.write(0, b"one").unwrap();
    let evicted = rig.windows.evict(&Scope::Object(7), &mut rig.drive, rig.now).unwrap();
    assert_eq!(rig.finish(evicted).quarantined_bytes, W as u64);
    assert_eq!(&rig.drive.objects[&7][..3], b"one");
    rig.ensure(&reading);
    section.write(0, b"two").unwrap();
    assert_eq!(c.read(reading.handle, 0, 3), (Outcome::Copied(Home::Host), b"one".to_vec()));
    assert_eq!(section.finish(), Finished::Revoked);
    rig.poll();
    assert_eq!(rig.windows.quarantine().count(), 0);
    assert_eq!(c.read(reading.handle, 0, 3).1, b"one");
}

#[test]
fn readers_never_see_a_fenced_writers_late_stores() {
    let mut rig = rig();
    let (silent, c) = (rig.client(), rig.client());
    let hold = rig.hold(&silent, 7, 0, true);
    rig.ensure(&hold);
    let mut slot = silent.slots.take().unwrap();
    let section = slot.write(&silent.control, writing(&hold), &silent.view).unwrap();
    let mut saw = Vec::new();
    let mut drive = Midway::new(&mut rig.drive, |way| {
        if way == Way::FromCmb {
            saw.push(c.read(hold.handle, 0, 8).0);
        }
    });
    let ticket = rig.windows.evict(&Scope::Object(7), &mut drive, 0).unwrap();
    rig.windows.poll(&mut drive, 2 * GRACE);
    // Its last bytes are on their way to the drive: from here on no reader may accept the old place.
    assert_eq!(saw, [Outcome::NotResident]);
    rig.windows.poll(&mut rig.drive, 4 * GRACE);
    assert!(matches!(rig.windows.progress(ticket), Some(Progress::Done(_))));
    assert_eq!(section.finish(), Finished::Revoked);
}
