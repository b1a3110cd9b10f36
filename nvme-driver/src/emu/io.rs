//! The NVM command set (NVM Command Set Specification).

use std::io;

use super::bus::{Bus, Place};
use super::data::Direction;
use super::reads::deliver;
use super::state::State;
use super::step::Outcome;
use crate::disk::is_full;
use crate::mem::Mapping;
use crate::spec::command::{DSM_AD, DsmRange, FUA};
use crate::spec::{Command, NvmOpcode, Status};

/// The broadcast namespace identifier.
const ALL_NAMESPACES: u32 = 0xffff_ffff;

/// A checked range of the namespace, in bytes.
#[derive(Clone, Copy)]
struct Range {
    offset: u64,
    len: u64,
}

impl State {
    /// `defer`: a read may be left under way, to complete at the end of the step.
    pub(super) fn execute_io(&mut self, bus: &Bus<'_>, qid: u16, cmd: &Command, defer: bool) -> Outcome {
        match self.run_io(bus, qid, cmd, defer) {
            Ok(true) => Outcome::Done(Status::SUCCESS, 0),
            Ok(false) => Outcome::Held,
            Err(status) => Outcome::Done(status, 0),
        }
    }

    fn run_io(&mut self, bus: &Bus<'_>, qid: u16, cmd: &Command, defer: bool) -> Result<bool, Status> {
        let op = NvmOpcode::from_u8(cmd.opcode()).ok_or(Status::INVALID_OPCODE)?;
        if cmd.fuse() != 0 {
            return Err(Status::INVALID_FIELD);
        }
        if op == NvmOpcode::Flush {
            return self.flush(cmd);
        }
        if cmd.nsid != 1 || !self.admin.namespace_is_attached() {
            return Err(Status::INVALID_NAMESPACE);
        }
        match op {
            NvmOpcode::Read => return self.read(bus, qid, cmd, defer),
            NvmOpcode::Write => self.write(bus, cmd),
            NvmOpcode::Compare => self.compare(bus, cmd),
            NvmOpcode::Verify => self.verify(cmd),
            NvmOpcode::WriteZeroes => self.write_zeroes(cmd),
            NvmOpcode::DatasetManagement => self.dataset_management(bus, cmd),
            NvmOpcode::Flush | NvmOpcode::WriteUncorrectable => Err(Status::INVALID_OPCODE),
        }?;
        Ok(true)
    }

