//! Peers of a server: what lists them, and which path their reads take.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]
use nvme_driver::mem::Mapping;
use shm_api::client::{Client, OpenMode, Peer};
use shm_api::protocol::ErrorCode;

mod common;
use common::{SMALL, Serving, Setup};

const W: u64 = 65_536;

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed).collect()
}

fn file(client: &Client, path: &str, bytes: &[u8]) -> shm_api::client::File {
    let file = client.open(path, OpenMode::create()).unwrap();
    file.write_at(0, bytes).unwrap();
    file.commit().unwrap();
    file
}

fn local(memory: &Mapping, at: usize, len: usize) -> Vec<u8> {
    let mut got = vec![0; len];
    memory.read(at, &mut got).unwrap();
    got
}

#[test]
fn peers_are_listed_with_what_they_reach_by_file_and_by_peer() {
    let serving = Serving::start(SMALL);
    let (client, other) = (serving.client(), serving.client());
    let bytes = pattern(2 * W as usize, 1);
    let (a, b) = (file(&client, "/a", &bytes), file(&client, "/b", &bytes));
    let _held = (a.map(0, 2 * W).unwrap(), b.map(0, W).unwrap());
    assert!(client.peers().unwrap().peers.is_empty());
    let (first, second) = (client.attach_peer(4096).unwrap(), client.attach_peer(4096).unwrap());
    first.map(&a, 0, false).unwrap();
    let written = first.map(&a, W, true).unwrap();
    second.map(&a, 0, false).unwrap();
    second.map(&b, 0, false).unwrap();
    // Whoever asks, of the same user.
    let list = other.peers().unwrap();
    assert_eq!(list.peers.iter().map(|p| p.mappings).collect::<Vec<_>>(), [2, 2], "{list:?}");
    assert_ne!(list.peers[0].name, list.peers[1].name);
    let ino = client.stat("/a").unwrap().ino;
    let of_a: Vec<_> =
        list.mappings.iter().filter(|m| m.ino == ino).map(|m| (m.offset, m.len, m.writable)).collect();
    assert_eq!(of_a, [(0, W, false), (W, W, true), (0, W, false)], "{list:?}");
    assert!(list.mappings.iter().any(|m| m.iova == written.iova && m.writable), "{list:?}");
    // Of one file: by offset, and only those who reach it.
    let of = |path: &str| other.peers_of(client.stat(path).unwrap().ino).unwrap();
    let of_a = of("/a");
    assert_eq!(of_a.peers.iter().map(|p| p.mappings).collect::<Vec<_>>(), [2, 1], "{of_a:?}");
    let rows: Vec<_> = of_a.mappings.iter().map(|m| (m.offset, m.peer, m.writable)).collect();
    let (one, two) = (list.peers[0].peer, list.peers[1].peer);
    assert_eq!(rows, [(0, one, false), (0, two, false), (W, one, true)], "{of_a:?}");
    assert!(of_a.mappings.iter().all(|m| m.ino == ino) && of_a.all_mappings == 3, "{of_a:?}");
    let of_b = of("/b");
    assert_eq!((of_b.peers.len(), of_b.peers[0].peer, of_b.all_mappings), (1, two, 1), "{of_b:?}");
    file(&client, "/c", &bytes);
    assert_eq!((of("/c").peers.len(), of("/c").all_mappings), (0, 0));
    first.revoke().unwrap();
    let list = other.peers().unwrap();
    assert_eq!(list.peers.iter().map(|p| p.mappings).collect::<Vec<_>>(), [0, 2], "{list:?}");
    drop((first, second));
    assert_eq!(
        other.peers().unwrap(),
        shm_api::client::PeerList { peers: vec![], mappings: vec![], all_mappings: 0 }
    );
}

fn read_all(peer: &Peer, file: &shm_api::client::File, bytes: &[u8]) -> Vec<(bool, String)> {
    let mut ways = Vec::new();
    for offset in (0..bytes.len() as u64).step_by(W as usize) {
        let len = W.min(bytes.len() as u64 - offset);
        let moved = peer.read(file, offset, 0, len).unwrap();
        assert_eq!(moved.bytes, len);
        let expected = &bytes[offset as usize..(offset + len) as usize];
        assert!(local(peer.local(), 0, len as usize) == expected, "{len} bytes at {offset} differ");
        ways.push((moved.direct, moved.reason));
    }
    ways
}

#[test]
fn a_peers_read_takes_the_cmb_where_there_is_one_and_says_so() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let bytes = pattern(3 * W as usize - 100, 2);
    let file = file(&client, "/a", &bytes);
    let _held = file.map_read(0, bytes.len() as u64).unwrap();
    let peer = client.attach_peer(W).unwrap();
    assert!(read_all(&peer, &file, &bytes).iter().all(|(direct, _)| *direct));
    client.revoke("/a").unwrap();
    assert!(read_all(&peer, &file, &bytes).iter().all(|(direct, _)| *direct), "it is mapped again");
    let status = client.status().unwrap();
    let peer_bytes: u64 = status.paths.iter().filter(|p| p.path == "peer to peer").map(|p| p.bytes).sum();
    assert_eq!(peer_bytes, 2 * bytes.len() as u64, "{status:?}");
    // What is not in one window, not mapped, or not in its memory, is refused.
    for (offset, local, len) in
        [(0, 0, W + 1), (W - 1, 0, 2), (0, 1, W), (0, 0, 0), (u64::MAX, 0, 8), (0, u64::MAX, 8)]
    {
        assert!(peer.read(&file, offset, local, len).is_err(), "{offset} {local} {len}");
    }
}

