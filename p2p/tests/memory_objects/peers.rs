//! Peers that reach it, and such as cannot be cut off.

use nvme_driver::mem::Mapping;
use nvme_driver::pci::DmaAccess;
use p2p::counters::Reason;
use p2p::layout::Home;
use p2p::peer::{EmulatedEngine, Mapper, PeerError};
use p2p::reader::Outcome;
use p2p::region::RegionKind;
use p2p::windows::{Ensured, Scope, WindowsError};
use std::sync::Arc;

use crate::common::{W, config};
use crate::world::{OBJECT, want, world, world_with};

#[test]
fn a_peer_reads_and_writes_it_and_faults_once_it_is_taken_back() {
    let mut w = world();
    w.ensure_all();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = w.rig.windows.register_peer(Box::new(engine.clone()));
    let m = w.map(peer, 1, false);
    engine.copy(m.iova, 0, W, false).unwrap();
    let mut got = vec![0; W];
    engine.local().read(0, &mut got).unwrap();
    assert_eq!(got, want(1, 0, W));
    assert!(engine.copy(m.iova, 0, 8, true).unwrap_err().to_string().contains("may not write"));
    let m = w.map(peer, 1, true);
    engine.local().write(0, &[0x5a; 64]).unwrap();
    engine.copy(m.iova + 4096, 0, 64, true).unwrap();
    assert_eq!(w.read(1, 4096, 64), (Outcome::Copied(Home::Cmb), vec![0x5a; 64]));
    let report = w.rig.revoke(&Scope::Window(w.index(1)));
    assert_eq!((report.moved, report.quarantined_bytes), (1, 0));
    engine.local().write(0, &[0x6b; 64]).unwrap();
    assert!(engine.copy(m.iova + 4096, 0, 64, true).unwrap_err().to_string().contains("faulted"));
    assert_eq!(w.raw(1, 4096, 64), [0x5a; 64], "a late DMA landed");
    assert_eq!(w.read(1, 4096, 64), (Outcome::Copied(Home::Host), vec![0x5a; 64]));
    // Stored while it was in the host cache; wanted by the peer again it goes back, and the peer sees it.
    w.write(1, 0, b"between");
    let again = w.map(peer, 1, false);
    engine.copy(again.iova, 0, 7, false).unwrap();
    engine.local().read(0, &mut got[..7]).unwrap();
    assert_eq!(&got[..7], b"between");
    assert_eq!(w.rig.revoke(&Scope::Peer(peer)).moved, 1);
    assert!(engine.copy(again.iova, 0, 7, false).is_err());
    assert_eq!(w.home(1), Home::Cmb, "the window stays");
    // What is resident for a peer alone takes no host memory.
    w.map(peer, 3, true);
    let index = w.index(3);
    w.rig.windows.client_died(w.c.id, &mut w.rig.drive, w.rig.now);
    let used = w.rig.windows.host_bytes().0;
    w.rig.windows.unregister_peer(peer, w.rig.now).unwrap();
    assert_eq!(w.rig.revoke(&Scope::Object(OBJECT)).failed, Vec::<String>::new());
    assert!(w.rig.windows.host_bytes().0 >= used && w.rig.windows.status(index).is_some());
}

/// Says that it has unmapped, and does not.
#[derive(Debug)]
struct Liar(EmulatedEngine);

impl Mapper for Liar {
    fn name(&self) -> &str {
        "liar"
    }
    fn map(&mut self, m: &Arc<Mapping>, b: u64, o: usize, l: usize, a: DmaAccess) -> Result<u64, PeerError> {
        self.0.map(m, b, o, l, a)
    }
    fn unmap(&mut self, _: u64, _: usize) -> Result<(), PeerError> {
        Ok(())
    }
    fn stop(&mut self, _: u64, _: usize) {}
    fn drained(&mut self, _: u64, _: usize) -> bool {
        true
    }
    fn is_mapped(&mut self, iova: u64, len: usize) -> bool {
        self.0.is_mapped(iova, len)
    }
}

#[test]
fn a_place_that_a_peer_may_still_write_is_not_used() {
    let mut w = world();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = w.rig.windows.register_peer(Box::new(Liar(engine.clone())));
    let m = w.map(peer, 0, true);
    engine.local().write(0, b"good").unwrap();
    engine.copy(m.iova, 0, 4, true).unwrap();
    assert_eq!(w.rig.revoke(&Scope::Window(w.index(0))).quarantined_bytes, W as u64);
    engine.local().write(0, b"late").unwrap();
    engine.copy(m.iova, 0, 4, true).unwrap();
    let commit = w.commit();
    assert!(matches!(commit, Err(WindowsError::MemoryHeld { .. })), "{commit:?}");
    assert_eq!(&w.read(0, 0, 4).1, b"good");
    w.promote(0);
    assert_eq!(w.read(0, 0, 4), (Outcome::Copied(Home::Host), b"good".to_vec()));
    assert!(!w.rig.windows.remove_object(OBJECT));
    // The peer's end is the end of it.
    engine.domain().unmap(m.iova, m.len).unwrap();
    w.rig.windows.unregister_peer(peer, w.rig.now).unwrap();
    assert_eq!(w.commit().unwrap().host_bytes, W as u64);
    assert_eq!(w.raw(0, 0, 4), b"good");
}

#[test]
fn a_place_is_remembered_when_its_window_is_forgotten() {
    let mut w = world_with(W, config(), RegionKind::Ordinary);
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = w.rig.windows.register_peer(Box::new(Liar(engine.clone())));
    let m = w.map(peer, 1, false);
    let gone = w.rig.windows.evict(&Scope::Window(w.index(1)), &mut w.rig.drive, w.rig.now).unwrap();
    assert_eq!(w.rig.finish(gone).quarantined_bytes, W as u64);
    assert_eq!(w.home(1), Home::Host, "who could not be unmapped might write, for all that is known");
    let gone = w.rig.windows.evict(&Scope::Window(w.index(1)), &mut w.rig.drive, w.rig.now).unwrap();
    assert_eq!(w.rig.finish(gone).failed, Vec::<String>::new(), "clean: nothing to bring there");
    let old = w.index(1);
    w.rig.windows.release(w.c.id, old).unwrap();
    assert!(w.rig.windows.status(old).is_none());
    w.rig.object(7, W, W);
    assert_eq!(w.rig.hold(&w.c, 7, 0, false).handle.index, old, "its number is another's");
    w.holds[1] = w.rig.hold(&w.c, OBJECT, W as u64, true);
    let h = w.holds[1];
    assert_eq!(w.rig.ensure(&h), Ensured::Ready(Home::Host, Reason::Quarantine));
    w.write(1, 0, b"new");
    assert!(matches!(w.commit(), Err(WindowsError::MemoryHeld { .. })));
    engine.copy(m.iova, 0, 3, false).unwrap();
    let mut seen = [0; 3];
    engine.local().read(0, &mut seen).unwrap();
    assert_eq!(seen.to_vec(), want(1, 0, 3));
}
