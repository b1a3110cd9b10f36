//! A drive of the server's as a peer: its blocks go to windows and come from them, for whoever may, and no other way.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{SMALL, Serving, Setup, role, spawn, until};
use nvme_driver::clock::SystemClock;
use nvme_driver::controller::{Controller, ControllerOptions};
use nvme_driver::disk::Disk;
use nvme_driver::emu::{Config, EmulatedController, Fault, PowerCut, Rule, Target};
use nvme_driver::nvme_disk::NvmeDisk;
use nvme_driver::spec::{NvmOpcode, Status};
use nvme_driver::topology::Fence;
use p2p::counters::Reason;
use p2p::drive_copy::Obstacle;
use shm_api::client::{Client, ClientError, File, Mapped, OpenMode, PeerDrive};
use shm_api::protocol::ErrorCode;
use shm_api::server::PeerDevice;

const W: u64 = 65_536;
const NAME: &str = "emu:other.img";
const NOBODY: u32 = 65_534;
/// Where on the drive the tests put things, in bytes.
const AT: u64 = 1 << 20;

fn pattern(len: u64, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed).collect()
}

/// Another drive, with bytes of its own.
struct Drive {
    emulated: Arc<EmulatedController>,
    controller: Arc<Controller>,
    disk: NvmeDisk,
}

impl Drive {
    fn new() -> Self {
        // Long, for a command that is held goes on only as fast as a busy machine lets the server look at it.
        Self::with_timeout(Duration::from_secs(20))
    }

    fn with_timeout(io_timeout: Duration) -> Self {
        let emulated = EmulatedController::new(&Config::default()).unwrap();
        let options =
            ControllerOptions { io_timeout, admin_timeout: Duration::from_secs(1), ..Default::default() };
        let controller = Controller::new(emulated.function(), options, Arc::new(SystemClock::new())).unwrap();
        let disk = NvmeDisk::new(&controller).unwrap();
        Self { emulated, controller, disk }
    }

    fn peer(&self) -> PeerDevice {
        PeerDevice { writable: true, ..PeerDevice::new(NAME, &self.controller, Fence::Unmap) }
    }

    fn serve(&self, setup: Setup<'_>, device: PeerDevice) -> Serving {
        Serving::start_with(setup, |options| shm_api::server::ServerOptions {
            peers: vec![device],
            ..options
        })
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.disk.write(at / 512, bytes).unwrap();
    }

    fn get(&mut self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.disk.read(at / 512, &mut bytes).unwrap();
        bytes
    }

    /// What happens to the next command with this opcode at these bytes or later.
    fn next(&self, opcode: NvmOpcode, fault: Fault) {
        let target = Target { lba: Some(AT / 512..=u64::MAX), ..Target::io(opcode as u8) };
        self.emulated.faults().inject(Rule::once(target, fault));
    }

    fn mappings(&self) -> u64 {
        self.emulated.domain().counters().mappings
    }
}

/// A file of so many windows, mapped for writing.
fn file(client: &Client, path: &str, len: u64) -> (File, Mapped) {
    let file = client.open(path, OpenMode::create()).unwrap();
    file.write_at(0, &vec![0x11; len as usize]).unwrap();
    file.commit().unwrap();
    let mapped = file.map(0, len).unwrap();
    (file, mapped)
}

fn content(mapped: &Mapped, at: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    mapped.read(at, &mut bytes).unwrap();
    bytes
}

fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>, code: ErrorCode) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.code(), Some(code), "{error}");
    error.to_string()
}

