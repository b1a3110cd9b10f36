//! Servers that die, and whose power is cut.

use std::io::Write;
use std::time::{Duration, Instant};

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use shm_api::client::{ClientError, OpenMode};

use crate::common::{self, SMALL, Serving, connect, spawn};

#[test]
fn a_killed_server_is_noticed_and_what_was_committed_is_there_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("emu:{}?cmb=4M&size=64M", dir.path().join("disk.img").display());
    let socket = dir.path().join("s");
    let seed = 0x5eed_0003;
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    for round in 1..6u8 {
        // The stale socket of the server before is in the way each time.
        let mut server = spawn("serve", &[socket.to_str().unwrap(), &url]);
        let client = connect(&socket);
        let path = format!("/{round}");
        if round > 1 {
            let mut got = vec![0; 100_000];
            let before = client.open(&format!("/{}", round - 1), OpenMode::read()).unwrap();
            assert_eq!(before.read_at(0, &mut got).unwrap(), 100_000, "seed {seed:#x}");
            assert!(got.iter().all(|&b| b == round - 1), "seed {seed:#x}, round {round}");
        }
        let file = client.open(&path, OpenMode::create()).unwrap();
        file.write_at(0, &vec![round; 100_000]).unwrap();
        file.commit().unwrap();
        let mapped = file.map(0, 100_000).unwrap();
        let scratch = client.open("/scratch", OpenMode::create()).unwrap();
        let until_kill = Instant::now() + Duration::from_micros(random.next_u64() % 30_000);
        let killer = std::thread::spawn(move || {
            std::thread::sleep(until_kill.saturating_duration_since(Instant::now()));
            server.0.kill().unwrap();
            server.0.wait().unwrap();
        });
        let mut bytes = [0; 64];
        let error = loop {
            let busy = scratch
                .write_at(0, &[round; 9000])
                .and_then(|()| scratch.commit().map(drop))
                .and_then(|()| mapped.read(4096, &mut bytes));
            if let Err(error) = busy {
                break error;
            }
        };
        killer.join().unwrap();
        assert!(matches!(error, ClientError::Gone(_)), "{error}");
        assert!(!client.server_lives());
        assert!(matches!(mapped.read(0, &mut bytes), Err(ClientError::Gone(_))));
        assert!(matches!(mapped.write(0, &bytes), Err(ClientError::Gone(_))));
        assert!(matches!(client.stat("/"), Err(ClientError::Gone(_))));
    }
}

#[test]
fn what_commit_acknowledged_survives_a_power_cut() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("emu:{}?cmb=4M&size=64M", dir.path().join("disk.img").display());
    let socket = dir.path().join("s");
    let mut server = spawn("serve until power cut", &[socket.to_str().unwrap(), &url]);
    let client = connect(&socket);
    let file = client.open("/a", OpenMode::create()).unwrap();
    let bytes: Vec<u8> = (0..300_000).map(|i: usize| (i * 31 + i / 4096 * 7) as u8).collect();
    file.write_at(0, &bytes).unwrap();
    assert_eq!(file.commit().unwrap().from_host, 0);
    // Again in place, the other way: from the host cache.
    client.revoke("/a").unwrap();
    file.write_at(100_000, &bytes[..50_000]).unwrap();
    assert!(file.commit().unwrap().from_host > 0);
    file.write_at(200_000, &bytes[..10]).unwrap();
    server.0.stdin.take().unwrap().write_all(b"now\n").unwrap();
    server.0.wait().unwrap();
    let mut fs = common::filesystem(&url);
    let ino = fs.lookup("/a").unwrap();
    let mut got = vec![0; 300_000];
    assert_eq!(fs.read_at(ino, 0, &mut got).unwrap(), 300_000);
    assert_eq!(got[..100_000], bytes[..100_000]);
    assert_eq!(got[100_000..150_000], bytes[..50_000]);
    assert_eq!(got[150_000..], bytes[150_000..], "what was not committed was lost, and nothing else");
}

#[test]
fn a_live_socket_is_refused_naming_its_holder() {
    let serving = Serving::start(SMALL);
    let second = shm_api::server::Server::new(
        common::filesystem("emu:ram?size=16M&cmb=1M"),
        shm_api::server::ServerOptions::new(&serving.socket),
    );
    let text = second.err().unwrap().to_string();
    assert!(text.contains(&std::process::id().to_string()), "{text}");
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(&serving.socket).unwrap().permissions().mode() & 0o777, 0o600);
    serving.client().info().unwrap();
    let file = serving.socket.with_extension("txt");
    std::fs::write(&file, "not a socket").unwrap();
    let third = shm_api::transport::listener::Listener::bind(&file);
    assert!(third.unwrap_err().to_string().contains("no socket"));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "not a socket");
}
