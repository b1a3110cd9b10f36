//! From drive to drive: by DMA through the source's CMB where that works, through host memory where it does not, the same bytes
//! either way, and counted by the drives themselves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
use std::sync::Arc;
use std::time::Duration;

use nvme_driver::clock::ManualClock;
use nvme_driver::controller::{Controller, ControllerOptions};
use nvme_driver::disk::{Disk, DiskError, Geometry};
use nvme_driver::emu::{CmbSupport, Config, EmulatedController, Fault, Rule, Target};
use nvme_driver::nvme_disk::NvmeDisk;
use nvme_driver::peer_memory::PeerMemory;
use nvme_driver::spec::NvmOpcode;
use p2p::counters::{Path, Reason};
use p2p::drive_copy::{CopyError, DriveCopy, Obstacle};

struct Drive {
    emulated: Arc<EmulatedController>,
    disk: NvmeDisk,
}

fn drive(config: Config) -> Drive {
    let emulated = EmulatedController::new(&config).unwrap();
    let clock = Arc::new(ManualClock::new());
    let controller = Controller::new(emulated.function(), ControllerOptions::default(), clock).unwrap();
    let disk = NvmeDisk::new(&controller).unwrap();
    Drive { emulated, disk }
}

const LEN: usize = 3 << 20;

fn content() -> Vec<u8> {
    (0..LEN).map(|i| (i * 7 + i / 4093) as u8).collect()
}

/// A source with `content` from LBA 8 on (512-byte blocks), and an empty sink (4096-byte blocks).
fn pair(cmb: u64, support: CmbSupport) -> (Drive, Drive) {
    let mut source = drive(Config { cmb_size: cmb, cmb: support, ..Config::default() });
    source.disk.write(8, &content()).unwrap();
    (source, drive(Config { lba_size: 4096, ..Config::default() }))
}

fn run(copy: &mut DriveCopy, source: &mut Drive, sink: &mut Drive) -> Result<u64, CopyError> {
    let mut seen = 0;
    copy.copy((&mut source.disk, 8), (&mut sink.disk, 16), LEN as u64, &mut |n| seen += n).map(|()| seen)
}

fn expect_content(sink: &mut Drive) {
    let mut got = vec![0; LEN];
    sink.disk.read(16, &mut got).unwrap();
    assert!(got == content(), "the copy differs");
}

#[test]
fn no_byte_passes_host_memory() {
    let (mut source, mut sink) = pair(256 << 10, CmbSupport::default());
    let (a, b) = (source.emulated.counters(), sink.emulated.counters());
    let mut copy = DriveCopy::direct(&mut source.disk, &mut sink.disk, 16);
    assert_eq!(copy.obstacle(), None);
    assert_eq!(run(&mut copy, &mut source, &mut sink).unwrap(), LEN as u64);
    let (a2, b2) = (source.emulated.counters(), sink.emulated.counters());
    assert_eq!((a2.drive_to_cmb - a.drive_to_cmb, b2.peer_to_drive - b.peer_to_drive), {
        // The trial adds one page that did not come from the source.
        (LEN as u64, LEN as u64 + 4096)
    });
    for (now, before) in [(&a2, &a), (&b2, &b)] {
        assert_eq!(now.drive_to_host, before.drive_to_host, "bytes into host memory");
        assert_eq!(now.host_to_drive, before.host_to_drive, "bytes out of host memory");
    }
    let counted = copy.counters();
    assert_eq!(counted.path(Path::PeerToPeer).bytes, LEN as u64);
    assert_eq!(counted.path(Path::Bounce).bytes, 0);
    // The sink may read the CMB, but what it was given for that it may not write.
    assert_eq!(sink.emulated.domain().counters().faults, 0);
    drop(copy);
    expect_content(&mut sink);
}

#[test]
fn after_the_copy_the_sink_reaches_nothing_of_the_cmb() {
    let (mut source, mut sink) = pair(256 << 10, CmbSupport::default());
    let before = sink.emulated.domain().counters().mappings;
    let mut copy = DriveCopy::direct(&mut source.disk, &mut sink.disk, 16);
    assert_eq!(sink.emulated.domain().counters().mappings, before + 1, "the trial's page is given back");
    run(&mut copy, &mut source, &mut sink).unwrap();
    drop(copy);
    assert_eq!(sink.emulated.domain().counters().mappings, before);
}