#[test]
fn blocks_go_to_windows_and_come_from_them_by_dma_and_are_counted() {
    let mut other = Drive::new();
    let (theirs, ours) = (pattern(2 * W, 1), pattern(2 * W, 2));
    other.put(AT, &theirs);
    let serving = other.serve(SMALL, other.peer());
    let client = serving.client();
    let (file, mapped) = file(&client, "/a", 2 * W);
    let drive = client.open_drive(NAME).unwrap();
    assert_eq!((drive.bytes(), drive.block_size(), drive.is_writable()), (64 << 20, 512, true));
    let before = other.emulated.counters();
    for at in [0, W] {
        let moved = drive.fill(&file, at, AT + at, W).unwrap();
        assert_eq!((moved.bytes, moved.direct, moved.reason.as_str()), (W, true, "asked for"));
    }
    assert!(content(&mapped, 0, 2 * W) == theirs, "what the drive read differs");
    // Part of a window, not at a page's edge, and back to the drive.
    mapped.write(0, &ours).unwrap();
    drive.fill(&file, W + 512, AT + 1024, 1536).unwrap();
    let mut expected = ours;
    expected[W as usize + 512..W as usize + 2048].copy_from_slice(&theirs[1024..2560]);
    for at in [0, W] {
        assert!(drive.store(&file, at, 2 * AT + at, W).unwrap().direct);
    }
    let after = other.emulated.counters();
    let (to, from) = (after.drive_to_peer - before.drive_to_peer, after.peer_to_drive - before.peer_to_drive);
    assert_eq!((to, from), (2 * W + 1536, 2 * W));
    assert_eq!((after.drive_to_host, after.host_to_drive), (before.drive_to_host, before.host_to_drive));
    assert!(other.get(2 * AT, 2 * W) == expected, "what the drive wrote differs");
    // What came from it is the file's like anything else.
    file.commit().unwrap();
    client.revoke("/a").unwrap();
    assert!(content(&mapped, 0, 2 * W) == expected);
    let status = client.status().unwrap();
    let counted: u64 = status.paths.iter().filter(|p| p.path == "peer to peer").map(|p| p.bytes).sum();
    assert_eq!(counted, 4 * W + 1536, "{status:?}");
    let list = client.peers().unwrap();
    let [listed] = &list.peers[..] else { panic!("{list:?}") };
    assert_eq!((listed.name.as_str(), listed.direct_bytes, listed.bounced_bytes), (NAME, counted, 0));
    let state = listed.drive.unwrap();
    assert!(state.writable && state.direct && !state.failed, "{list:?}");
    // Whole blocks of it, inside one window and on the drive.
    for (offset, at, len) in
        [(0, AT + 1, 512), (0, AT, 100), (0, AT, 0), (W - 512, AT, 1024), (2, AT, 512), (0, 64 << 20, 512)]
    {
        refused(drive.fill(&file, offset, at, len), ErrorCode::Invalid);
    }
    refused(drive.fill(&file, 0, u64::MAX - 511, 512), ErrorCode::Invalid);
    refused(client.open_drive("emu:none.img"), ErrorCode::NotFound);
}

#[test]
fn a_dma_reaches_what_this_client_has_mapped_and_nothing_else() {
    let mut other = Drive::new();
    other.put(AT, &pattern(W, 3));
    let serving = other.serve(SMALL, other.peer());
    let (client, second) = (serving.client(), serving.client());
    let (file, mapped) = file(&client, "/a", 2 * W);
    let drive = client.open_drive(NAME).unwrap();
    let window = drive.map(&file, 0, true).unwrap();
    assert_eq!((window.len, window.first, window.in_cmb), (W, 0, true));
    assert_eq!(drive.dma_fill(window.iova + 4096, AT, 4096).unwrap(), 4096);
    assert!(content(&mapped, 4096, 4096) == pattern(4096, 3));
    drive.dma_store(window.iova, 2 * AT, W).unwrap();
    let mut expected = vec![0x11; W as usize];
    expected[4096..8192].copy_from_slice(&pattern(4096, 3));
    assert!(other.get(2 * AT, W) == expected);
    // Mapped for reading by another client: neither its own to write, nor what only the first one has mapped.
    let theirs = second.open_drive(NAME).unwrap();
    let read_only = second.open("/a", OpenMode::read()).unwrap();
    let _held = read_only.map_read(0, 2 * W).unwrap();
    let shared = theirs.map(&read_only, 0, false).unwrap();
    assert_eq!(shared.iova, window.iova);
    theirs.dma_store(shared.iova, 3 * AT, 512).unwrap();
    refused(theirs.dma_fill(shared.iova, AT, 512), ErrorCode::PeerFault);
    let beside = drive.map(&file, W, false).unwrap();
    refused(theirs.dma_store(beside.iova, 3 * AT, 512), ErrorCode::PeerFault);
    refused(drive.dma_store(window.iova - 4096, 3 * AT, 8192), ErrorCode::PeerFault);
    refused(drive.dma_store(u64::MAX - 511, 3 * AT, 512), ErrorCode::PeerFault);
    refused(theirs.map(&read_only, 0, true), ErrorCode::Denied);
    refused(theirs.fill(&read_only, 0, AT, 512), ErrorCode::Denied);
    // Each takes along what is its own alone.
    let mapped_for = || client.peers().unwrap().peers[0].mappings;
    assert_eq!(mapped_for(), 2);
    drop(drive);
    assert_eq!(mapped_for(), 1);
    theirs.dma_store(shared.iova, 3 * AT, 512).unwrap();
    theirs.revoke().unwrap();
    refused(theirs.dma_store(shared.iova, 3 * AT, 512), ErrorCode::PeerFault);
    theirs.map(&read_only, 0, false).unwrap();
    drop(theirs);
    assert_eq!(mapped_for(), 0);
}

