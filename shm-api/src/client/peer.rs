//! An emulated device beside the drive: it does DMA to the windows that are mapped for it, and to nothing else.

use std::sync::Arc;

use nvme_driver::mem::{Access, Mapping};
use p2p::counters::ALL_REASONS;

use super::peer_drive::DriveState;
use super::{Client, ClientError, File};
use crate::protocol::Op;
use crate::protocol::messages::{
    self as m, Empty, PeerAttachReply, PeerAttachRequest, PeerDmaReply, PeerDmaRequest, PeerMapReply,
    PeerMapRequest, PeerRequest,
};
use crate::protocol::records;

/// A peer attached through this client. Detached when dropped.
#[derive(Debug)]
pub struct Peer {
    handle: Handle,
    local: Arc<Mapping>,
}

/// A peer of this connection, of whatever kind. Detached when dropped.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) client: Client,
    pub(super) id: u64,
}

/// A window as the peer sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerWindow {
    /// The peer's address of the window's first byte.
    pub iova: u64,
    /// Its length in bytes.
    pub len: u64,
    /// File offset of its first byte.
    pub first: u64,
    /// Whether it lies in the CMB: then no byte passes host memory.
    pub in_cmb: bool,
}

/// How bytes got into a peer's memory, or out of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerTransfer {
    /// How many.
    pub bytes: u64,
    /// Whether the peer did it by DMA to the CMB; if not, they went through host memory.
    pub direct: bool,
    /// Why that way.
    pub reason: String,
}

/// A peer of a server as listed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PeerInfo {
    /// Its number on the server.
    pub peer: u32,
    /// Its name.
    pub name: String,
    /// Windows mapped for it; of one file, if that was asked for.
    pub mappings: u32,
    /// Bytes that it moved by DMA.
    pub direct_bytes: u64,
    /// Bytes of its that went through host memory.
    pub bounced_bytes: u64,
    /// What it is, if it is a drive of the server's ([`Client::open_drive`]).
    pub drive: Option<DriveState>,
}

/// A window that a peer reaches, as listed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PeerMappingInfo {
    /// The peer's number on the server.
    pub peer: u32,
    /// The file's inode.
    pub ino: u64,
    /// File offset of the window's first byte.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Where the peer finds it.
    pub iova: u64,
    /// Whether the peer may write.
    pub writable: bool,
}

/// The peers of a server and what they reach.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PeerList {
    /// Every peer.
    pub peers: Vec<PeerInfo>,
    /// Their mappings, as many as one message holds; none for a user who is neither root nor the server's own.
    pub mappings: Vec<PeerMappingInfo>,
    /// Mappings there are in all of what was asked for.
    pub all_mappings: u64,
}

impl PeerList {
    /// `ino` 0: of every file.
    pub(super) fn ask(client: &Client, ino: u64) -> Result<Self, ClientError> {
        let request = m::PeerListRequest { ino };
        let reply = client.inner.connection.call(Op::PeerList, "its peers", &request, &[])?;
        let (body, tail) = reply.message.body::<m::PeerListReply>()?;
        let (peers, tail) = records::peers(tail, body.peers)?;
        let mappings = records::mappings(tail, body.mappings)?;
        let peers = peers.into_iter().map(|p| PeerInfo {
            peer: p.record.peer,
            name: p.name,
            mappings: p.record.mappings,
            direct_bytes: p.record.direct,
            bounced_bytes: p.record.bounced,
            drive: DriveState::from_flags(p.record.flags),
        });
        let mappings = mappings.iter().map(|r| PeerMappingInfo {
            peer: r.peer,
            ino: r.ino,
            offset: r.offset,
            len: r.len,
            iova: r.iova,
            writable: r.write != 0,
        });
        let (peers, mappings) = (peers.collect(), mappings.collect());
        Ok(Self { peers, mappings, all_mappings: body.all_mappings })
    }
}

impl Peer {
    pub(super) fn attach(client: Client, local_len: u64, flags: u32) -> Result<Self, ClientError> {
        let request = PeerAttachRequest { local_len, flags, reserved: 0 };
        let reply = client.inner.connection.call(Op::PeerAttach, "a peer", &request, &[])?;
        let body: PeerAttachReply = reply.message.body_only()?;
        let fd = reply
            .fds
            .into_iter()
            .next()
            .ok_or_else(|| ClientError::Protocol("no descriptor for the peer's memory".to_owned()))?;
        let len = usize::try_from(body.local_len)
            .map_err(|_| ClientError::Protocol(format!("a peer with {} bytes", body.local_len)))?;
        let local = Mapping::from_fd(fd, 0, len, Access::ReadWrite)?;
        Ok(Self { handle: Handle { client, id: body.peer }, local })
    }

