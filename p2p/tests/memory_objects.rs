//! Objects with device memory of their own, in injected time: what a PMR or a peer's exported memory holds is what the object holds,
//! wherever its windows are.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod common;

use std::sync::Arc;

use common::{Client, GRACE, Rig, config, pattern, writing};
use nvme_driver::mem::Mapping;
use nvme_driver::pci::DmaAccess;
use p2p::counters::{Path, Reason};
use p2p::layout::Home;
use p2p::peer::{EmulatedEngine, Mapper, PeerError};
use p2p::reader::Outcome;
use p2p::refusal::Refusals;
use p2p::region::{Region, RegionKind};
use p2p::windows::{
    Config, DeviceMemory, Ensured, Hold, ObjectOptions, PeerMapping, PeerPath, Placement, Scope, Want,
    WindowsError,
};
use p2p::writer::{Finished, Returned};

const W: usize = 16 * 1024;
const N: usize = 4;
/// The object, and where in its mapping it begins.
const OBJECT: u64 = 1 << 40;
const AT: usize = 8192;

struct World {
    rig: Rig,
    memory: Arc<Mapping>,
    c: Client,
    holds: Vec<Hold>,
}

fn options() -> ObjectOptions {
    ObjectOptions { window_size: W, ..ObjectOptions::default() }
}

fn ordinary(memory: &Arc<Mapping>) -> DeviceMemory {
    let memory = Arc::clone(memory);
    DeviceMemory { memory, bus_address: 0x7000_0000, offset: AT, len: N * W, kind: RegionKind::Ordinary }
}

/// A client that has the object's memory mapped, as it has the CMB for a file.
fn client(rig: &mut Rig, memory: &Arc<Mapping>, kind: RegionKind) -> Client {
    let mut c = rig.client();
    rig.map_host(&mut c, OBJECT, N * W);
    c.view.cmb = Some(Region::new(Arc::clone(memory), 0, kind));
    c
}

fn world_with(cmb: usize, config: Config, kind: RegionKind) -> World {
    let mut rig = Rig::new(cmb, config);
    let memory = Mapping::memfd("device", AT + N * W + 4096).unwrap();
    let bytes: Vec<u8> = (0..N * W).map(|i| pattern(OBJECT, i)).collect();
    memory.write(AT, &bytes).unwrap();
    rig.windows.add_memory(OBJECT, DeviceMemory { kind, ..ordinary(&memory) }, options()).unwrap();
    let c = client(&mut rig, &memory, kind);
    let holds = (0..N).map(|n| rig.hold(&c, OBJECT, (n * W) as u64, true)).collect();
    World { rig, memory, c, holds }
}

fn world() -> World {
    world_with(0, config(), RegionKind::Ordinary)
}

impl World {
    fn ensure_all(&mut self) {
        for h in &self.holds {
            assert_eq!(self.rig.ensure(h), Ensured::Ready(Home::Cmb, Reason::Policy));
        }
    }

    fn write(&self, n: usize, at: usize, bytes: &[u8]) {
        let mut slot = self.c.slots.take().unwrap();
        let mut s = slot.write(&self.c.control, writing(&self.holds[n]), &self.c.view).unwrap();
        s.write(at, bytes).unwrap();
        assert_eq!(s.finish(), Finished::Done);
    }

    fn read(&self, n: usize, at: usize, len: usize) -> (Outcome, Vec<u8>) {
        self.c.read(self.holds[n].handle, at, len)
    }

    /// What the device's memory itself holds of window `n`.
    fn raw(&self, n: usize, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(AT + n * W + at, &mut bytes).unwrap();
        bytes
    }

    fn index(&self, n: usize) -> u32 {
        self.holds[n].handle.index
    }

    fn commit(&mut self) -> Result<p2p::windows::Committed, WindowsError> {
        self.rig.windows.commit(OBJECT, &(0..(N * W) as u64), &mut self.rig.drive)
    }

