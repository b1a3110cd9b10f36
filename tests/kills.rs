//! SIGKILL of the command and of a server at random points: afterwards the filesystem is sound, and every file is either
//! what it was or what was being put.
#![allow(clippy::unwrap_used, clippy::panic, reason = "test helpers: a step that fails is a test that fails")]

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use cmbfs_tests::{Lab, pattern, seeded};
use rand_xoshiro::rand_core::Rng;

const DRIVE: &str = "emu:disk.img?cmb=2M&size=128M";

/// The bytes of version `version` of the file; never of a length that tells nothing.
fn version(version: u64) -> Vec<u8> {
    pattern(version, 1_000_000 + 123_457 * (version as usize % 9))
}

fn versions_seen(lab: &Lab, seed: u64, round: u64, old: u64, new: u64) -> u64 {
    let check = lab.run(&["check", DRIVE]);
    assert_eq!(check.code, Some(0), "seed {seed}, round {round}: {}{}", check.text(), check.stderr);
    let got = lab.ok(&["cat", DRIVE, "/f"]);
    match got {
        _ if got == version(new) => new,
        _ if got == version(old) => old,
        _ => {
            panic!("seed {seed}, round {round}: {} bytes that are neither version {old} nor {new}", got.len())
        }
    }
}

fn prepared() -> Lab {
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    lab.ok(&["mkfs", DRIVE]);
    lab.file("in", &version(0));
    lab.ok(&["put", DRIVE, "in", "/f"]);
    lab
}

#[test]
fn a_put_that_is_killed_leaves_the_old_file_or_the_new_one() {
    let (seed, mut random) = seeded(11);
    let lab = prepared();
    let mut current = 0;
    for round in 1..=25 {
        lab.file("in", &version(round));
        let mut child = lab.command(&["put", DRIVE, "in", "/f"]).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(random.next_u64() % 40_000));
        let _ = child.kill(); // it may be done already
        child.wait().unwrap();
        current = versions_seen(&lab, seed, round, current, round);
    }
    // And it still works.
    lab.file("in", &version(1000));
    lab.ok(&["put", DRIVE, "in", "/f"]);
    assert_eq!(versions_seen(&lab, seed, 1000, current, 1000), 1000);
}

#[test]
fn a_server_that_is_killed_keeps_what_was_put() {
    let (seed, mut random) = seeded(12);
    let lab = prepared();
    let mut current = 0;
    for round in 1..=12 {
        let server = lab.serve(DRIVE, "s", &[]);
        lab.file("in", &version(round));
        let mut put = lab.command(&["put", "--socket", "s", "in", "/f"]).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(random.next_u64() % 60_000));
        let done = put.try_wait().unwrap();
        server.kill();
        let status = put.wait().unwrap();
        assert!(status.code().is_some(), "seed {seed}, round {round}: put ended by a signal: {status}");
        let seen = versions_seen(&lab, seed, round, current, round);
        // Acknowledged before the kill: durable.
        if done.is_some_and(|s| s.success()) {
            assert_eq!(seen, round, "seed {seed}, round {round}: a put that had returned is gone");
        }
        current = seen;
    }
}

