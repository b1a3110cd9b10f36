//! Bytes between a drive that is a peer and a window: by the drive's own DMA, or through host memory with the reason.
//!
//! A command takes its time and the server waits for none: each piece of work is asked in every turn how it stands. The window may be
//! taken back meanwhile. What is in flight then completes within the grace, or is cut off; a copy that was cut off begins again, wherever the
//! window is by then, and a single DMA is answered with an error.

use std::ops::Range;
use std::sync::Arc;

use nvme_driver::dma::DmaBuffer;
use p2p::counters::{Path, Reason};
use p2p::peer::{CopyId, CopyState, DriveTransfer, PeerError};
use p2p::windows::{Ensured, PeerPath};

use super::core::{Core, windows_error};
use super::drives::OpenDrive;
use super::jobs::{Answer, Work, given_back, no_place};
use super::peers::was_reset;
use super::session::{PeerEntry, Session};
use crate::protocol::messages as m;
use crate::protocol::{ErrorCode, WireError};

/// Bytes that go through host memory at a time.
const CHUNK: u64 = 256 << 10;
/// How often what was cut off for another's sake is sent again, where nothing else bounds that.
const ATTEMPTS: u32 = 8;
/// How often a copy begins again when revocations cut it off, before it goes through host memory: a drive that is slower than the grace
/// would get nowhere while somebody revokes its windows all the time.
const CUT_OFF: u32 = 3;

/// Work of a drive.
pub(super) enum DriveWork {
    /// One DMA at an address that the client was told.
    Dma { entry: PeerEntry, transfer: DriveTransfer, len: u64, device: u64 },
    /// Bytes of a window, wherever it is.
    Copy(Copy),
    /// What was written is to be durable.
    Flush { drive: OpenDrive, sent: Option<CopyId>, attempts: u32 },
}

/// Bytes between a drive and a window.
pub(super) struct Copy {
    pub(super) entry: PeerEntry,
    pub(super) drive: OpenDrive,
    pub(super) slot: u32,
    /// Which window that was when it was asked for.
    pub(super) incarnation: Option<u32>,
    pub(super) ino: u64,
    pub(super) bytes: Range<u64>,
    /// The first block.
    pub(super) lba: u64,
    /// From the drive into the window.
    pub(super) out: bool,
    pub(super) since: u64,
    pub(super) stage: Stage,
    /// How often it was cut off.
    pub(super) cut_off: u32,
}

/// How far a copy has come.
pub(super) enum Stage {
    /// The window is to be mapped.
    Place,
    /// The drive moves the bytes. With the device generation when it began.
    Direct(DriveTransfer, u64),
    /// They go through host memory.
    Bounce(Bounce),
}

/// A copy through host memory.
pub(super) struct Bounce {
    why: Reason,
    buffer: Arc<DmaBuffer>,
    /// Bytes done.
    done: u64,
    /// The drive's part of the present piece; `None`: the window's part is next.
    transfer: Option<DriveTransfer>,
    attempts: u32,
}

/// An error of a drive's as it goes to a client.
fn drive_error(error: &PeerError) -> WireError {
    let code = match error {
        PeerError::Drive { .. } => ErrorCode::Device,
        PeerError::Busy { .. } => ErrorCode::NotResident,
        _ => ErrorCode::PeerFault,
    };
    WireError::new(code, error.to_string())
}

impl Core {
    /// A DMA of a drive, at an address of a window that this client has mapped for it.
    pub(super) fn start_drive_dma(
        &mut self,
        entry: PeerEntry,
        drive: &OpenDrive,
        request: &m::PeerDmaRequest,
        out: bool,
    ) -> Result<Work, WireError> {
        let lba = drive.lba(request.local, request.len, request.iova, !out)?;
        self.must_be_mapped(drive, (request.iova, request.len), out)?;
        let len = usize::try_from(request.len)
            .map_err(|_| WireError::new(ErrorCode::Invalid, format!("{} bytes", request.len)))?;
        let transfer = DriveTransfer::window(&drive.peer, lba, request.iova, len, out);
        let device = self.windows.control().device_generation();
        Ok(Work::Drive(Box::new(DriveWork::Dma { entry, transfer, len: request.len, device })))
    }

