//! Another NVMe controller as a peer of windows: what it moves, what it may not, and that after a revocation nothing of it lands.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{GRACE, Rig, config, pattern};
use nvme_driver::clock::ManualClock;
use nvme_driver::controller::{Controller, ControllerOptions};
use nvme_driver::disk::Disk;
use nvme_driver::emu::{Config, EmulatedController, Fault, Rule, Target};
use nvme_driver::nvme_disk::NvmeDisk;
use nvme_driver::spec::NvmOpcode;
use nvme_driver::topology::Fence;
use nvme_driver::vfio_user::VfioUserFunction;
use nvme_driver::vfio_user::server::Server;
use p2p::layout::Home;
use p2p::peer::{CopyId, CopyState, EmulatedEngine, NvmePeer};
use p2p::reader::Outcome;
use p2p::windows::{Hold, PeerId, PeerMapping, PeerPath, Progress, Scope};

const W: usize = 16 * 1024;
/// Where on the drive the tests read and write, in blocks of 512 bytes.
const LBA: u64 = 64;

struct Drive {
    emulated: Arc<EmulatedController>,
    controller: Arc<Controller>,
    disk: NvmeDisk,
}

fn drive(cmb_size: u64) -> Drive {
    let emulated = EmulatedController::new(&Config { cmb_size, ..Config::default() }).unwrap();
    let clock = Arc::new(ManualClock::new());
    let controller = Controller::new(emulated.function(), ControllerOptions::default(), clock).unwrap();
    let disk = NvmeDisk::new(&controller).unwrap();
    Drive { emulated, controller, disk }
}

/// Windows of four places, and a drive with bytes of its own that is their peer.
struct Scene {
    rig: Rig,
    client: common::Client,
    hold: Hold,
    drive: Drive,
    peer: NvmePeer,
    id: PeerId,
}

/// `own`: the windows lie in the peer's own CMB. Otherwise in another device's.
fn scene(own: bool, fence: Fence) -> Scene {
    let mut drive = drive(if own { 4 * W as u64 } else { 0 });
    drive.disk.write(LBA, &[0xd7; W]).unwrap();
    let mut rig = match drive.controller.cmb().cmb() {
        Some(cmb) => Rig::over(Some(cmb.data.clone()), config()),
        None => Rig::new(4 * W, config()),
    };
    rig.object(7, 4 * W, W);
    let mut client = rig.client();
    rig.map_host(&mut client, 7, 4 * W);
    let hold = rig.hold(&client, 7, 0, true);
    let peer = NvmePeer::new(&drive.controller, fence).unwrap();
    let id = rig.windows.register_peer(Box::new(peer.clone()));
    Scene { rig, client, hold, drive, peer, id }
}

impl Scene {
    fn map(&mut self, write: bool) -> PeerMapping {
        let (index, now) = (self.hold.handle.index, self.rig.now);
        match self.rig.windows.map_peer(self.id, index, write, &mut self.rig.drive, now).unwrap() {
            PeerPath::Direct(m) => m,
            other => panic!("{other:?}"),
        }
    }

    fn finish(&self, id: CopyId) -> CopyState {
        for _ in 0..100 {
            match self.peer.take_result(id).unwrap() {
                CopyState::Queued => {}
                done => return done,
            }
        }
        panic!("{id:?} is never done");
    }

    /// Lets the drive go on until it has nothing left to do.
    fn let_it_run(&self) {
        for _ in 0..3000 {
            self.drive.emulated.step();
        }
        assert_eq!(self.drive.emulated.faults().held(), 0);
    }

    fn poison(&self) {
        self.rig.drive.cmb.write(0, &vec![0x99; 4 * W]).unwrap();
    }

    fn expect_poison(&self) {
        let mut got = vec![0; 4 * W];
        self.rig.drive.cmb.read(0, &mut got).unwrap();
        assert!(got.iter().all(|b| *b == 0x99), "a late DMA landed in pages that are another's");
    }
}

/// The next read command does its DMA only after so many steps of the controller.
fn delay(drive: &Drive, steps: u32) {
    let read = Target::io(NvmOpcode::Read as u8);
    drive.emulated.faults().inject(Rule::once(read, Fault::Delay { steps }));
}

