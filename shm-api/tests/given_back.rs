//! A client that asks something of a window and gives it back before it is done: its slot may be another file's window by then.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::os::fd::OwnedFd;

use extent_fs::{Filesystem, FormatOptions, MountOptions, NewInode};
use nvme_driver::mem::{Access, Mapping};
use shm_api::protocol::messages as m;
use shm_api::protocol::wire::Wire;
use shm_api::protocol::{Message, Op, VERSION, header};
use shm_api::server::{Server, ServerOptions};
use shm_api::transport::socket::Socket;

const WINDOW: usize = 16 * 1024;

/// A connection that sends without waiting for answers. Handles are given out in order, from 1 on.
struct Raw {
    socket: Socket,
    sent: u64,
}

impl Raw {
    fn connect(socket: &std::path::Path) -> Self {
        let mut raw = Self { socket: Socket::connect(socket).unwrap(), sent: 0 };
        raw.send(Op::Hello, &m::HelloRequest { min_version: VERSION, max_version: VERSION, reserved: 0 }, "");
        raw
    }

    fn send(&mut self, op: Op, body: &impl Wire, tail: &str) -> u64 {
        self.sent += 1;
        let bytes = header::encode(op, false, self.sent, 0, body, tail.as_bytes()).unwrap();
        self.socket.send(&bytes, &[]).unwrap();
        self.sent
    }

    fn open(&mut self, path: &str) {
        let flags = m::OPEN_READ | m::OPEN_WRITE;
        self.send(Op::Open, &m::OpenRequest { flags, mode: 0 }, path);
    }

    fn map(&mut self, handle: u64) {
        let len = WINDOW as u64;
        self.send(Op::Map, &m::MapRequest { handle, offset: 0, len, flags: m::MAP_WRITE, reserved: 0 }, "");
    }

    /// The answer to a request, and what came with it; those before it are passed over.
    fn answer(&self, request: u64) -> (Message, Vec<OwnedFd>) {
        loop {
            assert!(self.socket.wait_readable(10_000).unwrap(), "no answer to request {request}");
            let Some(datagram) = self.socket.receive().unwrap() else { panic!("the server closed") };
            let message = Message::decode(&datagram.bytes).unwrap();
            if message.request == request {
                return (message, datagram.fds);
            }
        }
    }
}

/// A server of /mine (full of 1) and /theirs (full of 2) that has not begun to run: what is sent until then it finds all at once.
fn with_server(before: impl FnOnce(&std::path::Path) -> (Raw, Raw), after: impl FnOnce(Raw, Raw)) {
    let device = nvme_driver::open(&"emu:ram?size=16M&cmb=1M".parse().unwrap(), &Default::default()).unwrap();
    let mut disk = device.disk().unwrap();
    extent_fs::format(&mut disk, &FormatOptions::default()).unwrap();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    for (path, byte) in [("/mine", 1), ("/theirs", 2)] {
        let ino = fs.create(path, &NewInode::file()).unwrap();
        fs.write_at(ino, 0, &[byte; WINDOW]).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let options = ServerOptions { window_size: WINDOW, ..ServerOptions::new(dir.path().join("s")) };
    let server = Server::new(fs, options).unwrap();
    let stop = server.stop_handle();
    let (mine, theirs) = before(&dir.path().join("s"));
    let running = std::thread::spawn(move || server.run().unwrap());
    after(mine, theirs);
    stop.stop();
    running.join().unwrap();
}

const PEER: u64 = 1;
const MINE: u64 = 2;

/// A peer that has 3 in its memory, and /mine open.
fn prepare(socket: &std::path::Path) -> Raw {
    let mut raw = Raw::connect(socket);
    raw.send(Op::PeerAttach, &m::PeerAttachRequest { local_len: WINDOW as u64, flags: 0, reserved: 0 }, "");
    raw.open("/mine");
    raw
}

/// Somebody else comes next.
fn other(socket: &std::path::Path) -> Raw {
    let mut raw = Raw::connect(socket);
    raw.open("/theirs");
    raw.map(1);
    raw
}

fn local(raw: &Raw) -> std::sync::Arc<Mapping> {
    let (_, fds) = raw.answer(2);
    Mapping::from_fd(fds.into_iter().next().unwrap(), 0, WINDOW, Access::ReadWrite).unwrap()
}

fn first_byte(memory: &Mapping) -> u8 {
    let mut byte = [0];
    memory.read(0, &mut byte).unwrap();
    byte[0]
}

#[test]
fn a_peer_is_mapped_no_others_window() {
    let asked = std::cell::Cell::new(0);
    let before = |socket: &std::path::Path| {
        let mut raw = prepare(socket);
        let map = m::PeerMapRequest { peer: PEER, handle: MINE, offset: 0, write: 0, reserved: 0 };
        asked.set(raw.send(Op::PeerMap, &map, ""));
        raw.map(MINE);
        raw.send(Op::Unmap, &m::UnmapRequest { map: MINE + 1 }, "");
        (raw, other(socket))
    };
    with_server(before, |mut raw, theirs| {
        let memory = local(&raw);
        let (reply, _) = raw.answer(asked.get());
        theirs.answer(3);
        if reply.error().is_some() {
            return;
        }
        let mapped = reply.body_only::<m::PeerMapReply>().unwrap();
        let len = WINDOW as u64;
        let dma = m::PeerDmaRequest {
            peer: PEER,
            iova: mapped.iova,
            local: 0,
            len,
            direction: m::DMA_READ,
            reserved: 0,
        };
        let done = raw.send(Op::PeerDma, &dma, "");
        raw.answer(done);
        assert_ne!(first_byte(&memory), 2, "the peer has read a file that nobody opened for it");
    });
}

#[test]
fn a_peer_copies_no_others_bytes() {
    for write in [false, true] {
        let asked = std::cell::Cell::new(0);
        let before = |socket: &std::path::Path| {
            let mut raw = prepare(socket);
            raw.map(MINE);
            let len = WINDOW as u64;
            let copy = m::PeerReadRequest { peer: PEER, handle: MINE, offset: 0, local: 0, len };
            asked.set(raw.send(if write { Op::PeerWrite } else { Op::PeerRead }, &copy, ""));
            raw.send(Op::Unmap, &m::UnmapRequest { map: MINE + 1 }, "");
            (raw, other(socket))
        };
        with_server(before, |raw, mut theirs| {
            let memory = local(&raw);
            raw.answer(asked.get());
            assert_ne!(first_byte(&memory), 2, "the peer has read a file that nobody opened for it");
            let read = m::ReadRequest { handle: 1, offset: 0, len: 16, reserved: 0 };
            let request = theirs.send(Op::Read, &read, "");
            let (reply, _) = theirs.answer(request);
            let (_, bytes) = reply.body::<m::ReadReply>().unwrap();
            assert_eq!(bytes, [2; 16], "the peer has written to a file that nobody opened for it");
        });
    }
}
