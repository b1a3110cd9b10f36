//! Windows that are taken back while the drive is at them, and a drive that fails.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nvme_driver::emu::{Fault, Rule, Target};
use nvme_driver::spec::{NvmOpcode, Status};
use nvme_driver::topology::Fence;
use shm_api::client::PeerDrive;
use shm_api::protocol::ErrorCode;
use shm_api::server::PeerDevice;

use crate::common::{SMALL, Setup, until};
use crate::rig::{AT, Drive, NAME, W, content, file, pattern, refused};

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
