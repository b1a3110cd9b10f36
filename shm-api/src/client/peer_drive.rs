//! Another drive of the server's: its blocks go to windows and come from them, by its own DMA where there is a way.

use super::peer::Handle;
use super::{Client, ClientError, File, PeerTransfer, PeerWindow};
use crate::protocol::Op;
use crate::protocol::messages::{self as m, Empty, PeerOpenReply, PeerRequest};

/// A drive that the server has as a peer, as this client has it open. What this client has mapped for it goes when this is dropped.
#[derive(Debug)]
pub struct PeerDrive {
    handle: Handle,
    bytes: u64,
    block_size: u32,
    writable: bool,
}

/// What a server says of a drive that it has as a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct DriveState {
    /// Whether its blocks may be written (`cmbfs serve --peer-write`).
    pub writable: bool,
    /// Whether its DMA reaches the CMB; if not, its bytes go through host memory.
    pub direct: bool,
    /// Whether it has failed, or is gone.
    pub failed: bool,
}

impl DriveState {
    /// `None`: it is no drive.
    pub(super) fn from_flags(flags: u32) -> Option<Self> {
        let has = |bit| flags & bit != 0;
        has(m::DRIVE).then(|| Self {
            writable: has(m::DRIVE_WRITABLE),
            direct: !has(m::DRIVE_BOUNCES),
            failed: has(m::DRIVE_FAILED),
        })
    }
}

impl PeerDrive {
    pub(super) fn open(client: Client, name: &str) -> Result<Self, ClientError> {
        let reply: PeerOpenReply =
            client.inner.connection.ask(Op::PeerOpen, "a drive", &Empty {}, name.as_bytes())?;
        Ok(Self {
            handle: Handle { client, id: reply.peer },
            bytes: reply.local_len,
            block_size: reply.block_size,
            writable: reply.flags & m::DRIVE_WRITABLE != 0,
        })
    }

    /// Bytes on it.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of a block: where bytes begin on the drive, and how many they are, is a multiple of this.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Whether its blocks may be written.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Reads `len` bytes at byte `at` of the drive into `offset` of `file`, all in one window that is mapped for writing: by the drive's own
    /// DMA into the CMB where that is possible, else through host memory. Says which of the two it was, and why.
    pub fn fill(&self, file: &File, offset: u64, at: u64, len: u64) -> Result<PeerTransfer, ClientError> {
        self.handle.copy(Op::PeerWrite, "a drive's read", file, offset, at, len)
    }

    /// Writes `len` bytes of `file` from `offset`, all in one mapped window, to byte `at` of the drive, as for [`fill`](Self::fill). Durable
    /// with the next [`flush`](Self::flush).
    pub fn store(&self, file: &File, offset: u64, at: u64, len: u64) -> Result<PeerTransfer, ClientError> {
        self.handle.copy(Op::PeerRead, "a drive's write", file, offset, at, len)
    }

    /// Makes durable what was stored before.
    pub fn flush(&self) -> Result<(), ClientError> {
        let request = PeerRequest { peer: self.handle.id };
        let done: Result<Empty, _> =
            self.handle.client.inner.connection.ask(Op::PeerFlush, "a drive's flush", &request, &[]);
        done.map(|_| ())
    }

    /// Lets the drive reach the window of `file` that holds `offset`; to write it too if `write`.
    pub fn map(&self, file: &File, offset: u64, write: bool) -> Result<PeerWindow, ClientError> {
        self.handle.map(file, offset, write)
    }

    /// The drive reads `len` bytes at byte `at` into a window that is mapped for it, at `iova`. Refused if the window was revoked.
    pub fn dma_fill(&self, iova: u64, at: u64, len: u64) -> Result<u64, ClientError> {
        self.handle.dma(iova, at, len, m::DMA_WRITE)
    }

    /// The drive writes `len` bytes from `iova`, in a window that is mapped for it, to byte `at`.
    pub fn dma_store(&self, iova: u64, at: u64, len: u64) -> Result<u64, ClientError> {
        self.handle.dma(iova, at, len, m::DMA_READ)
    }

    /// Takes every window back from the drive, whoever has mapped it.
    pub fn revoke(&self) -> Result<(), ClientError> {
        self.handle.revoke()
    }
}