    fn promote(&mut self, n: usize) {
        let index = self.index(n);
        self.rig.windows.promote(index, &mut self.rig.drive, self.rig.now);
        self.rig.poll();
    }

    fn home(&self, n: usize) -> Home {
        self.rig.windows.status(self.index(n)).unwrap().home
    }

    fn map(&mut self, peer: p2p::windows::PeerId, n: usize, write: bool) -> PeerMapping {
        let index = self.index(n);
        match self.rig.windows.map_peer(peer, index, write, &mut self.rig.drive, self.rig.now).unwrap() {
            PeerPath::Direct(m) => m,
            other => panic!("{other:?}"),
        }
    }
}

fn want(n: usize, at: usize, len: usize) -> Vec<u8> {
    (n * W + at..n * W + at + len).map(|i| pattern(OBJECT, i)).collect()
}

#[test]
fn it_is_what_the_memory_holds_and_takes_no_transfer() {
    let mut w = world();
    w.ensure_all();
    for n in 0..N {
        assert_eq!(w.read(n, 0, W), (Outcome::Copied(Home::Cmb), want(n, 0, W)));
    }
    w.write(1, 5000, b"stored");
    assert_eq!(w.raw(1, 5000, 6), b"stored", "at once, in the device");
    let done = w.commit().unwrap();
    assert_eq!((done.cmb_bytes, done.host_bytes), (0, 0));
    assert_eq!(w.rig.windows.counters().iter().count(), 0, "no byte was moved for it");
    assert_eq!((w.rig.windows.host_bytes().0, w.rig.windows.memory_bytes()), (0, (N * W) as u64));
    // Nowhere loses nothing: the bytes are home.
    let gone = w.rig.windows.evict(&Scope::Everything, &mut w.rig.drive, w.rig.now).unwrap();
    assert_eq!(w.rig.finish(gone).failed, Vec::<String>::new());
    assert_eq!(w.read(1, 5000, 6).0, Outcome::NotResident);
    let mut got = vec![0; 6];
    let at = (W + 5000) as u64;
    w.rig.windows.read_through(OBJECT, at..at + 6, &mut got, &mut w.rig.drive).unwrap();
    assert_eq!(&got, b"stored");
    w.ensure_all();
    assert_eq!(&w.read(1, 5000, 6).1, b"stored");
    // "No longer wanted" is no reason to lose what is there.
    let all = 0..(N * W) as u64;
    let ticket = w.rig.windows.invalidate(OBJECT, &all, &mut w.rig.drive, w.rig.now).unwrap();
    w.rig.finish(ticket);
    assert_eq!(w.raw(1, 5000, 6), b"stored");
}

