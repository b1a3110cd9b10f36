//! What a client can do with a server, one thing at a time.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use common::{SMALL, Serving};
use shm_api::client::{ClientError, OpenMode};
use shm_api::protocol::ErrorCode;

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 4096 * 7) as u8 ^ seed).collect()
}

#[test]
fn a_file_is_written_mapped_read_and_committed() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let file = client.open("/a", OpenMode::create()).unwrap();
    let bytes = pattern(300_001, 1);
    file.write_at(0, &bytes).unwrap();
    let report = file.commit().unwrap();
    assert_eq!(report.size, 300_001);
    assert!(report.from_cmb >= 300_001, "{report:?}");
    assert_eq!(report.from_host, 0);

    let other = serving.client();
    let file = other.open("/a", OpenMode::read()).unwrap();
    let mut got = vec![0; 400_000];
    assert_eq!(file.read_at(0, &mut got).unwrap(), 300_001);
    assert_eq!(got[..300_001], bytes);
    assert_eq!(file.read_at(300_000, &mut got).unwrap(), 1);
    assert_eq!(file.read_at(300_001, &mut got).unwrap(), 0);
    let paths = other.paths();
    assert!(paths.cmb_reads > 0 && paths.host_reads == 0, "{paths:?}");
}

#[test]
fn a_reader_goes_on_while_its_windows_are_revoked() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let file = client.open("/a", OpenMode::create()).unwrap();
    let bytes = pattern(200_000, 2);
    file.write_at(0, &bytes).unwrap();
    let mapped = file.map(0, 200_000).unwrap();
    let mut got = vec![0; 200_000];
    mapped.read(0, &mut got).unwrap();
    assert_eq!(got, bytes);
    assert_eq!(mapped.paths().host_reads, 0);
    let report = client.revoke("/a").unwrap();
    assert_eq!((report.windows, report.freed_pages, report.quarantined_pages), (4, 64, 0), "{report:?}");
    let before = mapped.paths();
    got.fill(0);
    mapped.read(0, &mut got).unwrap();
    assert_eq!(got, bytes);
    let after = mapped.paths();
    assert_eq!((after.host_reads, after.faults), (4, before.faults), "redirected without asking the server");
    // Not committed yet, and not lost.
    assert_eq!(file.commit().unwrap().from_host, 200_704, "whole pages");
    client.revoke_all().unwrap();
    mapped.read(0, &mut got).unwrap();
    assert_eq!(got, bytes);
}

#[test]
fn names_come_and_go() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    client.mkdir("/d", 0o755).unwrap();
    client.open("/d/x", OpenMode::create()).unwrap().write_at(0, b"x").unwrap();
    client.open("/d/y", OpenMode::create()).unwrap().write_at(0, b"yy").unwrap();
    let names: Vec<_> = client.list("/d").unwrap().into_iter().map(|e| (e.name, e.size)).collect();
    assert_eq!(names, [("x".to_owned(), 1), ("y".to_owned(), 2)]);
    client.rename("/d/x", "/d/y").unwrap();
    assert_eq!(client.stat("/d/y").unwrap().size, 1);
    assert!(client.stat("/d").unwrap().is_dir);
    assert_eq!(client.stat("/d/x").unwrap_err().code(), Some(ErrorCode::NotFound));
    assert_eq!(client.rmdir("/d").unwrap_err().code(), Some(ErrorCode::NotEmpty));
    assert_eq!(client.unlink("/d").unwrap_err().code(), Some(ErrorCode::IsADirectory));
    client.unlink("/d/y").unwrap();
    client.rmdir("/d").unwrap();
    assert_eq!(client.list("/").unwrap(), []);
    for name in 0..700 {
        client.open(&format!("/{name:0200}"), OpenMode::create()).unwrap();
    }
    assert_eq!(client.list("/").unwrap().len(), 700);
    let read = client.open("/nothing", OpenMode::read());
    assert_eq!(read.unwrap_err().code(), Some(ErrorCode::NotFound));
    let twice = client.open(&format!("/{:0200}", 5), OpenMode::create().exclusive());
    assert_eq!(twice.unwrap_err().code(), Some(ErrorCode::Exists));
}

