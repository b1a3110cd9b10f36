//! Peers: what they map, and that a revoked one's DMA faults and never lands.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod common;

use common::{GRACE, Rig, config, pattern, writing};
use nvme_driver::mem::Mapping;
use nvme_driver::pci::DmaAccess;
use p2p::backing::{Backing, BackingError};
use p2p::counters::Reason;
use p2p::layout::Home;
use p2p::peer::{EmulatedEngine, Mapper, PeerError};
use p2p::reader::Outcome;
use p2p::windows::{Config, Ensured, ObjectOptions, PeerMapping, PeerPath, Placement, Progress, Scope};
use p2p::writer::Finished;
use std::sync::Arc;

const W: usize = 16 * 1024;

fn rig() -> (Rig, common::Client, p2p::windows::Hold) {
    let mut rig = Rig::new(4 * W, config());
    rig.object(7, 4 * W, W);
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 4 * W);
    let hold = rig.hold(&c, 7, 0, true);
    (rig, c, hold)
}

fn map(rig: &mut Rig, peer: p2p::windows::PeerId, window: u32, write: bool) -> PeerMapping {
    match rig.windows.map_peer(peer, window, write, &mut rig.drive, rig.now).unwrap() {
        PeerPath::Direct(m) => m,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_peer_reads_the_cmb_with_no_byte_through_host_memory() {
    let (mut rig, _c, hold) = rig();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    let m = map(&mut rig, peer, hold.handle.index, false);
    engine.copy(m.iova, 0, W, false).unwrap();
    let mut got = vec![0; W];
    engine.local().read(0, &mut got).unwrap();
    assert_eq!(got, (0..W).map(|i| pattern(7, i)).collect::<Vec<_>>());
    assert_eq!((rig.drive.host_bytes, rig.windows.host_bytes().0), (0, 0));
    assert_eq!(engine.domain().counters().bytes_read, W as u64);
    assert!(engine.copy(m.iova, 0, 64, true).unwrap_err().to_string().contains("may not write"));
    assert_eq!(rig.windows.peer_mappings(Some(peer)).count(), 1);
    assert_eq!(rig.windows.window_mappings(hold.handle.index).count(), 1);
    assert_eq!(rig.windows.object_mappings(7).collect::<Vec<_>>(), [m]);
    assert_eq!(rig.windows.object_mappings(8).count(), 0);
}

#[test]
fn after_a_revocation_a_peers_dma_faults_and_nothing_lands_in_the_freed_pages() {
    let (mut rig, c, hold) = rig();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    let m = map(&mut rig, peer, hold.handle.index, true);
    engine.local().write(0, &[0x5a; 64]).unwrap();
    engine.copy(m.iova, 0, 64, true).unwrap();
    // Queued and not done when the revocation begins: it is drained, and its bytes move along.
    engine.local().write(64, &[0x6b; 64]).unwrap();
    let queued = engine.submit(m.iova + 4096, 64, 64, true).unwrap();
    let ticket = rig.windows.revoke(&Scope::Window(hold.handle.index), &mut rig.drive, rig.now).unwrap();
    rig.poll();
    assert!(matches!(rig.windows.progress(ticket), Some(Progress::Pending(_))), "waits for the queue");
    assert!(engine.submit(m.iova, 0, 64, true).unwrap_err().to_string().contains("revoked"));
    engine.step(1);
    assert_eq!(engine.take_result(queued), Some(p2p::peer::CopyState::Done));
    assert_eq!(rig.finish(ticket).freed_bytes, W as u64);
    assert_eq!(c.read(hold.handle, 0, 64), (Outcome::Copied(Home::Host), vec![0x5a; 64]));
    assert_eq!(c.read(hold.handle, 4096, 64).1, vec![0x6b; 64]);
    // The pages are another's now.
    rig.drive.cmb.write(0, &vec![0x99; 4 * W]).unwrap();
    assert!(engine.copy(m.iova, 0, 64, true).unwrap_err().to_string().contains("faulted"));
    let mut got = vec![0; 4 * W];
    rig.drive.cmb.read(0, &mut got).unwrap();
    assert!(got.iter().all(|b| *b == 0x99), "a late DMA landed");
    assert_eq!(engine.counters().faults, 1);
    // Mapped again it works again: back in the CMB.
    let again = map(&mut rig, peer, hold.handle.index, false);
    assert_ne!(again.iova, m.iova);
    engine.copy(again.iova, 0, 64, false).unwrap();
}

/// Three of many peers map one window. Who does is kept by window, and that is right whatever the others do.
#[test]
fn a_peer_that_gives_a_window_back_takes_nobody_else_along() {
    let (mut rig, c, hold) = rig();
    let index = hold.handle.index;
    let engines: Vec<_> = (0..40).map(|n| EmulatedEngine::new(&format!("dma{n}"), W).unwrap()).collect();
    let peers: Vec<_> = engines.iter().map(|e| rig.windows.register_peer(Box::new(e.clone()))).collect();
    let [first, second, third] = [3, 17, 38];
    let maps = [first, second, third].map(|n| map(&mut rig, peers[n], index, n == second));
    assert_eq!(rig.windows.window_mappings(index).collect::<Vec<_>>(), maps);
    rig.windows.unmap_peer(peers[first], index).unwrap();
    rig.windows.unregister_peer(peers[third], rig.now).unwrap();
    rig.windows.unregister_peer(peers[0], rig.now).unwrap();
    assert_eq!(rig.windows.window_mappings(index).collect::<Vec<_>>(), maps[1..2]);
    assert!(rig.windows.is_dirty(7, &(0..W as u64)), "one of them may write");
    engines[second].local().write(0, &[0x5a; 64]).unwrap();
    engines[second].copy(maps[1].iova, 0, 64, true).unwrap();
    rig.revoke(&Scope::Window(index));
    assert_eq!(c.read(hold.handle, 0, 64), (Outcome::Copied(Home::Host), vec![0x5a; 64]));
    assert_eq!((rig.windows.window_mappings(index).count(), rig.windows.peer_mappings(None).count()), (0, 0));
    for (n, m) in [first, second, third].into_iter().zip(maps) {
        assert!(engines[n].copy(m.iova, 0, 64, false).is_err(), "peer {n} still reaches the pages");
    }
    // A mapping for reading that becomes one for writing is one, and a window that comes back starts anew.
    map(&mut rig, peers[first], index, false);
    let again = map(&mut rig, peers[first], index, true);
    assert_eq!(rig.windows.window_mappings(index).collect::<Vec<_>>(), [again]);
}

#[test]
fn a_peer_that_does_not_drain_is_cut_off_after_the_grace() {
    let (mut rig, c, hold) = rig();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    let m = map(&mut rig, peer, hold.handle.index, true);
    let stuck = engine.submit(m.iova, 0, 64, true).unwrap();
    let begun = rig.now;
    let report = rig.revoke(&Scope::Window(hold.handle.index));
    assert!(rig.now - begun <= 3 * GRACE);
    assert_eq!(report.freed_bytes, W as u64, "unmapped, so nothing can land");
    rig.drive.cmb.write(0, &vec![0x99; W]).unwrap();
    engine.step(1);
    assert!(matches!(engine.take_result(stuck), Some(p2p::peer::CopyState::Failed(_))));
    assert_eq!(c.read(hold.handle, 0, 4).0, Outcome::Copied(Home::Host));
}

/// What reads is in nobody's way: readers on the processor go on, and a DMA in flight is given until the grace to complete.
#[test]
fn a_reading_peers_dma_in_flight_completes_before_its_window_goes() {
    let (mut rig, c, hold) = rig();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    let m = map(&mut rig, peer, hold.handle.index, false);
    let queued = engine.submit(m.iova + 4096, 0, 4096, false).unwrap();
    let ticket = rig.windows.revoke(&Scope::Window(m.window), &mut rig.drive, rig.now).unwrap();
    rig.poll();
    assert!(matches!(rig.windows.progress(ticket), Some(Progress::Pending(_))), "waits for the queue");
    let stopped = engine.submit(m.iova, 0, 64, false).unwrap_err().to_string();
    assert!(stopped.contains("revoked"), "{stopped}");
    let again = rig.windows.map_peer(peer, m.window, false, &mut rig.drive, rig.now).unwrap();
    assert_eq!(again, PeerPath::Moving, "its mapping is of no use any more");
    assert_eq!(c.read(hold.handle, 0, 64).0, Outcome::Copied(Home::Cmb));
    engine.step(1);
    assert_eq!(engine.take_result(queued), Some(p2p::peer::CopyState::Done));
    let mut got = vec![0; 4096];
    engine.local().read(0, &mut got).unwrap();
    assert_eq!(got, (4096..8192).map(|i| pattern(7, i)).collect::<Vec<_>>());
    rig.poll();
    assert!(matches!(rig.windows.progress(ticket), Some(Progress::Done(_))), "no time has to pass");
    assert!(engine.copy(m.iova, 0, 64, false).unwrap_err().to_string().contains("faulted"));
}

#[test]
fn a_reading_peer_that_does_not_drain_costs_one_grace_and_faults() {
    let (mut rig, c, hold) = rig();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    let m = map(&mut rig, peer, hold.handle.index, false);
    let stuck = engine.submit(m.iova, 0, 64, false).unwrap();
    let ticket = rig.windows.revoke(&Scope::Window(m.window), &mut rig.drive, rig.now).unwrap();
    rig.now += GRACE - 1;
    rig.poll();
    assert!(matches!(rig.windows.progress(ticket), Some(Progress::Pending(_))));
    let mut slot = c.slots.take().unwrap();
    assert!(
        slot.write(&c.control, writing(&hold), &c.view).is_err(),
        "a writer waits, and no longer than this"
    );
    rig.now += 1;
    rig.poll();
    let Some(Progress::Done(report)) = rig.windows.progress(ticket) else { panic!("the grace is over") };
    assert_eq!(report.freed_bytes, W as u64);
    rig.drive.cmb.write(0, &vec![0x99; W]).unwrap();
    engine.step(1);
    assert!(matches!(engine.take_result(stuck), Some(p2p::peer::CopyState::Failed(_))));
    let mut got = [0; 64];
    engine.local().read(0, &mut got).unwrap();
    assert_eq!(got, [0; 64], "it read pages that are another's");
    assert_eq!(slot.write(&c.control, writing(&hold), &c.view).unwrap().finish(), Finished::Done);
}

/// The move is given up, and the window stays where it is: then the peer is not left with a mapping that takes no work.
#[test]
fn after_a_move_that_failed_a_reading_peer_maps_again() {
    let (mut rig, c, hold) = rig();
    let options = ObjectOptions { window_size: W, placement: Placement::CmbOnly };
    rig.windows.add_object(7, options).unwrap();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    let m = map(&mut rig, peer, hold.handle.index, false);
    let mut slot = c.slots.take().unwrap();
    let mut section = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    section.write(0, &[0x5a; 64]).unwrap();
    let ticket = rig.windows.revoke(&Scope::Window(m.window), &mut rig.drive, rig.now).unwrap();
    rig.drive.fail_writes = true;
    assert_eq!(section.finish(), Finished::Done);
    let report = rig.finish(ticket);
    assert_eq!(report.failed.len(), 1, "{report:?}");
    rig.drive.fail_writes = false;
    let again = map(&mut rig, peer, m.window, false);
    engine.copy(again.iova, 0, 64, false).unwrap();
    let mut got = [0; 64];
    engine.local().read(0, &mut got).unwrap();
    assert_eq!(got, [0x5a; 64]);
    assert_eq!(rig.windows.peer_mappings(None).collect::<Vec<_>>(), [again]);
}

/// A drive during whose last write-back a peer reads the window.
struct Peeking<'a> {
    drive: &'a mut common::Drive,
    engine: EmulatedEngine,
    iova: u64,
    saw: Vec<bool>,
}

impl Backing for Peeking<'_> {
    fn read_to_cmb(&mut self, o: u64, f: u64, at: usize, len: usize) -> Result<(), BackingError> {
        self.drive.read_to_cmb(o, f, at, len)
    }
    fn read_to_host(&mut self, o: u64, f: u64, into: &mut [u8]) -> Result<(), BackingError> {
        self.drive.read_to_host(o, f, into)
    }
    fn write_from_cmb(&mut self, o: u64, f: u64, at: usize, n: usize) -> Result<(), BackingError> {
        self.saw.push(self.engine.domain().copy_out(self.iova, self.engine.local(), 0, 64).is_ok());
        self.drive.write_from_cmb(o, f, at, n)
    }
    fn write_from_host(&mut self, o: u64, f: u64, from: &[u8]) -> Result<(), BackingError> {
        self.drive.write_from_host(o, f, from)
    }
}

