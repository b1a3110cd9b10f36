//! A server with another drive as its peer, and what its tests look at.

use std::sync::Arc;
use std::time::Duration;

use nvme_driver::clock::SystemClock;
use nvme_driver::controller::{Controller, ControllerOptions};
use nvme_driver::disk::Disk;
use nvme_driver::emu::{Config, EmulatedController, Fault, Rule, Target};
use nvme_driver::nvme_disk::NvmeDisk;
use nvme_driver::spec::NvmOpcode;
use nvme_driver::topology::Fence;
use shm_api::client::{Client, ClientError, File, Mapped, OpenMode};
use shm_api::protocol::ErrorCode;
use shm_api::server::PeerDevice;

use crate::common::{Serving, Setup};

pub const W: u64 = 65_536;
pub const NAME: &str = "emu:other.img";
/// Where on the drive the tests put things, in bytes.
pub const AT: u64 = 1 << 20;

pub fn pattern(len: u64, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed).collect()
}

/// Another drive, with bytes of its own.
pub struct Drive {
    pub emulated: Arc<EmulatedController>,
    pub controller: Arc<Controller>,
    pub disk: NvmeDisk,
}

impl Drive {
    pub fn new() -> Self {
        // Long, for a command that is held goes on only as fast as a busy machine lets the server look at it.
        Self::with_timeout(Duration::from_secs(20))
    }

    pub fn with_timeout(io_timeout: Duration) -> Self {
        let emulated = EmulatedController::new(&Config::default()).unwrap();
        let options =
            ControllerOptions { io_timeout, admin_timeout: Duration::from_secs(1), ..Default::default() };
        let controller = Controller::new(emulated.function(), options, Arc::new(SystemClock::new())).unwrap();
        let disk = NvmeDisk::new(&controller).unwrap();
        Self { emulated, controller, disk }
    }

    pub fn peer(&self) -> PeerDevice {
        PeerDevice { writable: true, ..PeerDevice::new(NAME, &self.controller, Fence::Unmap) }
    }

    pub fn serve(&self, setup: Setup<'_>, device: PeerDevice) -> Serving {
        Serving::start_with(setup, |options| shm_api::server::ServerOptions {
            peers: vec![device],
            ..options
        })
    }

    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.disk.write(at / 512, bytes).unwrap();
    }

    pub fn get(&mut self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.disk.read(at / 512, &mut bytes).unwrap();
        bytes
    }

    /// What happens to the next command with this opcode at these bytes or later.
    pub fn next(&self, opcode: NvmOpcode, fault: Fault) {
        let target = Target { lba: Some(AT / 512..=u64::MAX), ..Target::io(opcode as u8) };
        self.emulated.faults().inject(Rule::once(target, fault));
    }

    pub fn mappings(&self) -> u64 {
        self.emulated.domain().counters().mappings
    }
}

/// A file of so many windows, mapped for writing.
pub fn file(client: &Client, path: &str, len: u64) -> (File, Mapped) {
    let file = client.open(path, OpenMode::create()).unwrap();
    file.write_at(0, &vec![0x11; len as usize]).unwrap();
    file.commit().unwrap();
    let mapped = file.map(0, len).unwrap();
    (file, mapped)
}

pub fn content(mapped: &Mapped, at: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    mapped.read(at, &mut bytes).unwrap();
    bytes
}

pub fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>, code: ErrorCode) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.code(), Some(code), "{error}");
    error.to_string()
}