#[test]
fn what_is_in_the_way_is_named_and_the_bytes_are_the_same() {
    let no_rds = CmbSupport { read_data: false, ..CmbSupport::default() };
    for (cmb, support, reason) in [
        (0, CmbSupport::default(), Reason::NoCmb),
        (4096, CmbSupport::default(), Reason::TooLarge),
        (256 << 10, no_rds, Reason::CmbUnsupported),
    ] {
        let (mut source, mut sink) = pair(cmb, support);
        let mut copy = DriveCopy::direct(&mut source.disk, &mut sink.disk, 16);
        let why = copy.obstacle().expect("something is in the way").clone();
        assert_eq!(why.reason, reason, "{}", why.text);
        run(&mut copy, &mut source, &mut sink).unwrap();
        assert_eq!(copy.counters().get(Path::Bounce, reason).bytes, LEN as u64);
        assert_eq!(copy.counters().path(Path::PeerToPeer).bytes, 0);
        assert_eq!(sink.emulated.counters().host_to_drive, LEN as u64);
        expect_content(&mut sink);
    }
}

/// A controller that completes commands whose data did not arrive, as real and emulated ones do after a fault in the IOMMU.
#[test]
fn a_sink_that_lies_about_its_dma_is_not_believed() {
    for opcode in [NvmOpcode::Write, NvmOpcode::Read] {
        let (mut source, mut sink) = pair(256 << 10, CmbSupport::default());
        sink.emulated.faults().inject(Rule::once(Target::io(opcode as u8), Fault::Lie));
        let mut copy = DriveCopy::direct(&mut source.disk, &mut sink.disk, 16);
        assert_eq!(copy.obstacle().map(|o| o.reason), Some(Reason::Untrusted), "{opcode:?}");
        run(&mut copy, &mut source, &mut sink).unwrap();
        expect_content(&mut sink);
    }
}

#[test]
fn a_direct_way_that_breaks_underway_is_left_and_nothing_is_lost() {
    let (mut source, mut sink) = pair(256 << 10, CmbSupport::default());
    let mut copy = DriveCopy::direct(&mut source.disk, &mut sink.disk, 16);
    let rule = Rule {
        skip: 3,
        ..Rule::once(
            Target::io(NvmOpcode::Write as u8),
            Fault::Status(nvme_driver::spec::Status::DATA_TRANSFER_ERROR),
        )
    };
    sink.emulated.faults().inject(rule);
    run(&mut copy, &mut source, &mut sink).unwrap();
    let counted = copy.counters();
    assert!(counted.path(Path::PeerToPeer).bytes > 0);
    assert!(counted.get(Path::Bounce, Reason::Drive).bytes > 0);
    assert_eq!(counted.path(Path::PeerToPeer).bytes + counted.path(Path::Bounce).bytes, LEN as u64);
    assert_eq!(sink.emulated.domain().counters().faults, 0);
    expect_content(&mut sink);
}

#[test]
fn what_was_in_the_cmb_before_a_reset_of_the_source_is_not_relied_on() {
    let (mut source, mut sink) = pair(256 << 10, CmbSupport::default());
    let mut copy = DriveCopy::direct(&mut source.disk, &mut sink.disk, 16);
    // A read that never completes: it is aborted, the controller reset, and what was in flight sent again, with success.
    source.emulated.faults().inject(Rule::once(Target::io(NvmOpcode::Read as u8), Fault::Lose));
    run(&mut copy, &mut source, &mut sink).unwrap();
    assert!(source.emulated.counters().resets > 0, "the test needs a reset");
    assert_eq!(copy.obstacle().map(|o| o.reason), Some(Reason::Drive));
    assert_eq!(copy.counters().path(Path::PeerToPeer).bytes, 0);
    expect_content(&mut sink);
}

#[test]
fn an_end_that_fails_is_named() {
    let (mut source, mut sink) = pair(256 << 10, CmbSupport::default());
    let mut copy = DriveCopy::bounce(Obstacle::new(Reason::Asked, "asked for"));
    let media = nvme_driver::spec::Status::UNRECOVERED_READ_ERROR;
    source.emulated.faults().inject(Rule::always(Target::io(NvmOpcode::Read as u8), Fault::Status(media)));
    assert!(matches!(run(&mut copy, &mut source, &mut sink), Err(CopyError::Source(_))));
    source.emulated.faults().clear();
    let media = nvme_driver::spec::Status::WRITE_FAULT;
    sink.emulated.faults().inject(Rule::always(Target::io(NvmOpcode::Write as u8), Fault::Status(media)));
    assert!(matches!(run(&mut copy, &mut source, &mut sink), Err(CopyError::Sink(_))));
}

