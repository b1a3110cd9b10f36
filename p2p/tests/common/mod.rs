//! A server's windows over memory that plays the drive, and clients in the same process.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]
#![allow(dead_code, unreachable_pub, reason = "each test uses its own part of a module that all include")]

use std::collections::BTreeMap;
use std::sync::Arc;

use nvme_driver::disk::CmbMemory;
use nvme_driver::mem::{Access, Mapping};
use p2p::backing::{Backing, BackingError};
use p2p::control::{ControlPages, WindowHandle};
use p2p::reader::Outcome;
use p2p::region::{Region, RegionKind, View};
use p2p::windows::{
    ClientId, Config, Ensured, Hold, ObjectOptions, Progress, Report, ResetSignal, Ticket, Want, Windows,
};
use p2p::writer::{Finished, Slots, WriteHandle};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

/// The drive: bytes per object, and the CMB that it reads into and writes from.
#[derive(Debug)]
pub struct Drive {
    pub cmb: Arc<Mapping>,
    pub objects: BTreeMap<u64, Vec<u8>>,
    pub fail_writes: bool,
    pub time_out_reads: bool,
    pub host_bytes: u64,
    rng: Option<(Xoshiro256PlusPlus, u64)>,
    resets: Option<Resets>,
}

/// A controller that is reset now and then, and loses its CMB.
#[derive(Debug)]
struct Resets {
    signal: ResetSignal,
    rng: Xoshiro256PlusPlus,
    per_mille: u64,
    happened: u64,
    /// Between a reset and the moment in which the windows know of it.
    unnoticed: bool,
}

/// What a reset leaves in every byte of the CMB.
pub const LEFT: u8 = 0xee;

impl Drive {
    /// Fails `per_mille` of 1000 transfers into or out of the CMB.
    pub fn unreliable(&mut self, seed: u64, per_mille: u64) {
        self.rng = Some((Xoshiro256PlusPlus::seed_from_u64(seed), per_mille));
    }

    /// Resets the controller in the middle of `per_mille` of 1000 transfers, after it has said so.
    pub fn resets(&mut self, signal: ResetSignal, seed: u64, per_mille: u64) {
        let rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let (happened, unnoticed) = self.resets.as_ref().map_or((0, false), |r| (r.happened, r.unnoticed));
        self.resets = Some(Resets { signal, rng, per_mille, happened, unnoticed });
    }

    /// How often it was reset.
    pub fn reset_count(&self) -> u64 {
        self.resets.as_ref().map_or(0, |r| r.happened)
    }

    /// Resets it now.
    pub fn reset(&mut self) {
        let Some(r) = self.resets.as_mut() else { return };
        r.signal.raise();
        self.cmb.write(0, &vec![LEFT; self.cmb.len()]).unwrap();
        (r.happened, r.unnoticed) = (r.happened + 1, true);
    }

    fn perhaps_reset(&mut self) {
        if self.resets.as_mut().is_some_and(|r| r.rng.next_u64() % 1000 < r.per_mille) {
            self.reset();
        }
    }

    /// As the driver does: what is to come from a CMB that was lost is not sent.
    fn cmb_is_good(&self) -> Result<(), BackingError> {
        if self.resets.as_ref().is_some_and(|r| r.unnoticed) {
            return Err(failed("a write from a CMB that was lost"));
        }
        Ok(())
    }

    fn failing(&mut self) -> Result<(), BackingError> {
        if let Some((rng, per_mille)) = self.rng.as_mut()
            && rng.next_u64() % 1000 < *per_mille
        {
            return Err(failed("a transfer that fails at random"));
        }
        Ok(())
    }

    fn bytes(&self, object: u64, offset: u64, into: &mut [u8]) {
        into.fill(0);
        if let Some(o) = self.objects.get(&object) {
            let from = (offset as usize).min(o.len());
            let end = (from + into.len()).min(o.len());
            into[..end - from].copy_from_slice(&o[from..end]);
        }
    }

    fn set(&mut self, object: u64, offset: u64, from: &[u8]) {
        let o = self.objects.entry(object).or_default();
        let start = (offset as usize).min(o.len());
        let end = (start + from.len()).min(o.len());
        o[start..end].copy_from_slice(&from[..end - start]);
    }
}

pub fn failed(what: &str) -> BackingError {
    BackingError::Failed { what: what.to_owned(), source: "by the test".into() }
}

impl Backing for Drive {
    fn read_to_cmb(&mut self, object: u64, offset: u64, at: usize, len: usize) -> Result<(), BackingError> {
        if self.time_out_reads {
            return Err(BackingError::TimedOut("read".to_owned()));
        }
        self.failing()?;
        let mut bytes = vec![0; len];
        self.bytes(object, offset, &mut bytes);
        // Commands that had completed are not sent again after a reset.
        let (first, second) = bytes.split_at(len / 2);
        self.cmb.write(at, first).unwrap();
        self.perhaps_reset();
        self.cmb.write(at + first.len(), second).unwrap();
        Ok(())
    }

