//! An object with memory of its own, and a client that has it mapped.
#![allow(unreachable_pub, reason = "a room of one test")]

use nvme_driver::mem::Mapping;
use p2p::counters::Reason;
use p2p::layout::Home;
use p2p::reader::Outcome;
use p2p::region::{Region, RegionKind};
use p2p::windows::{Config, DeviceMemory, Ensured, Hold, ObjectOptions, PeerMapping, PeerPath, WindowsError};
use std::sync::Arc;

use crate::common::{Client, Rig, W, config, pattern};

pub const N: usize = 4;

/// The object, and where in its mapping it begins.
pub const OBJECT: u64 = 1 << 40;

pub const AT: usize = 8192;

pub struct World {
    pub rig: Rig,
    pub memory: Arc<Mapping>,
    pub c: Client,
    pub holds: Vec<Hold>,
}

pub fn options() -> ObjectOptions {
    ObjectOptions { window_size: W, ..ObjectOptions::default() }
}

pub fn ordinary(memory: &Arc<Mapping>) -> DeviceMemory {
    let memory = Arc::clone(memory);
    DeviceMemory { memory, bus_address: 0x7000_0000, offset: AT, len: N * W, kind: RegionKind::Ordinary }
}

/// A client that has the object's memory mapped, as it has the CMB for a file.
pub fn client(rig: &mut Rig, memory: &Arc<Mapping>, kind: RegionKind) -> Client {
    let mut c = rig.client();
    rig.map_host(&mut c, OBJECT, N * W);
    c.view.cmb = Some(Region::new(Arc::clone(memory), 0, kind));
    c
}

pub fn world_with(cmb: usize, config: Config, kind: RegionKind) -> World {
    let mut rig = Rig::new(cmb, config);
    let memory = Mapping::memfd("device", AT + N * W + 4096).unwrap();
    let bytes: Vec<u8> = (0..N * W).map(|i| pattern(OBJECT, i)).collect();
    memory.write(AT, &bytes).unwrap();
    rig.windows.add_memory(OBJECT, DeviceMemory { kind, ..ordinary(&memory) }, options()).unwrap();
    let c = client(&mut rig, &memory, kind);
    let holds = (0..N).map(|n| rig.hold(&c, OBJECT, (n * W) as u64, true)).collect();
    World { rig, memory, c, holds }
}

pub fn world() -> World {
    world_with(0, config(), RegionKind::Ordinary)
}

impl World {
    pub fn ensure_all(&mut self) {
        for h in &self.holds {
            assert_eq!(self.rig.ensure(h), Ensured::Ready(Home::Cmb, Reason::Policy));
        }
    }

    pub fn write(&self, n: usize, at: usize, bytes: &[u8]) {
        self.c.write(&self.holds[n], at, bytes);
    }

    pub fn read(&self, n: usize, at: usize, len: usize) -> (Outcome, Vec<u8>) {
        self.c.read(self.holds[n].handle, at, len)
    }

    /// What the device's memory itself holds of window `n`.
    pub fn raw(&self, n: usize, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(AT + n * W + at, &mut bytes).unwrap();
        bytes
    }

    pub fn index(&self, n: usize) -> u32 {
        self.holds[n].handle.index
    }

    pub fn commit(&mut self) -> Result<p2p::windows::Committed, WindowsError> {
        self.rig.windows.commit(OBJECT, &(0..(N * W) as u64), &mut self.rig.drive)
    }

    pub fn promote(&mut self, n: usize) {
        let index = self.index(n);
        self.rig.windows.promote(index, &mut self.rig.drive, self.rig.now);
        self.rig.poll();
    }

    pub fn home(&self, n: usize) -> Home {
        self.rig.windows.status(self.index(n)).unwrap().home
    }

    pub fn map(&mut self, peer: p2p::windows::PeerId, n: usize, write: bool) -> PeerMapping {
        let index = self.index(n);
        match self.rig.windows.map_peer(peer, index, write, &mut self.rig.drive, self.rig.now).unwrap() {
            PeerPath::Direct(m) => m,
            other => panic!("{other:?}"),
        }
    }
}

pub fn want(n: usize, at: usize, len: usize) -> Vec<u8> {
    (n * W + at..n * W + at + len).map(|i| pattern(OBJECT, i)).collect()
}