/// A sink whose writes from the source's CMB wait until the source has gone on, as far as `until` says; told how many it has done.
struct Waiting<'a> {
    disk: &'a mut NvmeDisk,
    until: &'a (dyn Fn(u64) -> bool + Sync),
    writes: u64,
}

impl Disk for Waiting<'_> {
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
    fn write_from_peer(
        &mut self,
        lba: u64,
        from: &PeerMemory,
        offset: usize,
        len: usize,
    ) -> Result<(), DiskError> {
        for _ in 0..5000 {
            if (self.until)(self.writes) {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!((self.until)(self.writes), "the source waits for write {} of the sink", self.writes);
        self.writes += 1;
        self.disk.write_from_peer(lba, from, offset, len)
    }
}

/// Each write waits until the source has read all of the next piece: into another part of the CMB, then.
#[test]
fn the_source_reads_the_next_piece_while_the_sink_writes_one() {
    let (mut source, mut sink) = pair(256 << 10, CmbSupport::default());
    let mut copy = DriveCopy::direct(&mut source.disk, &mut sink.disk, 16);
    let reader = Arc::clone(&source.emulated);
    // Of the 63 pages that are used (the last is the trial's) two pieces of 31.
    let piece = 31 * 4096;
    let before = reader.counters().drive_to_cmb;
    let until =
        move |writes: u64| reader.counters().drive_to_cmb - before >= ((writes + 2) * piece).min(LEN as u64);
    let mut waiting = Waiting { disk: &mut sink.disk, until: &until, writes: 0 };
    let mut seen = Vec::new();
    copy.copy((&mut source.disk, 8), (&mut waiting, 16), LEN as u64, &mut |n| seen.push(n)).unwrap();
    assert_eq!((seen[0], seen.iter().sum::<u64>()), (piece, LEN as u64));
    let moved = copy.counters().path(Path::PeerToPeer);
    assert_eq!((moved.bytes, moved.transfers), (LEN as u64, LEN.div_ceil(piece as usize) as u64));
    drop(copy);
    expect_content(&mut sink);
}

/// The reset is for a read into the other piece, and takes this one's bytes with it.
#[test]
fn a_reset_while_the_next_piece_is_read_costs_the_one_that_is_written() {
    let (mut source, mut sink) = pair(256 << 10, CmbSupport::default());
    let mut copy = DriveCopy::direct(&mut source.disk, &mut sink.disk, 16);
    let reader = Arc::clone(&source.emulated);
    let per_piece = (31 * 4096_u64).div_ceil(source.disk.geometry().max_transfer as u64);
    let lost = Rule { skip: per_piece, ..Rule::once(Target::io(NvmOpcode::Read as u8), Fault::Lose) };
    source.emulated.faults().inject(lost);
    let until = move |_: u64| reader.counters().resets > 0;
    let mut waiting = Waiting { disk: &mut sink.disk, until: &until, writes: 0 };
    copy.copy((&mut source.disk, 8), (&mut waiting, 16), LEN as u64, &mut |_| ()).unwrap();
    assert_eq!(waiting.writes, 1);
    assert_eq!(copy.counters().path(Path::PeerToPeer).bytes, 0, "the first piece was still being written");
    assert_eq!(copy.counters().get(Path::Bounce, Reason::Drive).bytes, LEN as u64);
    drop(copy);
    expect_content(&mut sink);
}

/// Room for one piece only: one after the other, the same bytes.
#[test]
fn a_cmb_of_two_pages_will_do() {
    let (mut source, mut sink) = pair(8192, CmbSupport::default());
    let mut copy = DriveCopy::direct(&mut source.disk, &mut sink.disk, 16);
    run(&mut copy, &mut source, &mut sink).unwrap();
    let moved = copy.counters().path(Path::PeerToPeer);
    assert_eq!((moved.bytes, moved.transfers), (LEN as u64, LEN as u64 / 4096));
    expect_content(&mut sink);
}