#[test]
fn a_drive_that_is_for_reading_is_not_written() {
    let mut other = Drive::new();
    other.put(AT, &pattern(W, 4));
    let serving = other.serve(SMALL, PeerDevice { writable: false, ..other.peer() });
    let client = serving.client();
    let (file, mapped) = file(&client, "/a", W);
    let drive = client.open_drive(NAME).unwrap();
    assert!(!drive.is_writable());
    drive.fill(&file, 0, AT, W).unwrap();
    assert!(content(&mapped, 0, W) == pattern(W, 4));
    let said = refused(drive.store(&file, 0, 2 * AT, W), ErrorCode::ReadOnly);
    assert!(said.contains("--peer-write"), "{said}");
    let window = drive.map(&file, 0, true).unwrap();
    refused(drive.dma_store(window.iova, 2 * AT, 512), ErrorCode::ReadOnly);
    drive.dma_fill(window.iova, AT, 512).unwrap();
    assert!(other.get(2 * AT, W) == vec![0; W as usize], "it was written");
}

/// Both ways through host memory, in more pieces than one.
fn through_host(setup: Setup<'_>, device: impl Fn(PeerDevice) -> PeerDevice, why: &str) {
    let len = 1 << 20;
    let mut other = Drive::new();
    let (theirs, ours) = (pattern(len, 5), pattern(len, 6));
    other.put(AT, &theirs);
    let serving = other.serve(Setup { window: len as usize, ..setup }, device(other.peer()));
    let client = serving.client();
    let (file, mapped) = file(&client, "/a", len);
    let drive = client.open_drive(NAME).unwrap();
    let said = refused(drive.map(&file, 0, true), ErrorCode::Unsupported);
    assert!(said.contains(why), "{said}");
    let moved = drive.fill(&file, 0, AT, len).unwrap();
    assert_eq!((moved.bytes, moved.direct, moved.reason.as_str()), (len, false, why));
    assert!(content(&mapped, 0, len) == theirs);
    mapped.write(0, &ours).unwrap();
    let moved = drive.store(&file, 0, 16 * AT, len).unwrap();
    assert_eq!((moved.bytes, moved.direct, moved.reason.as_str()), (len, false, why));
    assert!(other.get(16 * AT, len) == ours);
    let status = client.status().unwrap();
    let counted: u64 =
        status.paths.iter().filter(|p| p.path == "bounce" && p.reason == why).map(|p| p.bytes).sum();
    assert_eq!(counted, 2 * len, "{status:?}");
    let list = client.peers().unwrap();
    assert_eq!((list.peers[0].direct_bytes, list.peers[0].bounced_bytes), (0, 2 * len), "{list:?}");
    assert_eq!(other.emulated.counters().drive_to_peer + other.emulated.counters().peer_to_drive, 0);
}

#[test]
fn where_there_is_no_way_bytes_go_through_host_memory_counted_with_the_reason() {
    let wall = Obstacle::new(Reason::Topology, "a wall");
    let bounces = |d: PeerDevice| PeerDevice { obstacle: Some(wall.clone()), ..d };
    through_host(SMALL, bounces, "no path between the devices");
    through_host(Setup { url: "emu:ram?size=64M&cmb=0", ..SMALL }, |d| d, "no CMB");
}

