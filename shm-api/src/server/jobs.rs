//! What takes longer than one turn: each job is asked in every turn whether it is done.

use std::ops::Range;
use std::os::fd::OwnedFd;

use extent_fs::FsError;
use p2p::counters::Reason;
use p2p::layout::Home;
use p2p::windows::{Ensured, PeerPath, Progress, Report, Ticket, Want};

use super::core::{Core, windows_error};
use super::drive_jobs::DriveWork;
use super::layouts::{Granted, Wanted};
use super::names::fs_error;
use super::peers::PeerDma;
use super::session::{PeerEntry, ReplyTo};
use crate::protocol::messages::{
    CommitReply, FaultReply, LayoutCommitReply, OpenReply, PLACE_CMB, PLACE_HOST, PLACE_NONE, PeerDmaReply,
    PeerMapReply, PeerReadReply, RevokeReply,
};
use crate::protocol::{ErrorCode, WireError};

/// Windows written back in one turn of a commit, so that others get theirs.
const WINDOWS_PER_TURN: u64 = 8;

/// A job, and who waits for it.
pub(crate) struct Job {
    pub(super) to: Option<(u32, ReplyTo)>,
    pub(super) work: Work,
    /// Which of all windows that have its control slot, one after the other, it is about.
    pub(super) incarnation: Option<u32>,
}

impl Job {
    /// Work that nobody waits for.
    pub(super) fn unasked(work: Work) -> Self {
        Self { to: None, work, incarnation: None }
    }
}

pub(super) enum Work {
    /// A window is to be resident.
    Fault { slot: u32, want: Want, leave_cmb: bool, since: u64 },
    /// A revocation is to be through.
    Revoke { ticket: Ticket, since: u64 },
    /// Dirty windows are to be written back, from `at` on, and the file synced. Losses beyond the first `losses` make it an error.
    Commit { ino: u64, handle: u64, at: u64, end: u64, size: u64, from_cmb: u64, from_host: u64, losses: u64 },
    /// What a commit wrote, or a layout's holder, is to be durable: with all that wait, in one flush.
    Sync(Unsynced),
    /// Windows behind a file's new end are to go; then the file is cut. If that was part of opening it, its reply.
    Truncate {
        ino: u64,
        size: u64,
        excluded: Range<u64>,
        ticket: Ticket,
        opened: Option<(OpenReply, OwnedFd)>,
    },
    /// A nameless inode's windows are to go; then its blocks.
    Forget { ino: u64, ticket: Ticket },
    /// A closed file's windows are to go, to make room for others.
    Retire { ino: u64, ticket: Ticket },
    /// A client is to have block numbers.
    Layout(Box<Wanted>),
    /// What a layout's holder wrote is to be durable, when the windows over it are gone.
    LayoutCommit { ino: u64, ticket: Ticket },
    /// A peer is to reach a window.
    PeerMap { peer: PeerEntry, slot: u32, write: bool, since: u64 },
    /// A peer's DMA is to be done.
    PeerDma(PeerDma),
    /// Bytes are to go between a drive that is a peer and a window, or to be durable on that drive.
    Drive(Box<DriveWork>),
    /// A peer is to have bytes of a file in its memory; or a file bytes of that, `out`.
    PeerCopy { peer: PeerEntry, slot: u32, ino: u64, bytes: Range<u64>, local: usize, out: bool, since: u64 },
}

impl Work {
    /// The control slot of the window that it is about.
    pub(super) fn slot(&self) -> Option<u32> {
        match self {
            Self::Fault { slot, .. } | Self::PeerMap { slot, .. } | Self::PeerCopy { slot, .. } => {
                Some(*slot)
            }
            _ => None,
        }
    }

    /// The file that this is a commit of, of whatever kind. It is held open in the filesystem until that is answered.
    pub(super) fn commits(&self) -> Option<u64> {
        let ino = match self {
            Self::Commit { ino, .. } | Self::LayoutCommit { ino, .. } => *ino,
            Self::Sync(waiting) => waiting.ino,
            _ => return None,
        };
        (!super::raw::is_raw(ino)).then_some(ino)
    }
}

/// A commit of which everything is on the drive, and nothing known to be durable.
pub(super) struct Unsynced {
    pub(super) ino: u64,
    /// Of a commit by a client through its handle; else of a layout.
    pub(super) by_handle: Option<Written>,
}

