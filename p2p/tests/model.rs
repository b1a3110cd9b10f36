//! Windows against a reference model: random operations, random refusals at every placement, random failures of the drive's CMB
//! transfers. Every byte read must be the reference's, whatever the placement (P4).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod common;

use common::{Client, GRACE, Rig, config, pattern, seed, writing};
use nvme_driver::mem::Mapping;
use p2p::peer::EmulatedEngine;
use p2p::reader::Outcome;
use p2p::refusal::Refusals;
use p2p::region::{Region, RegionKind};
use p2p::windows::{Config, DeviceMemory, Ensured, Hold, ObjectOptions, PeerPath, Progress, Scope, Want};
use p2p::writer::{Finished, NotEntered};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

const W: usize = 8192;
const WINDOWS: usize = 6;
const OBJECTS: u64 = 4;
/// The last one has device memory of its own.
const MEMORY: usize = 3;

struct World {
    rig: Rig,
    rng: Xoshiro256PlusPlus,
    /// What each object must read as.
    want: Vec<Vec<u8>>,
    memory: std::sync::Arc<Mapping>,
    clients: Vec<(Client, Vec<Vec<Hold>>)>,
    engine: EmulatedEngine,
    peer: p2p::windows::PeerId,
}

impl World {
    fn new(seed: u64, refusals: u16, failures: u64) -> Self {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let cmb = (1 + rng.next_u64() as usize % 8) * W;
        let host_limit = (3 + rng.next_u64() % 20) * W as u64;
        let mut rig = Rig::new(cmb, Config { host_limit, ..config() });
        for o in 0..MEMORY as u64 {
            rig.object(o, WINDOWS * W, W);
        }
        let mut want: Vec<Vec<u8>> = (0..MEMORY as u64).map(|o| rig.drive.objects[&o].clone()).collect();
        let memory = Mapping::memfd("device", WINDOWS * W).unwrap();
        want.push((0..WINDOWS * W).map(|i| pattern(MEMORY as u64, i)).collect());
        memory.write(0, &want[MEMORY]).unwrap();
        let own = DeviceMemory {
            memory: std::sync::Arc::clone(&memory),
            bus_address: 0,
            offset: 0,
            len: WINDOWS * W,
            kind: RegionKind::Ordinary,
        };
        let options = ObjectOptions { window_size: W, ..ObjectOptions::default() };
        rig.windows.add_memory(MEMORY as u64, own, options).unwrap();
        let mut clients = Vec::new();
        for _ in 0..2 {
            let mut c = rig.client();
            // One view per client: the objects' host caches have separate files, so each object gets a client of its own below.
            let mut holds = Vec::new();
            for o in 0..OBJECTS {
                holds.push((0..WINDOWS).map(|n| rig.hold(&c, o, (n * W) as u64, true)).collect());
            }
            c.view.host.clear();
            clients.push((c, holds));
        }
        rig.windows.set_refusals(Refusals::new(seed, refusals));
        rig.drive.unreliable(seed ^ 0xd, failures);
        let engine = EmulatedEngine::new("dma", W).unwrap();
        let peer = rig.windows.register_peer(Box::new(engine.clone()));
        Self { rig, rng, want, memory, clients, engine, peer }
    }

    fn pick(&mut self, n: usize) -> usize {
        (self.rng.next_u64() % n as u64) as usize
    }

    fn settle(&mut self) {
        for _ in 0..8 {
            self.rig.now += GRACE;
            self.rig.poll();
        }
    }

    /// A client with the view of this object, as it has it when it opens the file: its host cache, and the CMB or its own memory.
    fn opened(&mut self, client: usize, object: usize) -> Client {
        let known = &self.clients[client].0;
        let mut c = Client {
            id: known.id,
            control: known.control.clone(),
            slots: std::sync::Arc::clone(&known.slots),
            view: known.view.clone(),
        };
        if object == MEMORY {
            c.view.cmb = Some(Region::new(std::sync::Arc::clone(&self.memory), 0, RegionKind::Ordinary));
        }
        self.rig.map_host(&mut c, object as u64, WINDOWS * W);
        c
    }