/// As for readers: what a fenced writer stores after the last copy is lost, and whoever had seen it would see older bytes next.
#[test]
fn a_reading_peer_never_sees_a_fenced_writers_late_stores() {
    let (mut rig, c, hold) = rig();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    let m = map(&mut rig, peer, hold.handle.index, false);
    let mut slot = c.slots.take().unwrap();
    let section = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    engine.copy(m.iova, 0, 64, false).unwrap();
    let mut drive = Peeking { drive: &mut rig.drive, engine, iova: m.iova, saw: Vec::new() };
    let ticket = rig.windows.evict(&Scope::Object(7), &mut drive, 0).unwrap();
    rig.windows.poll(&mut drive, 2 * GRACE);
    assert_eq!(drive.saw, [false], "its DMA faults from before the last copy on");
    rig.windows.poll(&mut drive, 4 * GRACE);
    assert!(matches!(rig.windows.progress(ticket), Some(Progress::Done(_))));
    assert_eq!(section.finish(), Finished::Revoked);
}

#[test]
fn what_a_peer_wrote_reaches_the_drive() {
    let (mut rig, _c, hold) = rig();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    let m = map(&mut rig, peer, hold.handle.index, true);
    engine.local().write(0, b"by the peer").unwrap();
    engine.copy(m.iova + 8192, 0, 11, true).unwrap();
    assert!(rig.windows.is_dirty(7, &(0..1)));
    let done = rig.windows.commit(7, &(0..W as u64), &mut rig.drive).unwrap();
    assert_eq!((done.cmb_bytes, done.host_bytes), (W as u64, 0));
    assert_eq!(&rig.drive.objects[&7][8192..8203], b"by the peer");
}

