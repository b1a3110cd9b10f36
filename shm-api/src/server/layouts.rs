//! Layouts for clients: block numbers under a lease, the windows in their way, recalls, and the end of silent holders (P7).
//!
//! While a write lease is out no window over its range is resident; while a read lease is out, none that somebody holds
//! for writing. A window that is wanted there recalls the lease and waits. Eviction, on the other hand, touches no lease (P10).

use std::ops::Range;

use extent_fs::{Access, BLOCK, BlockState, Extent, Lease};
use p2p::layout::Home;
use p2p::windows::{Report, Scope, Ticket};

use super::core::{Core, windows_error};
use super::jobs::{Answer, Work};
use super::leases::Returned;
use super::names::fs_error;
use super::raw::is_raw;
use super::session::Session;
use crate::protocol::messages as m;
use crate::protocol::records::{
    self, EXTENT_HOLE, EXTENT_UNWRITTEN, EXTENT_WRITTEN, ExtentRecord, RecallRecord,
};
use crate::protocol::wire::Wire;
use crate::protocol::{ErrorCode, Message, WireError};

/// Most leases that one connection may hold.
const MAX_LEASES: usize = 1024;
/// Recalls in one reply.
const MAX_RECALLS: usize = 512;

/// A layout that is wanted: first the windows leave, then the leases in its way.
pub(super) struct Wanted {
    session: u32,
    pid: i32,
    ino: u64,
    bytes: Range<u64>,
    access: Access,
    ticket: Option<Ticket>,
    since: u64,
}

/// A layout as it goes to a client.
pub(super) struct Granted {
    pub(super) lease: u64,
    pub(super) body: m::LayoutReply,
    pub(super) extents: Vec<u8>,
}

fn invalid(text: impl Into<String>) -> WireError {
    WireError::new(ErrorCode::Invalid, text)
}

fn name(lease: u64, device_generation: u64) -> Lease {
    Lease { id: lease, device_generation }
}

fn record(e: &Extent) -> ExtentRecord {
    let state = match e.state {
        BlockState::Hole => EXTENT_HOLE,
        BlockState::Unwritten => EXTENT_UNWRITTEN,
        BlockState::Written => EXTENT_WRITTEN,
    };
    ExtentRecord { offset: e.file_offset, lba: e.lba, blocks: e.blocks, state, reserved: 0 }
}

fn extent(r: &ExtentRecord) -> Extent {
    // What a client says about the state is not looked at.
    Extent { file_offset: r.offset, lba: r.lba, blocks: r.blocks, state: BlockState::Unwritten }
}

impl Core {
    /// Block numbers reach every byte of the drive: they go to the server's own uid and to nobody else (P8).
    fn may_have_blocks(&self, session: &Session) -> Result<(), WireError> {
        if session.identity.uid == self.server_uid {
            return Ok(());
        }
        let text = format!(
            "who has block numbers reaches every file's bytes: layouts are for the server's own uid {} only, not for {}; map windows instead",
            self.server_uid, session.identity.uid
        );
        Err(WireError::new(ErrorCode::Denied, text))
    }

    fn room_for_lease(&self, session: &Session) -> Result<(), WireError> {
        if self.leases.of(session.id).len() < MAX_LEASES {
            return Ok(());
        }
        Err(WireError::new(
            ErrorCode::TooMany,
            format!("this connection holds {MAX_LEASES} leases, which is the limit"),
        ))
    }

    /// Begins to make way for a layout.
    pub(super) fn start_layout(
        &mut self,
        session: &Session,
        request: &m::LayoutMapRequest,
        now: u64,
    ) -> Result<Work, WireError> {
        let access = match request.access {
            m::LAYOUT_READ => Access::Read,
            m::LAYOUT_WRITE => Access::Write,
            other => return Err(invalid(format!("layout access {other}"))),
        };
        self.may_have_blocks(session)?;
        self.room_for_lease(session)?;
        let file = match access {
            Access::Read => session.file(request.handle)?,
            Access::Write => session.writable_file(request.handle)?,
        };
        if is_raw(file.ino) {
            return Err(WireError::new(ErrorCode::Unsupported, "raw memory has no blocks"));
        }
        let end = request.offset.checked_add(request.len).filter(|end| *end <= p2p::layout::LANE);
        let Some(end) = end.filter(|_| request.len > 0 && request.reserved == 0) else {
            return Err(invalid(format!("a layout of {} bytes at {}", request.len, request.offset)));
        };
        let bytes = request.offset - request.offset % BLOCK..end.next_multiple_of(BLOCK);
        // What was written through windows goes to the drive, and none comes back before the lease is given.
        self.windows.exclude(file.ino, bytes.clone()).map_err(|e| windows_error(&e))?;
        self.leases.expect(file.ino, &bytes);
        let mut wanted = Wanted {
            session: session.id,
            pid: session.identity.pid,
            ino: file.ino,
            bytes: bytes.clone(),
            access,
            ticket: None,
            since: now,
        };
        match self.windows.evict(&Scope::Range { object: file.ino, bytes }, &mut self.backing, now) {
            Ok(ticket) => wanted.ticket = Some(ticket),
            Err(e) => {
                self.give_up(&wanted);
                return Err(windows_error(&e));
            }
        }
        Ok(Work::Layout(Box::new(wanted)))
    }