#[test]
fn the_peers_of_one_user_share_a_limit_of_memory() {
    const MIB: u64 = 1 << 20;
    let serving = Serving::start(SMALL);
    let (client, other) = (serving.client(), serving.client());
    let refused = |client: &Client, mib: u64, left: u64| {
        let said = client.attach_peer(mib * MIB).map(drop).unwrap_err();
        assert_eq!(said.code(), Some(ErrorCode::TooMany), "{said}");
        assert!(said.to_string().contains(&format!("may have {} more", left * MIB)), "{said}");
    };
    let first = client.attach_peer(600 * MIB).unwrap();
    refused(&client, 425, 424);
    refused(&other, 425, 424);
    let second = other.attach_peer(424 * MIB).unwrap();
    refused(&client, 1, 0);
    drop(first);
    refused(&client, 601, 600);
    let third = client.attach_peer(600 * MIB).unwrap();
    // A connection that ends gives back what it had.
    drop((second, other));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while client.attach_peer(424 * MIB).is_err() {
        assert!(std::time::Instant::now() < deadline, "the memory of a client that left does not come back");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    drop(third);
}

#[test]
fn without_a_cmb_a_peers_read_goes_through_host_memory_counted_with_the_reason() {
    let serving = Serving::start(Setup { url: "emu:ram?size=64M&cmb=0", ..SMALL });
    let client = serving.client();
    let bytes = pattern(2 * W as usize + 5, 3);
    let file = file(&client, "/a", &bytes);
    let _held = file.map_read(0, bytes.len() as u64).unwrap();
    let peer = client.attach_peer(W).unwrap();
    let ways = read_all(&peer, &file, &bytes);
    assert!(ways.iter().all(|(direct, why)| !direct && why == "no CMB"), "{ways:?}");
    let status = client.status().unwrap();
    let bounced = status.paths.iter().find(|p| p.path == "bounce" && p.reason == "no CMB");
    assert_eq!(bounced.map(|p| p.bytes), Some(bytes.len() as u64), "{status:?}");
}

/// Writes `bytes` window by window out of the peer's memory; which ways they took.
fn write_all(peer: &Peer, file: &shm_api::client::File, bytes: &[u8]) -> Vec<(bool, String)> {
    let mut ways = Vec::new();
    for offset in (0..bytes.len() as u64).step_by(W as usize) {
        let len = W.min(bytes.len() as u64 - offset);
        peer.local().write(0, &bytes[offset as usize..(offset + len) as usize]).unwrap();
        let moved = peer.write(file, offset, 0, len).unwrap();
        assert_eq!(moved.bytes, len);
        ways.push((moved.direct, moved.reason));
    }
    ways
}

#[test]
fn a_peer_that_is_not_coherent_reads_by_dma_and_writes_through_host_memory_and_status_says_why() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let (old, new) = (pattern(2 * W as usize, 4), pattern(2 * W as usize, 5));
    let file = file(&client, "/a", &old);
    let held = file.map(0, old.len() as u64).unwrap();
    let peer = client.attach_incoherent_peer(W).unwrap();
    assert!(read_all(&peer, &file, &old).iter().all(|(direct, _)| *direct));
    let refused = peer.map(&file, 0, true).unwrap_err().to_string();
    assert!(refused.contains("peer DMA is not coherent"), "{refused}");
    let ways = write_all(&peer, &file, &new);
    assert!(ways.iter().all(|(direct, why)| !direct && why == "peer DMA is not coherent"), "{ways:?}");
    let mut got = vec![0; new.len()];
    held.read(0, &mut got).unwrap();
    assert!(got == new, "what the peer wrote did not arrive");
    assert!(read_all(&peer, &file, &new).iter().all(|(direct, _)| *direct));
    let status = client.status().unwrap();
    let counted = status.paths.iter().find(|p| p.path == "bounce" && p.reason == "peer DMA is not coherent");
    assert_eq!(counted.map(|p| p.bytes), Some(new.len() as u64), "{status:?}");
    // Durable like anything else, and not to be had through a file that is open for reading only.
    file.commit().unwrap();
    client.revoke("/a").unwrap();
    held.read(0, &mut got).unwrap();
    assert!(got == new);
    let read_only = client.open("/a", OpenMode::read()).unwrap();
    let _held = read_only.map_read(0, W).unwrap();
    assert!(peer.write(&read_only, 0, 0, 8).unwrap_err().to_string().contains("reading only"));
}

#[test]
fn a_peers_write_takes_the_cmb_where_it_may() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let (old, new) = (pattern(2 * W as usize, 6), pattern(2 * W as usize, 7));
    let file = file(&client, "/a", &old);
    let held = file.map(0, old.len() as u64).unwrap();
    let peer = client.attach_peer(W).unwrap();
    assert!(write_all(&peer, &file, &new).iter().all(|(direct, why)| *direct && why == "asked for"));
    let mut got = vec![0; new.len()];
    held.read(0, &mut got).unwrap();
    assert!(got == new, "what the peer wrote did not arrive");
    let status = client.status().unwrap();
    let peer_bytes: u64 = status.paths.iter().filter(|p| p.path == "peer to peer").map(|p| p.bytes).sum();
    assert_eq!(peer_bytes, new.len() as u64, "{status:?}");
    for (offset, local, len) in [(0, 0, W + 1), (W - 1, 0, 2), (0, 1, W), (0, 0, 0), (u64::MAX, 0, 8)] {
        assert!(peer.write(&file, offset, local, len).is_err(), "{offset} {local} {len}");
    }
}
