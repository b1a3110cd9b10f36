//! Client and server processes that die, stop, or lie.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Process, SMALL, Serving, Setup, connect, role, spawn, until};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use rustix::process::{Pid, Signal, kill_process};
use shm_api::client::{Client, ClientError, OpenMode};
use shm_api::protocol::messages::{self as m, HelloRequest};
use shm_api::protocol::wire::Wire;
use shm_api::protocol::{ErrorCode, Message, Op, VERSION, header};
use shm_api::transport::ring::{RING_LEN, word};
use shm_api::transport::socket::Socket;

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
            extent_fs::format(&mut disk, &Default::default()).unwrap();
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

#[test]
fn a_stopped_writer_delays_nobody_beyond_the_grace_and_its_pages_wait_for_it() {
    let serving = Serving::start(Setup { grace_ms: 60, ..SMALL });
    let client = serving.client();
    file_of(&client, &[1; WINDOW]);
    let socket = serving.socket.to_str().unwrap();
    let (stopped, mut out) = started("hold", &[socket, "1000"]);
    signal(&stopped, Signal::STOP);
    let reader = client.open("/a", OpenMode::read()).unwrap().map_read(0, WINDOW as u64).unwrap();
    let report = client.revoke("/a").unwrap();
    assert_eq!((report.windows, report.fenced), (1, 1), "{report:?}");
    assert_eq!(
        (report.freed_pages, report.quarantined_pages),
        (0, 16),
        "its late stores may still land there"
    );
    // Two graces at most (the writers', then the borrows'); the rest is for a busy machine.
    assert!(report.nanoseconds < 2_000_000_000, "{report:?}");
    let mut bytes = vec![0; WINDOW];
    reader.read(0, &mut bytes).unwrap();
    assert!(bytes[8192..].iter().all(|&b| b == 1));
    assert_eq!(client.status().unwrap().cmb_quarantined, WINDOW as u64);
    // Others write on meanwhile.
    let writer = client.open("/a", OpenMode::write()).unwrap().map(0, WINDOW as u64).unwrap();
    writer.write(16384, &[7; 100]).unwrap();

    signal(&stopped, Signal::CONT);
    assert_eq!(next_word(&mut out), "fenced 1", "it was told, and wrote again");
    reader.read(0, &mut bytes).unwrap();
    assert_eq!((bytes[0], bytes[4096], bytes[8192], bytes[16384]), (0xaa, 0xbb, 1, 7));
    until("its pages come back", || client.status().unwrap().cmb_quarantined == 0);
}

#[test]
fn a_writer_that_is_killed_in_its_section_gives_everything_back() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    file_of(&client, &[1; WINDOW]);
    let socket = serving.socket.to_str().unwrap();
    let (mut killed, _) = started("hold", &[socket, "100000"]);
    signal(&killed, Signal::STOP);
    assert_eq!(client.revoke("/a").unwrap().quarantined_pages, 16);
    killed.0.kill().unwrap();
    killed.0.wait().unwrap();
    until("its pages come back", || client.status().unwrap().cmb_quarantined == 0);
    assert_eq!(client.status().unwrap().died, 1);
    // A live section that dies: what it stored may be there, whole pages of it; nothing else is harmed.
    let (mut killed, _) = started("hold", &[socket, "100000"]);
    killed.0.kill().unwrap();
    killed.0.wait().unwrap();
    until("it is noticed", || client.status().unwrap().died == 2);
    let report = client.revoke("/a").unwrap();
    assert_eq!((report.quarantined_pages, report.fenced), (0, 0));
    client.open("/a", OpenMode::write()).unwrap().commit().unwrap();
    let mut bytes = vec![0; WINDOW];
    client.open("/a", OpenMode::read()).unwrap().read_at(0, &mut bytes).unwrap();
    assert!(bytes[8192..].iter().all(|&b| b == 1));
}

/// A closed socket proves nothing about the process behind it: what it may still touch is not reused before it is dead.
#[test]
fn a_process_that_hangs_up_in_its_section_keeps_its_pages_until_it_is_dead() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    file_of(&client, &[1; WINDOW]);
    let (mut hung_up, _) = started("hang up", &[serving.socket.to_str().unwrap()]);
    until("its windows are taken back", || client.status().unwrap().cmb_quarantined == WINDOW as u64);
    assert_eq!(client.status().unwrap().clients, 1);
    hung_up.0.kill().unwrap();
    hung_up.0.wait().unwrap();
    until("its pages come back", || client.status().unwrap().cmb_quarantined == 0);
}