#[test]
fn its_drive_reads_into_windows_and_writes_from_them() {
    for own in [false, true] {
        let mut s = scene(own, Fence::Unmap);
        let m = s.map(true);
        let write = s.peer.write_to_drive(LBA + 32, m.iova, W).unwrap();
        assert_eq!(s.finish(write), CopyState::Done);
        let mut got = vec![0; W];
        s.drive.disk.read(LBA + 32, &mut got).unwrap();
        assert_eq!(got, (0..W).map(|i| pattern(7, i)).collect::<Vec<_>>());
        let read = s.peer.read_from_drive(LBA, m.iova + 4096, 4096).unwrap();
        assert_eq!(s.finish(read), CopyState::Done);
        assert_eq!(s.client.read(s.hold.handle, 4096, 4096), (Outcome::Copied(Home::Cmb), vec![0xd7; 4096]));
        // What it wrote moves along, and reaches the drive that the windows are of.
        s.rig.revoke(&Scope::Window(s.hold.handle.index));
        assert_eq!(s.client.read(s.hold.handle, 4096, 4096), (Outcome::Copied(Home::Host), vec![0xd7; 4096]));
    }
}

#[test]
fn a_mapping_for_reading_cannot_be_written() {
    for own in [false, true] {
        let mut s = scene(own, Fence::Unmap);
        let m = s.map(false);
        let before = s.client.read(s.hold.handle, 0, 4096);
        let refused = match s.peer.read_from_drive(LBA, m.iova, 4096) {
            Ok(id) => matches!(s.finish(id), CopyState::Failed(_)),
            Err(e) => e.to_string().contains("reading only"),
        };
        assert!(refused);
        // In another device's memory it is the IOMMU that refuses.
        assert_eq!(s.drive.emulated.domain().counters().faults, u64::from(!own));
        assert_eq!(s.client.read(s.hold.handle, 0, 4096), before);
    }
}

#[test]
fn what_makes_no_sense_is_refused_before_it_is_sent() {
    let mut s = scene(false, Fence::Unmap);
    let m = s.map(true);
    for (lba, iova, len) in [
        (LBA, m.iova, 0),
        (LBA, m.iova, 100),
        (LBA, m.iova, 64 << 20),
        (LBA, m.iova - 4096, 4096),
        (LBA, m.iova + W as u64 - 512, 1024),
        (LBA, u64::MAX - 100, 512),
        (u64::MAX - 1, m.iova, 512),
    ] {
        assert!(s.peer.read_from_drive(lba, iova, len).is_err(), "{lba} {iova:#x} {len}");
    }
    assert_eq!(s.peer.poll(), 0);
}

#[test]
fn what_is_in_flight_completes_before_the_revocation_does() {
    let mut s = scene(false, Fence::Unmap);
    let m = s.map(true);
    delay(&s.drive, 6);
    let read = s.peer.read_from_drive(LBA, m.iova, 4096).unwrap();
    let ticket = s.rig.windows.revoke(&Scope::Window(m.window), &mut s.rig.drive, s.rig.now).unwrap();
    s.rig.poll();
    assert!(matches!(s.rig.windows.progress(ticket), Some(Progress::Pending(_))), "it waits for the command");
    assert!(s.peer.read_from_drive(LBA, m.iova, 512).unwrap_err().to_string().contains("revoked"));
    // Each poll looks for the completion, which is what lets this drive go on; no time passes.
    for _ in 0..50 {
        s.rig.poll();
    }
    let Some(Progress::Done(report)) = s.rig.windows.progress(ticket) else { panic!("not done") };
    assert_eq!(report.freed_bytes, W as u64);
    assert_eq!(s.peer.take_result(read), Some(CopyState::Done));
    assert_eq!(s.client.read(s.hold.handle, 0, 4096), (Outcome::Copied(Home::Host), vec![0xd7; 4096]));
}

