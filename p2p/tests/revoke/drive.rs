//! A drive that fails or is late, and truncation.

use p2p::counters::Reason;
use p2p::layout::Home;
use p2p::reader::Outcome;
use p2p::refusal::Refusals;
use p2p::windows::{Ensured, Progress, Scope};
use p2p::writer::Finished;

use crate::common::{W, in_cmb, pattern, rig, writing};

#[test]
fn a_window_whose_bytes_cannot_be_saved_stays_where_it_is() {
    let (mut rig, c, hold) = in_cmb();
    c.write(&hold, 0, b"precious");
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

/// A truncation ends when everybody has let go of what it cuts off, and the drive is cut after that. Who has read zeros behind the new end
/// until then reads nothing older, wherever the bytes come from.
#[test]
fn what_is_cut_off_does_not_come_back_from_the_drive_before_that_is_cut() {
    let mut rig = rig();
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 4 * W);
    let (first, last) = (rig.hold(&c, 7, 0, true), rig.hold(&c, 7, 3 * W as u64, true));
    rig.ensure(&first);
    rig.ensure(&last);
    let mut slot = c.slots.take().unwrap();
    let section = slot.write(&c.control, writing(&last), &c.view).unwrap();
    let excluded = 0..p2p::layout::LANE;
    rig.windows.exclude(7, excluded.clone()).unwrap();
    let cut = rig.windows.truncate(7, 5000, &mut rig.drive, rig.now).unwrap();
    let (there, zeros) = (4992..5000, vec![0; 8]);
    assert_eq!(c.read(first.handle, 5000, 8), (Outcome::Copied(Home::Cmb), zeros.clone()));
    let evicted = rig.windows.evict(&Scope::Window(first.handle.index), &mut rig.drive, rig.now).unwrap();
    rig.poll();
    assert!(matches!(rig.windows.progress(evicted), Some(Progress::Done(_))));
    assert!(matches!(rig.windows.progress(cut), Some(Progress::Pending(_))), "the section holds it up");
    assert_eq!(rig.ensure(&first), Ensured::Refused(Reason::Revoked));
    let mut got = vec![1; 16];
    rig.windows.read_through(7, 4992..5008, &mut got, &mut rig.drive).unwrap();
    let kept: Vec<u8> = there.map(|at| pattern(7, at)).collect();
    assert_eq!(got, [kept, zeros].concat(), "read as zeros before");
    assert_eq!(section.finish(), Finished::Done);
    rig.finish(cut);
    // Cut on the drive as well, and longer again.
    rig.drive.objects.insert(7, vec![5; 4 * W]);
    rig.windows.readmit(7, &excluded);
    rig.windows.read_through(7, 4992..5008, &mut got, &mut rig.drive).unwrap();
    assert_eq!(got, vec![5; 16]);
}

#[test]
fn nothing_reaches_the_drive_after_a_truncation_during_a_move() {
    let (mut rig, c, hold) = in_cmb();
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

/// The same when all windows are revoked at once: nobody is kept out of it for as long as the drive fails.
#[test]
fn a_window_that_does_not_follow_a_mass_revocation_is_open_where_it_is() {
    let (mut rig, c, hold) = in_cmb();
    c.write(&hold, 0, b"precious");
    rig.drive.fail_writes = true;
    rig.windows.set_refusals(Refusals::new(1, 1000));
    let ticket = rig.windows.revoke(&Scope::Everything, &mut rig.drive, rig.now).unwrap();
    assert_eq!(rig.finish(ticket).failed.len(), 1);
    assert_eq!(c.read(hold.handle, 0, 8), (Outcome::Copied(Home::Cmb), b"precious".to_vec()));
}