#[test]
fn clients_are_killed_at_random_points() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    file_of(&client, &vec![0; 3 * WINDOW]);
    let seed = 0x5eed_0002;
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    for _ in 0..12 {
        let (mut worker, _) = started("work", &[serving.socket.to_str().unwrap()]);
        std::thread::sleep(Duration::from_micros(random.next_u64() % 20_000));
        if random.next_u32() % 2 == 0 {
            client.revoke("/a").unwrap();
        }
        worker.0.kill().unwrap();
        worker.0.wait().unwrap();
    }
    // One whose connection ended a moment before its process keeps its files until the process is seen to be dead.
    until(&format!("seed {seed:#x}: all are gone, and all they had is back"), || {
        let status = client.status().unwrap();
        (status.clients, status.cmb_quarantined, status.open_files) == (1, 0, 0)
    });
    let file = client.open("/a", OpenMode::write()).unwrap();
    let bytes = vec![9; 3 * WINDOW];
    file.write_at(0, &bytes).unwrap();
    file.commit().unwrap();
    client.revoke_all().unwrap();
    let mut got = vec![0; 3 * WINDOW];
    file.read_at(0, &mut got).unwrap();
    assert_eq!(got, bytes);
}

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

/// A connection that speaks the protocol by hand.
struct Raw {
    socket: Socket,
}

impl Raw {
    fn connect(path: &Path) -> Self {
        Self { socket: Socket::connect(path).unwrap() }
    }

    fn send<T: Wire>(&self, op: Op, body: &T, tail: &[u8]) {
        let bytes = header::encode(op, false, 1, 0, body, tail).unwrap();
        let _ = self.socket.send(&bytes, &[]);
    }

    fn receive(&self) -> Option<(Message, Vec<std::os::fd::OwnedFd>)> {
        self.socket.wait_readable(5000).unwrap();
        let datagram = self.socket.receive().ok()??;
        Some((Message::decode(&datagram.bytes).unwrap(), datagram.fds))
    }

    fn hello(&self) -> Vec<std::os::fd::OwnedFd> {
        self.send(Op::Hello, &HelloRequest { min_version: VERSION, max_version: VERSION, reserved: 0 }, &[]);
        let (message, fds) = self.receive().unwrap();
        assert_eq!(message.error(), None);
        fds
    }

    /// Reads on until the server closes.
    fn is_closed(&self) -> bool {
        for _ in 0..10_000 {
            self.socket.wait_readable(5000).unwrap();
            match self.socket.receive() {
                Ok(Some(_)) => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return false,
                Ok(None) | Err(_) => return true,
            }
        }
        false
    }
}

#[test]
fn garbage_on_the_socket_costs_its_sender_the_connection_and_nobody_else_anything() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    file_of(&client, &[3; WINDOW]);
    let seed = 0x5eed_0004;
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut closed = 0;
    for round in 0..400u32 {
        let raw = Raw::connect(&serving.socket);
        if round % 4 > 0 {
            raw.hello();
        }
        let mut bytes = vec![0; (random.next_u32() % 200) as usize + 1];
        random.fill_bytes(&mut bytes);
        if round % 2 == 0 {
            // A sound header with a random body gets as far as the handlers.
            let op = Op::ALL[random.next_u32() as usize % Op::ALL.len()];
            let body = m::HandleRequest { handle: random.next_u64() % 4 };
            bytes = header::encode(op, false, u64::from(round), 0, &body, &bytes).unwrap();
        }
        let _ = raw.socket.send(&bytes, &[]);
        if round % 16 == 0 {
            // A descriptor that nobody asked for.
            let _ = raw.socket.send(&bytes, &[serving_fd().as_fd()]);
            closed += u32::from(raw.is_closed());
        }
        if round % 50 == 0 {
            client.stat("/a").unwrap();
        }
    }
    assert_eq!(closed, 25, "seed {seed:#x}");
    let mut bytes = vec![0; WINDOW];
    client.open("/a", OpenMode::read()).unwrap().read_at(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&b| b == 3));
    until("they are forgotten", || client.status().unwrap().clients == 1);
    assert!(client.status().unwrap().expelled > 100);
}

