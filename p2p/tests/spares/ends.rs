//! What takes a spare away.

use p2p::layout::Home;
use p2p::windows::{Scope, Want};

use crate::common::{W, pattern};
use crate::world::{assert_bytes, assert_spare, home, promote, revoke, rig, to_cmb_from_host, with};

#[test]
fn a_truncation_leaves_no_spare_that_could_bring_back_what_was_cut_off() {
    let (mut rig, c, hold) = rig();
    let ticket = rig.windows.truncate(7, 5000, &mut rig.drive, rig.now).unwrap();
    rig.finish(ticket);
    assert_spare(&rig, &hold, false);
    assert_eq!(rig.windows.host_bytes().0, 0);
    revoke(&mut rig, &hold);
    assert_bytes(&c, &hold, Home::Host, &with(&[(5000, &[0; W - 5000])]));
}

#[test]
fn a_window_that_goes_nowhere_has_no_spare_afterwards() {
    let (mut rig, c, hold) = rig();
    c.write(&hold, 0, b"not committed");
    revoke(&mut rig, &hold);
    promote(&mut rig, &hold);
    // The reset takes what was dirty; the spare had it.
    rig.windows.reset_signal().raise();
    rig.drive.cmb.zero(0, 8 * W).unwrap();
    rig.poll();
    assert_spare(&rig, &hold, false);
    assert_eq!((rig.windows.host_bytes().0, home(&rig, &hold)), (0, Home::None));
    rig.ensure_want(&hold, Want::Cmb);
    revoke(&mut rig, &hold);
    assert_bytes(&c, &hold, Home::Host, &with(&[]));

    for invalidate in [true, false] {
        promote(&mut rig, &hold);
        assert_spare(&rig, &hold, true);
        let bytes = 0..W as u64;
        let ticket = if invalidate {
            rig.drive.objects.get_mut(&7).unwrap()[0] ^= 0xff;
            rig.windows.invalidate(7, &bytes, &mut rig.drive, rig.now).unwrap()
        } else {
            rig.windows.evict(&Scope::Object(7), &mut rig.drive, rig.now).unwrap()
        };
        rig.finish(ticket);
        assert_eq!((rig.windows.host_bytes().0, home(&rig, &hold)), (0, Home::None));
        rig.ensure_want(&hold, Want::Cmb);
        revoke(&mut rig, &hold);
        assert_bytes(&c, &hold, Home::Host, &with(&[(0, &[pattern(7, 0) ^ 0xff])]));
    }
}

#[test]
fn a_layout_takes_the_spares_of_its_range() {
    let (mut rig, c, hold) = rig();
    let beyond = rig.hold(&c, 7, W as u64, true);
    to_cmb_from_host(&mut rig, &beyond);
    rig.windows.exclude(7, 0..4096).unwrap();
    assert_spare(&rig, &hold, false);
    assert_spare(&rig, &beyond, true);
}

#[test]
fn with_the_last_client_the_spare_goes() {
    for died in [false, true] {
        let (mut rig, c, hold) = rig();
        let other = rig.client();
        let its = rig.hold(&other, 7, 0, false);
        rig.windows.release(c.id, hold.handle.index).unwrap();
        assert_spare(&rig, &hold, true);
        if died {
            rig.windows.client_died(other.id, &mut rig.drive, rig.now);
        } else {
            rig.windows.release(other.id, its.handle.index).unwrap();
        }
        assert_spare(&rig, &hold, false);
        assert_eq!((rig.windows.host_bytes().0, rig.windows.spare_bytes()), (0, 0));
    }
}
