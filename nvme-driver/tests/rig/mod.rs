//! A disk on an emulated controller, in injected time.
#![allow(dead_code, reason = "each test uses some of it")]
use std::sync::Arc;
use std::time::Duration;

use nvme_driver::clock::{Clock, ManualClock};
use nvme_driver::controller::{Controller, ControllerError, ControllerOptions};
use nvme_driver::disk::{Disk, DiskError};
use nvme_driver::emu::{Backing, Config, EmulatedController, Rule};
use nvme_driver::nvme_disk::NvmeDisk;
use nvme_driver::spec::NvmOpcode;

pub(crate) const READ: u8 = NvmOpcode::Read as u8;
pub(crate) const BLOCK: usize = 4096;

pub(crate) struct Rig {
    pub(crate) emulated: Arc<EmulatedController>,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) disk: NvmeDisk,
    /// DMA memory that the disk and its controller have in use.
    pub(crate) in_use: u64,
}

pub(crate) fn config() -> Config {
    Config {
        namespace: Backing::Ram { bytes: 4 << 20 },
        lba_size: 4096,
        cmb_size: 1 << 20,
        mdts: 2,
        ..Config::default()
    }
}

/// Ten times shorter than by default: injected time is cheap, but every millisecond of it is a few polls.
pub(crate) fn options() -> ControllerOptions {
    ControllerOptions {
        io_timeout: Duration::from_secs(3),
        abort_timeout: Duration::from_millis(200),
        admin_timeout: Duration::from_secs(1),
        ..ControllerOptions::default()
    }
}

pub(crate) fn attach(
    emulated: &Arc<EmulatedController>,
    clock: &Arc<ManualClock>,
) -> Result<Arc<Controller>, ControllerError> {
    Controller::new(emulated.function(), options(), Arc::clone(clock) as Arc<dyn Clock>)
}

/// A disk whose every block holds its number.
pub(crate) fn rig() -> Rig {
    rig_with(&config())
}

/// The same on another controller of 4 MiB.
pub(crate) fn rig_with(config: &Config) -> Rig {
    let emulated = EmulatedController::new(config).unwrap();
    let clock = Arc::new(ManualClock::new());
    let mut disk = NvmeDisk::new(&attach(&emulated, &clock).unwrap()).unwrap();
    let all: Vec<u8> = (0..4 << 20).map(|i| pattern(i / BLOCK)).collect();
    disk.write(0, &all).unwrap();
    let in_use = disk.controller().arena().in_use();
    Rig { emulated, clock, disk, in_use }
}

pub(crate) fn pattern(block: usize) -> u8 {
    (block * 7 + block / 256 + 1) as u8
}

impl Rig {
    pub(crate) fn read(&mut self, lba: usize, blocks: usize) -> Result<(), DiskError> {
        let mut got = vec![0; blocks * BLOCK];
        self.disk.read(lba as u64, &mut got)?;
        for (i, block) in got.chunks(BLOCK).enumerate() {
            assert!(block.iter().all(|&b| b == pattern(lba + i)), "block {}", lba + i);
        }
        Ok(())
    }

    pub(crate) fn inject(&self, rule: Rule) {
        self.emulated.faults().inject(rule);
    }

    /// Everything works, with all pieces of the bounce buffer; nothing is left behind.
    pub(crate) fn is_well(&mut self) {
        self.emulated.faults().clear();
        self.read(0, 1024).unwrap();
        assert_eq!(self.emulated.faults().held(), 0);
        assert!(self.emulated.domain().faults().is_empty(), "a DMA went astray");
        assert_eq!(self.disk.controller().arena().in_use(), self.in_use, "DMA memory leaked");
    }

    /// How much injected time `what` takes.
    pub(crate) fn timed<T>(&mut self, what: impl FnOnce(&mut Self) -> T) -> (T, Duration) {
        let start = self.clock.now();
        let result = what(self);
        let took = self.clock.now() - start;
        (result, took)
    }
}

/// What a call may take at most: three attempts, each with its I/O and its abort timeout, and a little for resets.
pub(crate) fn bound() -> Duration {
    let options = options();
    (options.io_timeout + options.abort_timeout + Duration::from_secs(3)) * 3
}
