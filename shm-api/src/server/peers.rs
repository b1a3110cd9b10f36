//! Peers on behalf of clients: emulated ones that they attach, and what is asked of drives as of those.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;

use extent_fs::Access;
use p2p::counters::{Path, Reason};
use p2p::peer::{CopyId, CopyState, EmulatedEngine};
use p2p::windows::{Ensured, PeerId, PeerMapping, PeerPath, Scope};
use rustix::fs::{SealFlags, fcntl_add_seals};

use super::core::{Core, windows_error};
use super::drive_jobs::{Copy, DriveWork, Stage};
use super::jobs::{Answer, Job, Work, no_place};
use super::names::fs_error;
use super::session::{PeerEntry, PeerKind, Session};
use crate::protocol::messages as m;
use crate::protocol::records::{self, MappingRecord, PeerRecord};
use crate::protocol::wire::Wire;
use crate::protocol::{ErrorCode, MAX_MESSAGE, WireError};

/// Most memory of their own that the peers of one user can have together, in bytes: it is host memory in truth.
const MAX_LOCAL: u64 = 1 << 30;
/// Bytes of records after which a list of mappings ends, so that it and the header fit a message.
const MAX_LIST: usize = MAX_MESSAGE - 256;

/// A DMA of a peer, under way.
pub(super) struct PeerDma {
    peer: PeerId,
    engine: EmulatedEngine,
    copy: CopyId,
    /// The device generation when it was accepted.
    device: u64,
    len: usize,
    under_way: bool,
}