    /// The peer's own memory.
    pub fn local(&self) -> &Arc<Mapping> {
        &self.local
    }

    /// Makes the peer's memory a file for this client and, unless `name` is empty, under that name for all of its user's
    /// ([`Client::peer_memory`]). It stays until nobody has it open, whatever becomes of the peer. From here on its bytes are shared: what the peer or
    /// this client does to them otherwise than through the file is not seen while a window is in the host cache.
    pub fn export(&self, name: &str) -> Result<File, ClientError> {
        File::memory(self.handle.client.clone(), m::MEMORY_EXPORT, self.handle.id, name)
    }

    /// Lets the peer reach the window of `file` that holds `offset`; to write it too if `write`.
    pub fn map(&self, file: &File, offset: u64, write: bool) -> Result<PeerWindow, ClientError> {
        self.handle.map(file, offset, write)
    }

    /// The peer copies `len` bytes from `iova` to `local` in its memory. Refused by its IOMMU if the window was revoked.
    pub fn dma_read(&self, iova: u64, local: u64, len: u64) -> Result<u64, ClientError> {
        self.handle.dma(iova, local, len, m::DMA_READ)
    }

    /// The peer copies `len` bytes from `local` in its memory to `iova`.
    pub fn dma_write(&self, iova: u64, local: u64, len: u64) -> Result<u64, ClientError> {
        self.handle.dma(iova, local, len, m::DMA_WRITE)
    }

    /// Brings `len` bytes of `file` from `offset`, all in one mapped window, to `local` in the peer's memory: by its own DMA from the CMB
    /// where that is possible, else through host memory. Says which of the two it was, and why.
    pub fn read(&self, file: &File, offset: u64, local: u64, len: u64) -> Result<PeerTransfer, ClientError> {
        self.handle.copy(Op::PeerRead, "a peer's read", file, offset, local, len)
    }

    /// Brings `len` bytes at `local` in the peer's memory to `offset` of `file`, all in one window that is mapped for writing: by the
    /// peer's own DMA, else through host memory, as for [`read`](Self::read).
    pub fn write(&self, file: &File, offset: u64, local: u64, len: u64) -> Result<PeerTransfer, ClientError> {
        self.handle.copy(Op::PeerWrite, "a peer's write", file, offset, local, len)
    }

    /// Takes every window back from the peer: its next DMA faults.
    pub fn revoke(&self) -> Result<(), ClientError> {
        self.handle.revoke()
    }
}

impl Handle {
    pub(super) fn map(&self, file: &File, offset: u64, write: bool) -> Result<PeerWindow, ClientError> {
        let request = PeerMapRequest {
            peer: self.id,
            handle: file.inner.handle,
            offset,
            write: u32::from(write),
            reserved: 0,
        };
        let reply: PeerMapReply =
            self.client.inner.connection.ask(Op::PeerMap, "a peer's mapping", &request, &[])?;
        Ok(PeerWindow {
            iova: reply.iova,
            len: reply.len,
            first: reply.first,
            in_cmb: reply.place == m::PLACE_CMB,
        })
    }

    pub(super) fn copy(
        &self,
        op: Op,
        what: &'static str,
        file: &File,
        offset: u64,
        local: u64,
        len: u64,
    ) -> Result<PeerTransfer, ClientError> {
        let request = m::PeerReadRequest { peer: self.id, handle: file.inner.handle, offset, local, len };
        let reply: m::PeerReadReply = self.client.inner.connection.ask(op, what, &request, &[])?;
        let reason = ALL_REASONS.iter().find(|r| **r as u32 == reply.reason);
        Ok(PeerTransfer {
            bytes: reply.bytes,
            direct: reply.path == m::PATH_PEER,
            reason: reason.map_or("unknown".to_owned(), ToString::to_string),
        })
    }

    pub(super) fn dma(&self, iova: u64, local: u64, len: u64, direction: u32) -> Result<u64, ClientError> {
        let request = PeerDmaRequest { peer: self.id, iova, local, len, direction, reserved: 0 };
        let reply: PeerDmaReply = self.client.inner.connection.ask(Op::PeerDma, "a DMA", &request, &[])?;
        Ok(reply.bytes)
    }

    pub(super) fn revoke(&self) -> Result<(), ClientError> {
        let request = PeerRequest { peer: self.id };
        let _: m::RevokeReply =
            self.client.inner.connection.ask(Op::PeerRevoke, "a peer's revocation", &request, &[])?;
        Ok(())
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let request = PeerRequest { peer: self.id };
        let gone: Result<Empty, _> =
            self.client.inner.connection.ask(Op::PeerDetach, "a peer to be detached", &request, &[]);
        if let Err(e) = gone {
            tracing::debug!("detaching a peer: {e}");
        }
    }
}