/// What a commit through a handle has done so far.
#[derive(Clone, Copy)]
pub(super) struct Written {
    pub(super) handle: u64,
    pub(super) from_cmb: u64,
    pub(super) from_host: u64,
    pub(super) losses: u64,
}

/// What a finished job has to say.
pub(super) enum Answer {
    Nothing,
    Open(OpenReply, OwnedFd),
    Fault(FaultReply),
    Revoke(RevokeReply),
    Commit(CommitReply),
    PeerMap(PeerMapReply),
    PeerDma(PeerDmaReply),
    PeerCopy(PeerReadReply),
    Layout(Box<Granted>),
    LayoutCommit(LayoutCommitReply),
}

pub(super) fn place_number(home: Home) -> u32 {
    match home {
        Home::None => PLACE_NONE,
        Home::Cmb => PLACE_CMB,
        Home::Host => PLACE_HOST,
    }
}

/// The answer to who asks for a window and gives it back before that is done. The slot may be that of another file's window by then.
pub(super) fn given_back() -> WireError {
    WireError::new(ErrorCode::NotResident, "the window was given back meanwhile; ask again")
}

/// The answer where a window finds no place.
pub(super) fn no_place(why: Reason) -> WireError {
    WireError::new(ErrorCode::NotResident, format!("no place for the window now ({why}); ask again"))
}

