//! Taking CMB memory back, and saying where a file's windows may live.

use super::{Client, ClientError};
use crate::Placement;
use crate::protocol::Op;
use crate::protocol::messages::{self as m, RevokeReply, RevokeRequest, SetPlacementRequest};

/// What a revocation did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct RevokeReport {
    /// Windows that were moved.
    pub windows: u64,
    /// 4 KiB CMB pages that nothing reaches any more and that can be reused.
    pub freed_pages: u64,
    /// 4 KiB pages that a silent client may still touch; they wait until it answers or is gone.
    pub quarantined_pages: u64,
    /// Write sections that were fenced: their writers are told, and write again.
    pub fenced: u64,
    /// How long it took, in nanoseconds.
    pub nanoseconds: u64,
}

impl From<RevokeReply> for RevokeReport {
    fn from(reply: RevokeReply) -> Self {
        Self {
            windows: reply.windows,
            freed_pages: reply.freed,
            quarantined_pages: reply.quarantined,
            fenced: reply.fenced,
            nanoseconds: reply.nanoseconds,
        }
    }
}

impl Client {
    /// Moves every window of a file out of the CMB.
    pub fn revoke(&self, path: &str) -> Result<RevokeReport, ClientError> {
        self.revoke_request(RevokeRequest { scope: m::REVOKE_FILE, ..Default::default() }, path)
    }

    /// Moves the windows over `len` bytes from `offset` of a file out of the CMB.
    pub fn revoke_range(&self, path: &str, offset: u64, len: u64) -> Result<RevokeReport, ClientError> {
        let request = RevokeRequest { scope: m::REVOKE_RANGE, offset, len, ..Default::default() };
        self.revoke_request(request, path)
    }

    /// Moves every window that a client holds out of the CMB. On its connection it maps nothing more; it goes on reading what
    /// it has mapped. Its own user and the server's may ask for it.
    pub fn revoke_client(&self, client: u32) -> Result<RevokeReport, ClientError> {
        self.revoke_request(RevokeRequest { scope: m::REVOKE_CLIENT, id: client, ..Default::default() }, "")
    }

    /// Takes every window back from a peer, by its number on the server. The server's user may ask for it.
    pub fn revoke_peer(&self, peer: u32) -> Result<RevokeReport, ClientError> {
        self.revoke_request(RevokeRequest { scope: m::REVOKE_PEER, id: peer, ..Default::default() }, "")
    }

    /// Moves every window of every file out of the CMB.
    pub fn revoke_all(&self) -> Result<RevokeReport, ClientError> {
        self.revoke_request(RevokeRequest { scope: m::REVOKE_ALL, ..Default::default() }, "")
    }

    pub(super) fn revoke_request(
        &self,
        request: RevokeRequest,
        path: &str,
    ) -> Result<RevokeReport, ClientError> {
        let reply: RevokeReply =
            self.inner.connection.ask(Op::Revoke, "a revocation", &request, path.as_bytes())?;
        Ok(reply.into())
    }

    /// Says where the windows of a file may live from now on; it is kept with the file, and durable when this returns. Those in the CMB leave
    /// it if they may not stay. `None`: wherever the filesystem has it. Who may write the file may ask for it. Of `/`: for all files that have
    /// no choice of their own; only the server's own user may ask for that.
    pub fn set_placement(
        &self,
        path: &str,
        placement: impl Into<Option<Placement>>,
    ) -> Result<RevokeReport, ClientError> {
        let placement = placement.into().map_or(m::PLACEMENT_NONE, |p| p.number().into());
        let request = SetPlacementRequest { placement, reserved: 0 };
        let reply: RevokeReply =
            self.inner.connection.ask(Op::SetPlacement, "a placement", &request, path.as_bytes())?;
        Ok(reply.into())
    }
}
