//! DMA of peers in a reset. The server does one thing at a time, so what has to happen in one turn of it is sent all at once.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nvme_driver::emu::{Fault, Rule, Target};
use nvme_driver::mem::{Access, Mapping};
use nvme_driver::spec::NvmOpcode;
use shm_api::Placement;
use shm_api::protocol::messages as m;
use shm_api::protocol::wire::Wire;
use shm_api::protocol::{ErrorCode, Message, Op, header};

use crate::raw::Raw;
use crate::{Rig, WINDOW, pattern, put};

/// DMA that are sent at once: a few turns of the server.
const BURST: usize = 64;
const PIECE: usize = 4096;

/// A client that speaks by hand, with a peer that reads the first window of `/shared`.
struct Peer {
    raw: Raw,
    file: u64,
    peer: u64,
    local: Arc<Mapping>,
    bytes: Vec<u8>,
}

impl Peer {
    fn attach(rig: &Rig) -> Self {
        let bytes = pattern(WINDOW, 9);
        put(&rig.serving.client(), "/shared", &bytes);
        let raw = Raw::connect(&rig.serving.socket);
        raw.hello();
        let request = m::PeerAttachRequest { local_len: (BURST * PIECE) as u64, flags: 0, reserved: 0 };
        let (reply, mut fds) = ask(&raw, Op::PeerAttach, &request, &[]);
        let peer = reply.body::<m::PeerAttachReply>().unwrap().0.peer;
        let local = Mapping::from_fd(fds.remove(0), 0, BURST * PIECE, Access::ReadWrite).unwrap();
        let file = open(&raw, m::OPEN_READ, b"/shared");
        Self { raw, file, peer, local, bytes }
    }

    /// Where it finds the window.
    fn map(&self) -> u64 {
        let request =
            m::PeerMapRequest { peer: self.peer, handle: self.file, offset: 0, write: 0, reserved: 0 };
        let reply = ask(&self.raw, Op::PeerMap, &request, &[]).0;
        reply.body::<m::PeerMapReply>().unwrap().0.iova
    }

    /// Sends requests, and right behind them many for DMA: while a flush keeps the server busy, so that it finds all of them when it looks
    /// again. What is said to be done has brought the file's bytes. Returns the answers, and how many DMA were refused because of a reset.
    fn burst(&self, iova: u64, requests: &[Vec<u8>]) -> (Vec<Message>, usize) {
        self.local.zero(0, BURST * PIECE).unwrap();
        for request in requests {
            self.raw.socket.send(request, &[]).unwrap();
        }
        for n in 0..BURST {
            let request = m::PeerDmaRequest {
                peer: self.peer,
                iova,
                local: (n * PIECE) as u64,
                len: PIECE as u64,
                direction: m::DMA_READ,
                reserved: 0,
            };
            self.raw.send_as(2 + n as u64, Op::PeerDma, &request, &[]);
        }
        let (mut answers, mut told, mut got) = (Vec::new(), 0, vec![0; PIECE]);
        for _ in 0..requests.len() + BURST {
            let message = self.raw.receive().unwrap().0;
            match (message.request.checked_sub(2), message.error()) {
                (None, _) => answers.push(message),
                (Some(n), None) => {
                    self.local.read(n as usize * PIECE, &mut got).unwrap();
                    assert!(
                        got == self.bytes[..PIECE],
                        "DMA {n} is said to be done, and shows something else"
                    );
                }
                (Some(_), Some(e)) => {
                    assert_eq!(e.code, ErrorCode::PeerFault, "{e}");
                    told += usize::from(e.text.contains("was reset"));
                }
            }
        }
        (answers, told)
    }
}

fn ask<T: Wire>(raw: &Raw, op: Op, body: &T, tail: &[u8]) -> (Message, Vec<OwnedFd>) {
    raw.send(op, body, tail);
    let (reply, fds) = raw.receive().unwrap();
    assert_eq!(reply.error(), None, "{op:?}");
    (reply, fds)
}

fn open(raw: &Raw, flags: u32, path: &[u8]) -> u64 {
    ask(raw, Op::Open, &m::OpenRequest { flags, mode: 0 }, path).0.body::<m::OpenReply>().unwrap().0.handle
}

/// A request as it is sent.
fn encoded<T: Wire>(op: Op, body: &T, tail: &[u8]) -> Vec<u8> {
    header::encode(op, false, 1, 0, body, tail).unwrap()
}

/// Has the next flush take some milliseconds.
fn slow_flush(rig: &Rig) {
    let rule = Rule::once(Target::io(NvmOpcode::Flush as u8), Fault::Delay { steps: 100 });
    rig.emulated.faults().inject(rule);
}

/// Until some DMA has been where it is to be: at most so often.
const ROUNDS: u64 = 50;

/// It was accepted before the reset. A commit's turn comes before its own; what that writes lies in the host cache, and is written again after
/// the reset, so that nobody has to deal with it at once.
#[test]
fn a_dma_that_was_under_way_in_a_reset_is_not_said_to_be_done() {
    let rig = Rig::new();
    let client = rig.serving.client();
    let peer = Peer::attach(&rig);
    // Six turns of a commit.
    let windows = 48;
    let file = put(&client, "/written", &[]);
    client.set_placement("/written", Placement::Host).unwrap();
    let handle = open(&peer.raw, m::OPEN_WRITE, b"/written");
    let sync = encoded(Op::Sync, &m::Empty {}, &[]);
    let commit = encoded(Op::Commit, &m::CommitRequest { handle, offset: 0, len: 0, size: 0 }, &[]);
    for n in 1..=ROUNDS {
        for window in 0..windows {
            file.write_at((window * WINDOW) as u64, &[n as u8]).unwrap();
        }
        client.mkdir(&format!("/{n}"), 0o755).unwrap();
        let iova = peer.map();
        slow_flush(&rig);
        // In the third of them.
        let rule = Rule::once(Target::io(NvmOpcode::Write as u8), Fault::WrongCid(1));
        rig.emulated.faults().inject(Rule { skip: 20, ..rule });
        let (answers, told) = peer.burst(iova, &[sync.clone(), commit.clone()]);
        assert_eq!(answers.iter().find_map(Message::error), None);
        assert_eq!(rig.resets(&client), n);
        if told > 0 {
            return;
        }
    }
    panic!("no DMA was under way in {ROUNDS} resets");
}

/// Nobody has dealt with the reset, and the peer's mapping is there still.
#[test]
fn a_dma_that_is_asked_for_right_after_a_reset_is_told_why_it_is_refused() {
    let rig = Rig::new();
    let client = rig.serving.client();
    let peer = Peer::attach(&rig);
    let sync = encoded(Op::Sync, &m::Empty {}, &[]);
    for n in 1..=ROUNDS {
        client.mkdir(&format!("/{n}"), 0o755).unwrap();
        let mkdir =
            encoded(Op::Mkdir, &m::MkdirRequest { mode: 0o755, reserved: 0 }, format!("/and {n}").as_bytes());
        let iova = peer.map();
        slow_flush(&rig);
        rig.reset_at(NvmOpcode::Flush);
        let (answers, told) = peer.burst(iova, &[sync.clone(), mkdir, sync.clone()]);
        assert_eq!(answers.iter().find_map(Message::error), None);
        assert_eq!(rig.resets(&client), n);
        if told > 0 {
            return;
        }
    }
    panic!("no DMA was told of any of {ROUNDS} resets");
}
