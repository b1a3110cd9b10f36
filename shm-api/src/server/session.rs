//! One client's connection: who it is, what it has open, and what waits to be sent to it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use p2p::peer::EmulatedEngine;
use p2p::windows::{ClientId, PeerId};

use super::drives::OpenDrive;
use super::outbox::{Outbox, Outgoing, SendError};
use crate::protocol::wire::Wire;
use crate::protocol::{ErrorCode, Op, WireError, header};
use crate::transport::peer::Identity;
use crate::transport::ring::{RingError, RingReply, ServerRing};
use crate::transport::socket::Socket;

/// Most files one client may have open.
const MAX_FILES: usize = 1024;
/// Most mappings one client may hold.
const MAX_MAPS: usize = 4096;
/// Most peers one client may have attached.
const MAX_PEERS: usize = 8;

/// A file as one client has it open.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenFile {
    pub(crate) ino: u64,
    pub(crate) writable: bool,
    /// Of the inode's losses (a reset of the device takes what is dirty in its CMB), how many it has been told of.
    pub(crate) losses: u64,
    /// Whether the client can reach its windows where they are direct: it has the CMB, or the device memory that the object is.
    pub(crate) reaches: bool,
}

/// A peer that one client has attached, or opened.
#[derive(Clone, Debug)]
pub(crate) struct PeerEntry {
    pub(crate) id: PeerId,
    pub(crate) kind: PeerKind,
}

#[derive(Clone, Debug)]
pub(crate) enum PeerKind {
    /// An emulated device of this client's.
    Engine {
        engine: EmulatedEngine,
        /// Whose memory it is.
        uid: u32,
    },
    /// A drive of the server's.
    Drive(OpenDrive),
}

/// A mapped range of windows.
#[derive(Clone, Debug)]
pub(crate) struct MapEntry {
    pub(crate) file: u64,
    /// Control slots of the windows held.
    pub(crate) windows: Vec<u32>,
}

/// Where the answer to a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReplyTo {
    /// Back over the socket.
    Socket(Op, u64),
    /// Into the ring.
    Ring(u64),
}

#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: u32,
    pub(crate) socket: Socket,
    pub(crate) identity: Identity,
    pub(crate) pidfd: OwnedFd,
    pub(crate) outbox: Outbox,
    /// From hello on.
    pub(crate) client: Option<ClientId>,
    /// Whether it was given the CMB.
    pub(crate) has_cmb: bool,
    /// From hello on.
    pub(crate) ring: Option<ServerRing>,
    /// Open files by handle.
    pub(crate) files: HashMap<u64, OpenFile>,
    /// Of temporary ones, the names under which they were made.
    pub(crate) temporary: HashMap<u64, String>,
    pub(crate) maps: HashMap<u64, MapEntry>,
    pub(crate) peers: HashMap<u64, PeerEntry>,
    /// Its connection is gone and its process lives.
    pub(crate) has_left: bool,
    next_handle: u64,
}

impl Session {
    pub(crate) fn new(id: u32, socket: Socket, identity: Identity, pidfd: OwnedFd) -> Self {
        Self {
            id,
            socket,
            identity,
            pidfd,
            outbox: Outbox::default(),
            client: None,
            has_cmb: false,
            ring: None,
            files: HashMap::new(),
            temporary: HashMap::new(),
            maps: HashMap::new(),
            peers: HashMap::new(),
            has_left: false,
            next_handle: 1,
        }
    }

    fn handle(&mut self) -> u64 {
        // Never reused on one connection: an old handle can then not name a new file.
        self.next_handle += 1;
        self.next_handle - 1
    }

    pub(crate) fn add_file(&mut self, file: OpenFile) -> u64 {
        let handle = self.handle();
        self.files.insert(handle, file);
        handle
    }

    pub(crate) fn add_map(&mut self, map: MapEntry) -> u64 {
        let handle = self.handle();
        self.maps.insert(handle, map);
        handle
    }

    pub(crate) fn add_peer(&mut self, peer: PeerEntry) -> u64 {
        let handle = self.handle();
        self.peers.insert(handle, peer);
        handle
    }

    /// Whether the limits allow one more.
    pub(crate) fn room_for_file(&self) -> Result<(), WireError> {
        room(self.files.len(), MAX_FILES, "open files")
    }

    pub(crate) fn room_for_map(&self) -> Result<(), WireError> {
        room(self.maps.len(), MAX_MAPS, "mappings")
    }

    pub(crate) fn room_for_peer(&self) -> Result<(), WireError> {
        room(self.peers.len(), MAX_PEERS, "peers")
    }

    pub(crate) fn file(&self, handle: u64) -> Result<OpenFile, WireError> {
        self.files.get(&handle).copied().ok_or_else(|| {
            WireError::new(ErrorCode::BadHandle, format!("{handle} is no open file of this connection"))
        })
    }

    pub(crate) fn writable_file(&self, handle: u64) -> Result<OpenFile, WireError> {
        let file = self.file(handle)?;
        if file.writable {
            return Ok(file);
        }
        Err(WireError::new(ErrorCode::Denied, "the file is open for reading only; open it for writing"))
    }

    pub(crate) fn peer(&self, handle: u64) -> Result<PeerEntry, WireError> {
        self.peers.get(&handle).cloned().ok_or_else(|| {
            WireError::new(ErrorCode::BadHandle, format!("{handle} is no peer of this connection"))
        })
    }

    /// An emulated peer of this client's.
    pub(crate) fn engine(&self, handle: u64) -> Result<(PeerId, EmulatedEngine), WireError> {
        match self.peer(handle)? {
            PeerEntry { id, kind: PeerKind::Engine { engine, .. } } => Ok((id, engine)),
            PeerEntry { kind: PeerKind::Drive(_), .. } => Err(WireError::new(
                ErrorCode::Unsupported,
                "a drive has no memory of its own: that is for emulated peers",
            )),
        }
    }

    /// A drive that this client has opened.
    pub(crate) fn drive(&self, handle: u64) -> Result<(PeerId, OpenDrive), WireError> {
        match self.peer(handle)? {
            PeerEntry { id, kind: PeerKind::Drive(drive) } => Ok((id, drive)),
            PeerEntry { kind: PeerKind::Engine { .. }, .. } => Err(WireError::new(
                ErrorCode::Unsupported,
                "an emulated peer is no drive: it has nothing to flush",
            )),
        }
    }

    /// Sends a successful reply.
    pub(crate) fn reply<T: Wire>(
        &mut self,
        op: Op,
        request: u64,
        body: &T,
        tail: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<(), SendError> {
        match header::encode(op, true, request, fds.len(), body, tail) {
            Ok(bytes) => self.outbox.send(&self.socket, Outgoing { bytes, fds }),
            Err(error) => self.reply_error(op, request, &error),
        }
    }

    /// Sends an error reply.
    pub(crate) fn reply_error(&mut self, op: Op, request: u64, error: &WireError) -> Result<(), SendError> {
        let bytes = header::encode_error(op, request, error);
        self.outbox.send(&self.socket, Outgoing { bytes, fds: Vec::new() })
    }

    /// Answers in the ring.
    pub(crate) fn reply_ring(&mut self, reply: &RingReply) -> Result<(), RingError> {
        match &mut self.ring {
            Some(ring) => ring.put(reply),
            None => Ok(()),
        }
    }
}

fn room(have: usize, limit: usize, what: &str) -> Result<(), WireError> {
    if have < limit {
        return Ok(());
    }
    Err(WireError::new(ErrorCode::TooMany, format!("this connection has {limit} {what}, which is the limit")))
}