fn serving_fd() -> std::fs::File {
    std::fs::File::open("/dev/null").unwrap()
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let serving = Serving::start(SMALL);
    let path = serving.socket.with_extension("txt");
    let file = std::fs::File::create(&path).unwrap();
    let open = || {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap();
        fds.filter(|fd| std::fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|to| to == path)).count()
    };
    let before = open();
    let raw = Raw::connect(&serving.socket);
    raw.hello();
    let bytes = header::encode(Op::Info, false, 1, 1, &m::Empty {}, &[]).unwrap();
    raw.socket.send(&bytes, &[file.as_fd(), file.as_fd()]).unwrap();
    let (message, _) = raw.receive().unwrap();
    assert_eq!(message.error().unwrap().code, ErrorCode::BadMessage);
    assert!(raw.is_closed());
    until("they are closed", || open() == before);
}

#[test]
fn every_request_with_random_fields_is_answered_or_refused() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    file_of(&client, &[3; WINDOW]);
    let seed = 0x5eed_0005;
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let raw = Raw::connect(&serving.socket);
    raw.hello();
    raw.send(Op::Open, &m::OpenRequest { flags: m::OPEN_READ | m::OPEN_WRITE, mode: 0 }, b"/a");
    raw.receive().unwrap();
    let mut odd = move || match random.next_u32() % 6 {
        0 => 0,
        1 => u64::MAX,
        2 => 1 << (random.next_u32() % 64),
        3 => random.next_u64() % 8,
        4 => random.next_u64() % (1 << 20),
        _ => random.next_u64(),
    };
    let mut answered = 0;
    for _ in 0..3000 {
        let (handle, offset, len) = (odd() % 3, odd(), odd());
        let flags = odd() as u32;
        match odd() % 10 {
            0 => {
                raw.send(Op::Map, &m::MapRequest { handle, offset, len, flags: flags % 4, reserved: 0 }, &[]);
            }
            1 => raw.send(Op::Fault, &m::FaultRequest { handle, offset, flags, reserved: 0 }, &[]),
            2 => raw.send(Op::Read, &m::ReadRequest { handle, offset, len: len as u32, reserved: 0 }, &[]),
            3 => {
                raw.send(Op::Commit, &m::CommitRequest { handle, offset, len, size: odd() % (1 << 21) }, &[]);
            }
            4 => raw.send(Op::Truncate, &m::TruncateRequest { handle, size: offset % (1 << 21) }, &[]),
            5 => raw.send(Op::Unmap, &m::UnmapRequest { map: odd() % 10 }, &[]),
            6 => raw.send(
                Op::Revoke,
                &m::RevokeRequest { handle, offset, len, scope: flags % 5, id: 0 },
                b"/a",
            ),
            7 => raw.send(Op::PeerAttach, &m::PeerAttachRequest { local_len: len % (1 << 20) }, &[]),
            8 => {
                let (iova, local, direction) = (odd(), odd(), flags % 4);
                raw.send(
                    Op::PeerDma,
                    &m::PeerDmaRequest { peer: handle, iova, local, len, direction, reserved: 0 },
                    &[],
                );
            }
            _ => raw.send(
                Op::PeerMap,
                &m::PeerMapRequest { peer: odd() % 6, handle, offset, write: flags % 3, reserved: 0 },
                &[],
            ),
        }
        let (message, _) = raw.receive().expect("a sound message is never a reason to let go");
        answered += u32::from(message.error().is_none());
    }
    assert!(answered > 100, "seed {seed:#x}: only {answered} made sense");
    client.stat("/a").unwrap();
}