    fn read_to_host(&mut self, object: u64, offset: u64, into: &mut [u8]) -> Result<(), BackingError> {
        self.perhaps_reset();
        self.host_bytes += into.len() as u64;
        self.bytes(object, offset, into);
        Ok(())
    }

    fn write_from_cmb(
        &mut self,
        object: u64,
        offset: u64,
        at: usize,
        len: usize,
    ) -> Result<(), BackingError> {
        if self.fail_writes {
            return Err(failed("write"));
        }
        self.failing()?;
        self.cmb_is_good()?;
        let mut bytes = vec![0; len];
        self.cmb.read(at, &mut bytes).unwrap();
        let (first, second) = bytes.split_at(len / 2);
        self.set(object, offset, first);
        self.perhaps_reset();
        self.cmb_is_good()?;
        self.set(object, offset + first.len() as u64, second);
        Ok(())
    }

    fn write_from_host(&mut self, object: u64, offset: u64, from: &[u8]) -> Result<(), BackingError> {
        if self.fail_writes {
            return Err(failed("write"));
        }
        self.perhaps_reset();
        self.host_bytes += from.len() as u64;
        self.set(object, offset, from);
        Ok(())
    }

    fn reset_noticed(&mut self) {
        if let Some(r) = self.resets.as_mut() {
            r.unnoticed = false;
        }
    }
}

/// Which way a transfer of the drive goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    ToCmb,
    FromCmb,
}

/// The drive, with something that happens when half of each transfer into or out of the CMB is done.
pub struct Midway<'a, F> {
    drive: &'a mut Drive,
    happens: F,
}

impl<'a, F: FnMut(Way)> Midway<'a, F> {
    pub fn new(drive: &'a mut Drive, happens: F) -> Self {
        Self { drive, happens }
    }
}

impl<F: FnMut(Way)> Backing for Midway<'_, F> {
    fn read_to_cmb(&mut self, object: u64, offset: u64, at: usize, len: usize) -> Result<(), BackingError> {
        let half = len / 2;
        self.drive.read_to_cmb(object, offset, at, half)?;
        (self.happens)(Way::ToCmb);
        self.drive.read_to_cmb(object, offset + half as u64, at + half, len - half)
    }
    fn read_to_host(&mut self, object: u64, offset: u64, into: &mut [u8]) -> Result<(), BackingError> {
        self.drive.read_to_host(object, offset, into)
    }
    fn write_from_cmb(
        &mut self,
        object: u64,
        offset: u64,
        at: usize,
        len: usize,
    ) -> Result<(), BackingError> {
        let half = len / 2;
        self.drive.write_from_cmb(object, offset, at, half)?;
        (self.happens)(Way::FromCmb);
        self.drive.write_from_cmb(object, offset + half as u64, at + half, len - half)
    }
    fn write_from_host(&mut self, object: u64, offset: u64, from: &[u8]) -> Result<(), BackingError> {
        self.drive.write_from_host(object, offset, from)
    }
}

/// Windows, the drive behind them, and a clock.
#[derive(Debug)]
pub struct Rig {
    pub windows: Windows,
    pub drive: Drive,
    pub now: u64,
}

pub const GRACE: u64 = 1_000_000;

pub fn config() -> Config {
    Config { slots: 256, grace: GRACE, settle: 0, dirty_words: 4096, ..Config::default() }
}

/// A window of the rig that [`rig`] makes.
pub const W: usize = 16 * 1024;

/// Room for eight windows in the CMB, and object 7 of four.
pub fn rig() -> Rig {
    let mut rig = Rig::new(8 * W, config());
    rig.object(7, 4 * W, W);
    rig
}

/// The same, the object's first window in the CMB, and a client that holds it for writing and has the object's host cache mapped.
pub fn in_cmb() -> (Rig, Client, Hold) {
    let mut rig = rig();
    let mut client = rig.client();
    rig.map_host(&mut client, 7, 4 * W);
    let hold = rig.hold(&client, 7, 0, true);
    rig.ensure(&hold);
    (rig, client, hold)
}

impl Rig {
    pub fn new(cmb_bytes: usize, config: Config) -> Self {
        let memory = CmbMemory {
            memory: Mapping::memfd("cmb", cmb_bytes.max(4096)).unwrap(),
            bus_address: 0x1000_0000,
            is_device_memory: false,
            read_data: true,
            write_data: true,
        };
        Self::over((cmb_bytes > 0).then_some(memory), config)
    }