#[test]
fn what_is_flushed_survives_a_power_cut_of_the_drive() {
    let mut other = Drive::new();
    let serving = other.serve(SMALL, other.peer());
    let client = serving.client();
    let (file, mapped) = file(&client, "/a", W);
    let drive = client.open_drive(NAME).unwrap();
    mapped.write(0, &pattern(W, 7)).unwrap();
    drive.store(&file, 0, AT, W).unwrap();
    drive.flush().unwrap();
    drive.store(&file, 0, 2 * AT, W).unwrap();
    other.emulated.power_cut(PowerCut::LoseAll).unwrap();
    // It comes back with a reset, which the next command finds out about.
    other.controller.reset(other.controller.epoch()).unwrap();
    drive.fill(&file, 0, AT, W).unwrap();
    assert!(content(&mapped, 0, W) == pattern(W, 7), "what was flushed is lost");
    assert!(other.get(2 * AT, W) == vec![0; W as usize], "the power cut lost nothing: this shows nothing");
}

#[test]
fn a_drive_that_fails_is_an_error_and_the_server_lives_on() {
    let mut other = Drive::with_timeout(Duration::from_secs(1));
    other.put(AT, &pattern(W, 8));
    let serving = other.serve(SMALL, other.peer());
    let client = serving.client();
    let (file, mapped) = file(&client, "/a", W);
    let drive = client.open_drive(NAME).unwrap();
    let works = |drive: &PeerDrive| {
        mapped.write(0, &vec![0; W as usize]).unwrap();
        drive.fill(&file, 0, AT, W).unwrap();
        assert!(content(&mapped, 0, W) == pattern(W, 8));
    };
    // A bad block, a command that never ends, a flush that fails, a completion of nobody's, a controller that has to be reset.
    other.next(NvmOpcode::Read, Fault::Status(Status::UNRECOVERED_READ_ERROR));
    refused(drive.fill(&file, 0, AT, W), ErrorCode::Device);
    works(&drive);
    other.next(NvmOpcode::Read, Fault::Stall);
    let said = refused(drive.fill(&file, 0, AT, W), ErrorCode::Device);
    assert!(said.contains("1000 ms"), "{said}");
    works(&drive);
    let any = Rule::once(Target::io(NvmOpcode::Flush as u8), Fault::Status(Status::INTERNAL_ERROR));
    other.emulated.faults().inject(any);
    refused(drive.flush(), ErrorCode::Device);
    drive.flush().unwrap();
    other.next(NvmOpcode::Read, Fault::WrongCid(3));
    works(&drive);
    let resets = other.controller.epoch();
    other.emulated.faults().fatal();
    works(&drive);
    assert!(other.controller.epoch() > resets, "it was not reset: this shows nothing");
    // Gone for good: errors, at once, and everything else goes on.
    other.emulated.faults().remove();
    refused(drive.fill(&file, 0, AT, W), ErrorCode::Device);
    refused(drive.flush(), ErrorCode::Device);
    assert!(client.peers().unwrap().peers[0].drive.unwrap().failed);
    client.revoke("/a").unwrap();
    mapped.write(0, b"still here").unwrap();
    file.commit().unwrap();
    drop(drive);
    assert_eq!(client.peers().unwrap().peers[0].mappings, 0);
}

/// What is in flight when its window is taken back completes within the grace, and its bytes move along.
#[test]
fn a_revocation_waits_for_what_the_drive_has_in_flight() {
    let mut other = Drive::new();
    other.put(AT, &pattern(W, 9));
    let serving = other.serve(Setup { grace_ms: 20_000, ..SMALL }, other.peer());
    let client = serving.client();
    let (file, mapped) = file(&client, "/a", W);
    let drive = client.open_drive(NAME).unwrap();
    let window = drive.map(&file, 0, true).unwrap();
    let revoker = serving.client();
    for round in 0..4 {
        let window = if round == 0 { window } else { drive.map(&file, 0, true).unwrap() };
        mapped.write(0, &vec![0; W as usize]).unwrap();
        other.next(NvmOpcode::Read, Fault::Delay { steps: 600 });
        std::thread::scope(|scope| {
            let dma = scope.spawn(|| drive.dma_fill(window.iova, AT, W));
            until("the command is held", || other.emulated.faults().held() > 0 || dma.is_finished());
            revoker.revoke("/a").unwrap();
            assert_eq!(dma.join().unwrap().unwrap(), W);
        });
        assert!(content(&mapped, 0, W) == pattern(W, 9), "what was in flight is lost");
    }
    assert_eq!(other.emulated.domain().counters().faults, 0);
}