    /// SLBA and NLB as bytes, inside the namespace.
    fn range(&self, cmd: &Command) -> Result<Range, Status> {
        let (slba, blocks) = (cmd.slba(), u64::from(cmd.blocks()));
        let end = slba.checked_add(blocks).ok_or(Status::LBA_OUT_OF_RANGE)?;
        if end > self.namespace.blocks() {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        let shift = self.namespace.block_shift;
        Ok(Range { offset: slba << shift, len: blocks << shift })
    }

    /// As [`range`](Self::range), for commands that move the data: at most MDTS.
    fn data_range(&self, cmd: &Command) -> Result<Range, Status> {
        let len = u64::from(cmd.blocks()) << self.namespace.block_shift;
        if len > 4096 << self.fixed.mdts {
            return Err(Status::INVALID_FIELD);
        }
        self.range(cmd)
    }

    fn flush(&mut self, cmd: &Command) -> Result<bool, Status> {
        if (cmd.nsid != 1 && cmd.nsid != ALL_NAMESPACES) || !self.admin.namespace_is_attached() {
            return Err(Status::INVALID_NAMESPACE);
        }
        self.namespace.flush().map_err(|e| media_error("flush", &e, Status::WRITE_FAULT))?;
        Ok(true)
    }

    /// Says whether the command is complete; if not, it is under way (only if `defer` allows that).
    fn read(&mut self, bus: &Bus<'_>, qid: u16, cmd: &Command, defer: bool) -> Result<bool, Status> {
        let range = self.data_range(cmd)?;
        let len = range.len as usize;
        self.pointers.locate(bus, cmd, len, Direction::In)?;
        self.namespace.traffic.reads += 1;
        self.namespace.traffic.bytes_read += range.len;
        if !self.namespace.media.holds_data() {
            return Ok(true);
        }
        if defer && self.begin_read(bus, qid, cmd.cid(), range.offset, len) {
            return Ok(false);
        }
        let (memory, at) = self
            .namespace
            .fetch(range.offset, len)
            .map_err(|e| media_error("read", &e, Status::UNRECOVERED_READ_ERROR))?;
        deliver(&mut self.counters, bus, &self.pointers.segments, memory, at)?;
        Ok(true)
    }

    fn write(&mut self, bus: &Bus<'_>, cmd: &Command) -> Result<(), Status> {
        let range = self.data_range(cmd)?;
        let len = range.len as usize;
        self.pointers.locate(bus, cmd, len, Direction::Out)?;
        self.namespace.traffic.writes += 1;
        self.namespace.traffic.bytes_written += range.len;
        if !self.namespace.media.holds_data() {
            return Ok(());
        }
        // All of it is checked before any block changes: a refused write leaves the blocks as they were.
        for s in &self.pointers.segments {
            if bus.check_readable(s.addr, s.len).is_err() {
                self.counters.iommu_faults += 1;
                return Err(Status::DATA_TRANSFER_ERROR);
            }
        }
        let durable = cmd.cdw12 & FUA != 0;
        let fail = |e: io::Error| media_error("write", &e, Status::WRITE_FAULT);
        let (memory, mut at) = self.namespace.prepare(range.offset, len, durable).map_err(fail)?;
        for s in &self.pointers.segments {
            let before = bus.peer_bytes();
            if bus.copy_out(s.addr, memory, at, s.len).is_err() {
                self.counters.iommu_faults += 1;
                return Err(Status::DATA_TRANSFER_ERROR);
            }
            let peer = bus.peer_bytes() - before;
            let counter = match bus.place(s.addr) {
                Place::Host => &mut self.counters.host_to_drive,
                Place::Cmb => &mut self.counters.cmb_to_drive,
                Place::Pmr => &mut self.counters.pmr_to_drive,
            };
            *counter += s.len as u64 - peer;
            self.counters.peer_to_drive += peer;
            at += s.len;
        }
        self.namespace.store(range.offset, len, durable).map_err(fail)
    }

    fn compare(&mut self, bus: &Bus<'_>, cmd: &Command) -> Result<(), Status> {
        let range = self.data_range(cmd)?;
        let len = range.len as usize;
        self.pointers.locate(bus, cmd, len, Direction::Out)?;
        if !self.namespace.media.holds_data() {
            return Ok(());
        }
        let (memory, mut at) = self
            .namespace
            .fetch(range.offset, len)
            .map_err(|e| media_error("compare", &e, Status::UNRECOVERED_READ_ERROR))?;
        let mut equal = true;
        for s in &self.pointers.segments {
            match is_equal(bus, s.addr, memory, at, s.len) {
                Ok(same) => equal &= same,
                Err(()) => {
                    self.counters.iommu_faults += 1;
                    return Err(Status::DATA_TRANSFER_ERROR);
                }
            }
            at += s.len;
        }
        if equal { Ok(()) } else { Err(Status::COMPARE_FAILURE) }
    }

    fn verify(&mut self, cmd: &Command) -> Result<(), Status> {
        self.range(cmd).map(|_| ())
    }

    fn write_zeroes(&mut self, cmd: &Command) -> Result<(), Status> {
        let range = self.range(cmd)?;
        let durable = cmd.cdw12 & FUA != 0;
        self.namespace
            .zero(range.offset, range.len, durable)
            .map_err(|e| media_error("write zeroes", &e, Status::WRITE_FAULT))
    }

    fn dataset_management(&mut self, bus: &Bus<'_>, cmd: &Command) -> Result<(), Status> {
        let count = (cmd.cdw10 & 0xff) as usize + 1;
        self.pointers.locate(bus, cmd, count * 16, Direction::Out)?;
        let mut ranges = [DsmRange::default(); 256];
        let ranges = &mut ranges[..count];
        self.gather(bus, bytemuck::cast_slice_mut(ranges))?;
        // All of them are checked before any takes effect.
        let blocks = self.namespace.blocks();
        for r in ranges.iter() {
            if r.slba.checked_add(u64::from(r.nlb)).is_none_or(|end| end > blocks) {
                return Err(Status::LBA_OUT_OF_RANGE);
            }
        }
        if cmd.cdw11 & DSM_AD == 0 {
            return Ok(());
        }
        let shift = self.namespace.block_shift;
        for r in ranges.iter().filter(|r| r.nlb != 0) {
            self.namespace
                .zero(r.slba << shift, u64::from(r.nlb) << shift, false)
                .map_err(|e| media_error("deallocate", &e, Status::WRITE_FAULT))?;
        }
        Ok(())
    }

    /// Copies the located data of a command out of the bus, once.
    pub(super) fn gather(&mut self, bus: &Bus<'_>, into: &mut [u8]) -> Result<(), Status> {
        let mut at = 0;
        for s in &self.pointers.segments {
            if bus.read(s.addr, &mut into[at..at + s.len]).is_err() {
                self.counters.iommu_faults += 1;
                return Err(Status::DATA_TRANSFER_ERROR);
            }
            at += s.len;
        }
        Ok(())
    }

    /// Copies a reply to the located data of a command.
    pub(super) fn scatter(&mut self, bus: &Bus<'_>, from: &[u8]) -> Result<(), Status> {
        let mut at = 0;
        for s in &self.pointers.segments {
            if bus.write(s.addr, &from[at..at + s.len]).is_err() {
                self.counters.iommu_faults += 1;
                return Err(Status::DATA_TRANSFER_ERROR);
            }
            at += s.len;
        }
        Ok(())
    }
}

/// Compares memory on the bus with memory of ours, a page at a time.
fn is_equal(bus: &Bus<'_>, addr: u64, memory: &Mapping, at: usize, len: usize) -> Result<bool, ()> {
    let (mut theirs, mut ours) = ([0u8; 4096], [0u8; 4096]);
    let mut equal = true;
    let mut done = 0;
    while done < len {
        let n = (len - done).min(4096);
        bus.read(addr.wrapping_add(done as u64), &mut theirs[..n]).map_err(|_| ())?;
        memory.read(at + done, &mut ours[..n]).map_err(|_| ())?;
        equal &= theirs[..n] == ours[..n];
        done += n;
    }
    Ok(equal)
}

pub(super) fn media_error(what: &str, error: &io::Error, status: Status) -> Status {
    // The image says what is wrong with it by itself, once.
    tracing::debug!("emulated drive: {what}: {error}");
    // As a thinly provisioned drive says it whose pool is empty: it has a word for it.
    if is_full(error) { Status::CAPACITY_EXCEEDED } else { status }
}