impl Core {
    /// Moves a job on. `None`: not done yet.
    pub(super) fn advance(&mut self, job: &mut Job, now: u64) -> Option<Result<Answer, WireError>> {
        if let Some(slot) = job.work.slot()
            && self.incarnation(slot) != job.incarnation
        {
            return Some(Err(given_back()));
        }
        match &mut job.work {
            Work::Fault { slot, want, leave_cmb, since } => {
                let (slot, since) = (*slot, *since);
                self.fault(slot, *want, *leave_cmb, now).or_else(|| self.held_up(slot, since, now).map(Err))
            }
            Work::Revoke { ticket, since } => {
                let report = self.done(*ticket)?;
                Some(Ok(Answer::Revoke(RevokeReply {
                    windows: report.moved,
                    freed: report.freed_bytes / 4096,
                    quarantined: report.quarantined_bytes / 4096,
                    fenced: report.silent,
                    nanoseconds: now.saturating_sub(*since),
                })))
            }
            Work::Commit { ino, handle, at, end, size, from_cmb, from_host, losses } => {
                // A sparse file may be large, and most of it nobody's window.
                *at = self.windows.next_window(*ino, *at).map_or(*end, |next| next.max(*at)).min(*end);
                let step = (*at + WINDOWS_PER_TURN * self.window_of(*ino)).min(*end);
                if self.awaits_lease(*ino, &(*at..step)) {
                    return None;
                }
                match self.windows.commit(*ino, &(*at..step), &mut self.backing) {
                    Ok(done) => {
                        *from_cmb += done.cmb_bytes;
                        *from_host += done.host_bytes;
                    }
                    Err(e) => {
                        let e = self.object_error(*ino, &e);
                        return Some(self.none_lost(*ino, losses, now).and(Err(e)));
                    }
                }
                *at = step;
                if *at < *end {
                    return None;
                }
                // A device's own memory is not the filesystem's: it has nothing to share.
                if let Some(synced) = self.sync_memory(*ino) {
                    let synced = self.none_lost(*ino, losses, now).and(synced);
                    let (from_cmb, from_host) = (*from_cmb, *from_host);
                    return Some(synced.map(|size| {
                        self.counts.commits += 1;
                        Answer::Commit(CommitReply { size, from_cmb, from_host })
                    }));
                }
                if let Err(e) = self.grow(*ino, *size) {
                    return Some(self.none_lost(*ino, losses, now).and(Err(e)));
                }
                let written =
                    Written { handle: *handle, from_cmb: *from_cmb, from_host: *from_host, losses: *losses };
                job.work = Work::Sync(Unsynced { ino: *ino, by_handle: Some(written) });
                None
            }
            // When everybody has had a turn: `sync_waiting`.
            Work::Sync(_) => None,
            Work::Truncate { ino, size, excluded, ticket, opened } => {
                let (ino, size, excluded) = (*ino, *size, excluded.clone());
                let report = self.done(*ticket)?;
                let result = match report.failed.first() {
                    Some(why) => Err(WireError::new(ErrorCode::Internal, why.clone())),
                    None => self.backing.fs.truncate(ino, size).map_err(|e| fs_error(&e)),
                };
                self.windows.readmit(ino, &excluded);
                Some(result.map(|()| match opened.take() {
                    Some((reply, fd)) => Answer::Open(OpenReply { size, ..reply }, fd),
                    None => Answer::Nothing,
                }))
            }
            Work::Forget { ino, ticket } => {
                let ino = *ino;
                let report = self.done(*ticket)?;
                // While a silent client may still touch its pages it is counted, and no longer.
                let gone = report.failed.is_empty() && self.windows.remove_object(ino);
                if !gone && super::raw::is_raw(ino) {
                    self.leaving.push(ino);
                }
                self.close_in_fs(ino);
                Some(Ok(Answer::Nothing))
            }
            Work::Retire { ino, ticket } => {
                let ino = *ino;
                let report = self.done(*ticket)?;
                let wanted = self.opened.contains_key(&ino) || self.leases.has_file(ino);
                if report.failed.is_empty() && !wanted {
                    self.windows.remove_object(ino);
                }
                Some(Ok(Answer::Nothing))
            }
            Work::PeerDma(dma) => self.peer_dma(dma),
            Work::Drive(work) => self.advance_drive(work, now),
            Work::PeerCopy { peer, slot, ino, bytes, local, out, since } => {
                let (slot, since) = (*slot, *since);
                self.peer_copy(peer, slot, (*ino, bytes.clone()), *local, *out, now)
                    .map(|result| result.map(Answer::PeerCopy))
                    .or_else(|| self.held_up(slot, since, now).map(Err))
            }
            Work::Layout(wanted) => self.advance_layout(wanted, now),
            Work::LayoutCommit { ino, ticket } => {
                let (ino, ticket) = (*ino, *ticket);
                self.done(ticket)?;
                job.work = Work::Sync(Unsynced { ino, by_handle: None });
                None
            }
            Work::PeerMap { peer, slot, write, since } => {
                let (slot, write, since) = (*slot, *write, *since);
                match self.map_peer(peer, slot, write, now) {
                    Ok(PeerPath::Direct(mapping)) => {
                        let first = self.windows.status(slot).map_or(0, |w| w.offset);
                        let len = mapping.len as u64;
                        let reply =
                            PeerMapReply { iova: mapping.iova, len, first, place: PLACE_CMB, reason: 0 };
                        Some(Ok(Answer::PeerMap(reply)))
                    }
                    Ok(PeerPath::Bounce(why)) => Some(Err(WireError::new(
                        ErrorCode::Unsupported,
                        format!(
                            "the peer cannot reach this window directly ({why}); copy through host memory"
                        ),
                    ))),
                    Ok(PeerPath::Moving) => self.held_up(slot, since, now).map(Err),
                    Err(e) => Some(Err(windows_error(&e))),
                }
            }
        }
    }

    /// Which window has a control slot now.
    pub(super) fn incarnation(&self, slot: u32) -> Option<u32> {
        self.windows.handle(slot).map(|handle| handle.incarnation)
    }

    /// What to tell a request that has waited for a window for too long: what is in the way. `None`: it waits on.
    pub(super) fn held_up(&mut self, slot: u32, since: u64, now: u64) -> Option<WireError> {
        let waited = now.saturating_sub(since);
        if waited <= self.patience {
            return None;
        }
        if self.is_leased(slot) {
            let text = "a layout over the window is out, and is being recalled; ask again";
            return Some(WireError::new(ErrorCode::Leased, text));
        }
        let ms = waited / 1_000_000;
        let what = self.windows.in_the_way(slot).map_or(String::new(), |w| format!(" ({w})"));
        let text = format!("the window is still moving after {ms} ms{what}; ask again");
        Some(WireError::new(ErrorCode::Moving, text))
    }

    /// The report of a revocation that is through.
    pub(super) fn done(&mut self, ticket: Ticket) -> Option<Report> {
        match self.windows.progress(ticket) {
            Some(Progress::Pending(_)) => None,
            Some(Progress::Done(report)) => {
                for why in &report.failed {
                    tracing::error!("a window could not be moved: {why}");
                }
                Some(report)
            }
            None => Some(Report::default()),
        }
    }