    /// Has a drive make durable what was written to it.
    pub(super) fn start_drive_flush(&mut self, session: &Session, peer: u64) -> Result<Work, WireError> {
        let (_, drive) = session.drive(peer)?;
        Ok(Work::Drive(Box::new(DriveWork::Flush { drive, sent: None, attempts: 0 })))
    }

    /// Moves a drive's work on. `None`: it is under way.
    pub(super) fn advance_drive(
        &mut self,
        work: &mut DriveWork,
        now: u64,
    ) -> Option<Result<Answer, WireError>> {
        match work {
            DriveWork::Dma { entry, transfer, len, device } => {
                if let Err(e) = transfer.step()? {
                    return Some(Err(drive_error(&e)));
                }
                // What it found may be what a reset left, and what it wrote may be lost.
                if self.windows.control().device_generation() != *device {
                    return Some(Err(was_reset()));
                }
                self.count_moved(entry.id, Path::PeerToPeer, Reason::Asked, *len);
                Some(Ok(Answer::PeerDma(m::PeerDmaReply { bytes: *len })))
            }
            DriveWork::Copy(copy) => {
                let reply = self.drive_copy(copy, now)?;
                Some(reply.map(Answer::PeerCopy))
            }
            DriveWork::Flush { drive, sent, attempts } => flush(drive, sent, attempts),
        }
    }

    /// Moves a copy on, as many stages as it can.
    fn drive_copy(&mut self, copy: &mut Copy, now: u64) -> Option<Result<m::PeerReadReply, WireError>> {
        let len = copy.bytes.end - copy.bytes.start;
        let reply = |path, reason| m::PeerReadReply { bytes: len, path, reason: reason as u32 };
        loop {
            match &mut copy.stage {
                Stage::Place => {
                    if let Some(e) = self.held_up(copy.slot, copy.since, now) {
                        return Some(Err(e));
                    }
                    match self.place_drive_copy(copy, now) {
                        Ok(Some(stage)) => copy.stage = stage,
                        Ok(None) => return None,
                        Err(e) => return Some(Err(e)),
                    }
                }
                Stage::Direct(transfer, device) => match transfer.step()? {
                    // A reset since: what was there then may not be the window's bytes, and what came may be lost.
                    Ok(()) if self.windows.control().device_generation() != *device => {
                        copy.stage = Stage::Place;
                        return None;
                    }
                    Ok(()) => {
                        self.count_moved(copy.entry.id, Path::PeerToPeer, Reason::Asked, len);
                        return Some(Ok(reply(m::PATH_PEER, Reason::Asked)));
                    }
                    Err(PeerError::Revoked { .. }) => {
                        (copy.stage, copy.cut_off) = (Stage::Place, copy.cut_off + 1);
                        return None;
                    }
                    Err(e) => return Some(Err(drive_error(&e))),
                },
                Stage::Bounce(_) => {
                    let bounced = self.bounce_drive(copy, now)?;
                    return Some(bounced.map(|why| reply(m::PATH_BOUNCE, why)));
                }
            }
        }
    }

    /// Where the bytes can go from here. `None`: the window is moving.
    fn place_drive_copy(&mut self, copy: &Copy, now: u64) -> Result<Option<Stage>, WireError> {
        let len = copy.bytes.end - copy.bytes.start;
        if self.incarnation(copy.slot) != copy.incarnation {
            return Err(given_back());
        }
        let path = if copy.cut_off >= CUT_OFF {
            PeerPath::Bounce(Reason::Revoked)
        } else {
            self.map_peer(&copy.entry, copy.slot, copy.out, now).map_err(|e| windows_error(&e))?
        };
        match path {
            PeerPath::Moving => Ok(None),
            // Its mappings go as soon as that is dealt with.
            PeerPath::Direct(_) if self.windows.device_moved() => Ok(None),
            PeerPath::Direct(mapping) => {
                let first = self.windows.status(copy.slot).map_or(copy.bytes.start, |w| w.offset);
                let iova = mapping.iova + (copy.bytes.start - first);
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                let transfer = DriveTransfer::window(&copy.drive.peer, copy.lba, iova, len, copy.out);
                Ok(Some(Stage::Direct(transfer, self.windows.control().device_generation())))
            }
            PeerPath::Bounce(why) => {
                let arena = copy.drive.peer.controller().arena();
                // At most CHUNK.
                let buffer = arena.alloc(len.min(CHUNK) as usize).map_err(|e| {
                    WireError::new(ErrorCode::TooMany, format!("no memory to copy through: {e}"))
                })?;
                let buffer = Arc::new(buffer);
                Ok(Some(Stage::Bounce(Bounce { why, buffer, done: 0, transfer: None, attempts: 0 })))
            }
        }
    }