#[test]
fn a_client_that_is_killed_harms_nobody() {
    let (seed, mut random) = seeded(13);
    let lab = prepared();
    let server = lab.serve(DRIVE, "s", &[]);
    let mut current = 0;
    for round in 1..=20 {
        lab.file("in", &version(round));
        let mut put = lab.command(&["put", "--socket", "s", "in", "/f"]).spawn().unwrap();
        let mut get = lab.command(&["get", "--socket", "s", "/f", "out"]).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(random.next_u64() % 30_000));
        for child in [&mut put, &mut get] {
            let _ = child.kill();
            child.wait().unwrap();
        }
        let got = lab.ok(&["cat", "--socket", "s", "/f"]);
        current = match got {
            _ if got == version(round) => round,
            _ if got == version(current) => current,
            _ => panic!("seed {seed}, round {round}: {} bytes of no version", got.len()),
        };
        // What the killed ones had begun to write goes as soon as the server has seen them die, and not with the next put only.
        let mut left = Vec::new();
        for _ in 0..500 {
            left = lab.ok(&["ls", "--socket", "s", "/"]);
            if left == b"f\n" {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(String::from_utf8_lossy(&left), "f\n", "seed {seed}, round {round}");
    }
    // What the others had got never had a name.
    let mut names: Vec<_> =
        std::fs::read_dir(lab.dir()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.retain(|name| !["disk.img", "in", "out", "s"].iter().any(|known| name == known));
    assert!(names.is_empty(), "seed {seed}: {names:?}");
    assert_eq!(server.stop(), Some(0));
    versions_seen(&lab, seed, 0, current, current);
}

#[test]
fn what_a_killed_server_left_of_a_put_goes_with_the_next() {
    let lab = prepared();
    // Named as a put of a process that is dead names what it has begun.
    let namespace = std::fs::metadata("/proc/self/ns/pid").unwrap().ino();
    let left = format!("/.f.put-{namespace:x}-4194999");
    lab.ok(&["put", DRIVE, "in", &left]);
    lab.ok(&["put", DRIVE, "in", "/.f.put-1-4194999"]); // of another machine
    lab.ok(&["put", DRIVE, "in", "/f"]);
    assert_eq!(lab.ok(&["ls", DRIVE, "/"]), b".f.put-1-4194999\nf\n");
}

#[test]
fn what_killed_puts_left_goes_when_a_server_starts_or_a_check_repairs() {
    let lab = prepared();
    lab.file("big", &pattern(4, 2 << 20));
    for folder in ["/d", "/d/e"] {
        lab.ok(&["mkdir", DRIVE, folder]);
    }
    // Of this machine and of others, dead or with the number of a process that lives: nobody else has the drive.
    let left = ["/.f.put-1-4194999".to_owned(), format!("/d/e/.g.put-f0000-{}", std::process::id())];
    let leave = || left.iter().for_each(|name| drop(lab.ok(&["put", DRIVE, "big", name])));
    lab.ok(&["put", DRIVE, "in", "/d/e/.users-own.put-1"]);
    let names = |folder: &str| String::from_utf8(lab.ok(&["ls", DRIVE, folder])).unwrap();
    let all_gone = || {
        assert_eq!(names("/"), "d/\nf\n");
        assert_eq!(names("/d/e"), ".users-own.put-1\n");
    };
    leave();
    let said = String::from_utf8(lab.ok(&["check", DRIVE])).unwrap();
    assert!(said.contains("2 unfinished files of 4 MiB"), "{said}");
    let json = |args: &[&str]| -> serde_json::Value { serde_json::from_slice(&lab.ok(args)).unwrap() };
    assert_eq!(json(&["check", "--json", DRIVE])["unfinished"], 2);
    assert_eq!(names("/").lines().count(), 3, "a check changes nothing");
    assert_eq!(json(&["check", "--repair", "--json", DRIVE])["unfinished"], 2);
    all_gone();
    let used = json(&["check", "--json", DRIVE])["used_bytes"].clone();
    leave();
    let mut command = lab.command(&["serve", DRIVE, "--socket", "s"]);
    let log = std::fs::File::create(lab.path("log")).unwrap();
    let server = cmbfs_tests::Server::start(command.stderr(log));
    assert_eq!(lab.ok(&["ls", "--socket", "s", "/"]), b"d/\nf\n");
    let said = std::fs::read_to_string(lab.path("log")).unwrap();
    assert!(said.contains("removed 2 unfinished files of 4 MiB"), "{said}");
    // It is durable, and the space is free.
    server.kill();
    all_gone();
    assert_eq!(json(&["check", "--json", DRIVE])["used_bytes"], used);
}

#[test]
fn names_that_a_command_changed_stay_when_the_server_is_killed_and_freed_space_is_free_at_once() {
    let lab = prepared();
    lab.file("big", &pattern(3, 20 << 20));
    let server = lab.serve(DRIVE, "s", &[]);
    let free = || cmbfs::Client::connect(lab.path("s")).unwrap().info().unwrap().free_bytes;
    let empty = free();
    for name in ["/gone", "/old"] {
        lab.ok(&["put", "--socket", "s", "big", name]);
    }
    assert!(free() + (40 << 20) <= empty);
    lab.ok(&["rm", "--socket", "s", "/gone"]);
    lab.ok(&["mv", "--socket", "s", "/old", "/new"]);
    lab.ok(&["mkdir", "--socket", "s", "/d"]);
    // The library's, which is not durable yet: what it frees is free all the same.
    cmbfs::Client::connect(lab.path("s")).unwrap().unlink("/new").unwrap();
    let left = empty.saturating_sub(free());
    assert!(left < 1 << 20, "{left} bytes of removed files are not free");
    server.kill();
    let names = String::from_utf8(lab.ok(&["ls", DRIVE, "/"])).unwrap();
    for (name, there) in [("gone", false), ("old", false), ("d/", true), ("f", true)] {
        assert_eq!(names.lines().any(|line| line == name), there, "{name} in {names}");
    }
    assert_eq!(lab.run(&["check", DRIVE]).code, Some(0));
}
