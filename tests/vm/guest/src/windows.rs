//! Windows in one QEMU drive's CMB, and the other drive as their peer behind the IOMMU: what it moves, what it may not, and that nothing of
//! it lands in pages that were taken back. QEMU reports success for a DMA that faulted, so the bytes decide.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_driver::controller::{Controller, ControllerOptions};
use nvme_driver::disk::{CmbMemory, Disk, DiskError};
use nvme_driver::nvme_disk::NvmeDisk;
use nvme_driver::topology::{Answer, Topology};
use nvme_driver::vfio::device_memory;
use p2p::backing::{Backing, BackingError};
use p2p::peer::{CopyId, CopyState, NvmePeer};
use p2p::windows::{Config, ObjectOptions, PeerId, PeerMapping, PeerPath, Progress, Report, Scope, Windows};

use crate::driver::controller;
use crate::lab::{Case, Outcome, addresses, expect, pattern};

pub(crate) const CASES: &[(&str, Case)] = &[
    ("windows-peer", peer),
    ("windows-peer-read-only", read_only),
    ("windows-peer-drained", drained),
    ("windows-peer-cut-off", cut_off),
];

/// Bytes of a window.
const W: usize = 256 << 10;
/// The one object: blocks of the first drive from here on.
const OBJECT: u64 = 1;
const OBJECT_LBA: u64 = 1024;
const BLOCK: u64 = 512;
/// What freed pages are filled with.
const POISON: u8 = 0x99;

/// The first drive as what is behind the windows.
struct Behind(NvmeDisk);

fn failed(what: &str) -> impl FnOnce(DiskError) -> BackingError {
    let what = what.to_owned();
    |e| BackingError::Failed { what, source: Box::new(e) }
}

impl Backing for Behind {
    fn read_to_cmb(&mut self, _: u64, offset: u64, at: usize, len: usize) -> Result<(), BackingError> {
        self.0.read_to_cmb(OBJECT_LBA + offset / BLOCK, at, len).map_err(failed("a fill"))
    }
    fn read_to_host(&mut self, _: u64, offset: u64, into: &mut [u8]) -> Result<(), BackingError> {
        self.0.read(OBJECT_LBA + offset / BLOCK, into).map_err(failed("a read"))
    }
    fn write_from_cmb(&mut self, _: u64, offset: u64, at: usize, len: usize) -> Result<(), BackingError> {
        self.0.write_from_cmb(OBJECT_LBA + offset / BLOCK, at, len).map_err(failed("a write-back"))
    }
    fn write_from_host(&mut self, _: u64, offset: u64, from: &[u8]) -> Result<(), BackingError> {
        self.0.write(OBJECT_LBA + offset / BLOCK, from).map_err(failed("a write-back"))
    }
}

/// Windows in the first drive's CMB, and the second drive registered as a peer.
struct Scene {
    windows: Windows,
    behind: Behind,
    cmb: CmbMemory,
    peer: NvmePeer,
    id: PeerId,
    /// The second drive, for its bytes through host memory.
    other: NvmeDisk,
    began: Instant,
}