/// The same for a command that only reads the window; where unmapping is no fence its queue would have to go with all that is in it.
#[test]
fn what_only_reads_completes_too_and_no_queue_has_to_go() {
    for own in [false, true] {
        let mut s = scene(own, Fence::Queue);
        let m = s.map(false);
        let write = Target::io(NvmOpcode::Write as u8);
        s.drive.emulated.faults().inject(Rule::once(write, Fault::Delay { steps: 6 }));
        let write = s.peer.write_to_drive(LBA + 32, m.iova, W).unwrap();
        let ticket = s.rig.windows.revoke(&Scope::Window(m.window), &mut s.rig.drive, s.rig.now).unwrap();
        s.rig.poll();
        assert!(matches!(s.rig.windows.progress(ticket), Some(Progress::Pending(_))), "it waits");
        for _ in 0..50 {
            s.rig.poll();
        }
        assert!(matches!(s.rig.windows.progress(ticket), Some(Progress::Done(_))));
        assert_eq!(s.peer.take_result(write), Some(CopyState::Done));
        let mut got = vec![0; W];
        s.drive.disk.read(LBA + 32, &mut got).unwrap();
        assert_eq!(got, (0..W).map(|i| pattern(7, i)).collect::<Vec<_>>());
    }
}

/// A command that the drive does not finish within the grace: pages are freed and poisoned, and only then it goes on.
fn late_dma(own: bool, fence: Fence) -> (Scene, CopyId) {
    let mut s = scene(own, fence);
    let m = s.map(true);
    delay(&s.drive, 2000);
    let late = s.peer.read_from_drive(LBA, m.iova, W).unwrap();
    s.peer.poll();
    let begun = s.rig.now;
    let report = s.rig.revoke(&Scope::Window(m.window));
    assert!(s.rig.now - begun <= 3 * GRACE);
    assert_eq!((report.freed_bytes, report.quarantined_bytes), (W as u64, 0), "fenced, so nothing can land");
    s.poison();
    s.let_it_run();
    s.expect_poison();
    assert_eq!(s.client.read(s.hold.handle, 0, 4).0, Outcome::Copied(Home::Host));
    (s, late)
}

#[test]
fn late_dma_of_another_controller_faults_in_the_iommu() {
    let (s, late) = late_dma(false, Fence::Unmap);
    assert!(matches!(s.finish(late), CopyState::GivenUp(_)));
    assert_eq!(s.drive.emulated.domain().counters().faults, 1);
}

#[test]
fn where_unmapping_is_no_fence_the_queue_goes_and_its_commands_with_it() {
    // Its own CMB: no IOMMU in between, whatever the topology says of others.
    let (mut s, late) = late_dma(true, Fence::Unmap);
    assert!(matches!(s.finish(late), CopyState::GivenUp(why) if why.contains("given up")));
    assert_eq!(s.drive.emulated.domain().counters().faults, 0);
    // Another device's memory that requests may reach past the IOMMU: nothing is left that could try.
    let (t, late) = late_dma(false, Fence::Queue);
    assert!(matches!(t.finish(late), CopyState::GivenUp(why) if why.contains("given up")));
    assert_eq!(t.drive.emulated.domain().counters().faults, 0);
    // It comes back with the next command.
    let m = s.map(false);
    let write = s.peer.write_to_drive(LBA + 32, m.iova, 4096).unwrap();
    assert_eq!(s.finish(write), CopyState::Done);
}

#[test]
fn a_drained_window_costs_the_others_nothing() {
    let mut s = scene(true, Fence::Queue);
    let other = s.rig.hold(&s.client, 7, W as u64, true);
    let m = s.map(true);
    let now = s.rig.now;
    let n = match s.rig.windows.map_peer(s.id, other.handle.index, true, &mut s.rig.drive, now).unwrap() {
        PeerPath::Direct(n) => n,
        path => panic!("{path:?}"),
    };
    delay(&s.drive, 50);
    let under_way = s.peer.read_from_drive(LBA, n.iova, 4096).unwrap();
    s.rig.revoke(&Scope::Window(m.window));
    let done = (0..100).map(|_| s.peer.take_result(under_way)).find(|r| *r != Some(CopyState::Queued));
    assert_eq!(done, Some(Some(CopyState::Done)), "its queue had to go for a window that was idle");
}