    fn give_up(&mut self, wanted: &Wanted) {
        self.leases.expected(wanted.ino, &wanted.bytes);
        self.windows.readmit(wanted.ino, &wanted.bytes);
    }

    /// The windows have left: takes the lease as soon as none is in its way.
    pub(super) fn advance_layout(
        &mut self,
        wanted: &mut Wanted,
        now: u64,
    ) -> Option<Result<Answer, WireError>> {
        if let Some(ticket) = wanted.ticket {
            let report: Report = self.done(ticket)?;
            wanted.ticket = None;
            if let Some(why) = report.failed.first() {
                self.give_up(wanted);
                return Some(Err(WireError::new(ErrorCode::Internal, why.clone())));
            }
        }
        let (offset, len) = (wanted.bytes.start, wanted.bytes.end - wanted.bytes.start);
        match self.backing.fs.map_blocks(wanted.ino, offset, len, wanted.access) {
            Ok(layout) => {
                self.give_up(wanted);
                Some(self.grant(wanted, &layout).map(|granted| Answer::Layout(Box::new(granted))))
            }
            Err(extent_fs::FsError::LeaseConflict { .. })
                if now.saturating_sub(wanted.since) <= self.patience =>
            {
                None
            }
            Err(e) => {
                self.give_up(wanted);
                Some(Err(fs_error(&e)))
            }
        }
    }

    /// Enters a lease into the book. Of more extents than fit a message the rest is given back.
    fn grant(&mut self, wanted: &Wanted, layout: &extent_fs::Layout) -> Result<Granted, WireError> {
        let fs = &mut self.backing.fs;
        let fit = &layout.extents[..layout.extents.len().min(m::MAX_EXTENTS)];
        let end = fit.last().map_or(wanted.bytes.end, |e| e.file_offset + e.bytes());
        if end < wanted.bytes.end {
            fs.release_range(layout.lease, end, wanted.bytes.end - end).map_err(|e| fs_error(&e))?;
        }
        let bytes = wanted.bytes.start..end;
        if wanted.access == Access::Write {
            self.windows.exclude(wanted.ino, bytes.clone()).map_err(|e| windows_error(&e))?;
        }
        self.leases.add(layout.lease, wanted.ino, wanted.access, bytes);
        self.leases.join(layout.lease.id, wanted.session, wanted.pid);
        self.describe(layout.lease, wanted.ino, wanted.access, fit)
    }

    fn describe(
        &self,
        lease: Lease,
        ino: u64,
        access: Access,
        extents: &[Extent],
    ) -> Result<Granted, WireError> {
        let fs = &self.backing.fs;
        let mut tail = Vec::new();
        extents.iter().for_each(|e| record(e).put(&mut tail));
        let body = m::LayoutReply {
            lease: lease.id,
            device_generation: lease.device_generation,
            ino,
            size: fs.stat(ino).map_err(|e| fs_error(&e))?.size,
            uuid: fs.uuid(),
            block_size: nvme_driver::disk::Disk::geometry(fs.disk()).block_size,
            access: if access == Access::Read { m::LAYOUT_READ } else { m::LAYOUT_WRITE },
            count: u32::try_from(extents.len()).unwrap_or(0),
            reserved: 0,
        };
        Ok(Granted { lease: lease.id, body, extents: tail })
    }

    /// Refuses unless the connection holds the lease.
    fn check_holder(&self, session: &Session, lease: Lease) -> Result<(), WireError> {
        match self.leases.held_by(lease.id, session.id) {
            Some(out) if out.lease == lease => Ok(()),
            _ => Err(WireError::new(
                ErrorCode::StaleLease,
                format!(
                    "this connection does not hold lease {} of device generation {}",
                    lease.id, lease.device_generation
                ),
            )),
        }
    }