    /// Tries to have a window resident now. `None`: it is moving.
    pub(super) fn fault(
        &mut self,
        slot: u32,
        want: Want,
        leave_cmb: bool,
        now: u64,
    ) -> Option<Result<Answer, WireError>> {
        if self.is_leased(slot) {
            return None;
        }
        let ensured = match self.windows.ensure(slot, want, &mut self.backing, now) {
            Ok(ensured) => ensured,
            Err(e) => {
                let object = self.windows.status(slot).map_or(0, |w| w.object);
                return Some(Err(self.object_error(object, &e)));
            }
        };
        match ensured {
            Ensured::Moving => None,
            Ensured::Refused(why) => {
                let text = format!("no place for the window now: {why}");
                Some(Err(WireError::new(ErrorCode::NotResident, text)))
            }
            Ensured::Ready(Home::Cmb, _) if leave_cmb => {
                // For a client that cannot reach the CMB: move it to where it can.
                let scope = p2p::windows::Scope::Window(slot);
                match self.windows.revoke(&scope, &mut self.backing, now) {
                    Ok(ticket) => {
                        self.jobs.push(Job::unasked(Work::Revoke { ticket, since: now }));
                        None
                    }
                    Err(e) => Some(Err(windows_error(&e))),
                }
            }
            Ensured::Ready(home, why) => {
                let incarnation = self.windows.handle(slot).map_or(0, |h| h.incarnation);
                let place = place_number(home);
                Some(Ok(Answer::Fault(FaultReply { slot, incarnation, place, reason: why as u32 })))
            }
        }
    }

    /// An error if more of an inode's dirty bytes were lost than the first `known` times. Those are known from here on.
    fn none_lost(&mut self, ino: u64, known: &mut u64, now: u64) -> Result<(), WireError> {
        let losses = self.windows.losses(ino, &mut self.backing, now);
        if losses.events <= *known {
            return Ok(());
        }
        *known = losses.events;
        self.windows.losses_reported(ino);
        if self.allocations.contains_key(&ino) {
            let text = if self.windows.has_memory(ino) && !self.windows.memory_is_gone(ino) {
                "the drive was reset and its PMR with it, and bytes that were written there and not yet committed may be lost; write them \
                 again and commit"
            } else {
                "the device whose memory this was is gone, and what was not in the host cache is lost with it"
            };
            return Err(WireError::new(ErrorCode::DataLost, text));
        }
        let text = "the device was reset, and bytes of this file that were written and not yet committed are lost with its CMB; \
                    write them again and commit";
        Err(WireError::new(ErrorCode::DataLost, text))
    }

    /// Has a file be at least `size` bytes long.
    fn grow(&mut self, ino: u64, size: u64) -> Result<(), WireError> {
        let fs = &mut self.backing.fs;
        let mut grown = || -> Result<(), FsError> {
            if size > fs.stat(ino)?.size { fs.truncate(ino, size) } else { Ok(()) }
        };
        grown().map_err(|e| fs_error(&e))
    }

    /// Makes all commits durable that wait for it, in one flush, and answers them.
    pub(super) fn sync_waiting(&mut self, jobs: Vec<Job>, now: u64) -> Vec<(Job, Result<Answer, WireError>)> {
        let synced = self.backing.fs.sync_all().map_err(|e| fs_error(&e));
        let mut answered = Vec::with_capacity(jobs.len());
        for mut job in jobs {
            let Work::Sync(waiting) = &mut job.work else { continue };
            let ino = waiting.ino;
            let mut result = synced.clone();
            if let Some(written) = &mut waiting.by_handle {
                // Last of all: the device may be reset as late as in that flush.
                result = self.none_lost(ino, &mut written.losses, now).and(result);
            }
            let size = self.backing.fs.stat(ino).map(|s| s.size).map_err(|e| fs_error(&e));
            let result = result.and(size).map(|size| match waiting.by_handle {
                Some(Written { from_cmb, from_host, .. }) => {
                    self.counts.commits += 1;
                    Answer::Commit(CommitReply { size, from_cmb, from_host })
                }
                None => Answer::LayoutCommit(LayoutCommitReply { size }),
            });
            answered.push((job, result));
        }
        answered
    }
}
