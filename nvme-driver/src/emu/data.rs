//! Where a command's data is: PRP entries and lists turned into segments (Base Specification, "Physical Region Page
//! Entry and List"). SGLs are in `sgl`.
//!
//! Lists are memory that the host may be changing: each is copied once and the copy checked. The work is bounded by the
//! transfer length, which MDTS bounds.

use super::bus::{Bus, Place};
use crate::spec::{Command, Status};

/// Entries copied at a time: a 4 KiB page of them.
const CHUNK: usize = 512;

/// A contiguous piece of a command's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) addr: u64,
    pub(super) len: usize,
}

/// What the CMB may be used for (CMBSZ and CMBLOC).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CmbUse {
    pub(super) lists: bool,
    pub(super) rds: bool,
    pub(super) wds: bool,
    /// Data of one command may lie partly in the CMB and partly elsewhere (CDPMLS).
    pub(super) mixed: bool,
}

/// Which way data moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// Drive to memory.
    In,
    /// Memory to drive.
    Out,
}

/// Turns commands' data pointers into segments; its buffers are reused from command to command.
#[derive(Debug)]
pub(super) struct Pointers {
    pub(super) segments: Vec<Segment>,
    chunk: Box<[u8; CHUNK * 8]>,
    page: u64,
    usage: CmbUse,
    /// SGLs are offered.
    sgls: bool,
}

impl Pointers {
    pub(super) fn new(usage: CmbUse, sgls: bool) -> Self {
        Self { segments: Vec::with_capacity(64), chunk: Box::new([0; CHUNK * 8]), page: 4096, usage, sgls }
    }

    /// Takes over CC.MPS.
    pub(super) fn set_page_size(&mut self, page: u64) {
        self.page = page;
    }

    /// Finds `len` bytes of data of `cmd`; the result is in `segments`.
    pub(super) fn locate(
        &mut self,
        bus: &Bus<'_>,
        cmd: &Command,
        len: usize,
        direction: Direction,
    ) -> Result<(), Status> {
        self.segments.clear();
        if len == 0 {
            return Ok(());
        }
        match cmd.psdt() {
            0 => self.walk_prps(bus, cmd.prp1, cmd.prp2, len)?,
            1 | 2 if self.sgls => self.walk_sgl(bus, cmd, len)?,
            _ => return Err(Status::INVALID_FIELD),
        }
        self.check_places(bus, direction)
    }

    /// Data may lie in the CMB only as CMBSZ and CMBLOC say. Afterwards each segment is in one place.
    fn check_places(&mut self, bus: &Bus<'_>, direction: Direction) -> Result<(), Status> {
        let (mut own, mut other) = (false, false);
        let mut i = 0;
        while i < self.segments.len() {
            let s = self.segments[i];
            let len = bus.len_in_place(s.addr, s.len);
            if len < s.len {
                self.segments[i].len = len;
                let after = Segment { addr: s.addr.wrapping_add(len as u64), len: s.len - len };
                self.segments.insert(i + 1, after);
            }
            match bus.place(s.addr) {
                Place::Cmb => own = true,
                Place::Host | Place::Pmr => other = true,
            }
            i += 1;
        }
        let allowed = match direction {
            Direction::In => self.usage.rds,
            Direction::Out => self.usage.wds,
        };
        if own && (!allowed || (other && !self.usage.mixed)) {
            return Err(Status::INVALID_USE_OF_CMB);
        }
        Ok(())
    }

    /// Whether PRP lists and SGL segments may lie in the CMB.
    pub(super) fn lists_in_cmb(&self) -> bool {
        self.usage.lists
    }

    /// Adds a piece, to the last segment if it continues it.
    pub(super) fn push(&mut self, addr: u64, len: usize) {
        if let Some(last) = self.segments.last_mut()
            && last.addr.checked_add(last.len as u64) == Some(addr)
        {
            last.len += len;
        } else {
            self.segments.push(Segment { addr, len });
        }
    }

    fn walk_prps(&mut self, bus: &Bus<'_>, prp1: u64, prp2: u64, len: usize) -> Result<(), Status> {
        let page = self.page as usize;
        if !prp1.is_multiple_of(4) {
            return Err(Status::INVALID_PRP_OFFSET);
        }
        let first = len.min(page - (prp1 % self.page) as usize);
        self.push(prp1, first);
        let rest = len - first;
        if rest == 0 {
            return Ok(());
        }
        if rest <= page {
            if !prp2.is_multiple_of(self.page) {
                return Err(Status::INVALID_PRP_OFFSET);
            }
            self.push(prp2, rest);
            return Ok(());
        }
        self.walk_list(bus, prp2, rest)
    }

    fn walk_list(&mut self, bus: &Bus<'_>, list: u64, mut rest: usize) -> Result<(), Status> {
        let page = self.page as usize;
        let mut at = list;
        if !at.is_multiple_of(8) {
            return Err(Status::INVALID_PRP_OFFSET);
        }
        while rest > 0 {
            let needed = rest.div_ceil(page);
            // A list ends with its page; its last slot is the next list's address if that is not all.
            let slots = ((self.page - at % self.page) / 8) as usize;
            let n = needed.min(slots).min(CHUNK);
            self.read_list(bus, at, n)?;
            let chain = needed > n && n == slots;
            for i in 0..n {
                let entry = self.entry(i);
                if !entry.is_multiple_of(self.page) {
                    return Err(Status::INVALID_PRP_OFFSET);
                }
                if chain && i == n - 1 {
                    at = entry;
                } else {
                    let piece = rest.min(page);
                    self.push(entry, piece);
                    rest -= piece;
                }
            }
            if !chain {
                at = at.wrapping_add(n as u64 * 8);
            }
        }
        Ok(())
    }

    fn read_list(&mut self, bus: &Bus<'_>, at: u64, entries: usize) -> Result<(), Status> {
        let in_cmb = bus.place(at) == Place::Cmb;
        if in_cmb && !self.usage.lists {
            return Err(Status::INVALID_USE_OF_CMB);
        }
        bus.read(at, &mut self.chunk[..entries * 8]).map_err(|_| Status::DATA_TRANSFER_ERROR)
    }

    fn entry(&self, i: usize) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.chunk[i * 8..i * 8 + 8]);
        u64::from_le_bytes(word)
    }
}
