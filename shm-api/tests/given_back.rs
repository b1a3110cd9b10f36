//! A client that does not wait for answers: what it asks of a window that it gives back before that is done, for the slot may be another
//! file's window by then; and what it asks when it has asked too much.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use extent_fs::{Filesystem, FormatOptions, MountOptions, NewInode};
use nvme_driver::mem::{Access, Mapping};
use p2p::layout::{SectionKind, SectionState, SectionWord};
use shm_api::protocol::messages as m;
use shm_api::protocol::records::WindowRecord;
use shm_api::protocol::wire::Wire;
use shm_api::protocol::{ErrorCode, Message, Op, VERSION, header, records};
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

    fn map(&mut self, handle: u64, windows: usize) -> u64 {
        let len = (windows * WINDOW) as u64;
        self.send(Op::Map, &m::MapRequest { handle, offset: 0, len, flags: m::MAP_WRITE, reserved: 0 }, "")
    }

    /// The first bytes of a file.
    fn read(&mut self, handle: u64) -> Vec<u8> {
        let request = self.send(Op::Read, &m::ReadRequest { handle, offset: 0, len: 16, reserved: 0 }, "");
        let (reply, _) = self.answer(request);
        reply.body::<m::ReadReply>().unwrap().1.to_vec()
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
    let grace = Duration::from_secs(1);
    let options = ServerOptions { window_size: WINDOW, grace, ..ServerOptions::new(dir.path().join("s")) };
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
    raw.map(1, 1);
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
        raw.map(MINE, 1);
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
            raw.map(MINE, 1);
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
            assert_eq!(theirs.read(1), [2; 16], "the peer has written to a file that nobody opened for it");
        });
    }
}

/// A DMA that is refused as one too many does not happen later, when the peer does the next.
#[test]
fn what_is_refused_is_not_done() {
    let nobody = |socket: &std::path::Path| (prepare(socket), Raw::connect(socket));
    with_server(nobody, |mut raw, _| {
        let (hello, fds) = raw.answer(1);
        let (hello, _) = hello.body::<m::HelloReply>().unwrap();
        let region = fds.into_iter().nth(1).unwrap();
        let region = Mapping::from_fd(region, 0, hello.slots_len as usize, Access::ReadWrite).unwrap();
        let memory = local(&raw);
        memory.write(0, &[7; 64]).unwrap();
        let request = raw.map(MINE, 2);
        let (reply, _) = raw.answer(request);
        let (mapped, tail) = reply.body::<m::MapReply>().unwrap();
        let windows: Vec<WindowRecord> = records::windows(tail, mapped.count).unwrap();
        let map = m::PeerMapRequest { peer: PEER, handle: MINE, offset: 0, write: 1, reserved: 0 };
        let request = raw.send(Op::PeerMap, &map, "");
        let iova = raw.answer(request).0.body_only::<m::PeerMapReply>().unwrap().iova;
        let fault = m::FaultRequest { handle: MINE, offset: WINDOW as u64, flags: 0, reserved: 0 };
        let request = raw.send(Op::Fault, &fault, "");
        raw.answer(request);
        // In a section of the second window, which is revoked as often as may be.
        let section = SectionWord::new(SectionState::Active, SectionKind::Write, windows[1].slot, 1);
        let slot = region.u64_at(0).unwrap();
        slot.store(section.word(), Ordering::SeqCst);
        let revoke =
            m::RevokeRequest { handle: MINE, offset: WINDOW as u64, len: 0, scope: m::REVOKE_WINDOW, id: 0 };
        let revoked = (0..64).map(|_| raw.send(Op::Revoke, &revoke, "")).last().unwrap();
        let dma =
            |direction, local| m::PeerDmaRequest { peer: PEER, iova, local, len: 64, direction, reserved: 0 };
        let request = raw.send(Op::PeerDma, &dma(m::DMA_WRITE, 0), "");
        let refused = raw.answer(request).0.error();
        assert!(refused.as_ref().is_none_or(|e| e.code == ErrorCode::TooMany), "{refused:?}");
        slot.store(section.with_state(SectionState::Idle).word(), Ordering::SeqCst);
        if refused.is_some() {
            raw.answer(revoked);
        }
        let request = raw.send(Op::PeerDma, &dma(m::DMA_READ, 4096), "");
        assert!(raw.answer(request).0.error().is_none());
        let expected = if refused.is_some() { 1 } else { 7 };
        assert_eq!(raw.read(MINE), [expected; 16], "refused: {refused:?}");
    });
}