pub(super) fn was_reset() -> WireError {
    let text = "the device was reset, or every window was taken back; map the window again";
    WireError::new(ErrorCode::PeerFault, text)
}

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
        let uid = session.identity.uid;
        let left = MAX_LOCAL.saturating_sub(self.peer_memory.get(&uid).copied().unwrap_or(0));
        if request.local_len > left {
            let text = format!(
                "{} bytes for a peer, and the peers of uid {uid} may have {left} more: {MAX_LOCAL} together; detach others",
                request.local_len
            );
            return Err(WireError::new(ErrorCode::TooMany, text));
        }
        let coherent = match request.flags {
            0 => true,
            m::PEER_NOT_COHERENT => false,
            other => return Err(WireError::new(ErrorCode::Invalid, format!("flags {other:#x} of a peer"))),
        };
        let internal =
            |e: &dyn std::fmt::Display| WireError::new(ErrorCode::Internal, format!("a peer: {e}"));
        let name = format!("peer-{}-{}", session.id, session.peers.len());
        let engine = EmulatedEngine::new(&name, request.local_len as usize).map_err(|e| internal(&e))?;
        let engine = if coherent { engine } else { engine.not_coherent() };
        let Some((fd, _)) = engine.local().fd() else { return Err(internal(&"its memory has no file")) };
        // The client gets it writable: it must not shrink it under the engine.
        fcntl_add_seals(fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|e| internal(&e))?;
        let fd = fd.try_clone_to_owned().map_err(|e| internal(&e))?;
        let id = self.windows.register_peer(Box::new(engine.clone()));
        *self.peer_memory.entry(uid).or_default() += request.local_len;
        let peer = session.add_peer(PeerEntry { id, kind: PeerKind::Engine { engine, uid } });
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

    pub(super) fn start_peer_dma(
        &mut self,
        session: &Session,
        request: &m::PeerDmaRequest,
    ) -> Result<Work, WireError> {
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
            return Err(was_reset());
        }
        let engine = match &peer.kind {
            PeerKind::Engine { engine, .. } => engine.clone(),
            PeerKind::Drive(drive) => {
                let drive = drive.clone();
                return self.start_drive_dma(peer, &drive, request, out);
            }
        };
        let device = self.windows.control().device_generation();
        let copy = engine
            .submit(request.iova, local, len, out)
            .map_err(|e| WireError::new(ErrorCode::PeerFault, e.to_string()))?;
        Ok(Work::PeerDma(PeerDma { peer: peer.id, engine, copy, device, len, under_way: false }))
    }

    /// Moves a DMA on. A device takes its time: what is asked of the server in the same turn finds the DMA under way.
    pub(super) fn peer_dma(&mut self, dma: &mut PeerDma) -> Option<Result<Answer, WireError>> {
        if !std::mem::replace(&mut dma.under_way, true) {
            return None;
        }
        let fault = |text: String| Some(Err(WireError::new(ErrorCode::PeerFault, text)));
        loop {
            match dma.engine.take_result(dma.copy) {
                Some(CopyState::Queued) => dma.engine.step(1),
                Some(CopyState::Failed(reason) | CopyState::GivenUp(reason)) => return fault(reason),
                None => return fault("the result of the DMA is gone".to_owned()),
                // What it found may be what a reset left, and what it wrote may be lost.
                Some(CopyState::Done) if self.windows.control().device_generation() != dma.device => {
                    return Some(Err(was_reset()));
                }
                Some(CopyState::Done) => {
                    self.count_moved(dma.peer, Path::PeerToPeer, Reason::Asked, dma.len as u64);
                    return Some(Ok(Answer::PeerDma(m::PeerDmaReply { bytes: dma.len as u64 })));
                }
            };
        }
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

    /// Every peer, and (for root and the server's own user) what is mapped for it, as far as one message holds it; or who reaches one file.
    pub(super) fn list_peers(
        &self,
        session: &Session,
        request: &m::PeerListRequest,
    ) -> Result<(m::PeerListReply, Vec<u8>), WireError> {
        let trusted = self.is_server(session);
        let mappings: Vec<PeerMapping> = match request.ino {
            0 => self.windows.peer_mappings(None).collect(),
            _ if !trusted => {
                let text = "who reaches a file is shown to root and to the server's own user only";
                return Err(WireError::new(ErrorCode::Denied, text));
            }
            ino => self.windows.object_mappings(ino).collect(),
        };
        let mut counts: BTreeMap<PeerId, u32> = BTreeMap::new();
        for mapping in &mappings {
            *counts.entry(mapping.peer).or_default() += 1;
        }
        let mut tail = Vec::new();
        let (mut peers, mut shown) = (0, 0);
        for peer in self.windows.peers() {
            let mappings = counts.get(&peer.peer).copied();
            if request.ino != 0 && mappings.is_none() {
                continue;
            }
            let name_len = u32::try_from(peer.name.len()).unwrap_or(0);
            let mappings = mappings.unwrap_or(0);
            let (direct, bounced) = self.moved.get(&peer.peer).copied().unwrap_or_default();
            let flags = self.peer_flags(peer.peer);
            let record = PeerRecord { peer: peer.peer.0, mappings, name_len, flags, direct, bounced };
            records::put_peer(&record, &peer.name, &mut tail);
            peers += 1;
        }
        for mapping in mappings.iter().filter(|_| trusted) {
            let Some(window) = self.windows.status(mapping.window) else { continue };
            if tail.len() > MAX_LIST {
                break;
            }
            let record = MappingRecord {
                peer: mapping.peer.0,
                write: u32::from(mapping.writable),
                ino: window.object,
                offset: window.offset,
                len: mapping.len as u64,
                iova: mapping.iova,
            };
            record.put(&mut tail);
            shown += 1;
        }
        Ok((m::PeerListReply { peers, mappings: shown, all_mappings: mappings.len() as u64 }, tail))
    }

    /// A read by a peer, or a write (`out`), which may have to wait until the window stands still.
    pub(super) fn start_peer_copy(
        &mut self,
        session: &Session,
        request: &m::PeerReadRequest,
        out: bool,
        now: u64,
    ) -> Result<Work, WireError> {
        let peer = session.peer(request.peer)?;
        let file = if out { session.writable_file(request.handle)? } else { session.file(request.handle)? };
        let ino = file.ino;
        let slot = self.held_slot(session, request.handle, request.offset)?;
        let window = self.windows.status(slot).map_or(0..0, |w| w.offset..w.offset + w.len as u64);
        let invalid = |text: String| WireError::new(ErrorCode::Invalid, text);
        let end = request.offset.checked_add(request.len).filter(|end| *end <= window.end);
        let Some(end) = end.filter(|_| request.len > 0) else {
            return Err(invalid(format!(
                "{} bytes at {} are not in one window",
                request.len, request.offset
            )));
        };
        // Of a drive, its first block.
        let local = match &peer.kind {
            PeerKind::Drive(drive) => drive.lba(request.local, request.len, request.offset, !out)?,
            PeerKind::Engine { engine, .. } => {
                let size = engine.local().len() as u64;
                if request.local.checked_add(request.len).is_none_or(|end| end > size) {
                    return Err(invalid("the range is not inside the peer's memory".to_owned()));
                }
                request.local
            }
        };
        if out {
            let whole = (window.start, window.end - window.start);
            self.backing.fs.make_way(ino, whole.0, whole.1, Access::Write).map_err(|e| fs_error(&e))?;
        }
        let bytes = request.offset..end;
        if let PeerKind::Drive(drive) = &peer.kind {
            let drive = drive.clone();
            let copy = Copy {
                drive,
                slot,
                incarnation: self.incarnation(slot),
                ino,
                bytes,
                lba: local,
                out,
                since: now,
                stage: Stage::Place,
                cut_off: 0,
                entry: peer,
            };
            return Ok(Work::Drive(Box::new(DriveWork::Copy(copy))));
        }
        let local = usize::try_from(local).unwrap_or(usize::MAX);
        Ok(Work::PeerCopy { peer, slot, ino, bytes, local, out, since: now })
    }

    /// Counts bytes that were moved for a peer.
    pub(super) fn count_moved(&mut self, peer: PeerId, path: Path, reason: Reason, bytes: u64) {
        self.windows.count_peer(path, reason, usize::try_from(bytes).unwrap_or(usize::MAX));
        self.note_moved(peer, path == Path::PeerToPeer, bytes);
    }

    /// The same of bytes that are counted in all already.
    pub(super) fn note_moved(&mut self, peer: PeerId, direct: bool, bytes: u64) {
        let (by_dma, through_host) = self.moved.entry(peer).or_default();
        *if direct { by_dma } else { through_host } += bytes;
    }

    /// Moves a peer's read on, or its write (`out`): by DMA to the CMB, or through host memory with the reason. `None`: the window is moving.
    pub(super) fn peer_copy(
        &mut self,
        peer: &PeerEntry,
        slot: u32,
        (ino, bytes): (u64, Range<u64>),
        local: usize,
        out: bool,
        now: u64,
    ) -> Option<Result<m::PeerReadReply, WireError>> {
        let PeerKind::Engine { engine, .. } = &peer.kind else { return None };
        let len = bytes.end - bytes.start;
        let reply = |path, reason| m::PeerReadReply { bytes: len, path, reason: reason as u32 };
        let why = match self.map_peer(peer, slot, out, now) {
            Ok(PeerPath::Moving) => return None,
            Ok(PeerPath::Direct(mapping)) => {
                let first = self.windows.status(slot).map_or(bytes.start, |w| w.offset);
                let iova = mapping.iova + (bytes.start - first);
                if let Err(e) = engine.copy(iova, local, len as usize, out) {
                    return Some(Err(WireError::new(ErrorCode::PeerFault, e.to_string())));
                }
                self.count_moved(peer.id, Path::PeerToPeer, Reason::Asked, len);
                return Some(Ok(reply(m::PATH_PEER, Reason::Asked)));
            }
            Ok(PeerPath::Bounce(why)) => why,
            Err(e) => return Some(Err(windows_error(&e))),
        };
        let (memory, backing) = (engine.local(), &mut self.backing);
        let bounced = if out {
            match self.windows.bounce_from_peer(ino, bytes, (memory.as_ref(), local), why, backing, now) {
                Ok(Ensured::Moving) => return None,
                Ok(Ensured::Refused(none)) => return Some(Err(no_place(none))),
                Ok(Ensured::Ready(..)) => Ok(()),
                Err(e) => Err(e),
            }
        } else {
            self.windows.bounce_to_peer(ino, bytes, (memory, local), why, backing)
        };
        if bounced.is_ok() {
            self.note_moved(peer.id, false, len);
        }
        Some(bounced.map(|()| reply(m::PATH_BOUNCE, why)).map_err(|e| windows_error(&e)))
    }

    /// Takes everything back from a peer and forgets it. Its engine does what it is told, so nothing stays behind. A drive stays, and has
    /// what it is doing to finish: its windows go when nobody uses them any more (`leave_drives`).
    pub(super) fn detach_peer(&mut self, peer: PeerEntry, now: u64) {
        let PeerKind::Engine { engine, uid } = &peer.kind else {
            drop(peer);
            return self.leave_drives(now);
        };
        if let Some(bytes) = self.peer_memory.get_mut(uid) {
            *bytes = bytes.saturating_sub(engine.local().len() as u64);
        }
        self.moved.remove(&peer.id);
        if let Err(e) = self.windows.unregister_peer(peer.id, now) {
            tracing::error!("a peer cannot be detached, its pages stay quarantined: {e}");
            if let Ok(ticket) = self.windows.revoke(&Scope::Peer(peer.id), &mut self.backing, now) {
                self.jobs.push(Job::unasked(Work::Revoke { ticket, since: now }));
            }
        }
    }
}