#[test]
fn revoked_it_is_in_the_host_cache_and_a_commit_brings_it_back() {
    let mut w = world();
    w.ensure_all();
    w.write(0, 0, b"direct");
    let (one, range) = (Scope::Window(w.index(0)), W as u64 + 5..3 * W as u64);
    assert_eq!(w.rig.revoke(&one).moved, 1);
    assert_eq!(w.rig.revoke(&Scope::Range { object: OBJECT, bytes: range }).moved, 2);
    assert_eq!(
        w.rig.revoke(&Scope::Object(OBJECT)),
        p2p::windows::Report { moved: 1, already: 3, freed_bytes: W as u64, ..Default::default() }
    );
    for n in 0..N {
        assert_eq!(w.read(n, 100, W - 100), (Outcome::Copied(Home::Host), want(n, 100, W - 100)));
    }
    assert_eq!(&w.read(0, 0, 6).1, b"direct");
    w.write(0, 0, b"cached");
    w.write(2, 8192, b"as well");
    assert_eq!((w.raw(0, 0, 6), w.raw(2, 8192, 7)), (b"direct".to_vec(), want(2, 8192, 7)));
    let done = w.commit().unwrap();
    assert_eq!((done.cmb_bytes, done.host_bytes), (0, 8192));
    assert_eq!((w.raw(0, 0, 6), w.raw(2, 8192, 7)), (b"cached".to_vec(), b"as well".to_vec()));
    assert_eq!(w.rig.windows.counters().get(Path::HostCache, Reason::WriteBack).bytes, 8192);
    // Back: only what changed since is copied.
    w.write(2, 4096, b"new");
    w.promote(2);
    assert_eq!(w.read(2, 4096, 3), (Outcome::Copied(Home::Cmb), b"new".to_vec()));
    assert_eq!(w.rig.windows.counters().path(Path::Bounce).bytes, 4096);
    assert_eq!(w.raw(2, 4096, 3), b"new");
    assert_eq!(w.read(2, 0, 4096).1, want(2, 0, 4096));
    assert!(w.rig.drive.objects.is_empty() && w.rig.drive.host_bytes == 0, "none of it concerns the drive");
    // Out of the host cache it goes home, committed or not.
    w.write(0, 12_288, b"late");
    let gone = w.rig.windows.evict(&Scope::Object(OBJECT), &mut w.rig.drive, w.rig.now).unwrap();
    assert_eq!(w.rig.finish(gone).failed, Vec::<String>::new());
    assert_eq!((w.raw(0, 12_288, 4), w.rig.windows.host_bytes().0), (b"late".to_vec(), 0));
}

#[test]
fn a_mass_revocation_and_one_of_the_client_take_it_too_and_it_goes_back() {
    let mut w = world_with(2 * W, config(), RegionKind::Ordinary);
    w.ensure_all();
    let ticket = w.rig.windows.revoke(&Scope::Everything, &mut w.rig.drive, w.rig.now).unwrap();
    assert_eq!(w.read(0, 0, 4).0, Outcome::DeviceMoved, "announced is closed");
    assert_eq!(w.rig.finish(ticket).moved, N as u64);
    for n in 0..N {
        assert_eq!(w.read(n, 0, W), (Outcome::Copied(Home::Host), want(n, 0, W)));
    }
    // By itself, when it is used: though the CMB is full of a file.
    w.rig.object(7, 2 * W, W);
    let other = w.rig.client();
    for n in 0..2 {
        let h = w.rig.hold(&other, 7, n * W as u64, false);
        assert_eq!(w.rig.ensure(&h), Ensured::Ready(Home::Cmb, Reason::Policy));
    }
    for n in 0..N {
        let h = w.holds[n];
        w.rig.ensure(&h);
    }
    for _ in 0..N {
        w.rig.poll();
    }
    assert!((0..N).all(|n| w.home(n) == Home::Cmb));
    assert_eq!(w.rig.windows.cmb_bytes().0, 0, "in its own memory, not in the CMB");
    w.rig.revoke(&Scope::Client(w.c.id));
    assert!((0..N).all(|n| w.home(n) == Home::Host));
    assert!(w.rig.windows.hold(w.c.id, OBJECT, 0, false).is_err());
}

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

#[test]
fn a_borrow_of_it_is_a_snapshot_and_keeps_a_commit_from_its_pages() {
    let mut w = world();
    w.ensure_all();
    let mut slot = w.c.slots.take().unwrap();
    let (control, view) = (w.c.control.clone(), w.c.view.clone());
    let borrow = slot.borrow(&control, w.holds[0].handle, &view).unwrap();
    let report = w.rig.revoke(&Scope::Window(w.index(0)));
    assert_eq!(report.quarantined_bytes, W as u64);
    w.write(0, 0, b"new");
    assert!(matches!(w.commit(), Err(WindowsError::MemoryHeld { object: OBJECT, offset: 0 })));
    let mut seen = [0; 3];
    borrow.bytes().read(0, &mut seen).unwrap();
    assert_eq!(seen.to_vec(), want(0, 0, 3), "the snapshot changed");
    w.promote(0);
    assert_eq!(w.home(0), Home::Host, "its place is taken");
    let evicted = w.rig.windows.evict(&Scope::Window(w.index(0)), &mut w.rig.drive, w.rig.now).unwrap();
    assert_eq!(w.rig.finish(evicted).failed.len(), 1);
    assert_eq!(&w.read(0, 0, 3).1, b"new");
    assert_eq!(borrow.end(), Returned::Snapshot);
    w.rig.poll();
    assert_eq!(w.commit().unwrap().host_bytes, 4096);
    assert_eq!(w.raw(0, 0, 3), b"new");
    w.promote(0);
    assert_eq!(w.read(0, 0, 3), (Outcome::Copied(Home::Cmb), b"new".to_vec()));
}