#[test]
fn a_whole_peer_is_revoked_and_the_windows_stay() {
    let (mut rig, mut c, hold) = rig();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let other = EmulatedEngine::new("dma1", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    let second = rig.windows.register_peer(Box::new(other.clone()));
    let m = map(&mut rig, peer, hold.handle.index, false);
    let n = map(&mut rig, second, hold.handle.index, false);
    rig.map_host(&mut c, 7, 4 * W);
    rig.revoke(&Scope::Peer(peer));
    assert!(engine.copy(m.iova, 0, 8, false).is_err());
    other.copy(n.iova, 0, 8, false).unwrap();
    assert_eq!(c.read(hold.handle, 0, 8).0, Outcome::Copied(Home::Cmb), "P10: only the mapping went");
    rig.windows.unregister_peer(second, rig.now).unwrap();
    assert!(other.copy(n.iova, 0, 8, false).is_err());
    assert_eq!(rig.windows.peers().count(), 1);
}

#[test]
fn without_a_cmb_a_peer_is_told_why_it_bounces() {
    let mut rig = Rig::new(0, config());
    rig.object(7, W, W);
    let c = rig.client();
    let hold = rig.hold(&c, 7, 0, false);
    let peer = rig.windows.register_peer(Box::new(EmulatedEngine::new("dma0", W).unwrap()));
    let path = rig.windows.map_peer(peer, hold.handle.index, false, &mut rig.drive, 0).unwrap();
    assert_eq!(path, PeerPath::Bounce(Reason::NoCmb));
}

#[test]
fn a_window_for_peers_only_takes_no_host_memory_even_when_revoked() {
    let mut rig = Rig::new(4 * W, Config { host_limit: 1 << 20, ..config() });
    rig.object(7, W, W);
    rig.windows.add_object(7, ObjectOptions { window_size: W, placement: Placement::CmbOnly }).unwrap();
    let c = rig.client();
    let hold = rig.hold(&c, 7, 0, true);
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    let m = map(&mut rig, peer, hold.handle.index, true);
    engine.copy(m.iova, 0, W, true).unwrap();
    rig.revoke(&Scope::Object(7));
    assert_eq!((rig.windows.host_bytes().0, rig.drive.host_bytes), (0, 0));
    assert_eq!(rig.drive.objects[&7], vec![0; W], "written back before the pages went");
}

/// A peer whose unmapping does nothing, whatever it says.
#[derive(Debug)]
struct Liar(EmulatedEngine);

impl Mapper for Liar {
    fn name(&self) -> &str {
        "liar"
    }
    fn map(
        &mut self,
        m: &Arc<Mapping>,
        bus: u64,
        offset: usize,
        len: usize,
        access: DmaAccess,
    ) -> Result<u64, PeerError> {
        self.0.map(m, bus, offset, len, access)
    }
    fn unmap(&mut self, _: u64, _: usize) -> Result<(), PeerError> {
        Ok(())
    }
    fn stop(&mut self, iova: u64, len: usize) {
        self.0.stop(iova, len);
    }
    fn drained(&mut self, iova: u64, len: usize) -> bool {
        self.0.drained(iova, len)
    }
    fn is_mapped(&mut self, iova: u64, len: usize) -> bool {
        self.0.is_mapped(iova, len)
    }
}

#[test]
fn an_unmapping_is_verified_and_not_believed() {
    let (mut rig, c, hold) = rig();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(Liar(engine.clone())));
    let m = map(&mut rig, peer, hold.handle.index, true);
    let report = rig.revoke(&Scope::Window(hold.handle.index));
    assert_eq!((report.freed_bytes, report.quarantined_bytes), (0, W as u64));
    // Its late DMA lands in pages that nobody else has.
    let before = c.read(hold.handle, 0, 64);
    engine.local().write(0, &[0x77; 64]).unwrap();
    engine.domain().copy_in(m.iova, engine.local(), 0, 64).unwrap();
    assert_eq!(c.read(hold.handle, 0, 64), before);
}

