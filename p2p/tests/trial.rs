//! Whether a drive's DMA to another's CMB arrives is tried, believed by the bytes alone, and changes nothing on the drive.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::sync::Arc;

use nvme_driver::clock::ManualClock;
use nvme_driver::controller::{Controller, ControllerOptions};
use nvme_driver::disk::{CmbMemory, Disk, DiskError, Geometry};
use nvme_driver::emu::{Config, EmulatedController};
use nvme_driver::mem::Mapping;
use nvme_driver::nvme_disk::NvmeDisk;
use nvme_driver::pci::DmaAccess;
use nvme_driver::peer_memory::PeerMemory;
use p2p::counters::Reason;
use p2p::peer::try_out;

const PAGE: usize = 4096;

fn drive(cmb_size: u64) -> (Arc<EmulatedController>, NvmeDisk) {
    let emulated = EmulatedController::new(&Config { cmb_size, ..Config::default() }).unwrap();
    let clock = Arc::new(ManualClock::new());
    let controller = Controller::new(emulated.function(), ControllerOptions::default(), clock).unwrap();
    let disk = NvmeDisk::new(&controller).unwrap();
    (emulated, disk)
}

/// A drive of which some DMA to and from the other one's memory does not arrive; the commands succeed all the same.
struct Crooked {
    disk: NvmeDisk,
    to_memory: bool,
    from_memory: bool,
}

impl Disk for Crooked {
    fn name(&self) -> &str {
        self.disk.name()
    }
    fn geometry(&self) -> &Geometry {
        self.disk.geometry()
    }
    fn read(&mut self, lba: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.disk.read(lba, into)
    }
    fn write(&mut self, lba: u64, from: &[u8]) -> Result<(), DiskError> {
        self.disk.write(lba, from)
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        self.disk.flush()
    }
    fn write_zeroes(&mut self, lba: u64, blocks: u64) -> Result<(), DiskError> {
        self.disk.write_zeroes(lba, blocks)
    }
    fn deallocate(&mut self, lba: u64, blocks: u64) -> Result<(), DiskError> {
        self.disk.deallocate(lba, blocks)
    }
    fn map_peer(
        &mut self,
        memory: &Arc<Mapping>,
        offset: usize,
        len: usize,
        access: DmaAccess,
    ) -> Result<PeerMemory, DiskError> {
        self.disk.map_peer(memory, offset, len, access)
    }
    fn read_to_peer(
        &mut self,
        lba: u64,
        to: &PeerMemory,
        offset: usize,
        len: usize,
    ) -> Result<(), DiskError> {
        if self.to_memory { self.disk.read_to_peer(lba, to, offset, len) } else { Ok(()) }
    }
    fn write_from_peer(
        &mut self,
        lba: u64,
        from: &PeerMemory,
        offset: usize,
        len: usize,
    ) -> Result<(), DiskError> {
        if self.from_memory {
            return self.disk.write_from_peer(lba, from, offset, len);
        }
        // All ones is what a read of nobody's memory gives.
        self.disk.write(lba, &vec![0xff; len])
    }
}

/// The last page of a drive: never written, zeros, or bytes of somebody's.
fn contents() -> [Option<Vec<u8>>; 3] {
    [None, Some(vec![0; PAGE]), Some((0..PAGE).map(|i| (i * 7) as u8 ^ 0x3c).collect())]
}

fn last_page(disk: &mut dyn Disk) -> (u64, Vec<u8>) {
    let lba = disk.geometry().blocks - PAGE as u64 / u64::from(disk.geometry().block_size);
    let mut bytes = vec![0; PAGE];
    disk.read(lba, &mut bytes).unwrap();
    (lba, bytes)
}

#[test]
fn what_arrives_is_believed_and_the_drive_is_what_it_was() {
    let (_owner, owner) = drive(64 << 10);
    let cmb: CmbMemory = owner.cmb().unwrap().clone();
    for bytes in contents() {
        for writes in [false, true] {
            let (emulated, mut disk) = drive(0);
            let (lba, _) = last_page(&mut disk);
            if let Some(bytes) = &bytes {
                disk.write(lba, bytes).unwrap();
            }
            let (_, before) = last_page(&mut disk);
            try_out(&mut disk, &cmb, writes).unwrap();
            assert_eq!(last_page(&mut disk), (lba, before));
            let counters = emulated.counters();
            let from = if writes { PAGE as u64 } else { 0 };
            assert_eq!((counters.drive_to_peer, counters.peer_to_drive), (PAGE as u64, from));
        }
    }
}

#[test]
fn what_does_not_arrive_is_found_out_and_the_drive_is_what_it_was() {
    let (_owner, owner) = drive(64 << 10);
    let cmb = owner.cmb().unwrap().clone();
    for bytes in contents() {
        for (to_memory, from_memory) in [(false, true), (true, false)] {
            let mut disk = Crooked { disk: drive(0).1, to_memory, from_memory };
            let (lba, _) = last_page(&mut disk);
            if let Some(bytes) = &bytes {
                disk.write(lba, bytes).unwrap();
            }
            // What the trials before have left there is no proof either.
            try_out(&mut drive(0).1, &cmb, true).unwrap();
            let (_, before) = last_page(&mut disk);
            let found = try_out(&mut disk, &cmb, true).unwrap_err();
            assert_eq!(found.reason, Reason::Untrusted, "{found:?}");
            assert_eq!(last_page(&mut disk), (lba, before), "the drive was changed");
            // For reading only it does not matter what does not arrive the other way.
            assert_eq!(try_out(&mut disk, &cmb, false).is_ok(), to_memory);
        }
    }
}

#[test]
fn a_drive_that_fails_in_the_trial_is_not_relied_on() {
    let (_owner, owner) = drive(64 << 10);
    let cmb = owner.cmb().unwrap().clone();
    let (emulated, mut disk) = drive(0);
    emulated.faults().remove();
    assert_eq!(try_out(&mut disk, &cmb, false).unwrap_err().reason, Reason::Drive);
}
