//! A range of a peer's drive to or from a window, or host memory: as many commands as it takes, a bounded number of them at a time.

use std::sync::Arc;

use nvme_driver::dma::DmaBuffer;

use super::{CopyId, CopyState, NvmePeer, PeerError};

/// Commands of one transfer in flight at most, so that others find room in the queue.
const DEPTH: usize = 16;

/// What the commands move to or from.
#[derive(Clone, Debug)]
enum Place {
    /// A mapped window, by the peer's address.
    Window(u64),
    /// The beginning of host memory.
    Host(Arc<DmaBuffer>),
}

/// A transfer under way. Dropped early, its commands go on: what they touch is kept, but nobody learns how they ended.
#[derive(Debug)]
pub struct DriveTransfer {
    peer: NvmePeer,
    place: Place,
    /// First logical block.
    lba: u64,
    len: usize,
    /// From the drive.
    into: bool,
    sent: usize,
    in_flight: Vec<CopyId>,
    error: Option<PeerError>,
}

impl DriveTransfer {
    /// `len` bytes between logical block `lba` of the drive and `iova`, inside one mapping; `into` the window. Nothing is sent before the
    /// first [`step`](Self::step).
    pub fn window(peer: &NvmePeer, lba: u64, iova: u64, len: usize, into: bool) -> Self {
        Self::new(peer, lba, Place::Window(iova), len, into)
    }

    /// The same between the drive and the beginning of host memory from the arena of the peer's controller.
    pub fn host(peer: &NvmePeer, lba: u64, buffer: &Arc<DmaBuffer>, len: usize, into: bool) -> Self {
        Self::new(peer, lba, Place::Host(Arc::clone(buffer)), len, into)
    }

    fn new(peer: &NvmePeer, lba: u64, place: Place, len: usize, into: bool) -> Self {
        let in_flight = Vec::with_capacity(DEPTH);
        Self { peer: peer.clone(), place, lba, len, into, sent: 0, in_flight, error: None }
    }

    /// Moves it on. `None`: it is under way. An error is given when no command of it is in flight any more.
    pub fn step(&mut self) -> Option<Result<(), PeerError>> {
        if !self.in_flight.is_empty() {
            self.peer.poll();
        }
        let (peer, error) = (&self.peer, &mut self.error);
        self.in_flight.retain(|id| {
            let ended = match peer.taken(*id) {
                Some(CopyState::Queued) => return true,
                Some(CopyState::Done) => return false,
                Some(CopyState::Failed(reason)) => peer.broken(reason),
                Some(CopyState::GivenUp(reason)) => {
                    PeerError::Revoked { peer: super::Mapper::name(peer).to_owned(), reason }
                }
                None => peer.broken("the result of a command is gone".to_owned()),
            };
            // What failed by itself says more than what was cut off with it.
            if error.is_none() || matches!(ended, PeerError::Drive { .. }) {
                *error = Some(ended);
            }
            false
        });
        while self.error.is_none() && self.sent < self.len && self.in_flight.len() < DEPTH {
            match self.send() {
                Ok(id) => self.in_flight.push(id),
                Err(PeerError::Busy { .. }) => break,
                Err(e) => self.error = Some(e),
            }
        }
        if !self.in_flight.is_empty() {
            return None;
        }
        match self.error.take() {
            Some(error) => Some(Err(error)),
            None if self.sent == self.len => Some(Ok(())),
            None => None,
        }
    }

    /// Sends the next command.
    fn send(&mut self) -> Result<CopyId, PeerError> {
        let (block, _) = self.peer.geometry()?;
        let len = (self.len - self.sent).min(self.peer.controller().max_transfer());
        let lba = self.lba + self.sent as u64 / u64::from(block.max(1));
        let id = match &self.place {
            Place::Window(iova) if self.into => {
                self.peer.read_from_drive(lba, iova.saturating_add(self.sent as u64), len)
            }
            Place::Window(iova) => self.peer.write_to_drive(lba, iova.saturating_add(self.sent as u64), len),
            Place::Host(buffer) => self.peer.move_through_host(lba, (buffer, self.sent), len, self.into),
        }?;
        self.sent += len;
        Ok(id)
    }
}
