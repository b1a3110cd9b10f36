//! Commits of many clients share flushes, and are durable all the same when they are answered.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{SMALL, connect, filesystem, options};
use extent_fs::{Filesystem, FormatOptions, MountOptions};
use nvme_driver::disk::Disk;
use nvme_driver::emu::{EmulatedController, PowerCut};
use nvme_driver::spec::NvmOpcode;
use shm_api::client::OpenMode;
use shm_api::protocol::messages::{
    CommitReply, CommitRequest, Empty, HandleRequest, HelloRequest, MAP_WRITE, MapRequest, OPEN_CREATE,
    OPEN_READ, OPEN_WRITE, OpenRequest,
};
use shm_api::protocol::{Message, Op, VERSION, header};
use shm_api::server::Server;
use shm_api::transport::socket::Socket;
use tempfile::TempDir;

const CLIENTS: u64 = 8;

/// A drive on an image, and a server for it. The server is not stopped: its drive loses power, and the process ends with the test.
struct Rig {
    dir: TempDir,
    emulated: Arc<EmulatedController>,
    server: Option<Server>,
    socket: PathBuf,
}

fn url(image: &Path) -> String {
    format!("emu:{}?size=64M&cmb=4M", image.display())
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = url(&dir.path().join("disk.img"));
        let device = nvme_driver::open(&url.parse().unwrap(), &Default::default()).unwrap();
        let emulated = Arc::clone(device.emulated().unwrap());
        let mut disk = device.disk().unwrap();
        common::format(&mut disk, FormatOptions::default());
        let filesystem = Filesystem::mount(disk, MountOptions::default()).unwrap();
        let socket = dir.path().join("s");
        let server = Some(Server::new(filesystem, options(&socket, SMALL)).unwrap());
        Self { dir, emulated, server, socket }
    }

    fn run(&mut self) {
        let server = self.server.take().unwrap();
        std::thread::spawn(move || server.run());
    }

    fn flushes(&self) -> u64 {
        self.emulated.counters().io_commands[NvmOpcode::Flush as usize]
    }

    /// Cuts the power, with the loss of whatever was not durable, and mounts what is on the image then.
    fn after_a_power_cut(&self) -> Filesystem<Box<dyn Disk>> {
        self.emulated.power_cut(PowerCut::LoseAll).unwrap();
        let copy = self.dir.path().join("copy.img");
        std::fs::copy(self.dir.path().join("disk.img"), &copy).unwrap();
        filesystem(&url(&copy))
    }
}

/// A connection on which requests are sent before anybody reads them.
fn sent_ahead(path: &Path, n: u64) -> Socket {
    let socket = Socket::connect(path).unwrap();
    let hello = HelloRequest { min_version: VERSION, max_version: VERSION, reserved: 0 };
    let open = OpenRequest { flags: OPEN_READ | OPEN_WRITE | OPEN_CREATE, mode: 0o600 };
    // The first handle of a connection is 1. The file is to be that long, which is a change to be made durable.
    let commit = CommitRequest { handle: 1, offset: 0, len: 0, size: 1000 + n };
    for bytes in [
        header::encode(Op::Hello, false, 1, 0, &hello, &[]),
        header::encode(Op::Open, false, 2, 0, &open, format!("/f{n}").as_bytes()),
        header::encode(Op::Commit, false, 3, 0, &commit, &[]),
    ] {
        socket.send(&bytes.unwrap(), &[]).unwrap();
    }
    socket
}

