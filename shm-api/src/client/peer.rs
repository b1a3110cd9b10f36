//! An emulated device beside the drive: it does DMA to the windows that are mapped for it, and to nothing else.

use std::sync::Arc;

use nvme_driver::mem::{Access, Mapping};

use super::{Client, ClientError, File};
use crate::protocol::Op;
use crate::protocol::messages::{
    self as m, Empty, PeerAttachReply, PeerAttachRequest, PeerDmaReply, PeerDmaRequest, PeerMapReply,
    PeerMapRequest, PeerRequest,
};

/// A peer attached through this client. Detached when dropped.
#[derive(Debug)]
pub struct Peer {
    client: Client,
    id: u64,
    local: Arc<Mapping>,
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

impl Peer {
    pub(super) fn attach(client: Client, local_len: u64) -> Result<Self, ClientError> {
        let request = PeerAttachRequest { local_len };
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
        Ok(Self { client, id: body.peer, local })
    }

    /// The peer's own memory.
    pub fn local(&self) -> &Arc<Mapping> {
        &self.local
    }

    /// Lets the peer reach the window of `file` that holds `offset`; to write it too if `write`.
    pub fn map(&self, file: &File, offset: u64, write: bool) -> Result<PeerWindow, ClientError> {
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

    /// The peer copies `len` bytes from `iova` to `local` in its memory. Refused by its IOMMU if the window was revoked.
    pub fn dma_read(&self, iova: u64, local: u64, len: u64) -> Result<u64, ClientError> {
        self.dma(iova, local, len, m::DMA_READ)
    }

    /// The peer copies `len` bytes from `local` in its memory to `iova`.
    pub fn dma_write(&self, iova: u64, local: u64, len: u64) -> Result<u64, ClientError> {
        self.dma(iova, local, len, m::DMA_WRITE)
    }

    fn dma(&self, iova: u64, local: u64, len: u64, direction: u32) -> Result<u64, ClientError> {
        let request = PeerDmaRequest { peer: self.id, iova, local, len, direction, reserved: 0 };
        let reply: PeerDmaReply = self.client.inner.connection.ask(Op::PeerDma, "a DMA", &request, &[])?;
        Ok(reply.bytes)
    }

    /// Takes every window back from the peer: its next DMA faults.
    pub fn revoke(&self) -> Result<(), ClientError> {
        let request = PeerRequest { peer: self.id };
        let _: m::RevokeReply =
            self.client.inner.connection.ask(Op::PeerRevoke, "a peer's revocation", &request, &[])?;
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let request = PeerRequest { peer: self.id };
        let gone: Result<Empty, _> =
            self.client.inner.connection.ask(Op::PeerDetach, "a peer to be detached", &request, &[]);
        if let Err(e) = gone {
            tracing::debug!("detaching a peer: {e}");
        }
    }
}