#[test]
fn a_file_is_cut_and_grown_while_it_is_mapped() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let file = client.open("/a", OpenMode::create()).unwrap();
    let bytes = pattern(300_000, 3);
    file.write_at(0, &bytes).unwrap();
    let mapped = file.map_read(0, 300_000).unwrap();
    let mut got = vec![0; 300_000];
    mapped.read(0, &mut got).unwrap();
    file.truncate(100_000).unwrap();
    file.truncate(300_000).unwrap();
    mapped.read(0, &mut got).unwrap();
    assert_eq!(got[..100_000], bytes[..100_000]);
    assert!(got[100_000..].iter().all(|&b| b == 0), "what was cut off does not come back");
    file.commit().unwrap();
    let again = client.open("/a", OpenMode::write().truncate()).unwrap();
    assert_eq!(again.size().unwrap(), 0);
}

#[test]
fn an_unlinked_file_lives_until_it_is_closed() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let free = client.info().unwrap().free_bytes;
    let file = client.open("/a", OpenMode::create()).unwrap();
    let bytes = pattern(1 << 20, 4);
    file.write_at(0, &bytes).unwrap();
    file.commit().unwrap();
    let mapped = file.map_read(0, 1 << 20).unwrap();
    client.unlink("/a").unwrap();
    let mut got = vec![0; 1 << 20];
    mapped.read(0, &mut got).unwrap();
    assert_eq!(got, bytes);
    drop((mapped, file));
    // Its blocks are free when the record that frees them is durable.
    let sync = client.open("/b", OpenMode::create()).unwrap();
    common::until("the blocks come back", || {
        sync.commit().unwrap();
        client.info().unwrap().free_bytes + 65_536 > free
    });
}

/// Most of a sparse file is nobody's window: nothing that concerns the whole file may go through all of it.
#[test]
fn the_whole_of_a_very_large_sparse_file_is_committed() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let file = client.open("/a", OpenMode::create()).unwrap();
    let far = (1 << 50) - 4096;
    for at in [0, far] {
        file.write_at(at, &pattern(4096, 3)).unwrap();
    }
    let report = file.commit().unwrap();
    assert_eq!((report.size, report.from_cmb + report.from_host), (1 << 50, 8192));
    // The server reaches no further, and refuses before it has changed anything.
    let refused = file.write_at(far + 4096, &[1]).unwrap_err();
    assert!(matches!(&refused, ClientError::Server(e) if e.code == ErrorCode::TooBig), "{refused}");
    assert_eq!(client.stat("/a").unwrap().size, 1 << 50);
}

#[test]
fn a_full_device_says_so_before_anything_is_written() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let file = client.open("/a", OpenMode::create()).unwrap();
    let error = file.map(0, 100 << 20).unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NoSpace), "{error}");
    file.write_at(0, b"still works").unwrap();
    file.commit().unwrap();
}

#[test]
fn a_peer_reads_a_window_from_the_cmb_until_it_is_revoked() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let file = client.open("/a", OpenMode::create()).unwrap();
    let bytes = pattern(65_536, 5);
    file.write_at(0, &bytes).unwrap();
    file.commit().unwrap();
    let _mapped = file.map(0, 65_536).unwrap();
    let peer = client.attach_peer(1 << 20).unwrap();
    let window = peer.map(&file, 0, false).unwrap();
    assert!(window.in_cmb);
    assert_eq!(peer.dma_read(window.iova, 4096, 65_536).unwrap(), 65_536);
    let mut got = vec![0; 65_536];
    peer.local().read(4096, &mut got).unwrap();
    assert_eq!(got, bytes);
    assert!(peer.dma_write(window.iova, 0, 8).is_err(), "it is mapped for reading");
    client.revoke("/a").unwrap();
    let late = peer.dma_read(window.iova, 0, 65_536).unwrap_err();
    assert_eq!(late.code(), Some(ErrorCode::PeerFault), "{late}");
    let status = client.status().unwrap();
    assert!(status.paths.iter().any(|p| p.path == "peer to peer" && p.bytes == 65_536), "{status:?}");
}

