//! Emulated peers on behalf of clients.

use std::os::fd::OwnedFd;

use extent_fs::Access;
use p2p::counters::{Path, Reason};
use p2p::peer::EmulatedEngine;
use p2p::windows::Scope;
use rustix::fs::{SealFlags, fcntl_add_seals};

use super::core::{Core, windows_error};
use super::jobs::{Job, Work};
use super::names::fs_error;
use super::session::{PeerEntry, Session};
use crate::protocol::messages as m;
use crate::protocol::{ErrorCode, WireError};

/// Most memory of its own that a peer can have, in bytes.
const MAX_LOCAL: u64 = 1 << 30;

impl Core {
    pub(super) fn attach_peer(
        &mut self,
        session: &mut Session,
        request: &m::PeerAttachRequest,
    ) -> Result<(m::PeerAttachReply, OwnedFd), WireError> {
        session.room_for_peer()?;
        if request.local_len == 0 || request.local_len > MAX_LOCAL || !request.local_len.is_multiple_of(4096)
        {
            return Err(WireError::new(
                ErrorCode::Invalid,
                format!("{} bytes for a peer: a multiple of 4096, at most {MAX_LOCAL}", request.local_len),
            ));
        }
        let internal =
            |e: &dyn std::fmt::Display| WireError::new(ErrorCode::Internal, format!("a peer: {e}"));
        let name = format!("peer-{}-{}", session.id, session.peers.len());
        let engine = EmulatedEngine::new(&name, request.local_len as usize).map_err(|e| internal(&e))?;
        let Some((fd, _)) = engine.local().fd() else { return Err(internal(&"its memory has no file")) };
        // The client gets it writable: it must not shrink it under the engine.
        fcntl_add_seals(fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|e| internal(&e))?;
        let fd = fd.try_clone_to_owned().map_err(|e| internal(&e))?;
        let id = self.windows.register_peer(Box::new(engine.clone()));
        let peer = session.add_peer(PeerEntry { id, engine });
        Ok((m::PeerAttachReply { peer, local_len: request.local_len }, fd))
    }

    pub(super) fn start_peer_map(
        &mut self,
        session: &Session,
        request: &m::PeerMapRequest,
        now: u64,
    ) -> Result<Work, WireError> {
        let peer = session.peer(request.peer)?;
        let write = match request.write {
            0 => false,
            1 => true,
            other => return Err(WireError::new(ErrorCode::Invalid, format!("write = {other}"))),
        };
        let file =
            if write { session.writable_file(request.handle)? } else { session.file(request.handle)? };
        // A window that nobody else has mapped will do as well, and takes no host memory.
        let slot = match self.held_slot(session, request.handle, request.offset) {
            Ok(slot) => slot,
            Err(_) => self.windows.window_at(file.ino, request.offset).map_err(|e| windows_error(&e))?,
        };
        if let Some(w) = self.windows.status(slot) {
            let access = if write { Access::Write } else { Access::Read };
            self.backing.fs.make_way(w.object, w.offset, w.len as u64, access).map_err(|e| fs_error(&e))?;
        }
        Ok(Work::PeerMap { peer, slot, write, since: now })
    }

    pub(super) fn peer_dma(
        &mut self,
        session: &Session,
        request: &m::PeerDmaRequest,
    ) -> Result<m::PeerDmaReply, WireError> {
        let peer = session.peer(request.peer)?;
        let out = match request.direction {
            m::DMA_READ => false,
            m::DMA_WRITE => true,
            other => return Err(WireError::new(ErrorCode::Invalid, format!("DMA direction {other}"))),
        };
        let too_big = |_| WireError::new(ErrorCode::Invalid, "the range is not inside the peer's memory");
        let local = usize::try_from(request.local).map_err(too_big)?;
        let len = usize::try_from(request.len).map_err(too_big)?;
        if self.windows.device_moved() {
            // Its mappings go as soon as that is dealt with; what they show now is no file's bytes.
            let text = "the device was reset; map the window again";
            return Err(WireError::new(ErrorCode::PeerFault, text));
        }
        peer.engine
            .copy(request.iova, local, len, out)
            .map_err(|e| WireError::new(ErrorCode::PeerFault, e.to_string()))?;
        self.windows.count_peer(Path::PeerToPeer, Reason::Asked, len);
        Ok(m::PeerDmaReply { bytes: request.len })
    }

    pub(super) fn start_peer_revoke(
        &mut self,
        session: &Session,
        peer: u64,
        now: u64,
    ) -> Result<Work, WireError> {
        let peer = session.peer(peer)?;
        let ticket = self
            .windows
            .revoke(&Scope::Peer(peer.id), &mut self.backing, now)
            .map_err(|e| windows_error(&e))?;
        Ok(Work::Revoke { ticket, since: now })
    }

    /// Takes everything back from a peer and forgets it. Its engine does what it is told, so nothing stays behind.
    pub(super) fn detach_peer(&mut self, peer: &PeerEntry, now: u64) {
        if let Err(e) = self.windows.unregister_peer(peer.id, now) {
            tracing::error!("a peer cannot be detached, its pages stay quarantined: {e}");
            if let Ok(ticket) = self.windows.revoke(&Scope::Peer(peer.id), &mut self.backing, now) {
                self.jobs.push(Job::unasked(Work::Revoke { ticket, since: now }));
            }
        }
    }
}