#[test]
fn clients_and_peers_write_one_window_and_nothing_is_lost() {
    let (mut rig, c, hold) = rig();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    for round in 0..20u8 {
        let m = map(&mut rig, peer, hold.handle.index, true);
        engine.local().write(0, &[round; 100]).unwrap();
        engine.copy(m.iova + 1000, 0, 100, true).unwrap();
        let mut slot = c.slots.take().unwrap();
        let mut s = slot.write(&c.control, writing(&hold), &c.view).unwrap();
        s.write(5000, &[round ^ 0xff; 100]).unwrap();
        assert_eq!(s.finish(), Finished::Done);
        rig.revoke(&Scope::Window(hold.handle.index));
        assert_eq!(c.read(hold.handle, 1000, 100), (Outcome::Copied(Home::Host), vec![round; 100]));
        assert_eq!(c.read(hold.handle, 5000, 100).1, vec![round ^ 0xff; 100]);
    }
}

#[test]
fn where_the_cmb_is_for_peers_readers_get_the_host_cache() {
    let mut rig = Rig::new(4 * W, config());
    rig.object(7, 4 * W, W);
    let options = ObjectOptions { window_size: W, placement: Placement::PeersFirst };
    rig.windows.add_object(7, options).unwrap();
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 4 * W);
    let (read, shared) = (rig.hold(&c, 7, 0, false), rig.hold(&c, 7, W as u64, false));
    assert_eq!(rig.ensure(&read), Ensured::Ready(Home::Host, Reason::Policy));
    for _ in 0..20 {
        rig.now += 10 * GRACE;
        rig.ensure(&read);
        rig.poll();
    }
    assert_eq!(c.read(read.handle, 0, 8).0, Outcome::Copied(Home::Host), "use by a processor moved it");
    // A peer gets the CMB: also of a window that a processor has used, and at once of one that nobody has.
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    for hold in [shared, read] {
        let m = loop {
            match rig.windows.map_peer(peer, hold.handle.index, false, &mut rig.drive, rig.now).unwrap() {
                PeerPath::Direct(m) => break m,
                PeerPath::Moving => rig.poll(),
                PeerPath::Bounce(why) => panic!("{why}"),
            }
        };
        engine.copy(m.iova, 0, W, false).unwrap();
    }
}

