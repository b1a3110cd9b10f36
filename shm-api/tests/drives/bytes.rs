//! Bytes by DMA and through host memory: which of them, where to, and that they are durable.

use nvme_driver::emu::PowerCut;
use p2p::counters::Reason;
use p2p::drive_copy::Obstacle;
use shm_api::client::OpenMode;
use shm_api::protocol::ErrorCode;
use shm_api::server::PeerDevice;

use crate::common::{SMALL, Setup};
use crate::rig::{AT, Drive, NAME, W, content, file, pattern, refused};

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
