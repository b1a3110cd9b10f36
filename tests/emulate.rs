//! A drive in a process of its own: `cmbfs emulate`, used over vfio-user; killed, stopped, refused, taken up again.
#![allow(clippy::unwrap_used, reason = "test helpers: a step that fails is a test that fails")]

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use cmbfs_tests::{Lab, Server, pattern, seeded};
use rand_xoshiro::rand_core::Rng;

const IMAGE: &str = "disk.img?cmb=4M&size=128M";
const DRIVE: &str = "vfio-user:run/cntrl";

fn lab() -> Lab {
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    std::fs::create_dir(lab.path("run")).unwrap();
    lab
}

#[test]
fn identify_says_over_vfio_user_what_it_says_directly() {
    let lab = lab();
    let identify = |device: &str| -> serde_json::Value {
        serde_json::from_slice(&lab.ok(&["identify", "--json", device])).unwrap()
    };
    std::fs::File::create(lab.path("disk.img")).unwrap().set_len(128 << 20).unwrap();
    let direct = identify("emu:disk.img?cmb=4M&size=128M&lba=512&cache=off");
    let emulate = lab.emulate("disk.img?cmb=4M&lba=512&cache=off", "run/cntrl");
    // More than one client, one after the other.
    for _ in 0..2 {
        let remote = identify(DRIVE);
        for what in ["bytes", "block_size", "volatile_write_cache", "can_deallocate", "max_transfer"] {
            assert_eq!(remote[what], direct[what], "{what}");
        }
        assert_eq!(remote["controller"], direct["controller"]);
        for what in ["bytes", "bar", "bar_offset", "read_data", "write_data", "submission_queues", "lists"] {
            assert_eq!(remote["cmb"][what], direct["cmb"][what], "{what}");
        }
    }
    assert!(String::from_utf8(lab.ok(&["identify", DRIVE])).unwrap().contains("CMB"));
    assert_eq!(emulate.stop(), Some(0), "it did not end cleanly on SIGTERM");
    assert!(!lab.path("run/cntrl").exists(), "the socket was left behind");
}

#[test]
fn what_is_put_over_vfio_user_is_got_back_and_is_in_the_image() {
    let lab = lab();
    let emulate = lab.emulate(&format!("emu:{IMAGE}"), "run/cntrl");
    lab.ok(&["mkfs", DRIVE]);
    let sizes = [0, 1, 4097, 1_048_577, 9_000_001];
    for (seed, size) in sizes.into_iter().enumerate() {
        let bytes = pattern(seed as u64, size);
        lab.file("in", &bytes);
        let path = format!("/f{size}");
        lab.ok(&["put", DRIVE, "in", &path]);
        lab.ok(&["get", DRIVE, &path, "out"]);
        assert!(std::fs::read(lab.path("out")).unwrap() == bytes, "get of {size} bytes differs");
    }
    // The whole stack on it: through the drive's CMB, and after that was taken back.
    let server = lab.serve(DRIVE, "s", &[]);
    for round in 0..2 {
        for (seed, size) in sizes.into_iter().enumerate() {
            let got = lab.ok(&["cat", "--socket", "s", &format!("/f{size}")]);
            assert!(got == pattern(seed as u64, size), "{size} bytes differ in round {round}");
        }
        lab.ok(&["revoke", "--socket", "s"]);
    }
    assert_eq!(server.stop(), Some(0));
    assert_eq!(emulate.stop(), Some(0));
    for (seed, size) in sizes.into_iter().enumerate() {
        let got = lab.ok(&["cat", &format!("emu:{IMAGE}"), &format!("/f{size}")]);
        assert!(got == pattern(seed as u64, size), "{size} bytes differ in the image");
    }
    lab.ok(&["check", &format!("emu:{IMAGE}")]);
}

#[test]
fn a_drive_that_is_killed_is_an_error_and_what_was_put_is_there_with_the_next() {
    let (seed, mut random) = seeded(31);
    let lab = lab();
    let mut emulate = lab.emulate(IMAGE, "run/cntrl");
    lab.ok(&["mkfs", DRIVE]);
    let mut kept = pattern(0, 2_000_000);
    lab.file("in", &kept);
    lab.ok(&["put", DRIVE, "in", "/f"]);
    for round in 1..=4 {
        let next = pattern(round, 8_000_000);
        lab.file("in", &next);
        let put = lab.command(&["put", DRIVE, "in", "/f"]).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(random.next_u64() % 60_000));
        emulate.kill(); // leaves its socket behind
        let out = put.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        match out.status.code() {
            Some(0) => kept = next.clone(), // it was faster
            Some(1) => {
                let typed =
                    said.lines().any(|line| line.starts_with("cmbfs: ")) && !said.contains("panicked");
                assert!(typed, "seed {seed}, round {round}: {said}");
            }
            other => panic!("seed {seed}, round {round}: ended with {other:?}: {said}"),
        }
        emulate = lab.emulate(IMAGE, "run/cntrl");
        lab.ok(&["check", DRIVE]);
        let got = lab.ok(&["cat", DRIVE, "/f"]);
        assert!(
            got == kept || got == next,
            "seed {seed}, round {round}: neither the old file nor the new one"
        );
        kept = got;
    }
    assert_eq!(emulate.stop(), Some(0));
    assert!(lab.fails(1, &["identify", DRIVE]).stderr.contains("run/cntrl"));
}