    /// Moves a copy through host memory on; when it is done, why it went there.
    fn bounce_drive(&mut self, copy: &mut Copy, now: u64) -> Option<Result<Reason, WireError>> {
        let Stage::Bounce(bounce) = &mut copy.stage else { return None };
        let late = self.held_up(copy.slot, copy.since, now);
        loop {
            let left = copy.bytes.end - copy.bytes.start - bounce.done;
            if left == 0 {
                return Some(Ok(bounce.why));
            }
            let piece = left.min(CHUNK);
            let at = copy.bytes.start + bounce.done;
            if bounce.transfer.is_none() {
                if !copy.out {
                    let (memory, from) = bounce.buffer.memory();
                    let to = (memory.as_ref(), from);
                    let told = self.windows.bounce_to_peer(
                        copy.ino,
                        at..at + piece,
                        to,
                        bounce.why,
                        &mut self.backing,
                    );
                    if let Err(e) = told {
                        return Some(Err(windows_error(&e)));
                    }
                }
                let lba = copy.lba + bounce.done / copy.drive.block.max(1);
                let peer = &copy.drive.peer;
                // At most CHUNK.
                bounce.transfer =
                    Some(DriveTransfer::host(peer, lba, &bounce.buffer, piece as usize, copy.out));
            }
            let Some(transfer) = &mut bounce.transfer else { return None };
            match transfer.step()? {
                Ok(()) => {}
                Err(PeerError::Revoked { .. }) if bounce.attempts < ATTEMPTS => {
                    bounce.attempts += 1;
                    bounce.transfer = None;
                    return None;
                }
                Err(e) => return Some(Err(drive_error(&e))),
            }
            if copy.out {
                let (memory, from) = bounce.buffer.memory();
                let from = (memory.as_ref(), from);
                let (ino, bytes, why) = (copy.ino, at..at + piece, bounce.why);
                let stored = self.windows.bounce_from_peer(ino, bytes, from, why, &mut self.backing, now);
                match stored {
                    // The transfer is done, and says so again.
                    Ok(Ensured::Moving) => return late.map(Err),
                    Ok(Ensured::Refused(none)) => return Some(Err(no_place(none))),
                    Ok(Ensured::Ready(..)) => {}
                    Err(e) => return Some(Err(windows_error(&e))),
                }
            }
            self.note_moved(copy.entry.id, false, piece);
            bounce.done += piece;
            bounce.transfer = None;
        }
    }
}

fn flush(
    drive: &OpenDrive,
    sent: &mut Option<CopyId>,
    attempts: &mut u32,
) -> Option<Result<Answer, WireError>> {
    let Some(id) = *sent else {
        return match drive.peer.flush() {
            Ok(id) => {
                *sent = Some(id);
                None
            }
            Err(PeerError::Busy { .. }) => None,
            Err(e) => Some(Err(drive_error(&e))),
        };
    };
    let failed =
        |reason: String| Some(Err(WireError::new(ErrorCode::Device, format!("the flush failed: {reason}"))));
    match drive.peer.take_result(id) {
        Some(CopyState::Queued) => None,
        Some(CopyState::Done) => Some(Ok(Answer::Nothing)),
        Some(CopyState::GivenUp(reason)) if *attempts >= ATTEMPTS => failed(reason),
        Some(CopyState::GivenUp(_)) => {
            (*attempts, *sent) = (*attempts + 1, None);
            None
        }
        Some(CopyState::Failed(reason)) => failed(reason),
        None => failed("its result is gone".to_owned()),
    }
}