#[test]
fn commits_that_wait_together_share_a_flush_and_are_durable_when_answered() {
    let mut rig = Rig::new();
    let sockets: Vec<Socket> = (0..CLIENTS).map(|n| sent_ahead(&rig.socket, n)).collect();
    let before = rig.flushes();
    rig.run();
    for (n, socket) in (0..).zip(&sockets) {
        let reply = loop {
            socket.wait_readable(1000).unwrap();
            let Ok(datagram) = socket.receive() else { continue };
            let message = Message::decode(&datagram.unwrap().bytes).unwrap();
            assert_eq!(message.error(), None);
            if message.request == 3 {
                break message.body_only::<CommitReply>().unwrap();
            }
        };
        assert_eq!(reply.size, 1000 + n);
    }
    let flushes = rig.flushes() - before;
    assert!((1..CLIENTS).contains(&flushes), "{flushes} flushes for {CLIENTS} commits");
    let fs = rig.after_a_power_cut();
    for n in 0..CLIENTS {
        let ino = fs.lookup(format!("/f{n}")).unwrap();
        assert_eq!(fs.stat(ino).unwrap().size, 1000 + n, "client {n} was told that it is durable");
    }
}

#[test]
fn a_commit_is_answered_although_the_file_goes_right_after_it() {
    let mut rig = Rig::new();
    let socket = sent_ahead(&rig.socket, 7);
    // It takes blocks, too.
    let map = MapRequest { handle: 1, offset: 0, len: 300_000, flags: MAP_WRITE, reserved: 0 };
    let close = HandleRequest { handle: 1 };
    for bytes in [
        header::encode(Op::Map, false, 6, 0, &map, &[]),
        header::encode(Op::Close, false, 4, 0, &close, &[]),
        header::encode(Op::Unlink, false, 5, 0, &Empty {}, b"/f7"),
    ] {
        socket.send(&bytes.unwrap(), &[]).unwrap();
    }
    rig.run();
    let mut answered = Vec::new();
    while answered.len() < 6 {
        socket.wait_readable(1000).unwrap();
        let Ok(datagram) = socket.receive() else { continue };
        let message = Message::decode(&datagram.unwrap().bytes).unwrap();
        assert_eq!(message.error(), None, "request {}", message.request);
        if message.request == 3 {
            assert!(message.body_only::<CommitReply>().unwrap().size >= 1007);
        }
        answered.push(message.request);
    }
    // Nobody has the file any more, the commit neither: its blocks are free again.
    let mut fresh = Rig::new();
    fresh.run();
    let free = |rig: &Rig, size: u64| {
        // Blocks are free as soon as it is durable that they are.
        let client = connect(&rig.socket);
        client.open("/other", OpenMode::create()).unwrap().commit_range(0, 0, size).unwrap();
        client.info().unwrap().free_bytes
    };
    let all = free(&fresh, 1);
    let mut size = 0;
    common::until("its blocks are free", || {
        size += 1;
        free(&rig, size) == all
    });
}

#[test]
fn clients_that_commit_at_once_need_fewer_flushes_than_commits() {
    const COMMITS: u64 = 50;
    let mut rig = Rig::new();
    rig.run();
    let clients: Vec<_> = (0..CLIENTS).map(|_| connect(&rig.socket)).collect();
    let commits = |n: u64| {
        let file = clients[n as usize].open(&format!("/f{n}"), OpenMode::create()).unwrap();
        let mapped = file.map(0, 8).unwrap();
        for round in 0..COMMITS {
            mapped.write_u64(0, n << 32 | round).unwrap();
            file.commit().unwrap();
        }
    };
    let before = rig.flushes();
    commits(0);
    let alone = rig.flushes() - before;
    std::thread::scope(|scope| {
        for n in 0..CLIENTS {
            let commits = &commits;
            scope.spawn(move || commits(n));
        }
    });
    assert_eq!(clients[0].status().unwrap().commits, (1 + CLIENTS) * COMMITS);
    let together = rig.flushes() - before - alone;
    println!("{alone} flushes for the commits of one client, {together} for those of {CLIENTS} at once");
    assert!(together < CLIENTS * alone, "{together} flushes for {CLIENTS} clients, {alone} for one");
    let mut fs = rig.after_a_power_cut();
    for n in 0..CLIENTS {
        let ino = fs.lookup(format!("/f{n}")).unwrap();
        let mut got = [0; 8];
        assert_eq!(fs.read_at(ino, 0, &mut got).unwrap(), 8);
        assert_eq!(u64::from_le_bytes(got), n << 32 | (COMMITS - 1), "client {n}");
    }
}
