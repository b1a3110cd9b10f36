//! Writers whose windows find no place: for a while, and for good.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use common::{SMALL, Serving, Setup};
use p2p::refusal::Refusals;
use shm_api::client::{ClientError, OpenMode};
use shm_api::protocol::ErrorCode;
use shm_api::server::{Server, ServerError, ServerOptions};

const WINDOW: u64 = SMALL.window as u64;
const WINDOWS: u64 = 60;

fn refusing(per_mille: u16) -> Serving {
    Serving::start_with(SMALL, |options| ServerOptions { refusals: Refusals::new(11, per_mille), ..options })
}

#[test]
fn a_writer_that_is_refused_without_end_is_told_why() {
    let serving = refusing(1000);
    let client = serving.client();
    let file = client.open("/a", OpenMode::create()).unwrap();
    let mapped = file.map(0, 2 * WINDOW).unwrap();
    let error = mapped.write(WINDOW + 5, b"nowhere").unwrap_err();
    assert!(matches!(error, ClientError::NoPlace { offset: WINDOW, .. }), "{error:?}");
    assert_eq!(error.code(), Some(ErrorCode::NotResident));
    let text = error.to_string();
    assert!(text.contains("no place for the window now: refusal injected"), "{text}");
    // Readers are served all the same.
    let mut got = [1; 7];
    mapped.read(WINDOW + 5, &mut got).unwrap();
    assert_eq!(got, [0; 7]);
}

#[test]
fn refusals_that_pass_are_ridden_out() {
    // One attempt in thirteen succeeds: of so many writers some are refused more often than a reader would ask.
    let serving = refusing(800);
    let client = serving.client();
    let file = client.open("/a", OpenMode::create()).unwrap();
    let mapped = file.map(0, WINDOWS * WINDOW).unwrap();
    for n in 0..WINDOWS {
        mapped.write(n * WINDOW, &n.to_le_bytes()).unwrap();
    }
    assert!(mapped.paths().faults > 5 * WINDOWS, "{:?}", mapped.paths());
    file.commit().unwrap();
    for n in 0..WINDOWS {
        let mut got = [0; 8];
        file.read_at(n * WINDOW, &mut got).unwrap();
        assert_eq!(u64::from_le_bytes(got), n);
    }
}

#[test]
fn a_host_cache_without_room_for_writers_is_not_served() {
    for url in ["emu:ram?size=16M&cmb=0", "emu:ram?size=16M&cmb=4M"] {
        for host_cache in [0, WINDOW, 2 * WINDOW - 1] {
            let dir = tempfile::tempdir().unwrap();
            let socket = dir.path().join("s");
            let options = ServerOptions { host_cache, ..common::options(&socket, SMALL) };
            let error = Server::new(common::filesystem(url), options).map(drop).unwrap_err();
            assert!(matches!(error, ServerError::HostCacheTooSmall { .. }), "{error:?}");
            assert!(error.to_string().contains(&(2 * WINDOW).to_string()), "{error}");
            assert!(!socket.exists());
        }
        // The least there may be is enough, for more than fits at once and while the CMB is dirty.
        let setup = Setup { url, ..SMALL };
        let serving =
            Serving::start_with(setup, |options| ServerOptions { host_cache: 2 * WINDOW, ..options });
        let client = serving.client();
        let bytes: Vec<u8> = (0..8 * WINDOW).map(|i| (i / 7) as u8).collect();
        for path in ["/cmb", "/host"] {
            let file = client.open(path, OpenMode::create()).unwrap();
            if path == "/host" {
                client.set_placement("/host", Some(shm_api::Placement::Host)).unwrap();
            }
            file.write_at(0, &bytes).unwrap();
            let mut got = vec![0; bytes.len()];
            file.read_at(0, &mut got).unwrap();
            assert!(got == bytes, "{url} {path}");
        }
    }
}

/// Raw memory has half of the smallest host cache there may be, and all of the CMB may be dirty: writers have the other half, in turns.
#[test]
fn raw_memory_and_a_dirty_cmb_leave_room_for_writers() {
    let setup = Setup { url: "emu:ram?size=16M&cmb=1M", ..SMALL };
    let serving = Serving::start_with(setup, |options| ServerOptions { host_cache: 2 * WINDOW, ..options });
    let client = serving.client();
    let raw = client.allocate(WINDOW).unwrap();
    let raw = raw.map(0, WINDOW).unwrap();
    raw.write(0, b"raw").unwrap();
    // Out of the CMB it has its half; in it that is kept.
    for whole in ["", "revoked"] {
        if !whole.is_empty() {
            client.revoke_all().unwrap();
        }
        let dirty = client.open("/dirty", OpenMode::create()).unwrap();
        let dirty = dirty.map(0, 16 * WINDOW).unwrap();
        for n in 0..16 {
            dirty.write(n * WINDOW, b"dirty").unwrap();
        }
        client.open("/host", OpenMode::create()).unwrap();
        client.set_placement("/host", Some(shm_api::Placement::Host)).unwrap();
        let host = client.open("/host", OpenMode::create()).unwrap();
        let mapped = host.map(0, 8 * WINDOW).unwrap();
        for n in 0..8 {
            mapped.write(n * WINDOW, &n.to_le_bytes()).unwrap();
        }
        for n in 0..8 {
            let mut got = [0; 8];
            mapped.read(n * WINDOW, &mut got).unwrap();
            assert_eq!(u64::from_le_bytes(got), n, "{whole}");
        }
        let mut got = [0; 5];
        for n in 0..16 {
            dirty.read(n * WINDOW, &mut got).unwrap();
            assert_eq!(&got, b"dirty", "{whole}");
        }
        raw.read(0, &mut got[..3]).unwrap();
        assert_eq!(&got[..3], b"raw");
    }
}
