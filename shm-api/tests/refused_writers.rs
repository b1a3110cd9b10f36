//! Writers whose windows find no place: for a while, and for good.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use common::{SMALL, Serving, Setup};
use nvme_driver::clock::{Clock, ManualClock};
use p2p::refusal::Refusals;
use shm_api::client::{Access, Client, ClientError, DEFAULT_PATIENCE, OpenMode};
use shm_api::protocol::ErrorCode;
use shm_api::server::{Server, ServerError, ServerOptions};

const WINDOW: u64 = SMALL.window as u64;
const WINDOWS: u64 = 60;

fn refusing(per_mille: u16) -> Serving {
    Serving::start_with(SMALL, |options| ServerOptions { refusals: Refusals::new(11, per_mille), ..options })
}

/// A clock that goes on by itself a little with each pause, and nobody sleeps. Whoever asks without end is noticed here.
#[derive(Debug)]
struct Watched {
    time: ManualClock,
    step: Duration,
    pauses: AtomicU32,
}

/// No writer has to ask so often.
const WITHOUT_END: u32 = 5_000;

impl Clock for Watched {
    fn now(&self) -> Duration {
        self.time.now()
    }

    fn pause(&self, length: Duration) {
        let pauses = 1 + self.pauses.fetch_add(1, Ordering::Relaxed);
        assert!(pauses < WITHOUT_END, "it is refused, and asks on and on: for {:?} by now", self.now());
        self.time.advance(length.max(self.step));
    }
}

/// A client that waits by such a clock.
fn watched(serving: &Serving, step: Duration) -> (Client, Arc<Watched>) {
    let clock = Arc::new(Watched { time: ManualClock::new(), step, pauses: AtomicU32::new(0) });
    let shared = Arc::clone(&clock) as Arc<dyn Clock>;
    (Client::connect_with_clock(&serving.socket, DEFAULT_PATIENCE, shared).unwrap(), clock)
}

#[test]
fn a_writer_that_is_refused_without_end_is_told_why() {
    let serving = refusing(1000);
    let (client, clock) = watched(&serving, Duration::ZERO);
    let file = client.open("/a", OpenMode::create()).unwrap();
    let mapped = file.map(0, 2 * WINDOW).unwrap();
    let error = mapped.write(WINDOW + 5, b"nowhere").unwrap_err();
    assert!(matches!(error, ClientError::NoPlace { offset: WINDOW, .. }), "{error:?}");
    assert_eq!(error.code(), Some(ErrorCode::NotResident));
    let text = error.to_string();
    assert!(text.contains("no place for the window now: refusal injected"), "{text}");
    assert!(
        clock.now() >= Duration::from_secs(2) && clock.now() < Duration::from_secs(3),
        "{:?}",
        clock.now()
    );
    // Readers are served all the same.
    let mut got = [1; 7];
    mapped.read(WINDOW + 5, &mut got).unwrap();
    assert_eq!(got, [0; 7]);
}

/// Two ways in which a window is closed to writers for long: it does not end moving, and a layout over it does not come back. The server
/// answers each request after its patience; the writer gives up by its clock, and knows what was in the way. When that is gone it writes.
#[test]
fn a_writer_whose_window_stays_closed_is_told_what_is_in_the_way() {
    let setup = Setup { grace_ms: 60_000, lease_grace_ms: 60_000, ..SMALL };
    let serving = Serving::start_with(setup, |options| ServerOptions {
        patience: Duration::from_millis(20),
        ..options
    });
    let other = serving.client();
    let file = other.open("/a", OpenMode::create()).unwrap();
    file.write_at(0, &[1; 3 * WINDOW as usize]).unwrap();
    file.commit().unwrap();
    let (client, clock) = watched(&serving, Duration::from_millis(500));
    let mine = client.open("/a", OpenMode::write()).unwrap();
    let mapped = mine.map(0, 3 * WINDOW).unwrap();
    mapped.write(0, b"open").unwrap();

    let held = file.map(0, WINDOW).unwrap();
    let ((inside, is_inside), (end, wait)) = (mpsc::channel(), mpsc::channel::<()>());
    std::thread::scope(|threads| {
        let section = threads.spawn(move || {
            let mut first = true;
            held.write_section(0, |section| {
                if std::mem::take(&mut first) {
                    inside.send(()).unwrap();
                    let _ = wait.recv();
                }
                section.write(0, b"held")
            })
        });
        is_inside.recv().unwrap();
        let revoker = threads.spawn(|| serving.client().revoke("/a"));
        common::until("the window is closed to writers", || {
            let start = clock.now();
            let Err(error) = mapped.write(8, b"late") else { return false };
            let waited = clock.now() - start;
            assert!(matches!(error, ClientError::HeldUp { offset: 0, .. }), "{error:?}");
            assert_eq!(error.code(), Some(ErrorCode::Moving));
            assert!(error.to_string().contains("a write section there has not ended"), "{error}");
            assert!(waited >= Duration::from_secs(10) && waited < Duration::from_secs(13), "{waited:?}");
            true
        });
        drop(end);
        section.join().unwrap().unwrap();
        revoker.join().unwrap().unwrap();
    });
    mapped.write(8, b"late").unwrap();

    let layout = file.map_blocks(WINDOW, WINDOW, Access::Write).unwrap();
    let start = clock.now();
    let error = mapped.write(WINDOW, b"leased").unwrap_err();
    let waited = clock.now() - start;
    assert!(matches!(error, ClientError::HeldUp { offset: WINDOW, .. }), "{error:?}");
    assert_eq!(error.code(), Some(ErrorCode::Leased));
    assert!(waited >= Duration::from_secs(60) && waited < Duration::from_secs(63), "{waited:?}");
    drop(layout);
    mapped.write(WINDOW, b"leased").unwrap();
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