impl Scene {
    fn new(grace: Duration) -> Outcome<Self> {
        let [owner, requester] = addresses()?;
        let a = controller(0, ControllerOptions::default())?;
        let b: Arc<Controller> = controller(1, ControllerOptions::default())?;
        let verdict = Topology::default().between(requester, owner)?;
        println!("{:?}, fence: {:?}: {}", verdict.answer, verdict.fence, verdict.reason);
        expect(verdict.answer != Answer::No, "the topology does not let them")?;
        let behind = Behind(NvmeDisk::new(&a)?);
        let cmb = behind.0.cmb().ok_or("no CMB")?.clone();
        let config = Config {
            slots: 64,
            grace: grace.as_nanos() as u64,
            settle: 0,
            read_ahead: 0,
            write_back: None,
            ..Config::default()
        };
        let mut windows = Windows::new(Some(cmb.clone()), config)?;
        windows.add_object(OBJECT, ObjectOptions { window_size: W, ..ObjectOptions::default() })?;
        let peer = NvmePeer::new(&b, verdict.fence)?;
        let id = windows.register_peer(Box::new(peer.clone()));
        Ok(Self { windows, behind, cmb, peer, id, other: NvmeDisk::new(&b)?, began: Instant::now() })
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    fn map(&mut self, number: u64, write: bool) -> Outcome<PeerMapping> {
        let (index, now) = (self.windows.window_at(OBJECT, number * W as u64)?, self.now());
        match self.windows.map_peer(self.id, index, write, &mut self.behind, now)? {
            PeerPath::Direct(mapping) => Ok(mapping),
            other => Err(format!("not mapped: {other:?}").into()),
        }
    }

    /// Where in the CMB a mapped window is.
    fn place(&self, m: PeerMapping) -> Outcome<usize> {
        Ok(self.windows.status(m.window).ok_or("no such window")?.at as usize)
    }

    fn in_cmb(&self, at: usize) -> Outcome<Vec<u8>> {
        let mut bytes = vec![0; W];
        device_memory::read(&self.cmb.memory, at, &mut bytes)?;
        Ok(bytes)
    }

    fn poison(&self, at: usize) -> Outcome {
        device_memory::write(&self.cmb.memory, at, &vec![POISON; W])?;
        device_memory::flush(&self.cmb.memory, at)?;
        Ok(())
    }

    fn finish(&self, ids: &[CopyId]) -> Outcome<Vec<CopyState>> {
        let deadline = Instant::now() + Duration::from_secs(40);
        while self.peer.poll() > 0 {
            expect(Instant::now() < deadline, "commands did not complete")?;
        }
        ids.iter().map(|id| self.peer.take_result(*id).ok_or_else(|| "a result is missing".into())).collect()
    }

    fn revoke(&mut self, window: u32) -> Outcome<Report> {
        let now = self.now();
        let ticket = self.windows.revoke(&Scope::Window(window), &mut self.behind, now)?;
        let deadline = Instant::now() + Duration::from_secs(40);
        loop {
            match self.windows.progress(ticket) {
                Some(Progress::Done(report)) => return Ok(report),
                Some(Progress::Pending(_)) => {}
                None => return Err("the ticket is spent".into()),
            }
            expect(Instant::now() < deadline, "the revocation does not end")?;
            let now = self.now();
            self.windows.poll(&mut self.behind, now);
        }
    }

    /// `len` bytes of the second drive.
    fn on_other(&mut self, lba: u64, len: usize) -> Outcome<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.other.read(lba, &mut bytes)?;
        Ok(bytes)
    }

    /// Pieces that one command takes.
    fn pieces(&self) -> usize {
        W / PIECE
    }
}

/// Bytes per command.
const PIECE: usize = 64 << 10;

/// The second drive writes its blocks from a window and reads into it; what it wrote moves along to the first drive, and no byte of that
/// passes host memory.
fn peer() -> Outcome {
    let mut s = Scene::new(Duration::from_secs(5))?;
    let (file, theirs) = (pattern(501, 2 * W), pattern(502, W));
    s.behind.0.write(OBJECT_LBA, &file)?;
    s.other.write(8192, &theirs)?;
    let m = s.map(0, false)?;
    let from: Vec<CopyId> = (0..s.pieces())
        .map(|i| {
            s.peer.write_to_drive(16384 + (i * PIECE) as u64 / BLOCK, m.iova + (i * PIECE) as u64, PIECE)
        })
        .collect::<Result<_, _>>()?;
    let states = s.finish(&from)?;
    expect(states.iter().all(|state| *state == CopyState::Done), format!("{states:?}"))?;
    expect(s.on_other(16384, W)? == file[..W], "what it wrote from the window differs")?;
    // The second window, for writing: both at once.
    let n = s.map(1, true)?;
    let into: Vec<CopyId> = (0..s.pieces())
        .map(|i| {
            s.peer.read_from_drive(8192 + (i * PIECE) as u64 / BLOCK, n.iova + (i * PIECE) as u64, PIECE)
        })
        .collect::<Result<_, _>>()?;
    let states = s.finish(&into)?;
    expect(states.iter().all(|state| *state == CopyState::Done), format!("{states:?}"))?;
    let at = s.place(n)?;
    expect(s.in_cmb(at)? == theirs, "what it read into the window differs")?;
    expect(s.windows.peer_mappings(Some(s.id)).count() == 2, "both are listed")?;
    expect(s.windows.object_mappings(OBJECT).count() == 2, "by object too")?;
    // A window that only a peer uses goes to the drive, not to host memory.
    let report = s.revoke(n.window)?;
    expect(report.freed_bytes == W as u64 && report.failed.is_empty(), format!("{report:?}"))?;
    let mut on_a = vec![0; W];
    s.behind.0.read(OBJECT_LBA + W as u64 / BLOCK, &mut on_a)?;
    expect(on_a == theirs, "what it wrote was lost with its mapping")?;
    expect(s.windows.host_bytes().0 == 0, "host memory was used")?;
    let (id, now) = (s.id, s.now());
    s.windows.unregister_peer(id, now)?;
    expect(s.windows.peers().count() == 0 && s.windows.peer_mappings(None).count() == 0, "it stays")
}