/// A command that the drive does not finish within the grace is not waited for: it is cut off, by what the topology asks for.
#[test]
fn what_is_late_is_cut_off_by_the_fence_and_begins_again() {
    for (fence, faults) in [(Fence::Unmap, 1), (Fence::Queue, 0)] {
        let mut other = Drive::new();
        other.put(AT, &pattern(W, 10));
        let serving = other.serve(SMALL, PeerDevice { fence, ..other.peer() });
        let client = serving.client();
        let (file, mapped) = file(&client, "/a", W);
        let drive = client.open_drive(NAME).unwrap();
        drive.map(&file, 0, true).unwrap();
        other.next(NvmOpcode::Read, Fault::Delay { steps: 2000 });
        let revoker = serving.client();
        std::thread::scope(|scope| {
            let fill = scope.spawn(|| drive.fill(&file, 0, AT, W));
            until("the command is held", || other.emulated.faults().held() > 0 || fill.is_finished());
            let report = revoker.revoke("/a").unwrap();
            assert_eq!((report.windows, report.quarantined_pages), (1, 0), "{report:?}");
            assert!(!fill.is_finished(), "it was not late: this shows nothing");
            // Wherever it went, the end is the same.
            assert_eq!(fill.join().unwrap().unwrap().bytes, W);
        });
        assert!(content(&mapped, 0, W) == pattern(W, 10));
        assert_eq!(other.emulated.domain().counters().faults, faults, "{fence:?}");
    }
}

/// A drive that does not finish within the grace, and somebody who revokes all the time: it gets there all the same.
#[test]
fn what_is_cut_off_again_and_again_goes_through_host_memory() {
    let mut other = Drive::new();
    other.put(AT, &pattern(W, 12));
    // Its queue goes with what is late, so nothing is waited for.
    let serving = other.serve(SMALL, PeerDevice { fence: Fence::Queue, ..other.peer() });
    let (client, revoker) = (serving.client(), serving.client());
    let (file, mapped) = file(&client, "/a", W);
    let drive = client.open_drive(NAME).unwrap();
    let read = Target { lba: Some(AT / 512..=u64::MAX), ..Target::io(NvmOpcode::Read as u8) };
    other.emulated.faults().inject(Rule { target: read, skip: 0, times: 3, fault: Fault::Stall });
    std::thread::scope(|scope| {
        let fill = scope.spawn(|| drive.fill(&file, 0, AT, W));
        while !fill.is_finished() {
            revoker.revoke("/a").unwrap();
        }
        let filled = fill.join().unwrap().unwrap();
        assert_eq!((filled.bytes, filled.direct, filled.reason.as_str()), (W, false, "revoked"));
    });
    assert!(content(&mapped, 0, W) == pattern(W, 12));
}

/// Every byte right, whatever is taken back meanwhile; in both directions, by both ways.
#[test]
fn a_storm_of_revocations_changes_no_byte() {
    const WINDOWS: u64 = 4;
    for fence in [Fence::Unmap, Fence::Queue] {
        let mut other = Drive::new();
        for n in 0..8 {
            other.put(AT + n * W, &pattern(W, n as u8));
        }
        let serving = other.serve(SMALL, PeerDevice { fence, ..other.peer() });
        let (client, revoker) = (serving.client(), serving.client());
        let (file, mapped) = file(&client, "/a", WINDOWS * W);
        let drive = client.open_drive(NAME).unwrap();
        let over = AtomicBool::new(false);
        let (mut revoked, mut direct) = (0, 0);
        std::thread::scope(|scope| {
            let storm = scope.spawn(|| {
                let mut count = 0u32;
                while !over.load(Ordering::Acquire) {
                    match count % 4 {
                        0 => revoker.revoke_all().map(|_| ()).unwrap(),
                        1 => drive.revoke().unwrap(),
                        _ => revoker.revoke("/a").map(|_| ()).unwrap(),
                    }
                    count += 1;
                }
                count
            });
            for round in 0..200u64 {
                let (window, from) = (round % WINDOWS * W, AT + round % 8 * W);
                let to = 16 * AT + round % 16 * W;
                let filled = drive.fill(&file, window, from, W).unwrap();
                let expected = pattern(W, (round % 8) as u8);
                assert!(content(&mapped, window, W) == expected, "round {round}: torn, stale or lost");
                // And bytes of this side's, to the drive.
                let word = round.to_le_bytes();
                mapped.write(window + 4096, &word).unwrap();
                let stored = drive.store(&file, window, to, W).unwrap();
                let mut expected = expected;
                expected[4096..4104].copy_from_slice(&word);
                assert!(other.get(to, W) == expected, "round {round}: not what the window held");
                direct += u32::from(filled.direct) + u32::from(stored.direct);
            }
            over.store(true, Ordering::Release);
            revoked = storm.join().unwrap();
        });
        assert!(
            revoked > 20 && direct > 0,
            "{revoked} revocations, {direct} of 400 direct: this shows little"
        );
        drop(drive);
        assert_eq!(client.peers().unwrap().all_mappings, 0);
    }
}