#[test]
fn what_goes_the_long_way_to_a_peer_is_counted_with_the_reason() {
    let mut rig = Rig::new(0, config());
    rig.object(7, 4 * W, W);
    let engine = EmulatedEngine::new("dma0", 2 * W).unwrap();
    let to = (engine.local().as_ref(), 100);
    let bytes = 50..(W + W / 2) as u64;
    rig.windows.bounce_to_peer(7, bytes.clone(), to, Reason::NoCmb, &mut rig.drive).unwrap();
    let mut got = vec![0; (bytes.end - bytes.start) as usize];
    engine.local().read(100, &mut got).unwrap();
    assert_eq!(got, (50..W + W / 2).map(|i| pattern(7, i)).collect::<Vec<_>>());
    let counted = rig.windows.counters().get(p2p::counters::Path::Bounce, Reason::NoCmb);
    assert_eq!((counted.transfers, counted.bytes), (1, got.len() as u64));
    // Nothing is counted that did not arrive.
    let outside = (engine.local().as_ref(), 2 * W - 1);
    assert!(rig.windows.bounce_to_peer(7, bytes, outside, Reason::NoCmb, &mut rig.drive).is_err());
    assert_eq!(rig.windows.counters().path(p2p::counters::Path::Bounce).transfers, 1);
}

