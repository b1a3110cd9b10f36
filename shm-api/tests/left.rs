//! Clients whose connection ends while they have windows mapped, and whose process lives: what nobody can ask for any more is given back.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]
mod common;

use std::path::Path;

use common::{SMALL, Serving, until};
use shm_api::client::{Client, OpenMode};
use shm_api::protocol::messages::{
    HelloRequest, MAP_WRITE, MapRequest, OPEN_READ, OPEN_WRITE, OpenReply, OpenRequest, PeerAttachRequest,
};
use shm_api::protocol::wire::Wire;
use shm_api::protocol::{Message, Op, VERSION, header};
use shm_api::transport::socket::Socket;

const LEN: u64 = 8 << 20;

fn call<T: Wire>(socket: &Socket, op: Op, body: &T, tail: &[u8]) -> Message {
    socket.send(&header::encode(op, false, 1, 0, body, tail).unwrap(), &[]).unwrap();
    assert!(socket.wait_readable(20_000).unwrap());
    let message = Message::decode(&socket.receive().unwrap().unwrap().bytes).unwrap();
    assert_eq!(message.error(), None);
    message
}

/// A connection that has a file mapped for writing, and a peer; it does not give them back when it ends.
fn holder(path: &Path) -> Socket {
    let socket = Socket::connect(path).unwrap();
    call(&socket, Op::Hello, &HelloRequest { min_version: VERSION, max_version: VERSION, reserved: 0 }, &[]);
    let request = OpenRequest { flags: OPEN_READ | OPEN_WRITE, mode: 0 };
    let opened: OpenReply = call(&socket, Op::Open, &request, b"/f").body_only().unwrap();
    for offset in (0..LEN).step_by(1 << 20) {
        let request =
            MapRequest { handle: opened.handle, offset, len: 1 << 20, flags: MAP_WRITE, reserved: 0 };
        call(&socket, Op::Map, &request, &[]);
    }
    call(&socket, Op::PeerAttach, &PeerAttachRequest { local_len: 700 << 20, flags: 0, reserved: 0 }, &[]);
    socket
}

/// Bytes of memory in use and of the device free.
fn account(client: &Client) -> (u64, u64) {
    let status = client.status().unwrap();
    (status.cmb_used + status.host_bytes + status.cmb_quarantined, client.info().unwrap().free_bytes)
}

fn made(client: &Client) -> shm_api::client::File {
    let file = client.open("/f", OpenMode::create().exclusive()).unwrap();
    file.write_at(0, &vec![7; LEN as usize]).unwrap();
    file.commit().unwrap();
    file
}

#[test]
fn a_file_without_a_name_gives_back_memory_and_blocks_when_the_last_who_could_use_it_has_left() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let empty = account(&client);
    let back = |when: &str| until(when, || account(&client) == empty);
    for who_goes_first in ["the name", "the holder", "the other user"] {
        let file = made(&client);
        let holder = holder(&serving.socket);
        match who_goes_first {
            "the name" => {
                drop(file);
                client.unlink("/f").unwrap();
                assert!(account(&client).1 < empty.1, "it is mapped");
                drop(holder);
            }
            "the holder" => {
                drop(holder);
                until("its peer to go", || client.peers().unwrap().peers.is_empty());
                let mut got = vec![0; LEN as usize];
                file.read_at(0, &mut got).unwrap();
                client.unlink("/f").unwrap();
                // Not before the last one who can read it has closed it.
                got.fill(0);
                assert_eq!(file.read_at(0, &mut got).unwrap(), LEN as usize);
                assert!(got.iter().all(|b| *b == 7), "an open file lost its bytes");
                drop(file);
            }
            _ => {
                drop((file, holder));
                until("its peer to go", || client.peers().unwrap().peers.is_empty());
                client.unlink("/f").unwrap();
            }
        }
        back(who_goes_first);
        // What it had as peers' memory is free as well, and nobody gets the old file by a new one's name.
        drop(client.attach_peer(1 << 30).unwrap());
        let new = client.open("/f", OpenMode::create().exclusive()).unwrap();
        assert_eq!(new.size().unwrap(), 0);
        drop(new);
        client.unlink("/f").unwrap();
        back("the new file to go");
    }
}