    fn read(&mut self, client: usize, object: usize, window: usize) {
        let (at, len) = (self.pick(W), 1 + self.pick(300));
        let len = len.min(W - at);
        let hold = self.clients[client].1[object][window];
        let start = window * W + at;
        let want = self.want[object][start..start + len].to_vec();
        let mut got = vec![0; len];
        for _ in 0..20 {
            let c = self.opened(client, object);
            match c.control.read(hold.handle, &c.view, at, &mut got) {
                Outcome::Copied(home) => {
                    assert_eq!(got, want, "object {object} window {window} at {at} from {home:?}");
                    return;
                }
                Outcome::NotResident | Outcome::DeviceMoved | Outcome::Moving => {}
                other => panic!("{other:?}"),
            }
            match self.rig.windows.ensure(hold.handle.index, Want::Auto, &mut self.rig.drive, self.rig.now) {
                Ok(Ensured::Refused(_)) => {
                    let (from, to) = (start as u64, (start + len) as u64);
                    self.rig
                        .windows
                        .read_through(object as u64, from..to, &mut got, &mut self.rig.drive)
                        .unwrap();
                    assert_eq!(got, want, "object {object} window {window} at {at} read through");
                    return;
                }
                Ok(Ensured::Moving) => self.settle(),
                Ok(Ensured::Ready(..)) => {}
                Err(e) => panic!("{e}"),
            }
        }
        panic!("never readable: object {object} window {window}");
    }

    fn write(&mut self, client: usize, object: usize, window: usize) {
        let (at, len) = (self.pick(W), 1 + self.pick(5000));
        let len = len.min(W - at);
        let value = self.rng.next_u64() as u8;
        let hold = self.clients[client].1[object][window];
        let c = self.opened(client, object);
        // In some sections the server acts: a revocation waits for it, or fences it.
        let act = self.pick(4);
        for _ in 0..20 {
            let mut slot = c.slots.take().unwrap();
            match slot.write(&c.control, writing(&hold), &c.view) {
                Ok(mut section) => {
                    section.write(at, &vec![value; len]).unwrap();
                    if act == 0 {
                        let scope = Scope::Window(hold.handle.index);
                        self.rig.windows.revoke(&scope, &mut self.rig.drive, self.rig.now).unwrap();
                        self.rig.poll();
                        if self.rng.next_u64().is_multiple_of(2) {
                            self.settle();
                        }
                    }
                    if section.finish() == Finished::Done {
                        let start = window * W + at;
                        self.want[object][start..start + len].fill(value);
                        return;
                    }
                    // Fenced: some of the bytes may be there, as of a section that is not over. Write them again.
                }
                Err(NotEntered::Moving) => self.settle(),
                Err(NotEntered::NotResident | NotEntered::DeviceMoved) => {
                    let index = hold.handle.index;
                    match self.rig.windows.ensure(index, Want::Auto, &mut self.rig.drive, self.rig.now) {
                        Ok(Ensured::Refused(_)) => self.settle(),
                        Ok(_) => {}
                        Err(e) => panic!("{e}"),
                    }
                }
                Err(other) => panic!("{other:?}"),
            }
        }
        // Refused to the end: nothing was written, unless a fenced try left bytes; write them through a refusal-free server.
        self.rig.windows.set_refusals(Refusals::default());
        self.rig.drive.unreliable(0, 0);
        self.settle();
        self.rig.windows.ensure(hold.handle.index, Want::Auto, &mut self.rig.drive, self.rig.now).unwrap();
        let mut slot = c.slots.take().unwrap();
        if let Ok(mut section) = slot.write(&c.control, writing(&hold), &c.view) {
            section.write(at, &vec![value; len]).unwrap();
            assert_eq!(section.finish(), Finished::Done);
            let start = window * W + at;
            self.want[object][start..start + len].fill(value);
        }
    }

    fn peer_copy(&mut self, object: usize, window: usize) {
        let index = self.clients[0].1[object][window].handle.index;
        let write = self.pick(3) == 0;
        let path =
            self.rig.windows.map_peer(self.peer, index, write, &mut self.rig.drive, self.rig.now).unwrap();
        let PeerPath::Direct(m) = path else { return };
        if write {
            let value = self.rng.next_u64() as u8;
            self.engine.local().write(0, &[value; 512]).unwrap();
            self.engine.copy(m.iova + 1024, 0, 512, true).unwrap();
            self.want[object][window * W + 1024..window * W + 1536].fill(value);
        }
        self.engine.copy(m.iova, 0, W, false).unwrap();
        let mut got = vec![0; W];
        self.engine.local().read(0, &mut got).unwrap();
        assert_eq!(
            got,
            self.want[object][window * W..(window + 1) * W],
            "peer, object {object} window {window}"
        );
        if self.pick(2) == 0 {
            self.rig.windows.unmap_peer(self.peer, index).unwrap();
            assert!(self.engine.copy(m.iova, 0, 8, false).is_err());
        }
    }

