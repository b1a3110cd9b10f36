//! What revocation must get right, case by case, in injected time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod common;

use common::{GRACE, Rig, config, pattern, writing};
use p2p::backing::{Backing, BackingError};
use p2p::counters::{Path, Reason};
use p2p::layout::Home;
use p2p::reader::Outcome;
use p2p::windows::{Config, Ensured, ObjectOptions, Placement, Progress, Scope, Want};
use p2p::writer::{Finished, NotEntered, Returned};

const W: usize = 16 * 1024;

fn rig() -> Rig {
    let mut rig = Rig::new(8 * W, config());
    rig.object(7, 4 * W, W);
    rig
}

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
fn a_write_section_is_waited_for_and_its_bytes_move_along() {
    let mut rig = rig();
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 4 * W);
    let hold = rig.hold(&c, 7, 0, true);
    rig.ensure(&hold);
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
    let mut theirs = c.slots.take().unwrap();
    let mut s = theirs.write(&c.control, writing(&reading), &c.view).unwrap();
    s.write(4096, b"others go on").unwrap();
    assert_eq!(s.finish(), Finished::Done);
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
fn a_borrow_becomes_a_snapshot_and_its_pages_wait() {
    let mut rig = rig();
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 4 * W);
    let hold = rig.hold(&c, 7, 0, true);
    rig.ensure(&hold);
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
fn a_dead_clients_pages_come_back_and_its_last_stores_count() {
    let mut rig = rig();
    let (dead, mut c) = (rig.client(), rig.client());
    rig.map_host(&mut c, 7, 4 * W);
    let hold = rig.hold(&dead, 7, 0, true);
    let reading = rig.hold(&c, 7, 0, false);
    rig.ensure(&hold);
    let (mut a, mut b) = (dead.slots.take().unwrap(), dead.slots.take().unwrap());
    let mut section = a.write(&dead.control, writing(&hold), &dead.view).unwrap();
    let borrow = b.borrow(&dead.control, hold.handle, &dead.view).unwrap();
    section.write(9000, b"last words").unwrap();
    let ticket = rig.windows.revoke(&Scope::Object(7), &mut rig.drive, rig.now).unwrap();
    rig.poll();
    rig.windows.client_died(dead.id, &mut rig.drive, rig.now);
    assert_eq!(rig.finish(ticket).freed_bytes, W as u64);
    assert_eq!(rig.windows.quarantine().count(), 0);
    assert_eq!(c.read(reading.handle, 9000, 10), (Outcome::Copied(Home::Host), b"last words".to_vec()));
    std::mem::forget((section, borrow));
}

#[test]
fn a_client_that_died_in_a_section_made_its_window_dirty() {
    let mut rig = rig();
    let dead = rig.client();
    let hold = rig.hold(&dead, 7, 0, true);
    rig.ensure(&hold);
    let mut a = dead.slots.take().unwrap();
    let mut section = a.write(&dead.control, writing(&hold), &dead.view).unwrap();
    section.write(4096, b"unmarked").unwrap();
    rig.windows.client_died(dead.id, &mut rig.drive, rig.now);
    std::mem::forget(section);
    rig.windows.commit(7, &(0..W as u64), &mut rig.drive).unwrap();
    assert_eq!(&rig.drive.objects[&7][4096..4104], b"unmarked");
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
fn a_window_whose_bytes_cannot_be_saved_stays_where_it_is() {
    let mut rig = rig();
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 4 * W);
    let hold = rig.hold(&c, 7, 0, true);
    rig.ensure(&hold);
    let mut slot = c.slots.take().unwrap();
    let mut s = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    s.write(0, b"precious").unwrap();
    assert_eq!(s.finish(), Finished::Done);
    rig.drive.fail_writes = true;
    let evicted = rig.windows.evict(&Scope::Object(7), &mut rig.drive, rig.now).unwrap();
    assert_eq!(rig.finish(evicted).failed.len(), 1);
    assert_eq!(c.read(hold.handle, 0, 8), (Outcome::Copied(Home::Cmb), b"precious".to_vec()));
    rig.drive.fail_writes = false;
    let evicted = rig.windows.evict(&Scope::Object(7), &mut rig.drive, rig.now).unwrap();
    assert_eq!(rig.finish(evicted).moved, 1);
    assert_eq!(&rig.drive.objects[&7][..8], b"precious");
}

