//! What can be revoked, and a file whose windows may not live in the CMB.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;
#[path = "common/four.rs"]
mod four;

use std::time::Duration;

use common::{SMALL, Serving, options, until};
use four::{four_windows, map_four, pattern};
use shm_api::Placement;
use shm_api::client::{ClientError, File, OpenMode};
use shm_api::protocol::ErrorCode;
use shm_api::server::{ServerOptions, WriteBack};

const WINDOW: usize = SMALL.window;

/// How many of the file's four windows are read from the CMB.
fn in_cmb(file: &File) -> u64 {
    four::in_cmb(&map_four(file))
}

fn code(result: Result<impl Sized, ClientError>) -> Option<ErrorCode> {
    match result {
        Err(ClientError::Server(e)) => Some(e.code),
        _ => None,
    }
}

#[test]
fn a_byte_range_is_revoked_and_nothing_else_and_again_is_nothing() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let file = four_windows(&client, "/a");
    four_windows(&client, "/b");
    assert_eq!(in_cmb(&file), 4);
    let (offset, len) = (WINDOW as u64 + 7, WINDOW as u64);
    assert_eq!(client.revoke_range("/a", offset, len).unwrap().windows, 2, "two windows have a part of it");
    assert_eq!(client.revoke_range("/a", offset, len).unwrap().windows, 0);
    assert_eq!(client.revoke_range("/a", 0, 0).unwrap().windows, 0);
    assert_eq!(client.revoke_range("/a", u64::MAX, u64::MAX).unwrap().windows, 0);
    assert_eq!(in_cmb(&file), 2);
    assert_eq!(code(client.revoke_range("/none", 0, 1)), Some(ErrorCode::NotFound));
    // Several at once, over one another: each window moves once.
    let moved: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|n| {
                let client = serving.client();
                scope.spawn(move || client.revoke_range("/b", n * 1000, 3 * WINDOW as u64).unwrap().windows)
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert!((4..=16).contains(&moved), "{moved}");
    let b = client.open("/b", OpenMode::read()).unwrap();
    assert_eq!(in_cmb(&b), 0);
}

#[test]
fn a_client_is_revoked_as_a_whole_and_reads_on() {
    let serving = Serving::start(SMALL);
    let (client, other) = (serving.client(), serving.client());
    four_windows(&client, "/a");
    four_windows(&client, "/b");
    let file = other.open("/a", OpenMode::read()).unwrap();
    let mapped = file.map_read(0, 2 * WINDOW as u64).unwrap();
    let people = client.status().unwrap().people;
    let line = people.iter().find(|p| p.client == other.id()).unwrap();
    assert_eq!((line.pid, line.windows), (std::process::id(), 2));
    assert_eq!(client.revoke_client(other.id()).unwrap().windows, 2);
    let mut got = vec![0; 2 * WINDOW];
    mapped.read(0, &mut got).unwrap();
    assert!(got == pattern(4 * WINDOW)[..2 * WINDOW]);
    assert_eq!(mapped.paths().cmb_reads, 0);
    assert_eq!(code(file.map_read(3 * WINDOW as u64, 1)), Some(ErrorCode::Denied));
    // Others are not concerned, and it may come back.
    assert_eq!(in_cmb(&client.open("/b", OpenMode::read()).unwrap()), 4);
    assert_eq!(in_cmb(&serving.client().open("/b", OpenMode::read()).unwrap()), 4);
    assert_eq!(code(client.revoke_client(9999)), Some(ErrorCode::BadHandle));
}

#[test]
fn a_peer_is_revoked_by_its_number_and_its_windows_stay() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let file = four_windows(&client, "/a");
    let peer = client.attach_peer(WINDOW as u64).unwrap();
    let window = peer.map(&file, 0, false).unwrap();
    peer.dma_read(window.iova, 0, 4096).unwrap();
    // The first peer of this server.
    client.revoke_peer(1).unwrap();
    assert_eq!(code(peer.dma_read(window.iova, 0, 4096)), Some(ErrorCode::PeerFault));
    assert_eq!(in_cmb(&file), 4);
    client.revoke_peer(1).unwrap();
    assert_eq!(code(client.revoke_peer(77)), Some(ErrorCode::BadHandle));
}

#[test]
fn a_file_opts_out_of_the_cmb_and_in_again() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let file = four_windows(&client, "/a");
    assert_eq!(client.stat("/a").unwrap().placement, Placement::Auto);
    assert_eq!(client.set_placement("/a", Placement::Host).unwrap().windows, 4);
    assert_eq!((client.stat("/a").unwrap().placement, in_cmb(&file)), (Placement::Host, 0));
    // Whatever is asked for.
    file.map_read(0, 4 * WINDOW as u64).unwrap().prefer_cmb().unwrap();
    assert_eq!((in_cmb(&file), file.stat().unwrap().placement), (0, Placement::Host));
    let other = four_windows(&client, "/b");
    assert_eq!(in_cmb(&other), 4, "a file for itself");
    client.set_placement("/a", Placement::Cmb).unwrap();
    until("it goes back", || {
        file.map_read(0, 4 * WINDOW as u64).unwrap().prefer_cmb().unwrap();
        in_cmb(&file) == 4
    });
    assert_eq!(code(client.set_placement("/none", Placement::Host)), Some(ErrorCode::NotFound));
    assert_eq!(code(client.revoke("")), Some(ErrorCode::IsADirectory));
}

#[test]
fn what_nobody_commits_reaches_the_drive_all_the_same() {
    let device = nvme_driver::open(&SMALL.url.parse().unwrap(), &Default::default()).unwrap();
    let mut disk = device.disk().unwrap();
    common::format(&mut disk, Default::default());
    let filesystem = extent_fs::Filesystem::mount(disk, Default::default()).unwrap();
    let serving = Serving::with(filesystem, |socket| ServerOptions {
        write_back: Some(WriteBack { after: 20_000_000, ..WriteBack::default() }),
        ..options(socket, SMALL)
    });
    let client = serving.client();
    let file = client.open("/a", OpenMode::create()).unwrap();
    let mapped = file.map(0, WINDOW as u64).unwrap();
    mapped.write(0, &[1]).unwrap();
    // Longer than the server spins: it is asleep when the bytes are written, and nobody wakes it for them.
    std::thread::sleep(Duration::from_millis(50));
    let emulated = device.emulated().unwrap();
    let before = emulated.counters();
    mapped.write(0, &pattern(WINDOW)).unwrap();
    until("it is written back", || emulated.counters().cmb_to_drive >= before.cmb_to_drive + WINDOW as u64);
    assert_eq!(emulated.counters().host_to_drive, before.host_to_drive, "no byte of it through host memory");
    let paths = client.status().unwrap().paths;
    assert!(paths.iter().any(|p| (p.path.as_str(), p.reason.as_str()) == ("CMB", "background write-back")));
    assert_eq!(file.commit().unwrap().from_cmb, 0, "nothing was left");
}
