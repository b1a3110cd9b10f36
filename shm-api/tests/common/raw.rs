//! A connection that speaks the protocol by hand.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]

use std::path::Path;

use shm_api::protocol::messages::HelloRequest;
use shm_api::protocol::wire::Wire;
use shm_api::protocol::{Message, Op, VERSION, header};
use shm_api::transport::socket::Socket;

/// A connection that speaks the protocol by hand.
pub struct Raw {
    pub socket: Socket,
}

impl Raw {
    pub fn connect(path: &Path) -> Self {
        Self { socket: Socket::connect(path).unwrap() }
    }

    pub fn send<T: Wire>(&self, op: Op, body: &T, tail: &[u8]) {
        self.send_as(1, op, body, tail);
    }

    /// As request number `request`.
    pub fn send_as<T: Wire>(&self, request: u64, op: Op, body: &T, tail: &[u8]) {
        let bytes = header::encode(op, false, request, 0, body, tail).unwrap();
        let _ = self.socket.send(&bytes, &[]);
    }

    pub fn receive(&self) -> Option<(Message, Vec<std::os::fd::OwnedFd>)> {
        self.socket.wait_readable(5000).unwrap();
        let datagram = self.socket.receive().ok()??;
        Some((Message::decode(&datagram.bytes).unwrap(), datagram.fds))
    }

    pub fn hello(&self) -> Vec<std::os::fd::OwnedFd> {
        self.send(Op::Hello, &HelloRequest { min_version: VERSION, max_version: VERSION, reserved: 0 }, &[]);
        let (message, fds) = self.receive().unwrap();
        assert_eq!(message.error(), None);
        fds
    }

    /// Reads on until the server closes.
    pub fn is_closed(&self) -> bool {
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