/// A process that has the drive do things until it is killed; or one that may not have it.
#[test]
fn helper_process() {
    let Some((what, args)) = role() else { return };
    let socket = Path::new(&args[0]);
    if what == "stranger" {
        let (uid, gid) = (rustix::fs::Uid::from_raw(NOBODY), rustix::fs::Gid::from_raw(NOBODY));
        rustix::thread::set_thread_groups(&[]).unwrap();
        rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
        rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
        let client = Client::connect(socket).unwrap();
        // That there is one it may know.
        assert_eq!(client.peers().unwrap().peers.len(), 1);
        let said = refused(client.open_drive(NAME), ErrorCode::Denied);
        assert!(said.contains("65534"), "{said}");
        println!("\nok");
    } else {
        let client = Client::connect(socket).unwrap();
        let file = client.open("/a", OpenMode::write()).unwrap();
        let _mapped = file.map(0, 2 * W).unwrap();
        let drive = client.open_drive(NAME).unwrap();
        let window = drive.map(&file, 0, true).unwrap();
        println!("\nmapped");
        std::io::stdout().flush().unwrap();
        // The test has this one go on for long.
        drive.dma_fill(window.iova, AT, W).unwrap();
        unreachable!();
    }
    std::io::stdout().flush().unwrap();
    std::process::exit(0);
}

fn says(child: &mut std::process::Child, word: &str) {
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == word), "it never said {word}");
}

#[test]
fn a_client_that_is_killed_amid_a_dma_gives_its_windows_back() {
    let mut other = Drive::new();
    other.put(AT, &pattern(W, 11));
    // Long, for a client that seems to have left before it is seen dead has its windows revoked.
    let serving = other.serve(Setup { grace_ms: 20_000, ..SMALL }, other.peer());
    let client = serving.client();
    let (file, mapped) = file(&client, "/a", 2 * W);
    // It has its queue, and nothing mapped.
    client.open_drive(NAME).unwrap().fill(&file, 0, 0, 512).unwrap();
    let before = other.mappings();
    other.next(NvmOpcode::Read, Fault::Delay { steps: 3000 });
    let mut helper = spawn("user", &[serving.socket.to_str().unwrap()]);
    says(&mut helper.0, "mapped");
    until("the command is held", || other.emulated.faults().held() > 0);
    helper.0.kill().unwrap();
    helper.0.wait().unwrap();
    assert!(other.emulated.faults().held() > 0, "it was over already: this shows nothing");
    until("its window is taken back from the drive", || client.peers().unwrap().all_mappings == 0);
    assert_eq!((other.mappings(), other.emulated.domain().counters().faults), (before, 0));
    // What was under way has been let finish; the window goes on, and the next one has the drive do things.
    assert!(content(&mapped, 0, W) == pattern(W, 11));
    let drive = client.open_drive(NAME).unwrap();
    drive.fill(&file, W, AT, W).unwrap();
    assert!(content(&mapped, W, W) == pattern(W, 11));
    client.revoke("/a").unwrap();
    assert!(content(&mapped, 0, W) == pattern(W, 11));
}

#[test]
fn a_stranger_may_not_have_raw_blocks() {
    if !rustix::process::geteuid().is_root() {
        return common::skip("a_stranger_may_not_have_raw_blocks", "not root: cannot become another user");
    }
    use std::os::unix::fs::PermissionsExt;
    let other = Drive::new();
    let serving = other.serve(SMALL, other.peer());
    let folder = serving.socket.parent().unwrap();
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&serving.socket, std::fs::Permissions::from_mode(0o666)).unwrap();
    let mut helper = spawn("stranger", &[serving.socket.to_str().unwrap()]);
    says(&mut helper.0, "ok");
    assert!(helper.0.wait().unwrap().success());
}