    /// Another process was told of a lease, and holds it too from here on.
    pub(super) fn share_layout(
        &mut self,
        session: &Session,
        request: &m::LeaseRequest,
    ) -> Result<Granted, WireError> {
        self.may_have_blocks(session)?;
        self.room_for_lease(session)?;
        let layout = self
            .backing
            .fs
            .layout(name(request.lease, request.device_generation))
            .map_err(|e| fs_error(&e))?;
        let Some(access) = self.leases.get(request.lease).map(|out| out.access) else {
            return Err(WireError::new(ErrorCode::StaleLease, format!("no lease {} is out", request.lease)));
        };
        if layout.extents.len() > m::MAX_EXTENTS {
            return Err(WireError::new(
                ErrorCode::TooMany,
                "the lease has come to have more extents than fit a message",
            ));
        }
        self.leases.join(request.lease, session.id, session.identity.pid);
        self.describe(layout.lease, layout.ino, access, &layout.extents)
    }

    /// What a holder wrote becomes the file. The windows over it are invalid (there should be none).
    pub(super) fn start_layout_commit(
        &mut self,
        session: &Session,
        message: &Message,
        now: u64,
    ) -> Result<Work, WireError> {
        let (body, tail) = message.body::<m::LayoutCommitRequest>()?;
        if body.count as usize > m::MAX_EXTENTS || body.reserved != 0 {
            return Err(invalid(format!("a commit of {} extents: at most {}", body.count, m::MAX_EXTENTS)));
        }
        let extents: Vec<Extent> =
            records::fixed::<ExtentRecord>(tail, body.count, "an extent")?.iter().map(extent).collect();
        if extents.iter().any(|e| {
            e.blocks == 0 || e.blocks > p2p::layout::LANE / BLOCK || e.file_offset > p2p::layout::LANE
        }) {
            return Err(invalid("an extent of no blocks, or behind the largest file"));
        }
        let lease = name(body.lease, body.device_generation);
        self.check_holder(session, lease)?;
        let ino = self.leases.get(lease.id).map_or(0, |out| out.ino);
        let size = (body.size > 0).then_some(body.size);
        self.backing.fs.commit_blocks(lease, &extents, size).map_err(|e| fs_error(&e))?;
        let first = extents.iter().map(|e| e.file_offset).min().unwrap_or(0);
        let end = extents.iter().map(|e| e.file_offset + e.bytes()).max().unwrap_or(0);
        let ticket = self
            .windows
            .invalidate(ino, &(first..end), &mut self.backing, now)
            .map_err(|e| windows_error(&e))?;
        Ok(Work::LayoutCommit { ino, ticket })
    }

