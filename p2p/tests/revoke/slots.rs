//! Control slots: held, given back, reused.

use p2p::layout::Home;
use p2p::reader::Outcome;
use p2p::windows::{Config, Scope};
use p2p::writer::Finished;

use crate::common::{Rig, W, config, in_cmb, writing};

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
fn a_hold_is_not_given_back_from_inside_a_section() {
    let (mut rig, c, hold) = in_cmb();
    let mut slot = c.slots.take().unwrap();
    let section = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    assert!(rig.windows.release(c.id, hold.handle.index).is_err());
    assert_eq!(section.finish(), Finished::Done);
    rig.windows.release(c.id, hold.handle.index).unwrap();
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
