//! The room that they take and give.

use p2p::layout::Home;
use p2p::reader::Outcome;
use p2p::windows::{Config, Ensured, Progress, Scope, Want};

use crate::common::{Rig, W, config};
use crate::world::{home, promote, revoke, rig, rig_of, to_cmb_from_host};

#[test]
fn whoever_needs_room_gets_that_of_the_oldest_spare_before_anybody_is_evicted() {
    let (mut rig, c, first) = rig_of(Config { host_limit: 4 * W as u64, ..config() });
    let second = rig.hold(&c, 7, W as u64, false);
    to_cmb_from_host(&mut rig, &second);
    let third = rig.hold(&c, 7, 2 * W as u64, false);
    to_cmb_from_host(&mut rig, &third);
    // The first goes and comes, and is the youngest now.
    revoke(&mut rig, &first);
    promote(&mut rig, &first);
    rig.object(8, 8 * W, W);
    let fill = |rig: &mut Rig, n: u64| {
        let h = rig.hold(&c, 8, n * W as u64, false);
        assert!(matches!(rig.ensure_want(&h, Want::Host), Ensured::Ready(Home::Host, _)));
        assert!(rig.windows.host_bytes().0 <= 4 * W as u64);
        h
    };
    let spares =
        |rig: &Rig| [&first, &second, &third].map(|h| rig.windows.status(h.handle.index).unwrap().spare);
    let fills = [fill(&mut rig, 0)];
    assert_eq!(spares(&rig), [true, true, true]);
    let fills = [fills[0], fill(&mut rig, 1)];
    assert_eq!(spares(&rig), [true, false, true]);
    let fills = [fills[0], fills[1], fill(&mut rig, 2)];
    assert_eq!(spares(&rig), [true, false, false]);
    assert!(fills.iter().all(|h| home(&rig, h) == Home::Host), "nobody was evicted for it");
}

/// Spares do not count against the room that is kept for what may be dirty in the CMB; they are part of it.
#[test]
fn spares_take_no_room_from_what_is_dirty() {
    let (mut rig, c, first) = rig_of(Config { host_limit: 10 * W as u64, ..config() });
    let mut dirty = vec![first];
    for n in 1..4 {
        let h = rig.hold(&c, 7, n * W as u64, true);
        // Two of the four have no spare.
        if n == 1 {
            to_cmb_from_host(&mut rig, &h);
        } else {
            rig.ensure_want(&h, Want::Cmb);
        }
        dirty.push(h);
    }
    dirty.iter().for_each(|h| c.write(h, 0, b"dirty"));
    rig.object(8, 32 * W, W);
    for n in 0..32 {
        let h = rig.hold(&c, 8, n * W as u64, false);
        rig.ensure_want(&h, Want::Host);
    }
    assert_eq!(rig.windows.host_bytes().0 - rig.windows.spare_bytes(), 6 * W as u64, "as without spares");
    assert_eq!(rig.windows.spare_bytes(), 2 * W as u64, "there was room for them");
    rig.drive.fail_writes = true;
    let ticket = rig.windows.revoke(&Scope::Object(7), &mut rig.drive, rig.now).unwrap();
    let report = loop {
        rig.poll();
        if let Some(Progress::Done(report)) = rig.windows.progress(ticket) {
            break report;
        }
    };
    assert_eq!((report.moved, report.failed.len()), (4, 0), "without the drive");
    for h in &dirty {
        assert_eq!(c.read(h.handle, 0, 5), (Outcome::Copied(Home::Host), b"dirty".to_vec()));
    }
}

#[test]
fn a_refusal_is_a_refusal_spare_or_not() {
    let (mut rig, c, hold) = rig();
    c.write(&hold, 0, b"kept");
    rig.windows.set_refusals(p2p::refusal::Refusals::new(1, 1000));
    rig.revoke(&Scope::Object(7));
    assert_eq!((home(&rig, &hold), rig.windows.host_bytes().0), (Home::None, 0));
    assert_eq!(&rig.drive.objects[&7][..4], b"kept");
}