#[test]
fn a_timed_out_command_quarantines_its_pages_until_the_device_is_reset() {
    let mut rig = rig();
    let c = rig.client();
    let hold = rig.hold(&c, 7, 0, false);
    rig.drive.time_out_reads = true;
    assert_eq!(rig.ensure(&hold), Ensured::Ready(Home::Host, Reason::Drive));
    assert_eq!(rig.windows.cmb_bytes().0, 7 * W);
    assert_eq!(rig.windows.quarantine().count(), 1);
    rig.windows.device_drained(rig.now);
    assert_eq!(rig.windows.cmb_bytes().0, 8 * W);
}

#[test]
fn truncation_during_a_move_leaves_zeros() {
    let mut rig = rig();
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 4 * W);
    let (first, last) = (rig.hold(&c, 7, 0, true), rig.hold(&c, 7, 3 * W as u64, true));
    rig.ensure(&first);
    rig.ensure(&last);
    let mut slot = c.slots.take().unwrap();
    let section = slot.write(&c.control, writing(&first), &c.view).unwrap();
    let ticket = rig.windows.revoke(&Scope::Object(7), &mut rig.drive, rig.now).unwrap();
    let cut = rig.windows.truncate(7, 5000, &mut rig.drive, rig.now).unwrap();
    assert_eq!(section.finish(), Finished::Done);
    rig.finish(ticket);
    rig.finish(cut);
    let mut want: Vec<u8> = (0..W).map(|i| pattern(7, i)).collect();
    want[5000..].fill(0);
    assert_eq!(c.read(first.handle, 0, W), (Outcome::Copied(Home::Host), want));
    assert_eq!(c.read(last.handle, 0, 8).0, Outcome::NotResident);
}

#[test]
fn nothing_reaches_the_drive_after_a_truncation_during_a_move() {
    let mut rig = rig();
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 4 * W);
    let hold = rig.hold(&c, 7, 0, true);
    rig.ensure(&hold);
    let mut slot = c.slots.take().unwrap();
    let mut section = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    let evicted = rig.windows.evict(&Scope::Window(hold.handle.index), &mut rig.drive, 0).unwrap();
    rig.poll();
    assert!(matches!(rig.windows.progress(evicted), Some(Progress::Pending(_))), "the section holds it up");
    rig.windows.truncate(7, 0, &mut rig.drive, 0).unwrap();
    // The blocks are another's from here on.
    rig.drive.objects.insert(7, vec![0xee; 4 * W]);
    section.write(0, b"late").unwrap();
    assert_eq!(section.finish(), Finished::Done);
    rig.finish(evicted);
    assert!(rig.drive.objects[&7].iter().all(|b| *b == 0xee), "a truncated window was written back");
}

#[test]
fn a_slot_is_reused_with_a_new_incarnation() {
    let mut rig = Rig::new(8 * W, Config { slots: 1, ..config() });
    rig.object(1, W, W);
    rig.object(2, W, W);
    let c = rig.client();
    let old = rig.hold(&c, 1, 0, false);
    rig.ensure(&old);
    assert!(rig.windows.hold(c.id, 2, 0, false).is_err(), "held");
    rig.windows.release(c.id, old.handle.index).unwrap();
    let evicted = rig.windows.evict(&Scope::Object(1), &mut rig.drive, rig.now).unwrap();
    rig.finish(evicted);
    let new = rig.hold(&c, 2, 0, false);
    rig.ensure(&new);
    assert_eq!(new.handle.index, old.handle.index);
    assert_eq!(c.read(old.handle, 0, 8).0, Outcome::StaleHandle);
    assert_eq!(c.read(new.handle, 0, 8).0, Outcome::Copied(Home::Cmb));
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
    let mut rig = rig();
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 4 * W);
    let hold = rig.hold(&c, 7, 0, true);
    rig.ensure(&hold);
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
fn a_dead_server_is_noticed_after_the_copy() {
    let mut rig = rig();
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 4 * W);
    let hold = rig.hold(&c, 7, 0, true);
    rig.ensure(&hold);
    assert_eq!(c.read(hold.handle, 0, 8).0, Outcome::Copied(Home::Cmb));
    drop(rig);
    assert_eq!(c.read(hold.handle, 0, 8).0, Outcome::ServerGone);
    let mut slot = c.slots.take().unwrap();
    // The words still look as if the window were open; what is stored there may be lost, and the writer is told.
    let told = match slot.write(&c.control, writing(&hold), &c.view) {
        Ok(section) => section.finish() == Finished::Revoked,
        Err(e) => e == NotEntered::ServerGone,
    };
    assert!(told);
}

/// A drive that looks at the window, as a reader, in the middle of the last write-back.
struct Watching<'a> {
    drive: &'a mut common::Drive,
    client: &'a common::Client,
    window: p2p::control::WindowHandle,
    saw: Vec<Outcome>,
}

