//! Raw memory through server and clients: the API of a file, and no file.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use common::{Process, SMALL, Serving, connect, role, spawn, until};
use shm_api::client::{ClientError, OpenMode};
use shm_api::protocol::ErrorCode;

const WINDOW: u64 = SMALL.window as u64;

fn code(result: Result<impl Sized, ClientError>) -> Option<ErrorCode> {
    match result {
        Err(ClientError::Server(e)) => Some(e.code),
        _ => None,
    }
}

#[test]
fn helper_process() {
    let Some((role, args)) = role() else { return };
    assert_eq!(role, "hold");
    let memory = connect(std::path::Path::new(&args[0])).allocate(3 * WINDOW).unwrap();
    let mapped = memory.map(0, 3 * WINDOW).unwrap();
    mapped.write(0, &[1; 4096]).unwrap();
    println!("\nready");
    std::thread::sleep(std::time::Duration::from_secs(100));
    drop(mapped);
}

#[test]
fn it_is_written_revoked_read_by_others_and_by_peers_and_freed() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let used = client.status().unwrap().cmb_used;
    let memory = client.allocate_shared("scratch", 2 * WINDOW + 100).unwrap();
    assert_eq!(memory.size().unwrap(), 2 * WINDOW + 100);
    let mapped = memory.map(0, memory.size().unwrap()).unwrap();
    mapped.write(WINDOW - 4, b"shared").unwrap();
    assert_eq!(mapped.paths().host_writes, 0, "in the CMB");
    // Others of the same user, by its name.
    let other = serving.client();
    assert_eq!(code(other.allocate_shared("scratch", 7)), Some(ErrorCode::Exists));
    assert_eq!(code(other.allocate_shared("nothing", 0)), Some(ErrorCode::NotFound));
    let theirs = other.allocate_shared("scratch", 0).unwrap();
    let mut got = [0; 6];
    assert_eq!(theirs.read_at(WINDOW - 4, &mut got).unwrap(), 6);
    assert_eq!(&got, b"shared");
    // A peer, until the window is revoked; then the bytes are in the host cache.
    let peer = client.attach_peer(4096).unwrap();
    let window = peer.map(&memory, WINDOW, false).unwrap();
    peer.dma_read(window.iova, 0, 4096).unwrap();
    peer.local().read(0, &mut got[..2]).unwrap();
    assert_eq!(&got[..2], b"ed");
    assert_eq!(memory.revoke_window(WINDOW).unwrap().windows, 1);
    assert_eq!(code(peer.dma_read(window.iova, 0, 4096)), Some(ErrorCode::PeerFault));
    client.revoke_all().unwrap();
    mapped.read(WINDOW - 4, &mut got).unwrap();
    assert_eq!(&got, b"shared");
    // What only files have.
    assert_eq!(code(memory.commit()), Some(ErrorCode::Unsupported));
    assert_eq!(code(memory.truncate(1)), Some(ErrorCode::Unsupported));
    assert_eq!(code(memory.map(0, 3 * WINDOW + 1)), Some(ErrorCode::Invalid), "nothing is behind its end");
    assert!(client.list("/").unwrap().is_empty());
    drop((mapped, memory, peer));
    assert_eq!(theirs.read_at(WINDOW - 4, &mut got).unwrap(), 6, "others have it still");
    drop(theirs);
    until("it is freed", || {
        let status = client.status().unwrap();
        (status.cmb_used, status.host_bytes) == (used, 0)
    });
    assert_eq!(code(client.allocate_shared("scratch", 0)), Some(ErrorCode::NotFound));
    assert_eq!(code(client.allocate(1 << 40)), Some(ErrorCode::TooBig));
    // A file all the same.
    client.open("/scratch", OpenMode::create()).unwrap().write_at(0, b"file").unwrap();
}

#[test]
fn that_of_a_killed_client_comes_back() {
    use std::io::{BufRead, BufReader};
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let mut process: Process = spawn("hold", &[serving.socket.to_str().unwrap()]);
    let out = BufReader::new(process.0.stdout.take().unwrap());
    assert!(out.lines().any(|line| line.unwrap() == "ready"));
    assert_eq!(client.status().unwrap().cmb_used, WINDOW, "one window of three was touched");
    process.0.kill().unwrap();
    until("its memory is free", || client.status().unwrap().cmb_used == 0);
}