/// A window that is mapped for reading is not written: the IOMMU's doing, for nothing before it looks.
fn read_only() -> Outcome {
    let mut s = Scene::new(Duration::from_secs(5))?;
    let file = pattern(511, W);
    s.behind.0.write(OBJECT_LBA, &file)?;
    s.other.write(8192, &pattern(512, W))?;
    let m = s.map(0, false)?;
    let at = s.place(m)?;
    let sent = [s.peer.read_from_drive(8192, m.iova, PIECE)?];
    println!("the read into a read-only window: {:?}", s.finish(&sent)?);
    expect(s.in_cmb(at)? == file, "a window that is mapped for reading was written")?;
    let m = s.map(0, true)?;
    let sent = [s.peer.read_from_drive(8192, m.iova, PIECE)?];
    s.finish(&sent)?;
    expect(s.in_cmb(at)?[..PIECE] == pattern(512, W)[..PIECE], "mapped for writing it cannot write")
}

/// Within the grace what is in flight completes, reads and writes, and its bytes are in the window when it has moved.
fn drained() -> Outcome {
    let mut s = Scene::new(Duration::from_secs(20))?;
    let mut waited = 0;
    for round in 0..8u64 {
        let (file, theirs) = (pattern(520 + round, W), pattern(540 + round, W));
        s.behind.0.write(OBJECT_LBA, &file)?;
        s.other.write(8192, &theirs)?;
        let writes = round % 2 == 0;
        let m = s.map(0, writes)?;
        let at = s.place(m)?;
        let ids: Vec<CopyId> = (0..s.pieces())
            .map(|i| {
                let (block, iova) = ((i * PIECE) as u64 / BLOCK, m.iova + (i * PIECE) as u64);
                if writes {
                    s.peer.read_from_drive(8192 + block, iova, PIECE)
                } else {
                    s.peer.write_to_drive(16384 + block, iova, PIECE)
                }
            })
            .collect::<Result<_, _>>()?;
        waited += s.peer.poll();
        let report = s.revoke(m.window)?;
        expect(report.freed_bytes == W as u64 && report.silent == 0, format!("round {round}: {report:?}"))?;
        s.poison(at)?;
        let states = s.finish(&ids)?;
        let done = states.iter().all(|state| *state == CopyState::Done);
        expect(done, format!("round {round}: {states:?}"))?;
        expect(s.in_cmb(at)?.iter().all(|b| *b == POISON), format!("round {round}: a DMA landed late"))?;
        let mut on_a = vec![0; W];
        s.behind.0.read(OBJECT_LBA, &mut on_a)?;
        if writes {
            expect(on_a == theirs, format!("round {round}: what was in flight is lost"))?;
        } else {
            expect(s.on_other(16384, W)? == file, format!("round {round}: what was in flight is wrong"))?;
        }
    }
    println!("{waited} commands were in flight when their window was taken back");
    expect(waited > 0, "nothing was ever in flight: the case shows nothing")
}

/// With no grace at all what is in flight faults: none of it lands in the pages once they are free.
fn cut_off() -> Outcome {
    let mut s = Scene::new(Duration::ZERO)?;
    let mut late = 0;
    s.other.write(8192, &pattern(560, W))?;
    // Until some were really late, and often enough to meet them at various points.
    let mut rounds = 0..64u64;
    while let Some(round) = rounds.next().filter(|round| *round < 16 || late == 0) {
        let m = s.map(0, true)?;
        let at = s.place(m)?;
        let ids: Vec<CopyId> = (0..s.pieces())
            .map(|i| {
                s.peer.read_from_drive(8192 + (i * PIECE) as u64 / BLOCK, m.iova + (i * PIECE) as u64, PIECE)
            })
            .collect::<Result<_, _>>()?;
        let report = s.revoke(m.window)?;
        expect(
            report.freed_bytes == W as u64 && report.quarantined_bytes == 0,
            format!("round {round}: {report:?}"),
        )?;
        s.poison(at)?;
        let in_flight = s.peer.poll();
        late += in_flight;
        // Whatever the controller says of them (QEMU's says success), what was cut off is not taken for done.
        let states = s.finish(&ids)?;
        let given_up = states.iter().filter(|state| matches!(state, CopyState::GivenUp(_))).count();
        expect(given_up >= in_flight, format!("round {round}: {in_flight} late, {states:?}"))?;
        expect(s.in_cmb(at)?.iter().all(|b| *b == POISON), format!("round {round}: a DMA landed late"))?;
        expect(s.peer.read_from_drive(8192, m.iova, PIECE).is_err(), "its mapping is still good")?;
    }
    println!("{late} commands were still in flight when their window's pages were free and poisoned");
    expect(late > 0, "no command was ever late: the case shows nothing")
}