#[test]
fn a_drive_in_use_and_a_socket_in_use_are_refused() {
    let lab = lab();
    let emulate = lab.emulate(IMAGE, "run/cntrl");
    let holder = emulate.pid().to_string();
    for args in [&["emulate", IMAGE, "--socket", "run/other"][..], &["identify", "emu:disk.img"]] {
        let said = lab.fails(1, args).stderr;
        assert!(said.contains(&holder), "{args:?} does not name process {holder}:\n{said}");
    }
    let said = lab.fails(1, &["emulate", "ram?size=1M", "--socket", "run/cntrl"]).stderr;
    assert!(said.contains("run/cntrl"), "{said}");
    let mode = std::fs::metadata(lab.path("run/cntrl")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    lab.fails(1, &["emulate", "ram?size=1M", "--socket", "no/such/folder/cntrl"]);
    // What cannot be served is not made.
    for socket in ["run/cntrl", "no/such/folder/cntrl"] {
        lab.fails(1, &["emulate", "new.img?size=1M", "--socket", socket]);
        assert!(!lab.path("new.img").exists(), "an image was left behind for {socket}");
    }
    lab.file("plain", b"not a socket");
    lab.fails(1, &["emulate", "ram?size=1M", "--socket", "plain"]);
    assert_eq!(std::fs::read(lab.path("plain")).unwrap(), b"not a socket");
    // And whoever takes something else for a drive's socket is told what it is.
    for (path, word) in [
        ("plain", "that is a plain file, not a socket; a drive's image is opened as emu:PATH"),
        ("run", "that is a directory, not a socket; the one in it is PATH/cntrl"),
        ("/dev/null", "that is a device node, not a socket"),
        ("none", "there is no such socket"),
    ] {
        let said = lab.fails(1, &["identify", &format!("vfio-user:{path}")]).stderr;
        assert!(said.contains(word), "{path}: {said}");
    }
    lab.ok(&["identify", DRIVE]);
    emulate.kill(); // leaves its socket behind
    let said = lab.fails(1, &["identify", DRIVE]).stderr;
    assert!(said.contains("nobody listens on that socket"), "{said}");
}

#[test]
fn sockets_of_the_two_kinds_are_told_apart() {
    let lab = lab();
    let _emulate = lab.emulate(IMAGE, "run/cntrl");
    lab.ok(&["mkfs", DRIVE]);
    lab.ok(&["mkfs", "emu:other.img?size=64M"]);
    let _server = lab.serve(DRIVE, "s", &[]);
    for (args, words) in [
        // A drive where a server is wanted, and the other way round.
        (&["ls", "--socket", "run/cntrl", "/"][..], ["vfio-user:PATH", "run/cntrl"]),
        (&["status", "--socket", "run/cntrl"], ["vfio-user:PATH", "run/cntrl"]),
        (&["identify", "vfio-user:s"], ["another kind of socket", "vfio-user:s"]),
        (&["serve", "emu:other.img?size=64M", "--socket", "run/cntrl"], ["vfio-user", "another --socket"]),
        (&["emulate", "ram?size=64M", "--socket", "s"], ["cmbfs server", "another --socket"]),
    ] {
        let said = lab.fails(1, args).stderr;
        assert!(words.iter().all(|word| said.contains(word)), "{args:?}: {said}");
        assert!(!said.contains("running"), "it is: {args:?}: {said}");
    }
    lab.ok(&["ls", "--socket", "s", "/"]);
}

#[test]
fn a_server_whose_drive_is_gone_says_so_and_serves_what_it_has() {
    let lab = lab();
    let emulate = lab.emulate(IMAGE, "run/cntrl");
    lab.ok(&["mkfs", DRIVE]);
    lab.file("in", &pattern(5, 3_000_000));
    lab.ok(&["put", DRIVE, "in", "/f"]);
    let server = lab.serve(DRIVE, "s", &[]);
    let status = || -> serde_json::Value {
        serde_json::from_slice::<serde_json::Value>(&lab.ok(&["status", "--json", "--socket", "s"])).unwrap()
            ["status"]
            .take()
    };
    assert_eq!((&status()["device_state"], &status()["device_trouble"]), (&"works".into(), &().into()));
    emulate.kill();
    // Nobody has used the drive since.
    assert_eq!(status()["device_state"], "failed");
    assert!(status()["device_trouble"].as_str().unwrap().contains("removed"));
    let text = String::from_utf8(lab.ok(&["status", "--socket", "s"])).unwrap();
    assert!(text.contains("failed:") && text.contains("removed"), "{text}");
    for args in [
        &["cat", "--socket", "s", "/f"][..],
        &["put", "--socket", "s", "in", "/g"],
        &["put", "--socket", "s", "in", "/f"],
    ] {
        let said = lab.fails(1, args).stderr;
        assert!(said.contains(DRIVE), "{args:?}: {said}");
    }
    assert_eq!(lab.ok(&["ls", "--socket", "s", "/"]), b"f\n");
    assert_eq!(server.stop(), Some(1), "it cannot end cleanly");
    let _emulate = lab.emulate(IMAGE, "run/cntrl");
    assert!(lab.ok(&["cat", DRIVE, "/f"]) == pattern(5, 3_000_000));
}

#[test]
fn where_there_is_no_cmb_status_does_not_speak_of_one() {
    let lab = lab();
    std::fs::File::create(lab.path("disk")).unwrap().set_len(64 << 20).unwrap();
    lab.ok(&["mkfs", "file:disk"]);
    lab.file("in", &pattern(6, 1_000_000));
    lab.ok(&["put", "file:disk", "in", "/f"]);
    let _server = lab.serve("file:disk", "s", &[]);
    lab.ok(&["cat", "--socket", "s", "/f"]);
    let text = String::from_utf8(lab.ok(&["status", "--socket", "s"])).unwrap();
    assert!(text.contains("auto has readers in the host cache: there is no CMB"), "{text}");
    assert!(text.contains("no CMB\n") && !text.contains("asked for"), "{text}");
}

#[test]
fn a_drives_server_without_descriptors_waits_and_goes_on() {
    use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
    let lab = lab();
    let log = std::fs::File::create(lab.path("log")).unwrap();
    let mut command = lab.command(&["emulate", IMAGE, "--socket", "run/cntrl"]);
    let emulate = Server::start(command.env("CMBFS_LOG", "warn").stderr(log));
    let pid = Pid::from_raw(emulate.pid() as i32);
    // No descriptor above the first three can be made from now on.
    let all = getrlimit(Resource::Nofile);
    prlimit(pid, Resource::Nofile, Rlimit { current: Some(3), ..all }).unwrap();
    let since = Instant::now();
    let mut client = lab.command(&["identify", DRIVE]).spawn().unwrap();
    let refusals = || {
        let log = std::fs::read_to_string(lab.path("log")).unwrap();
        log.lines().filter(|line| line.contains("cannot be taken")).count() as u128
    };
    while refusals() < 3 {
        std::thread::sleep(Duration::from_millis(20));
    }
    let said = refusals();
    let most = since.elapsed().as_millis() / 100 + 1;
    assert!(said <= most, "{said} tries, {most} would do");
    assert!(client.try_wait().unwrap().is_none(), "the client was turned away");
    prlimit(pid, Resource::Nofile, all).unwrap();
    assert!(client.wait().unwrap().success());
    assert_eq!(emulate.stop(), Some(0));
}

#[test]
fn a_client_that_waits_for_another_says_so() {
    let lab = lab();
    let emulate = lab.emulate(IMAGE, "run/cntrl");
    lab.ok(&["mkfs", DRIVE]);
    let server = lab.serve(DRIVE, "s", &[]);
    let mut client = lab.command(&["identify", DRIVE]).spawn().unwrap();
    let mut said = String::new();
    BufReader::new(client.stderr.take().unwrap()).read_line(&mut said).unwrap();
    assert!(said.contains("waiting for vfio-user:run/cntrl"), "{said}");
    assert_eq!(server.stop(), Some(0));
    assert!(client.wait().unwrap().success());
    assert_eq!(emulate.stop(), Some(0));
}

#[test]
fn the_machines_functions_are_listed_and_others_are_not_touched() {
    let lab = lab();
    let list: serde_json::Value = serde_json::from_slice(&lab.ok(&["devices", "--json"])).unwrap();
    let rows = list.as_array().unwrap();
    let text = String::from_utf8(lab.ok(&["devices"])).unwrap();
    for row in rows {
        assert!(text.contains(row["address"].as_str().unwrap()), "{row}\n{text}");
    }
    for command in ["bind", "unbind"] {
        let said = lab.fails(1, &[command, "ffff:ff:1f.7"]).stderr;
        assert!(said.contains("ffff:ff:1f.7"), "{said}");
    }
}