    /// Windows over this CMB, which the processor plays the drive of.
    pub fn over(memory: Option<CmbMemory>, config: Config) -> Self {
        let cmb = memory.as_ref().map(|m| Arc::clone(&m.memory));
        let drive = Drive {
            cmb: cmb.unwrap_or_else(|| Mapping::memfd("none", 4096).unwrap()),
            objects: BTreeMap::new(),
            fail_writes: false,
            time_out_reads: false,
            host_bytes: 0,
            rng: None,
            resets: None,
        };
        Self { windows: Windows::new(memory, config).unwrap(), drive, now: 0 }
    }

    /// An object of `len` bytes that no other has: byte `i` is a function of object and `i`.
    pub fn object(&mut self, object: u64, len: usize, window_size: usize) {
        self.drive.objects.insert(object, (0..len).map(|i| pattern(object, i)).collect());
        let options = ObjectOptions { window_size, ..ObjectOptions::default() };
        self.windows.add_object(object, options).unwrap();
    }

    pub fn client(&mut self) -> Client {
        let (id, region) = self.windows.attach().unwrap();
        let control_fd = self.windows.control_fd().unwrap();
        let len = self.windows.control().memory().len();
        let control =
            ControlPages::open(Mapping::from_fd(control_fd, 0, len, Access::ReadOnly).unwrap()).unwrap();
        let cmb = Region::new(Arc::clone(&self.drive.cmb), 0, RegionKind::Ordinary);
        Client { id, control, slots: Slots::new(region), view: View { cmb: Some(cmb), host: Vec::new() } }
    }

    /// Maps the first `len` bytes of the object's host cache (the first four lanes) into the client's view.
    pub fn map_host(&mut self, client: &mut Client, object: u64, len: usize) {
        for lane in 0..4 {
            let fd = self.windows.host_fd(object, true).unwrap();
            let base = lane * p2p::layout::LANE;
            let memory = Mapping::from_fd(fd, base, len, Access::ReadWrite).unwrap();
            client.view.host.push(Region::new(memory, base, RegionKind::Ordinary));
        }
    }

    pub fn hold(&mut self, client: &Client, object: u64, offset: u64, write: bool) -> Hold {
        self.windows.hold(client.id, object, offset, write).unwrap()
    }

    pub fn ensure(&mut self, hold: &Hold) -> Ensured {
        self.ensure_want(hold, Want::Auto)
    }

    pub fn ensure_want(&mut self, hold: &Hold, want: Want) -> Ensured {
        self.windows.ensure(hold.handle.index, want, &mut self.drive, self.now).unwrap()
    }

    pub fn poll(&mut self) {
        self.windows.poll(&mut self.drive, self.now);
    }

    /// Polls until the ticket is done, letting time pass as needed.
    pub fn finish(&mut self, ticket: Ticket) -> Report {
        for _ in 0..10_000 {
            self.poll();
            match self.windows.progress(ticket) {
                Some(Progress::Done(report)) => return report,
                Some(Progress::Pending(_)) => self.now += GRACE / 4,
                None => panic!("the ticket is spent"),
            }
        }
        panic!("never done: {ticket:?}");
    }

    pub fn revoke(&mut self, scope: &p2p::windows::Scope) -> Report {
        let ticket = self.windows.revoke(scope, &mut self.drive, self.now).unwrap();
        self.finish(ticket)
    }
}

pub fn pattern(object: u64, at: usize) -> u8 {
    (object as usize * 131 + at * 7 + at / 251) as u8
}

/// One client: what a client process has mapped.
#[derive(Debug)]
pub struct Client {
    pub id: ClientId,
    pub control: ControlPages,
    pub slots: Arc<Slots>,
    pub view: View,
}

impl Client {
    pub fn read(&self, window: WindowHandle, offset: usize, len: usize) -> (Outcome, Vec<u8>) {
        let mut bytes = vec![0; len];
        (self.control.read(window, &self.view, offset, &mut bytes), bytes)
    }

    /// Stores bytes at `offset` of a window, in a section of their own.
    pub fn write(&self, hold: &Hold, offset: usize, bytes: &[u8]) {
        let mut slot = self.slots.take().unwrap();
        let mut section = slot.write(&self.control, writing(hold), &self.view).unwrap();
        section.write(offset, bytes).unwrap();
        assert_eq!(section.finish(), Finished::Done);
    }
}

pub fn writing(hold: &Hold) -> WriteHandle {
    WriteHandle { window: hold.handle, dirty_word: hold.dirty_word.unwrap() }
}

/// The seed of a run: from the environment, so that a failure can be repeated.
pub fn seed(default: u64) -> u64 {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(default);
    println!("SEED={seed}");
    seed
}