#[test]
fn several_peers_share_a_window_and_leave_one_by_one() {
    let mut s = scene(false, Fence::Unmap);
    let engine = EmulatedEngine::new("dma0", W).unwrap();
    let second = s.rig.windows.register_peer(Box::new(engine.clone()));
    let m = s.map(true);
    let now = s.rig.now;
    let n = match s.rig.windows.map_peer(second, m.window, false, &mut s.rig.drive, now).unwrap() {
        PeerPath::Direct(n) => n,
        path => panic!("{path:?}"),
    };
    let read = s.peer.read_from_drive(LBA, m.iova, 4096).unwrap();
    assert_eq!(s.finish(read), CopyState::Done);
    engine.copy(n.iova, 0, 4096, false).unwrap();
    let mut got = vec![0; 4096];
    engine.local().read(0, &mut got).unwrap();
    assert_eq!(got, vec![0xd7; 4096], "what one peer wrote the other reads");
    assert_eq!(s.rig.windows.window_mappings(m.window).count(), 2);
    s.rig.revoke(&Scope::Peer(s.id));
    assert!(s.peer.read_from_drive(LBA, m.iova, 512).is_err());
    engine.copy(n.iova, 0, 64, false).unwrap();
    assert_eq!(s.rig.windows.window_mappings(m.window).collect::<Vec<_>>(), [n]);
}

#[test]
fn an_address_is_not_used_again_at_once() {
    let mut s = scene(false, Fence::Unmap);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..50 {
        let m = s.map(false);
        assert!(seen.insert(m.iova), "{:#x} came round", m.iova);
        s.rig.windows.unmap_peer(s.id, m.window).unwrap();
    }
    let mappings = s.drive.emulated.domain().counters().mappings;
    s.rig.windows.unregister_peer(s.id, s.rig.now).unwrap();
    assert_eq!(s.drive.emulated.domain().counters().mappings, mappings);
}

#[test]
fn a_controller_in_another_process_is_given_the_window_as_a_descriptor() {
    let emulated = EmulatedController::new(&Config::default()).unwrap();
    let socket = std::env::temp_dir().join(format!("p2p-nvme-peer-{}", std::process::id()));
    let server = Server::bind(&socket, emulated.function()).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&stop);
    let served = std::thread::spawn(move || server.run(&asked).unwrap());
    {
        let function = VfioUserFunction::connect(&socket).unwrap();
        let clock = Arc::new(nvme_driver::clock::SystemClock::new());
        let controller = Controller::new(function, ControllerOptions::default(), clock).unwrap();
        let mut disk = NvmeDisk::new(&controller).unwrap();
        disk.write(LBA, &[0xd7; 4096]).unwrap();
        let mut rig = Rig::new(4 * W, config());
        rig.object(7, W, W);
        let mut c = rig.client();
        rig.map_host(&mut c, 7, W);
        let hold = rig.hold(&c, 7, 0, true);
        let peer = NvmePeer::new(&controller, Fence::Unmap).unwrap();
        let id = rig.windows.register_peer(Box::new(peer.clone()));
        let now = rig.now;
        let m = match rig.windows.map_peer(id, hold.handle.index, true, &mut rig.drive, now).unwrap() {
            PeerPath::Direct(m) => m,
            other => panic!("{other:?}"),
        };
        let read = peer.read_from_drive(LBA, m.iova, 4096).unwrap();
        while peer.poll() > 0 {
            std::thread::yield_now();
        }
        assert_eq!(peer.take_result(read), Some(CopyState::Done));
        assert_eq!(c.read(hold.handle, 0, 4096), (Outcome::Copied(Home::Cmb), vec![0xd7; 4096]));
        let mapped = emulated.domain().counters().mappings;
        rig.revoke(&Scope::Window(m.window));
        assert_eq!(emulated.domain().counters().mappings, mapped - 1, "the other process still has it");
        assert_eq!(c.read(hold.handle, 0, 4096), (Outcome::Copied(Home::Host), vec![0xd7; 4096]));
    }
    stop.store(true, Ordering::Release);
    served.join().unwrap();
}
