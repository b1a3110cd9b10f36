//! A server that is stopped, or hung: whoever wants something of it is told, in time. One that works for long is waited for.
#![allow(clippy::unwrap_used, reason = "test helpers: a step that fails is a test that fails")]

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use cmbfs::{Client, ClientError, OpenMode};
use cmbfs_tests::{Lab, Server, pattern, skip};
use rustix::process::{Pid, Signal, kill_process};

const DRIVE: &str = "emu:disk.img?cmb=4M&size=64M";
const OTHER: &str = "emu:other.img?size=16M";
/// Far more than any of these commands takes when nobody waits.
const LONG: Duration = Duration::from_secs(20);

fn prepared() -> Lab {
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    lab.ok(&["mkfs", DRIVE]);
    lab.file("in", &pattern(1, 2_000_000));
    lab.ok(&["put", DRIVE, "in", "/f"]);
    lab.ok(&["mkfs", OTHER]);
    lab
}

fn send(server: &Server, signal: Signal) {
    kill_process(Pid::from_raw(server.pid().cast_signed()).unwrap(), signal).unwrap();
}

#[test]
fn every_command_gives_a_stopped_server_up_and_says_what_is_wrong() {
    let lab = prepared();
    let server = lab.serve(DRIVE, "s", &[]);
    send(&server, Signal::STOP);
    for args in [
        &["status"][..],
        &["peers"],
        &["revoke", "/f"],
        &["ls", "/"],
        &["cat", "/f"],
        &["stat", "/f"],
        &["get", "/f", "out"],
        &["put", "in", "/g"],
        &["mv", "/f", "/g"],
        &["rm", "/f"],
        &["mkdir", "/d"],
        &["placement", "/f", "host"],
    ] {
        let began = Instant::now();
        let said = lab.fails(1, &[args, &["--socket", "s", "--timeout", "1"]].concat()).stderr;
        assert!(began.elapsed() < LONG, "{args:?} took {:?}", began.elapsed());
        let what = format!("the server (process {}) has not answered for 1.", server.pid());
        let advice = format!("it is stopped; `kill -CONT {}`", server.pid());
        assert!(said.contains(&what) && said.contains(&advice), "{args:?}: {said}");
    }
    // It is not dead, so nobody takes its place.
    assert!(lab.fails(1, &["serve", OTHER, "--socket", "s"]).stderr.contains("s is served by process"));
    send(&server, Signal::CONT);
    assert_eq!(lab.ok(&["ls", "--socket", "s", "/"]), b"f\n");
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn the_python_client_gives_a_stopped_server_up_too() {
    const SCRIPT: &str = "
import sys, time
sys.path.insert(0, sys.argv[1])
from cmbfs_client import Client
client = Client('s', timeout=1)
client.list('/')
print('ready', flush=True)
sys.stdin.readline()
for attempt in (lambda: client.list('/'), lambda: Client('s', timeout=1)):
    began = time.monotonic()
    try:
        attempt()
        sys.exit('it was answered')
    except TimeoutError as error:
        assert 'has not answered for 1 s' in str(error), error
        assert 0.9 < time.monotonic() - began < 15
print('silent', flush=True)
sys.stdin.readline()
assert [name for name, size in client.list('/')] == ['f'], 'late answers are not those to later questions'
";
    let lab = prepared();
    let server = lab.serve(DRIVE, "s", &[]);
    let client = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("shm-api/python");
    let mut python = std::process::Command::new("python3");
    python.args(["-c", SCRIPT]).arg(client).current_dir(lab.dir());
    let spawned = python.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn();
    let Ok(mut python) = spawned else {
        return skip("the_python_client_gives_a_stopped_server_up_too", "no python3");
    };
    let mut to = python.stdin.take().unwrap();
    let mut from = BufReader::new(python.stdout.take().unwrap()).lines();
    assert_eq!(from.next().unwrap().unwrap(), "ready");
    send(&server, Signal::STOP);
    to.write_all(b"\n").unwrap();
    assert_eq!(from.next().unwrap().unwrap(), "silent");
    send(&server, Signal::CONT);
    to.write_all(b"\n").unwrap();
    assert!(python.wait().unwrap().success());
}

#[test]
fn a_server_that_takes_no_clients_is_given_up_before_a_connection_is_there() {
    let lab = prepared();
    let server = lab.serve(DRIVE, "s", &[]);
    send(&server, Signal::STOP);
    // More than the kernel lets wait.
    let mut waiting = Vec::new();
    let refused = loop {
        match shm_api::transport::socket::Socket::connect_within(&lab.path("s"), LONG / 20) {
            Ok(socket) => waiting.push(socket),
            Err(e) => break e,
        }
        assert!(waiting.len() < 10_000);
    };
    assert_eq!(refused.kind(), std::io::ErrorKind::TimedOut);
    let said = lab.fails(1, &["status", "--socket", "s", "--timeout", "1"]).stderr;
    assert!(said.contains("takes no clients"), "{said}");
    let said = lab.fails(1, &["serve", OTHER, "--socket", "s"]).stderr;
    assert!(said.contains("stopped or hung"), "{said}");
    send(&server, Signal::CONT);
}

#[test]
fn a_server_that_stops_in_the_middle_is_an_error_and_the_connection_is_good_when_it_goes_on() {
    let lab = prepared();
    let server = lab.serve(DRIVE, "s", &[]);
    let client = Client::connect_within(lab.path("s"), Duration::from_secs(1)).unwrap();
    let file = client.open("/f", OpenMode::write()).unwrap();
    let window = file.map(0, 4096).unwrap();
    window.write(0, b"new").unwrap();
    // Not in memory yet: its reader asks over the ring.
    let cold = file.map_read(1 << 20, 4096).unwrap();
    send(&server, Signal::STOP);
    let began = Instant::now();
    let silent = |e: ClientError| assert!(matches!(e, ClientError::TimedOut { .. }), "{e}");
    silent(cold.read(0, &mut [0; 16]).unwrap_err());
    silent(file.commit().map(drop).unwrap_err());
    // What is given back to it is not waited for as long again, each time.
    for _ in 0..40 {
        drop(client.stat("/f").unwrap_err());
    }
    drop(cold);
    assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
    send(&server, Signal::CONT);
    file.commit().unwrap();
    drop((window, file, client));
    assert_eq!(server.stop(), Some(0));
    assert_eq!(lab.ok(&["cat", DRIVE, "/f"])[..3], *b"new");
}

#[test]
fn work_that_takes_longer_than_the_patience_is_waited_for() {
    let lab = prepared();
    let server = lab.serve(DRIVE, "s", &["--grace-ms", "60000"]);
    let writer = Client::connect(lab.path("s")).unwrap();
    let file = writer.open("/f", OpenMode::write()).unwrap();
    let window = file.map(0, 4096).unwrap();
    window.write(0, b"x").unwrap();
    let patience = Duration::from_millis(500);
    let other = Client::connect_within(lab.path("s"), patience).unwrap();
    std::thread::scope(|threads| {
        // The revocation waits for the section, and the server for neither.
        let (began, is_in) = std::sync::mpsc::channel();
        let other = &other;
        let revoking = threads.spawn(move || {
            is_in.recv().unwrap();
            let began = Instant::now();
            other.revoke("/f").map(|_| began.elapsed())
        });
        window
            .write_section(0, |section| {
                let _ = began.send(());
                std::thread::sleep(patience * 5);
                section.write(0, b"y")
            })
            .unwrap();
        let took = revoking.join().unwrap().unwrap();
        assert!(took > patience * 3, "it took {took:?} only: nothing was waited for");
    });
    drop((window, file, writer, other));
    assert_eq!(server.stop(), Some(0));
}