impl Backing for Watching<'_> {
    fn read_to_cmb(&mut self, o: u64, f: u64, at: usize, len: usize) -> Result<(), BackingError> {
        self.drive.read_to_cmb(o, f, at, len)
    }
    fn read_to_host(&mut self, o: u64, f: u64, into: &mut [u8]) -> Result<(), BackingError> {
        self.drive.read_to_host(o, f, into)
    }
    fn write_from_cmb(&mut self, o: u64, f: u64, at: usize, n: usize) -> Result<(), BackingError> {
        self.saw.push(self.client.read(self.window, 0, 8).0);
        self.drive.write_from_cmb(o, f, at, n)
    }
    fn write_from_host(&mut self, o: u64, f: u64, from: &[u8]) -> Result<(), BackingError> {
        self.drive.write_from_host(o, f, from)
    }
}

#[test]
fn readers_never_see_a_fenced_writers_late_stores() {
    let mut rig = rig();
    let (silent, c) = (rig.client(), rig.client());
    let hold = rig.hold(&silent, 7, 0, true);
    rig.ensure(&hold);
    let mut slot = silent.slots.take().unwrap();
    let section = slot.write(&silent.control, writing(&hold), &silent.view).unwrap();
    let mut drive = Watching { drive: &mut rig.drive, client: &c, window: hold.handle, saw: Vec::new() };
    let ticket = rig.windows.evict(&Scope::Object(7), &mut drive, 0).unwrap();
    rig.windows.poll(&mut drive, 2 * GRACE);
    // Its last bytes are on their way to the drive: from here on no reader may accept the old place.
    assert_eq!(drive.saw, [Outcome::NotResident]);
    rig.windows.poll(&mut drive, 4 * GRACE);
    assert!(matches!(rig.windows.progress(ticket), Some(Progress::Done(_))));
    assert_eq!(section.finish(), Finished::Revoked);
}

#[test]
fn a_hold_is_not_given_back_from_inside_a_section() {
    let mut rig = rig();
    let c = rig.client();
    let hold = rig.hold(&c, 7, 0, true);
    rig.ensure(&hold);
    let mut slot = c.slots.take().unwrap();
    let section = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    assert!(rig.windows.release(c.id, hold.handle.index).is_err());
    assert_eq!(section.finish(), Finished::Done);
    rig.windows.release(c.id, hold.handle.index).unwrap();
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

#[test]
fn a_dead_quarantined_client_gives_its_pages_back() {
    let mut rig = rig();
    let silent = rig.client();
    let hold = rig.hold(&silent, 7, 0, true);
    rig.ensure(&hold);
    let (mut a, mut b) = (silent.slots.take().unwrap(), silent.slots.take().unwrap());
    let section = a.write(&silent.control, writing(&hold), &silent.view).unwrap();
    let borrow = b.borrow(&silent.control, hold.handle, &silent.view).unwrap();
    rig.revoke(&Scope::Window(hold.handle.index));
    assert_eq!(rig.windows.quarantine().map(|q| q.claims).sum::<usize>(), 2);
    rig.windows.client_died(silent.id, &mut rig.drive, rig.now);
    assert_eq!(rig.windows.quarantine().count(), 0);
    assert_eq!(rig.windows.cmb_bytes().0, 8 * W);
    std::mem::forget((section, borrow));
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

#[test]
fn windows_that_nobody_holds_make_way_for_new_ones() {
    let mut rig = Rig::new(8 * W, Config { slots: 16, ..config() });
    rig.object(7, 64 * W, W);
    let c = rig.client();
    for n in 0..64 {
        let hold = rig.hold(&c, 7, n * W as u64, true);
        rig.ensure(&hold);
        let mut slot = c.slots.take().unwrap();
        let mut view = c.view.clone();
        let fd = rig.windows.host_fd(7, true).unwrap();
        let memory =
            nvme_driver::mem::Mapping::from_fd(fd, 0, 64 * W, nvme_driver::mem::Access::ReadWrite).unwrap();
        view.host.push(p2p::region::Region::new(memory, 0, p2p::region::RegionKind::Ordinary));
        let mut s = slot.write(&c.control, writing(&hold), &view).unwrap();
        s.write(0, &n.to_le_bytes()).unwrap();
        assert_eq!(s.finish(), Finished::Done);
        rig.windows.release(c.id, hold.handle.index).unwrap();
        rig.poll();
    }
    let evicted = rig.windows.evict(&Scope::Everything, &mut rig.drive, rig.now).unwrap();
    rig.finish(evicted);
    for n in 0..64u64 {
        assert_eq!(rig.drive.objects[&7][n as usize * W..][..8], n.to_le_bytes());
    }
}