#[test]
fn a_new_file_is_zeros_even_where_other_files_have_been() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let old = client.open("/old", OpenMode::create()).unwrap();
    let bytes = vec![0xa5; 3 << 20];
    old.write_at(0, &bytes).unwrap();
    old.commit().unwrap();
    client.revoke_all().unwrap();
    let new = client.open("/new", OpenMode::create()).unwrap();
    let mapped = new.map(0, 3 << 20).unwrap();
    let mut got = vec![1; 3 << 20];
    mapped.read(0, &mut got).unwrap();
    assert!(got.iter().all(|&b| b == 0));
    assert!(mapped.paths().cmb_reads > 0, "in pages that held the old file");
}

#[test]
fn bytes_are_read_even_when_no_window_can_be_placed_anywhere() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let mut fs = common::filesystem("emu:ram?size=16M&cmb=0");
    let bytes = pattern(150_000, 9);
    let ino = fs.create("/a", &common::own(extent_fs::NewInode::file())).unwrap();
    fs.write_at(ino, 0, &bytes).unwrap();
    let refusals = p2p::refusal::Refusals::new(0, 1000);
    let options = shm_api::server::ServerOptions { refusals, ..common::options(&socket, SMALL) };
    let server = shm_api::server::Server::new(fs, options).unwrap();
    let stop = server.stop_handle();
    let thread = std::thread::spawn(move || server.run());
    let client = shm_api::client::Client::connect(&socket).unwrap();
    assert!(client.cmb_access().unwrap_err().contains("no CMB"));
    let mapped = client.open("/a", OpenMode::read()).unwrap().map_read(0, 150_000).unwrap();
    let mut got = vec![0; 150_000];
    mapped.read(0, &mut got).unwrap();
    assert_eq!(got, bytes);
    let paths = mapped.paths();
    assert_eq!((paths.sent_reads, paths.sent_read_bytes), (3, 150_000), "{paths:?}");
    let status = client.status().unwrap();
    assert!(status.paths.iter().any(|p| p.path == "bounce"), "{status:?}");
    stop.stop();
    thread.join().unwrap().unwrap();
}

#[test]
fn a_borrow_shows_the_bytes_in_place_and_then_a_snapshot() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let file = client.open("/a", OpenMode::create()).unwrap();
    file.write_at(0, &vec![1; 2 * SMALL.window]).unwrap();
    let mapped = file.map(0, 2 * SMALL.window as u64).unwrap();
    let second = SMALL.window as u64;
    mapped
        .borrow(second + 5, |borrow| {
            let byte = |at| {
                let mut byte = [0];
                borrow.bytes().read(at, &mut byte).unwrap();
                byte[0]
            };
            assert_eq!(borrow.bytes().len(), SMALL.window);
            mapped.write(second, &[2]).unwrap();
            assert_eq!((byte(0), byte(1), borrow.is_current()), (2, 1, true), "nothing was copied");
            client.revoke("/a").unwrap();
            // Through the same mapping, which finds the new place meanwhile.
            mapped.write(second, &[3]).unwrap();
            assert_eq!((byte(0), borrow.is_current()), (2, false));
        })
        .unwrap();
    let mut byte = [0];
    mapped.read(second, &mut byte).unwrap();
    assert_eq!(byte, [3]);
    assert!(matches!(mapped.borrow(2 * second, |_| ()), Err(ClientError::OutOfRange { .. })));
}
