//! What a peer wrote.

use nvme_driver::mem::Mapping;
use p2p::counters::Reason;
use p2p::layout::Home;
use p2p::peer::EmulatedEngine;
use p2p::windows::{Ensured, PeerPath};

use crate::common::W;
use crate::world::{PAGES, assert_bytes, assert_spare, revoke, rig, with};

#[test]
fn what_a_peer_wrote_is_copied_mapped_or_not_any_more() {
    for still_mapped in [false, true] {
        let (mut rig, c, hold) = rig();
        let engine = EmulatedEngine::new("dma", W).unwrap();
        let peer = rig.windows.register_peer(Box::new(engine.clone()));
        let index = hold.handle.index;
        let path = rig.windows.map_peer(peer, index, true, &mut rig.drive, 0).unwrap();
        let PeerPath::Direct(m) = path else { panic!("{path:?}") };
        assert_spare(&rig, &hold, true);
        engine.local().write(0, b"by DMA").unwrap();
        engine.copy(m.iova + 4096, 0, 6, true).unwrap();
        if !still_mapped {
            rig.windows.unmap_peer(peer, index).unwrap();
        }
        assert_eq!(revoke(&mut rig, &hold), PAGES);
        assert_bytes(&c, &hold, Home::Host, &with(&[(4096, b"by DMA")]));
    }
}

#[test]
fn what_a_peer_wrote_by_way_of_host_memory_is_copied() {
    let (mut rig, c, hold) = rig();
    let theirs = Mapping::memfd("peer", 4096).unwrap();
    theirs.write(0, b"bounced").unwrap();
    let at = 3 * 4096 + 1;
    let stored = rig.windows.bounce_from_peer(
        7,
        at..at + 7,
        (&theirs, 0),
        Reason::NotCoherent,
        &mut rig.drive,
        rig.now,
    );
    assert_eq!(stored.unwrap(), Ensured::Ready(Home::Cmb, Reason::Policy));
    assert_spare(&rig, &hold, true);
    assert_eq!(revoke(&mut rig, &hold), 1);
    assert_bytes(&c, &hold, Home::Host, &with(&[(at as usize, b"bounced")]));
}