/// A writer of window 0 that falls silent in a section; when it wakes up it stores late, and ends.
fn silent_writer(w: &mut World, act: impl FnOnce(&mut World), after: impl FnOnce(&mut World)) {
    let silent = client(&mut w.rig, &w.memory, RegionKind::Ordinary);
    let hold = w.rig.hold(&silent, OBJECT, 0, true);
    let mut slot = silent.slots.take().unwrap();
    let mut section = slot.write(&silent.control, writing(&hold), &silent.view).unwrap();
    section.write(0, b"half").unwrap();
    act(w);
    section.write(64, b"late").unwrap();
    after(w);
    assert_eq!(section.finish(), Finished::Revoked);
    w.rig.poll();
    w.rig.windows.release(silent.id, hold.handle.index).unwrap();
}

#[test]
fn what_a_silent_writer_stores_late_is_not_seen_and_not_kept() {
    let mut w = world();
    w.ensure_all();
    w.write(0, 64, b"good");
    silent_writer(
        &mut w,
        |w| {
            let report = w.rig.revoke(&Scope::Window(w.index(0)));
            assert_eq!((report.silent, report.quarantined_bytes), (1, W as u64));
        },
        |w| {
            assert_eq!(w.raw(0, 64, 4), b"late", "that is what it can reach");
            assert_eq!(w.read(0, 64, 4), (Outcome::Copied(Home::Host), b"good".to_vec()));
            // It stays away from there until the writer answers, and nothing is called durable.
            assert!(matches!(w.commit(), Err(WindowsError::MemoryHeld { .. })));
            w.promote(0);
            let index = w.index(0);
            assert_eq!(
                w.rig.windows.ensure(index, Want::Cmb, &mut w.rig.drive, w.rig.now).unwrap(),
                Ensured::Ready(Home::Host, Reason::Policy)
            );
            let evicted = w.rig.windows.evict(&Scope::Window(index), &mut w.rig.drive, w.rig.now).unwrap();
            assert_eq!(w.rig.finish(evicted).failed.len(), 1);
            assert_eq!(w.read(0, 64, 4), (Outcome::Copied(Home::Host), b"good".to_vec()));
        },
    );
    assert_eq!(w.commit().unwrap().host_bytes, W as u64, "all of it: nobody knows where it stored");
    assert_eq!(w.raw(0, 64, 4), b"good");
    w.promote(0);
    assert_eq!(w.read(0, 64, 4), (Outcome::Copied(Home::Cmb), b"good".to_vec()));
    assert_eq!(w.rig.windows.quarantine().count(), 0);
}

