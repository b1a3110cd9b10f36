//! Reads of an image that are under way together.
//!
//! Read commands of one step are handed to the kernel as they are fetched, and waited for together: at the end of the
//! step, or before any command that is no read. They complete in the order they were fetched, so a step stays
//! deterministic.

use super::bus::{Bus, Place};
use super::counters::Counters;
use super::data::Segment;
use super::io::media_error;
use super::media::Media;
use super::state::State;
use crate::mem::Mapping;
use crate::spec::Status;

/// A read command that is under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    qid: u16,
    cid: u16,
    slot: usize,
    offset: u64,
    len: usize,
    /// Where its segments end in [`Reads::segments`].
    segments_end: usize,
}

/// The read commands that are under way.
#[derive(Debug, Default)]
pub(super) struct Reads {
    list: Vec<Reading>,
    /// The segments of all of them, in order.
    segments: Vec<Segment>,
}

impl State {
    /// Starts a read of the image for the command whose data was just located; `false`: it has to be done at once.
    pub(super) fn begin_read(&mut self, bus: &Bus<'_>, qid: u16, cid: u16, offset: u64, len: usize) -> bool {
        let Media::File(file) = &mut self.namespace.media else { return false };
        let mut slot = file.begin_read(offset, len);
        if slot.is_none() && !self.reads.list.is_empty() {
            let located = std::mem::take(&mut self.pointers.segments);
            self.finish_reads(bus);
            self.pointers.segments = located;
            let Media::File(file) = &mut self.namespace.media else { return false };
            slot = file.begin_read(offset, len);
        }
        let Some(slot) = slot else { return false };
        self.reads.segments.extend_from_slice(&self.pointers.segments);
        let segments_end = self.reads.segments.len();
        self.reads.list.push(Reading { qid, cid, slot, offset, len, segments_end });
        true
    }

    /// Waits for the reads under way, moves their data and completes them.
    pub(super) fn finish_reads(&mut self, bus: &Bus<'_>) {
        if self.reads.list.is_empty() {
            return;
        }
        let mut reads = std::mem::take(&mut self.reads);
        if let Media::File(file) = &mut self.namespace.media {
            file.finish_reads();
        }
        let mut from = 0;
        for r in &reads.list {
            let segments = &reads.segments[from..r.segments_end];
            from = r.segments_end;
            // After a fatal error no DMA goes out.
            if !self.is_running() {
                break;
            }
            let status = match self.deliver_read(bus, r, segments) {
                Ok(()) => Status::SUCCESS,
                Err(status) => status,
            };
            self.complete(bus, r.qid, r.cid, status, 0);
        }
        reads.list.clear();
        reads.segments.clear();
        self.reads = reads;
    }

    fn deliver_read(&mut self, bus: &Bus<'_>, r: &Reading, segments: &[Segment]) -> Result<(), Status> {
        let Media::File(file) = &mut self.namespace.media else { return Err(Status::INTERNAL_ERROR) };
        let taken = file.take_read(r.slot, r.offset, r.len);
        let (memory, at) = taken.map_err(|e| media_error("read", &e, Status::UNRECOVERED_READ_ERROR))?;
        deliver(&mut self.counters, bus, segments, &memory, at)
    }
}

/// Moves read data from `memory` to where the command wants it, and counts it.
pub(super) fn deliver(
    counters: &mut Counters,
    bus: &Bus<'_>,
    segments: &[Segment],
    memory: &Mapping,
    mut at: usize,
) -> Result<(), Status> {
    for s in segments {
        let before = bus.peer_bytes();
        if bus.copy_in(s.addr, memory, at, s.len).is_err() {
            counters.iommu_faults += 1;
            return Err(Status::DATA_TRANSFER_ERROR);
        }
        let peer = bus.peer_bytes() - before;
        let counter = match bus.place(s.addr) {
            Place::Host => &mut counters.drive_to_host,
            Place::Cmb => &mut counters.drive_to_cmb,
            Place::Pmr => &mut counters.drive_to_pmr,
        };
        *counter += s.len as u64 - peer;
        counters.drive_to_peer += peer;
        at += s.len;
    }
    Ok(())
}
