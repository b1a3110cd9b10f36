//! Clients that die, and a server that does.

use p2p::layout::Home;
use p2p::reader::Outcome;
use p2p::windows::Scope;
use p2p::writer::{Finished, NotEntered};

use crate::common::{W, in_cmb, rig, writing};

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
fn a_dead_server_is_noticed_after_the_copy() {
    let (rig, c, hold) = in_cmb();
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
