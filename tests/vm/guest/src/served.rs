//! `cmbfs serve` on one QEMU drive with the other as a peer, both behind the IOMMU: a client has that one's blocks read into windows and
//! windows written to its blocks, while the windows are taken back all the time. QEMU reports success for a DMA that faulted, so the
//! bytes decide.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nvme_driver::controller::ControllerOptions;
use nvme_driver::disk::Disk;
use nvme_driver::nvme_disk::NvmeDisk;
use nvme_driver::vfio;
use shm_api::client::{Client, File, Mapped, OpenMode, PeerDrive};

use crate::driver::controller;
use crate::lab::{Case, Outcome, addresses, expect, pattern};
use crate::stack::{Server, cmbfs};

pub(crate) const CASES: &[(&str, Case)] = &[("served-peer", served_peer)];

/// Bytes of a window: few, for all of them are looked at through the CMB, where QEMU emulates every load.
const W: u64 = 64 << 10;
const WINDOWS: u64 = 4;
/// Where on the second drive its own bytes are, and where those of the windows go.
const THEIRS: u64 = 4 << 20;
const OURS: u64 = 16 << 20;
/// Rounds, and milliseconds that a revocation waits for what the drive has in flight: long enough for that to complete; and none, so that
/// what is in flight is cut off.
const PARTS: [(u64, &str); 2] = [(8, "2000"), (6, "0")];

/// What the second drive has for a window in some round.
fn theirs(n: u64) -> Vec<u8> {
    pattern(600 + n % 8, W as usize)
}

fn served_peer() -> Outcome {
    let [a, b] = addresses()?;
    vfio::bind(a)?;
    vfio::bind(b)?;
    {
        let mut other = NvmeDisk::new(&controller(1, ControllerOptions::default())?)?;
        for n in 0..8 {
            other.write((THEIRS + n * W) / 512, &theirs(n))?;
        }
        other.flush()?;
    }
    let (a, b) = (format!("pci:{a}"), format!("pci:{b}"));
    std::fs::write("/tmp/local", pattern(79, (WINDOWS * W) as usize))?;
    cmbfs(&["mkfs", &a, "--force"])?;
    cmbfs(&["put", &a, "/tmp/local", "/f"])?;
    let mut stored = Vec::new();
    for (rounds, grace) in PARTS {
        stored.extend(part(&a, &b, stored.len() as u64, rounds, grace)?);
    }
    let mut other = NvmeDisk::new(&controller(1, ControllerOptions::default())?)?;
    for (n, expected) in stored.iter().enumerate() {
        let mut got = vec![0; W as usize];
        other.read((OURS + n as u64 * W) / 512, &mut got)?;
        expect(&got == expected, format!("what was stored in round {n} is not on the second drive"))?;
    }
    drop(other);
    println!("{}", String::from_utf8_lossy(&cmbfs(&["check", &a])?));
    Ok(())
}

/// A socket is there a moment before it is listened on.
fn connect() -> Outcome<Client> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match Client::connect("/tmp/sock") {
            Ok(client) => return Ok(client),
            Err(e) => expect(Instant::now() < deadline, e.to_string())?,
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// So many rounds under a storm of revocations, the `first` on. What was stored on the second drive.
fn part(a: &str, b: &str, first: u64, count: u64, grace: &str) -> Outcome<Vec<Vec<u8>>> {
    let _server =
        Server::start(a, "/tmp/sock", &["--peer-write", b, "--window", "64K", "--grace-ms", grace])?;
    let (client, revoker) = (connect()?, connect()?);
    let file = client.open("/f", OpenMode::write())?;
    let mapped = file.map(0, WINDOWS * W)?;
    let drive = client.open_drive(b)?;
    let said = String::from_utf8_lossy(&cmbfs(&["peers", "--socket", "/tmp/sock"])?).into_owned();
    println!("{said}");
    expect(said.contains(b) && !said.contains("no way"), "it is not listed as a peer with a way to the CMB")?;
    let (revoked, over) = (AtomicU32::new(0), AtomicBool::new(false));
    let stored = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) && revoker.revoke("/f").is_ok() {
                revoked.fetch_add(1, Ordering::AcqRel);
            }
        });
        let stored = rounds(&drive, &file, &mapped, first..first + count).map_err(|e| e.to_string());
        over.store(true, Ordering::Release);
        stored
    })?;
    let revoked = revoked.into_inner();
    drive.flush()?;
    file.commit()?;
    let peers = client.peers()?.peers;
    let peer = peers.first().ok_or("the drive is no peer any more")?;
    println!(
        "grace {grace} ms: {revoked} revocations; {} bytes by DMA, {} copied",
        peer.direct_bytes, peer.bounced_bytes
    );
    expect(revoked > 3, "hardly anything was taken back: the case shows nothing")?;
    expect(grace == "0" || peer.direct_bytes > 0, "no byte went from drive to drive")?;
    // The server is killed here.
    Ok(stored)
}

/// Each round fills a window from the second drive, looks at it, changes a word of it and stores it there again. What was stored.
fn rounds(drive: &PeerDrive, file: &File, mapped: &Mapped, rounds: Range<u64>) -> Outcome<Vec<Vec<u8>>> {
    let mut stored = Vec::new();
    let mut got = vec![0; W as usize];
    for round in rounds {
        let window = round % WINDOWS * W;
        let filled = drive.fill(file, window, THEIRS + round % 8 * W, W)?;
        mapped.read(window, &mut got)?;
        let mut expected = theirs(round);
        expect(got == expected, format!("round {round}: not what the second drive has ({filled:?})"))?;
        let word = round.to_le_bytes();
        mapped.write(window + 8192, &word)?;
        expected[8192..8200].copy_from_slice(&word);
        drive.store(file, window, OURS + round * W, W)?;
        stored.push(expected);
    }
    Ok(stored)
}