/// What of `engine`'s memory is to be in the object from `to` on.
fn bounce(rig: &mut Rig, engine: &EmulatedEngine, to: std::ops::Range<u64>) -> Ensured {
    let from = (engine.local().as_ref(), 64);
    rig.windows.bounce_from_peer(7, to, from, Reason::NotCoherent, &mut rig.drive, rig.now).unwrap()
}

#[test]
fn a_peer_that_is_not_coherent_only_reads_and_what_it_writes_goes_through_host_memory() {
    let (mut rig, c, hold) = rig();
    let engine = EmulatedEngine::new("dma0", 4 * W).unwrap().not_coherent();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    let refused = rig.windows.map_peer(peer, hold.handle.index, true, &mut rig.drive, rig.now).unwrap();
    assert_eq!(refused, PeerPath::Bounce(Reason::NotCoherent));
    let counted = |rig: &Rig| rig.windows.counters().get(p2p::counters::Path::Bounce, Reason::NotCoherent);
    assert_eq!((counted(&rig).transfers, counted(&rig).bytes), (1, 0), "the refusal");
    assert_eq!(rig.windows.peer_mappings(None).count(), 0);
    // It reads by DMA, and what it has mapped for that it cannot write.
    let m = map(&mut rig, peer, hold.handle.index, false);
    engine.copy(m.iova, 0, 64, false).unwrap();
    assert!(engine.copy(m.iova, 0, 64, true).unwrap_err().to_string().contains("may not write"));
    let refused = rig.windows.map_peer(peer, hold.handle.index, true, &mut rig.drive, rig.now).unwrap();
    assert_eq!(refused, PeerPath::Bounce(Reason::NotCoherent));
    engine.copy(m.iova, 0, 64, false).unwrap();
    // Its bytes arrive the long way, in two windows of which nobody has the second, and reach the drive with the next commit.
    let bytes: Vec<u8> = (0..W + 100).map(|i| (i * 13 + 5) as u8).collect();
    engine.local().write(64, &bytes).unwrap();
    let to = 100..100 + bytes.len() as u64;
    assert!(matches!(bounce(&mut rig, &engine, to.clone()), Ensured::Ready(..)));
    assert_eq!((counted(&rig).transfers, counted(&rig).bytes), (3, bytes.len() as u64));
    let (home, got) = c.read(hold.handle, 100, W - 100);
    assert_eq!((home, &got[..]), (Outcome::Copied(Home::Cmb), &bytes[..W - 100]));
    engine.copy(m.iova, 0, W, false).unwrap();
    let mut got = vec![0; W - 100];
    engine.local().read(100, &mut got).unwrap();
    assert_eq!(got, bytes[..W - 100], "its own next read shows them");
    rig.windows.commit(7, &(0..4 * W as u64), &mut rig.drive).unwrap();
    assert_eq!(rig.drive.objects[&7][100..100 + bytes.len()], bytes);
    assert_eq!(rig.drive.objects[&7][..100], (0..100).map(|i| pattern(7, i)).collect::<Vec<_>>());
}

#[test]
fn what_is_bounced_into_a_window_that_moves_waits_and_moves_along() {
    let (mut rig, c, hold) = rig();
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    engine.local().write(64, &[0x5a; 100]).unwrap();
    rig.ensure(&hold);
    let mut slot = c.slots.take().unwrap();
    let section = slot.write(&c.control, writing(&hold), &c.view).unwrap();
    let ticket = rig.windows.revoke(&Scope::Window(hold.handle.index), &mut rig.drive, rig.now).unwrap();
    assert_eq!(bounce(&mut rig, &engine, 0..100), Ensured::Moving, "nothing is stored behind the last copy");
    assert_eq!(c.read(hold.handle, 0, 100).1, (0..100).map(|i| pattern(7, i)).collect::<Vec<_>>());
    assert_eq!(section.finish(), Finished::Done);
    rig.finish(ticket);
    assert!(matches!(bounce(&mut rig, &engine, 0..100), Ensured::Ready(..)));
    assert_eq!(c.read(hold.handle, 0, 100).1, vec![0x5a; 100]);
    rig.revoke(&Scope::Object(7));
    assert_eq!(c.read(hold.handle, 0, 100).1, vec![0x5a; 100]);
}