    fn revoke(&mut self, object: usize, window: usize) {
        let index = self.clients[0].1[object][window].handle.index;
        let scope = match self.pick(6) {
            0 | 1 => Scope::Window(index),
            2 => Scope::Range {
                object: object as u64,
                bytes: (window * W / 2) as u64..(window * W + 100) as u64,
            },
            3 => Scope::Object(object as u64),
            4 => Scope::Peer(self.peer),
            _ => Scope::Everything,
        };
        let evict = self.pick(3) == 0;
        let (w, d, now) = (&mut self.rig.windows, &mut self.rig.drive, self.rig.now);
        let ticket = if evict && !matches!(scope, Scope::Peer(_)) {
            w.evict(&scope, d, now)
        } else {
            w.revoke(&scope, d, now)
        }
        .unwrap();
        if self.pick(2) == 0 {
            self.settle();
            assert!(matches!(self.rig.windows.progress(ticket), Some(Progress::Done(_))));
        }
    }

    fn step(&mut self) {
        let (client, object, window) = (self.pick(2), self.pick(OBJECTS as usize), self.pick(WINDOWS));
        match self.pick(20) {
            0..8 => self.read(client, object, window),
            8..13 => self.write(client, object, window),
            13 => self.peer_copy(object, window),
            14 | 15 => self.revoke(object, window),
            16 => {
                let range = 0..(WINDOWS * W) as u64;
                let done = self.rig.windows.commit(object as u64, &range, &mut self.rig.drive);
                if object == MEMORY && done.is_ok() {
                    let mut got = vec![0; WINDOWS * W];
                    self.memory.read(0, &mut got).unwrap();
                    assert_eq!(got, self.want[MEMORY], "committed, and not in the device's memory");
                }
            }
            17 if object != MEMORY => {
                let at = self.pick(WINDOWS * W);
                self.want[object][at..].fill(0);
                // What the filesystem does: the object's own bytes beyond its end are gone first.
                if let Some(o) = self.rig.drive.objects.get_mut(&(object as u64)) {
                    o[at..].fill(0);
                }
                let (w, d) = (&mut self.rig.windows, &mut self.rig.drive);
                w.truncate(object as u64, at as u64, d, self.rig.now).unwrap();
                self.settle();
                // And it grows again, with a hole.
            }
            18 => {
                let index = self.clients[0].1[object][window].handle.index;
                self.rig.windows.promote(index, &mut self.rig.drive, self.rig.now);
            }
            _ => {
                self.rig.now += GRACE / 3;
                self.rig.poll();
            }
        }
    }

    /// In the end everything is on the drive, and all memory is free.
    fn finish(&mut self) {
        self.rig.windows.set_refusals(Refusals::default());
        self.rig.drive.unreliable(0, 0);
        self.settle();
        self.rig.windows.unregister_peer(self.peer, self.rig.now).unwrap();
        for (c, _) in &self.clients {
            self.rig.windows.client_died(c.id, &mut self.rig.drive, self.rig.now);
        }
        let ticket = self.rig.windows.evict(&Scope::Everything, &mut self.rig.drive, self.rig.now).unwrap();
        let report = self.rig.finish(ticket);
        assert_eq!(report.failed, Vec::<String>::new());
        for (o, want) in self.want.iter().enumerate() {
            let mut got = vec![0; WINDOWS * W];
            match self.rig.drive.objects.get(&(o as u64)) {
                Some(bytes) => got.clone_from(bytes),
                None => self.memory.read(0, &mut got).unwrap(),
            }
            let wrong = got.iter().zip(want).position(|(a, b)| a != b);
            assert_eq!(wrong, None, "object {o} differs on the drive from this byte on");
        }
        let (free, size) = self.rig.windows.cmb_bytes();
        let (used, spares) = (self.rig.windows.host_bytes().0, self.rig.windows.spare_bytes());
        assert_eq!((free, used, spares), (size, 0, 0), "memory leaked");
        assert_eq!(self.rig.windows.quarantine().count(), 0);
    }
}

fn run(seeds: std::ops::Range<u64>, steps: usize, refusals: u16, failures: u64) {
    let base = seed(seeds.start);
    let mut spared = 0;
    for s in base..base + (seeds.end - seeds.start) {
        println!("SEED={s}");
        let mut world = World::new(s, refusals, failures);
        for _ in 0..steps {
            world.step();
        }
        world.finish();
        spared += world.rig.windows.counters().spared_bytes;
    }
    assert!(spared > 0, "no window ever came back to pages that were good still");
}

#[test]
fn every_byte_is_the_references() {
    run(100..110, 300, 0, 0);
}

#[test]
fn every_byte_is_the_references_whatever_is_refused() {
    run(200..215, 300, 300, 0);
}

#[test]
fn every_byte_is_the_references_on_a_failing_drive() {
    run(300..310, 300, 100, 50);
}