#[test]
fn on_its_way_to_nowhere_a_window_does_not_leave_its_bytes_to_a_silent_writer() {
    // One window of host cache: there is no room for a second one.
    let mut w = world_with(0, Config { host_limit: W as u64, ..config() }, RegionKind::Ordinary);
    w.ensure_all();
    w.write(0, 64, b"good");
    silent_writer(
        &mut w,
        |w| {
            let index = w.index(0);
            let ticket = w.rig.windows.evict(&Scope::Window(index), &mut w.rig.drive, w.rig.now).unwrap();
            assert_eq!(w.rig.finish(ticket).silent, 1);
            assert_eq!(w.home(0), Home::Host);
        },
        |w| assert_eq!(w.read(0, 64, 4), (Outcome::Copied(Home::Host), b"good".to_vec())),
    );
    let ticket = w.rig.windows.evict(&Scope::Object(OBJECT), &mut w.rig.drive, w.rig.now).unwrap();
    assert_eq!(w.rig.finish(ticket).failed, Vec::<String>::new());
    assert_eq!(w.raw(0, 64, 4), b"good");

    // And with none to be had it stays closed, not open to what is stored late.
    w.ensure_all();
    w.rig.windows.set_refusals(Refusals::new(0, 1000));
    silent_writer(
        &mut w,
        |w| {
            let index = w.index(0);
            w.rig.windows.evict(&Scope::Window(index), &mut w.rig.drive, w.rig.now).unwrap();
            w.rig.now += 2 * GRACE;
            w.rig.poll();
        },
        |w| {
            w.rig.now += 2 * GRACE;
            w.rig.poll();
            assert!(!matches!(w.read(0, 64, 4).0, Outcome::Copied(_)));
            w.rig.windows.set_refusals(Refusals::default());
            w.rig.now += 2 * GRACE;
            w.rig.poll();
            assert_eq!(w.read(0, 0, 4).0, Outcome::Copied(Home::Host), "as soon as there is room");
        },
    );
}