    /// A holder gives back what it was asked for, or all.
    pub(super) fn release_layout(
        &mut self,
        session: &Session,
        request: &m::LayoutReleaseRequest,
    ) -> Result<(), WireError> {
        let lease = name(request.lease, request.device_generation);
        self.check_holder(session, lease)?;
        let returned = if request.len == 0 {
            self.leases.leave(lease.id, session.id)
        } else {
            let end = request.offset.saturating_add(request.len);
            let end = end.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX);
            self.leases.give_back(lease.id, session.id, request.offset - request.offset % BLOCK..end)
        };
        self.take_back(lease, returned);
        Ok(())
    }

    /// What is asked back of this connection.
    pub(super) fn layout_recalls(&self, session: &Session) -> (m::RecallsReply, Vec<u8>) {
        let mut tail = Vec::new();
        let mut count = 0;
        let mut recalls = self.leases.recalls(session.id);
        for (lease, bytes, deadline) in recalls.by_ref().take(MAX_RECALLS) {
            let record = RecallRecord {
                lease: lease.id,
                device_generation: lease.device_generation,
                offset: bytes.start,
                len: bytes.end - bytes.start,
                deadline,
            };
            record.put(&mut tail);
            count += 1;
        }
        (m::RecallsReply { count, more: u32::from(recalls.next().is_some()) }, tail)
    }

    /// A connection's process is dead: its leases are nobody's, or its co-holders'.
    pub(super) fn release_layouts(&mut self, session: u32) {
        for id in self.leases.of(session) {
            self.leave_layout(id, session);
        }
    }

    /// One connection holds a lease no more.
    pub(super) fn leave_layout(&mut self, id: u64, session: u32) {
        let returned = self.leases.leave(id, session);
        if let Some(lease) = self.leases.get(id).map(|out| out.lease) {
            self.take_back(lease, returned);
        }
    }

    fn take_back(&mut self, lease: Lease, returned: Returned) {
        let Some(out) = self.leases.get(lease.id) else { return };
        let (ino, access, before) = (out.ino, out.access, out.ranges.clone());
        let fs = &mut self.backing.fs;
        let (given, after) = match returned {
            Returned::All => {
                self.leases.remove(lease.id);
                (fs.release(lease), Vec::new())
            }
            Returned::Ranges(gone) => {
                let each = |r: &Range<u64>| fs.release_range(lease, r.start, r.end - r.start);
                let given = gone.iter().try_for_each(each);
                let after = self.leases.cut(lease.id, &gone);
                if after.is_empty() && !gone.is_empty() {
                    self.leases.remove(lease.id);
                }
                (given, after)
            }
        };
        if let Err(e) = given {
            tracing::warn!("giving back lease {}: {e}", lease.id);
        }
        self.admit(ino, access, &before, &after);
    }

    /// Windows may be filled where a write lease is no more.
    fn admit(&mut self, ino: u64, access: Access, before: &[Range<u64>], after: &[Range<u64>]) {
        if access == Access::Read || before == after {
            return;
        }
        before.iter().for_each(|r| self.windows.readmit(ino, r));
        for r in after {
            if let Err(e) = self.windows.exclude(ino, r.clone()) {
                tracing::warn!("inode {ino}: {e}");
            }
        }
    }

    /// Whether a lease is in a window's way. It is recalled then: ask again.
    pub(super) fn is_leased(&mut self, slot: u32) -> bool {
        if self.leases.is_idle() {
            return false;
        }
        let Some(w) = self.windows.status(slot) else { return false };
        if w.home != Home::None {
            return false;
        }
        let bytes = w.offset..w.offset + w.len as u64;
        if self.leases.is_expected(w.object, &bytes) {
            return true;
        }
        let access = if w.writers > 0 { Access::Write } else { Access::Read };
        self.backing.fs.make_way(w.object, w.offset, w.len as u64, access).is_err()
    }

    /// Whether what is to be written back lies under a lease (of a reader: windows that were read ahead were then written to). It is
    /// recalled then: ask again.
    pub(super) fn awaits_lease(&mut self, ino: u64, bytes: &Range<u64>) -> bool {
        if self.leases.is_idle() {
            return false;
        }
        let window = self.window_size as u64;
        let mut waits = false;
        // Window by window: what is clean is in no holder's way.
        for first in (bytes.start / window..bytes.end.div_ceil(window)).map(|n| n * window) {
            if self.windows.is_dirty(ino, &(first..first + window)) {
                waits |= self.backing.fs.make_way(ino, first, window, Access::Write).is_err();
            }
        }
        waits
    }

    /// Before windows are mapped for writing: where a read lease is out they leave, so that the first write finds the lease.
    pub(super) fn leave_to_readers(
        &mut self,
        ino: u64,
        bytes: Range<u64>,
        now: u64,
    ) -> Result<(), WireError> {
        let len = bytes.end - bytes.start;
        if self.leases.is_idle() || self.backing.fs.make_way(ino, bytes.start, len, Access::Write).is_ok() {
            return Ok(());
        }
        let scope = Scope::Range { object: ino, bytes };
        self.windows.evict(&scope, &mut self.backing, now).map(drop).map_err(|e| windows_error(&e))
    }

    /// Tells holders what is asked back, and ends the leases of those that do not answer. `tell` wakes one connection.
    pub(super) fn step_leases(&mut self, mut tell: impl FnMut(u32)) {
        for recall in self.backing.fs.take_recalls() {
            for session in self.leases.recall(&recall) {
                tell(session);
            }
        }
        if !self.leases.is_recalling() {
            return;
        }
        self.keep_polling();
        let Self { backing, leases, fence, .. } = self;
        let mut late = Vec::new();
        backing.fs.expire_leases(|recall| {
            let fenced = fence.as_ref().is_some_and(|f| f.fence(recall, &leases.holders(recall.lease.id)));
            late.push((recall.lease, fenced));
            fenced
        });
        for (lease, fenced) in late {
            self.end_silent(lease, fenced);
        }
    }

    fn end_silent(&mut self, lease: Lease, fenced: bool) {
        let Some(out) = self.leases.get(lease.id) else { return };
        let (ino, access, before) = (out.ino, out.access, out.ranges.clone());
        if fenced {
            tracing::warn!(lease = lease.id, "a silent holder was fenced");
            self.leases.remove(lease.id);
        } else {
            // Nobody waits for the silent: the file moves off its blocks, which stay out of use until it is gone.
            if let Err(e) = self.backing.fs.sever(lease) {
                tracing::warn!(lease = lease.id, "a silent holder keeps its lease: {e}");
                return;
            }
            self.leases.sever(lease.id);
        }
        self.admit(ino, access, &before, &[]);
    }
}
