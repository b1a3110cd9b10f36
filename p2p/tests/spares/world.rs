//! A window in the CMB with a spare, and what is asked of it.
#![allow(unreachable_pub, reason = "a room of one test")]

use p2p::counters::{Path, Reason};
use p2p::layout::Home;
use p2p::reader::Outcome;
use p2p::windows::{Config, Hold, Scope, Want};

use crate::common::{Client, Rig, W, config, pattern};

pub const PAGES: usize = W / 4096;

/// An object of eight windows, the first of them in the CMB with a spare, and a client that holds it for writing.
pub fn rig() -> (Rig, Client, Hold) {
    rig_of(config())
}

pub fn rig_of(config: Config) -> (Rig, Client, Hold) {
    let mut rig = Rig::new(8 * W, config);
    rig.object(7, 8 * W, W);
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 8 * W);
    let hold = rig.hold(&c, 7, 0, true);
    to_cmb_from_host(&mut rig, &hold);
    assert_spare(&rig, &hold, true);
    (rig, c, hold)
}

/// One window in the host cache, and a client that holds it for writing.
pub fn in_host() -> (Rig, Client, Hold) {
    let mut rig = Rig::new(8 * W, config());
    rig.object(7, W, W);
    let mut c = rig.client();
    rig.map_host(&mut c, 7, W);
    let hold = rig.hold(&c, 7, 0, true);
    rig.ensure_want(&hold, Want::Host);
    (rig, c, hold)
}

pub fn to_cmb_from_host(rig: &mut Rig, hold: &Hold) {
    rig.ensure_want(hold, Want::Host);
    promote(rig, hold);
}

pub fn promote(rig: &mut Rig, hold: &Hold) {
    rig.windows.promote(hold.handle.index, &mut rig.drive, rig.now);
    rig.poll();
    assert_eq!(home(rig, hold), Home::Cmb);
}

pub fn home(rig: &Rig, hold: &Hold) -> Home {
    rig.windows.status(hold.handle.index).unwrap().home
}

pub fn assert_spare(rig: &Rig, hold: &Hold, spare: bool) {
    assert_eq!(rig.windows.status(hold.handle.index).unwrap().spare, spare);
}

/// Revokes the window, and says how many pages were copied.
pub fn revoke(rig: &mut Rig, hold: &Hold) -> usize {
    let copied = |rig: &Rig| rig.windows.counters().get(Path::HostCache, Reason::Revoked).bytes;
    let (before, spared) = (copied(rig), rig.windows.counters().spared_bytes);
    let report = rig.revoke(&Scope::Window(hold.handle.index));
    assert_eq!((report.moved, home(rig, hold)), (1, Home::Host));
    let pages = (copied(rig) - before) as usize / 4096;
    let saved = (rig.windows.counters().spared_bytes - spared) as usize / 4096;
    assert!(saved == 0 || pages + saved == PAGES, "{pages} pages copied, {saved} not");
    pages
}

/// The window as the drive had it, with these bytes in it.
pub fn with(changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut want: Vec<u8> = (0..W).map(|i| pattern(7, i)).collect();
    for (at, bytes) in changes {
        want[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    want
}

#[track_caller]
pub fn assert_bytes(c: &Client, hold: &Hold, home: Home, want: &[u8]) {
    let (outcome, got) = c.read(hold.handle, 0, W);
    assert_eq!(outcome, Outcome::Copied(home));
    let wrong = got.iter().zip(want).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "the first wrong byte");
}