/// One is silent in a borrow of its own memory, another in a section in the host cache: there is a third place, and nobody else waits.
#[test]
fn two_silent_clients_do_not_close_a_window() {
    let mut w = world();
    w.ensure_all();
    let borrower = client(&mut w.rig, &w.memory, RegionKind::Ordinary);
    let hold = w.rig.hold(&borrower, OBJECT, 0, false);
    let mut slot = borrower.slots.take().unwrap();
    let borrow = slot.borrow(&borrower.control, hold.handle, &borrower.view).unwrap();
    w.rig.revoke(&Scope::Window(w.index(0)));
    silent_writer(
        &mut w,
        |w| {
            // Clean as far as anybody knows, until the writer is fenced.
            let index = w.index(0);
            let ticket = w.rig.windows.evict(&Scope::Window(index), &mut w.rig.drive, w.rig.now).unwrap();
            assert_eq!(w.rig.finish(ticket).silent, 1);
            assert_eq!(w.home(0), Home::Host);
        },
        |w| assert_eq!(w.read(0, 64, 4), (Outcome::Copied(Home::Host), want(0, 64, 4))),
    );
    assert!(matches!(w.commit(), Err(WindowsError::MemoryHeld { .. })));
    assert_eq!(borrow.end(), Returned::Snapshot);
    w.rig.poll();
    assert_eq!(w.commit().unwrap().host_bytes, W as u64);
    assert_eq!((w.raw(0, 0, 4), w.raw(0, 64, 4)), (b"half".to_vec(), want(0, 64, 4)));
    assert_eq!(w.rig.windows.quarantine().count(), 0);
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

#[test]
fn a_reset_of_the_drive_takes_the_cmb_and_leaves_it_alone() {
    let mut w = world_with(4 * W, config(), RegionKind::Ordinary);
    w.rig.object(7, W, W);
    let mut other = w.rig.client();
    w.rig.map_host(&mut other, 7, W);
    let file = w.rig.hold(&other, 7, 0, true);
    w.rig.ensure(&file);
    w.ensure_all();
    w.write(0, 0, b"kept");
    w.rig.revoke(&Scope::Window(w.index(1)));
    w.write(1, 0, b"kept");
    // One goes to the host cache, one comes back, both held up by a section.
    w.rig.revoke(&Scope::Window(w.index(3)));
    let (mut a, mut b) = (w.c.slots.take().unwrap(), w.c.slots.take().unwrap());
    let (control, view) = (w.c.control.clone(), w.c.view.clone());
    let mut out = a.write(&control, writing(&w.holds[2]), &view).unwrap();
    let mut back = b.write(&control, writing(&w.holds[3]), &view).unwrap();
    out.write(0, b"kept").unwrap();
    back.write(0, b"kept").unwrap();
    w.rig.windows.revoke(&Scope::Window(w.holds[2].handle.index), &mut w.rig.drive, w.rig.now).unwrap();
    w.rig.windows.promote(w.holds[3].handle.index, &mut w.rig.drive, w.rig.now);

    w.rig.windows.reset_signal().raise();
    w.rig.drive.cmb.write(0, &[0xee; 4 * W]).unwrap();
    assert_eq!(w.read(0, 0, 4).0, Outcome::DeviceMoved);
    assert_eq!((out.finish(), back.finish()), (Finished::Done, Finished::Done));
    w.rig.poll();
    w.rig.poll();
    for (n, home) in [Home::Cmb, Home::Host, Home::Host, Home::Cmb].into_iter().enumerate() {
        assert_eq!(w.read(n, 0, 4), (Outcome::Copied(home), b"kept".to_vec()), "window {n}");
        assert_eq!(w.read(n, 4, W - 4).1, want(n, 4, W - 4), "window {n}");
    }
    let now = w.rig.now;
    assert_eq!(w.rig.windows.losses(OBJECT, &mut w.rig.drive, now).bytes, 0);
    assert_eq!(other.read(file.handle, 0, 4).0, Outcome::NotResident);
    w.commit().unwrap();
    assert!((0..N).all(|n| w.raw(n, 0, 4) == b"kept"));
}

#[test]
fn a_reset_amid_a_mass_revocation_does_not_call_it_off() {
    let mut w = world_with(W, Config { slots: 1024, ..config() }, RegionKind::Ordinary);
    w.ensure_all();
    w.rig.windows.revoke(&Scope::Everything, &mut w.rig.drive, w.rig.now).unwrap();
    w.rig.windows.reset_signal().raise();
    w.rig.poll();
    w.rig.poll();
    for n in 0..N {
        assert_eq!(w.read(n, 0, W), (Outcome::Copied(Home::Host), want(n, 0, W)));
    }
}

#[test]
fn memory_that_goes_with_its_device_is_lost_and_said_to_be() {
    let canary = (AT + N * W) as u64;
    let mut w = world_with(0, config(), RegionKind::Device { canary });
    w.ensure_all();
    w.rig.revoke(&Scope::Window(w.index(0)));
    w.write(0, 0, b"here");
    w.write(1, 0, b"there");
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let peer = w.rig.windows.register_peer(Box::new(engine.clone()));
    let m = w.map(peer, 2, false);
    // Removed: all ones, everywhere.
    w.memory.write(0, &vec![0xff; AT + N * W + 4096]).unwrap();
    assert_eq!(w.read(1, 0, 5).0, Outcome::DeviceMoved);
    let there = W as u64..(N * W) as u64;
    let commit = w.rig.windows.commit(OBJECT, &there, &mut w.rig.drive);
    assert!(matches!(commit, Err(WindowsError::MemoryGone(OBJECT))), "nothing to copy, and nothing is there");
    let index = w.index(1);
    let asked = w.rig.windows.ensure(index, Want::Auto, &mut w.rig.drive, w.rig.now);
    assert!(matches!(asked, Err(WindowsError::MemoryGone(OBJECT))), "{asked:?}");
    w.rig.poll();
    let now = w.rig.now;
    let lost = w.rig.windows.losses(OBJECT, &mut w.rig.drive, now);
    assert_eq!((lost.events, lost.bytes), (1, 3 * W as u64));
    assert_eq!(w.rig.windows.counters().lost_bytes, 3 * W as u64);
    assert!(engine.copy(m.iova, 0, 8, false).is_err(), "its peers are cut off");
    // What the host cache has is to be had; nothing can be made durable, and nobody reads all ones.
    assert_eq!(w.read(0, 0, 4), (Outcome::Copied(Home::Host), b"here".to_vec()));
    assert!(matches!(w.commit(), Err(WindowsError::MemoryGone(OBJECT))));
    let mut got = [0; 4];
    let through = w.rig.windows.read_through(OBJECT, W as u64..W as u64 + 4, &mut got, &mut w.rig.drive);
    assert!(matches!(through, Err(WindowsError::MemoryGone(OBJECT))));
    w.promote(0);
    assert_eq!(w.read(0, 0, 4), (Outcome::Copied(Home::Host), b"here".to_vec()));
}

#[test]
fn what_cannot_be_an_object_is_refused_with_the_reason() {
    let mut w = world();
    let memory = Arc::clone(&w.memory);
    let mut add = |change: &dyn Fn(&mut DeviceMemory)| {
        let mut m = ordinary(&memory);
        change(&mut m);
        w.rig.windows.add_memory(OBJECT | 1, m, options()).unwrap_err().to_string()
    };
    assert!(add(&|m| m.len += 2 * W).contains("bytes at 8192 of"));
    assert!(add(&|m| m.len = 0).contains("0 bytes"));
    assert!(add(&|m| m.len = W + 4096).contains("not whole windows of 16384"));
    assert!(add(&|m| m.offset = 100).contains("not whole windows"));
    let inside = RegionKind::Device { canary: (AT + N * W - 8) as u64 };
    assert!(add(&|m| m.kind = inside).contains("the canary"));
    assert!(!w.rig.windows.has_object(OBJECT | 1));
    let again = w.rig.windows.add_memory(OBJECT, ordinary(&memory), options());
    assert!(matches!(again, Err(WindowsError::Registered(OBJECT))));
    let beyond = w.rig.windows.hold(w.c.id, OBJECT, (N * W) as u64, false);
    assert!(matches!(beyond, Err(WindowsError::BeyondMemory { len, .. }) if len == (N * W) as u64));
    let mut got = [0; 8];
    let end = (N * W) as u64;
    assert!(w.rig.windows.read_through(OBJECT, end - 4..end + 4, &mut got, &mut w.rig.drive).is_err());
    // It goes when nobody has it; until then it stays.
    assert!(!w.rig.windows.remove_object(OBJECT));
    for n in 0..N {
        w.rig.windows.release(w.c.id, w.index(n)).unwrap();
    }
    let gone = w.rig.windows.evict(&Scope::Object(OBJECT), &mut w.rig.drive, w.rig.now).unwrap();
    w.rig.finish(gone);
    assert!(w.rig.windows.remove_object(OBJECT));
    assert_eq!(w.rig.windows.memory_bytes(), 0);
}

#[test]
fn its_placement_is_its_own() {
    let mut w = world();
    let host_only = ObjectOptions { placement: Placement::HostOnly, ..options() };
    w.rig.windows.add_object(OBJECT, host_only).unwrap();
    assert_eq!(w.rig.ensure(&w.holds[0].clone()), Ensured::Ready(Home::Host, Reason::Asked));
    assert_eq!(w.read(0, 0, W), (Outcome::Copied(Home::Host), want(0, 0, W)));
    let direct = ObjectOptions { placement: Placement::CmbOnly, ..options() };
    w.rig.windows.add_object(OBJECT, direct).unwrap();
    assert_eq!(w.rig.ensure(&w.holds[1].clone()), Ensured::Ready(Home::Cmb, Reason::Policy));
    w.write(1, 0, b"here");
    assert_eq!(w.rig.revoke(&Scope::Window(w.index(1))).moved, 1);
    assert_eq!(w.home(1), Home::None, "no host memory for it");
    assert_eq!(w.raw(1, 0, 4), b"here");
}