#[test]
fn garbage_in_the_rings_and_slots_is_survived() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    file_of(&client, &[3; 3 * WINDOW]);
    let seed = 0x5eed_0006;
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut expelled = 0;
    for round in 0..60u64 {
        let raw = Raw::connect(&serving.socket);
        let mut fds = raw.hello();
        raw.send(Op::Open, &m::OpenRequest { flags: m::OPEN_READ | m::OPEN_WRITE, mode: 0 }, b"/a");
        raw.receive().unwrap();
        let map =
            m::MapRequest { handle: 1, offset: 0, len: 3 * WINDOW as u64, flags: m::MAP_WRITE, reserved: 0 };
        raw.send(Op::Map, &map, &[]);
        raw.receive().unwrap();
        use nvme_driver::mem::{Access, Mapping};
        let ring = Mapping::from_fd(fds.remove(2), 0, RING_LEN, Access::ReadWrite).unwrap();
        let slots = Mapping::from_fd(fds.remove(1), 0, 8192, Access::ReadWrite).unwrap();
        for _ in 0..200 {
            let at = random.next_u32() as usize % (4096 / 8) * 8;
            // Words that look like sections of windows that exist, and words that look like nothing.
            let value = if random.next_u32() % 2 == 0 {
                (random.next_u64() % (1 << 40)) & !0b11 | (random.next_u64() % 4)
            } else {
                random.next_u64()
            };
            slots.u64_at(at).unwrap().store(value, std::sync::atomic::Ordering::SeqCst);
        }
        client.revoke("/a").unwrap();
        let mut bytes = vec![0; RING_LEN - 4096];
        random.fill_bytes(&mut bytes);
        ring.write(4096, &bytes).unwrap();
        let lie = if round % 2 == 0 { 1 + random.next_u32() % 64 } else { random.next_u32() };
        ring.u32_at(word::REPLY_HEAD).unwrap().store(random.next_u32(), std::sync::atomic::Ordering::SeqCst);
        ring.u32_at(word::REQUEST_TAIL).unwrap().store(lie, std::sync::atomic::Ordering::SeqCst);
        raw.send(Op::Kick, &m::Empty {}, &[]);
        expelled += u32::from(raw.is_closed());
    }
    assert_eq!(expelled, 60, "seed {seed:#x}");
    let mut bytes = vec![0; WINDOW];
    let file = client.open("/a", OpenMode::write()).unwrap();
    file.read_at(0, &mut bytes).unwrap();
    file.commit().unwrap();
    assert!(bytes.iter().all(|&b| b == 3), "nobody wrote anything");
}

#[test]
fn a_client_that_does_not_read_is_let_go() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let raw = Raw::connect(&serving.socket);
    raw.hello();
    let mut sent = 0;
    let bytes = header::encode(Op::Info, false, 1, 0, &m::Empty {}, &[]).unwrap();
    until("it is let go", || {
        while raw.socket.send(&bytes, &[]).is_ok() {
            sent += 1;
        }
        client.info().unwrap();
        client.status().unwrap().expelled == 1
    });
    assert!(sent > 64);
}

#[test]
fn hello_comes_first_and_once_and_in_a_known_version() {
    let serving = Serving::start(SMALL);
    let raw = Raw::connect(&serving.socket);
    raw.send(Op::Info, &m::Empty {}, &[]);
    assert_eq!(raw.receive().unwrap().0.error().unwrap().code, ErrorCode::BadState);
    raw.send(Op::Hello, &HelloRequest { min_version: 7, max_version: 9, reserved: 0 }, &[]);
    assert_eq!(raw.receive().unwrap().0.error().unwrap().code, ErrorCode::BadVersion);
    let fds = raw.hello();
    assert_eq!(fds.len(), 4);
    raw.send(Op::Hello, &HelloRequest { min_version: 1, max_version: 1, reserved: 0 }, &[]);
    assert_eq!(raw.receive().unwrap().0.error().unwrap().code, ErrorCode::BadState);
    // What is the server's to write cannot be written, even by the same uid.
    use nvme_driver::mem::{Access, Mapping};
    let control = fds[0].try_clone().unwrap();
    assert!(Mapping::from_fd(control, 0, 4096, Access::ReadWrite).is_err());
    use std::os::fd::AsRawFd;
    let again = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/self/fd/{}", fds[0].as_raw_fd()));
    if let Ok(again) = again {
        assert!(Mapping::from_fd(again.into(), 0, 4096, Access::ReadWrite).is_err(), "sealed");
    }
    for fd in &fds[..3] {
        assert!(rustix::fs::ftruncate(fd, 0).is_err(), "its size is sealed");
    }
}
