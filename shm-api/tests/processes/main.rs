//! Client and server processes that die, stop, or lie.
//!
//! * `clients`: clients that stop, die or hang up
//! * `servers`: servers that die, and whose power is cut
//! * `liars`: whoever does not keep to the protocol
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod clients;
#[path = "../common/mod.rs"]
mod common;
mod liars;
#[path = "../common/raw.rs"]
mod raw;
mod servers;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::time::Duration;

use common::{Process, SMALL, Setup, connect, role, spawn};
use raw::Raw;
use rustix::process::{Pid, Signal, kill_process};
use shm_api::client::{Client, OpenMode};
use shm_api::protocol::Op;
use shm_api::protocol::messages as m;

const WINDOW: usize = SMALL.window;

#[test]
fn helper_process() {
    let Some((role, args)) = role() else { return };
    match role.as_str() {
        "serve" => {
            let setup = Setup { url: &args[1], ..SMALL };
            let server = shm_api::server::Server::new(
                common::filesystem(setup.url),
                common::options(Path::new(&args[0]), setup),
            );
            server.unwrap().run().unwrap();
        }
        // Serves until a line comes in; then the power is cut, and what was not flushed is lost.
        "serve until power cut" => {
            let device = nvme_driver::open(&args[1].parse().unwrap(), &Default::default()).unwrap();
            let mut disk = device.disk().unwrap();
            common::format(&mut disk, Default::default());
            let fs = extent_fs::Filesystem::mount(disk, Default::default()).unwrap();
            let server =
                shm_api::server::Server::new(fs, common::options(Path::new(&args[0]), SMALL)).unwrap();
            std::thread::spawn(move || {
                std::io::stdin().read_line(&mut String::new()).unwrap();
                device.emulated().unwrap().power_cut(nvme_driver::emu::PowerCut::LoseAll).unwrap();
                std::process::exit(0);
            });
            server.run().unwrap();
        }
        // Opens a write section, says so, and never ends it.
        "hold" => {
            let client = connect(Path::new(&args[0]));
            let file = client.open("/a", OpenMode::write()).unwrap();
            let mapped = file.map(0, WINDOW as u64).unwrap();
            let mut first = true;
            mapped
                .write_section(0, |section| {
                    section.write(0, &[0xaa; 4096])?;
                    if std::mem::take(&mut first) {
                        println!("\nready");
                        // Stopped or killed here, in time on a busy machine too; when it goes on, it was fenced and writes again.
                        std::thread::sleep(Duration::from_millis(args[1].parse().unwrap()));
                    }
                    section.write(4096, &[0xbb; 4096])
                })
                .unwrap();
            println!("\nfenced {}", mapped.paths().fenced);
        }
        // Borrows the window in place, says so, and looks again much later.
        "borrow" => {
            let client = connect(Path::new(&args[0]));
            let mapped = client.open("/a", OpenMode::read()).unwrap().map_read(0, WINDOW as u64).unwrap();
            let kept = mapped.borrow(0, |borrow| {
                let (mut first, mut last) = (vec![0; WINDOW], vec![0; WINDOW]);
                borrow.bytes().read(0, &mut first).unwrap();
                println!("\nready");
                // Stopped or killed here.
                std::thread::sleep(Duration::from_millis(args[1].parse().unwrap()));
                borrow.bytes().read(0, &mut last).unwrap();
                (borrow.is_current(), first == last)
            });
            println!("\nborrowed {:?}", kept.unwrap());
        }
        // Opens a write section by hand, closes the connection, and lives on.
        "hang up" => {
            use nvme_driver::mem::{Access, Mapping};
            use p2p::layout::{SectionKind, SectionState, SectionWord};
            let raw = Raw::connect(Path::new(&args[0]));
            let mut fds = raw.hello();
            raw.send(Op::Open, &m::OpenRequest { flags: m::OPEN_READ | m::OPEN_WRITE, mode: 0 }, b"/a");
            raw.receive().unwrap();
            let map = m::MapRequest { handle: 1, offset: 0, len: 4096, flags: m::MAP_WRITE, reserved: 0 };
            raw.send(Op::Map, &map, &[]);
            let (reply, _) = raw.receive().unwrap();
            let (body, tail) = reply.body::<m::MapReply>().unwrap();
            let window = shm_api::protocol::records::windows(tail, body.count).unwrap()[0];
            raw.send(Op::Fault, &m::FaultRequest { handle: 1, ..Default::default() }, &[]);
            raw.receive().unwrap();
            let slots = Mapping::from_fd(fds.remove(1), 0, 4096, Access::ReadWrite).unwrap();
            let section = SectionWord::new(SectionState::Active, SectionKind::Write, window.slot, 1);
            slots.u64_at(0).unwrap().store(section.word(), std::sync::atomic::Ordering::SeqCst);
            drop(raw);
            println!("\nready");
            std::thread::sleep(Duration::from_secs(100));
        }
        // Writes and reads for ever.
        "work" => {
            let client = connect(Path::new(&args[0]));
            let file = client.open("/a", OpenMode::write()).unwrap();
            println!("\nready");
            let mut bytes = vec![0; 3 * WINDOW];
            for round in 0u8.. {
                let mapped = file.map(0, bytes.len() as u64).unwrap();
                bytes.fill(round);
                mapped.write(0, &bytes).unwrap();
                mapped.read(0, &mut bytes).unwrap();
                if round % 8 == 0 {
                    file.commit().unwrap();
                }
            }
        }
        other => panic!("no role {other}"),
    }
    std::io::stdout().flush().unwrap();
    std::process::exit(0);
}

fn next_word(out: &mut impl BufRead) -> String {
    let mut line = String::new();
    while ["", "running 1 test"].contains(&line.trim()) {
        line.clear();
        assert!(out.read_line(&mut line).unwrap() > 0, "the process ended too early");
    }
    line.trim().to_owned()
}

fn started(role: &str, args: &[&str]) -> (Process, BufReader<std::process::ChildStdout>) {
    let mut process = spawn(role, args);
    let mut out = BufReader::new(process.0.stdout.take().unwrap());
    while next_word(&mut out) != "ready" {}
    (process, out)
}

fn signal(process: &Process, signal: Signal) {
    kill_process(Pid::from_child(&process.0), signal).unwrap();
}

fn file_of(client: &Client, bytes: &[u8]) {
    let file = client.open("/a", OpenMode::create()).unwrap();
    file.write_at(0, bytes).unwrap();
    file.commit().unwrap();
}
