//! Scatter Gather Lists turned into segments (Base Specification, "Scatter Gather List").
//!
//! Data blocks, segments and last segments, by address; bit buckets and keyed descriptors are not offered.

use super::bus::{Bus, Place};
use super::data::Pointers;
use crate::spec::{Command, Status};

/// Descriptors that one command may name: an endless list ends here.
const MOST: usize = 4096;
/// Descriptors copied at a time.
const CHUNK: usize = 256;

/// What a descriptor says (byte 15, bits 7:4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Data,
    Segment,
    LastSegment,
}

#[derive(Clone, Copy, Debug)]
struct Descriptor {
    addr: u64,
    len: usize,
    kind: Kind,
}

impl Descriptor {
    fn parse(low: u64, high: u64) -> Result<Self, Status> {
        let kind = match high >> 56 {
            0x00 => Kind::Data,
            0x20 => Kind::Segment,
            0x30 => Kind::LastSegment,
            _ => return Err(Status::SGL_TYPE_INVALID),
        };
        Ok(Self { addr: low, len: (high & 0xffff_ffff) as usize, kind })
    }
}

impl Pointers {
    /// Finds `len` bytes of data of `cmd`, whose data pointer is an SGL descriptor.
    pub(super) fn walk_sgl(&mut self, bus: &Bus<'_>, cmd: &Command, len: usize) -> Result<(), Status> {
        let mut rest = len;
        let mut next = Descriptor::parse(cmd.prp1, cmd.prp2)?;
        if next.kind == Kind::Data {
            self.take(next, &mut rest);
            return finished(rest);
        }
        let mut seen = 0;
        loop {
            // A segment holds whole descriptors, and at least one.
            if next.len == 0 || !next.len.is_multiple_of(16) {
                return Err(Status::INVALID_SGL_SEGMENT);
            }
            let count = next.len / 16;
            seen += count;
            if seen > MOST {
                return Err(Status::INVALID_SGL_COUNT);
            }
            match self.walk_segment(bus, next, count, &mut rest)? {
                Some(following) => next = following,
                None => return finished(rest),
            }
        }
    }

    /// Takes one segment's data blocks; the segment after it, if there is one.
    fn walk_segment(
        &mut self,
        bus: &Bus<'_>,
        segment: Descriptor,
        count: usize,
        rest: &mut usize,
    ) -> Result<Option<Descriptor>, Status> {
        if bus.place(segment.addr) == Place::Cmb && !self.lists_in_cmb() {
            return Err(Status::INVALID_USE_OF_CMB);
        }
        let mut chunk = [0u64; CHUNK * 2];
        let mut done = 0;
        while done < count {
            let n = (count - done).min(CHUNK);
            let at = segment.addr.wrapping_add(done as u64 * 16);
            let words = &mut chunk[..n * 2];
            bus.read(at, bytemuck::cast_slice_mut(words)).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            for (i, pair) in words.as_chunks::<2>().0.iter().enumerate() {
                let d = Descriptor::parse(u64::from_le(pair[0]), u64::from_le(pair[1]))?;
                let is_last = done + i + 1 == count;
                match d.kind {
                    Kind::Data => self.take(d, rest),
                    // Only the last descriptor leads on, and not from a last segment.
                    _ if !is_last || segment.kind == Kind::LastSegment => {
                        return Err(Status::INVALID_SGL_SEGMENT);
                    }
                    _ => return Ok(Some(d)),
                }
            }
            done += n;
        }
        // A segment that is not the last one ends with a pointer to the next.
        if segment.kind == Kind::Segment { Err(Status::INVALID_SGL_SEGMENT) } else { Ok(None) }
    }

    /// Takes as much of a data block as is still needed: longer lists are allowed (SGLS bit 18).
    fn take(&mut self, block: Descriptor, rest: &mut usize) {
        let n = block.len.min(*rest);
        if n > 0 {
            self.push(block.addr, n);
            *rest -= n;
        }
    }
}

fn finished(rest: usize) -> Result<(), Status> {
    if rest == 0 { Ok(()) } else { Err(Status::SGL_LENGTH_INVALID) }
}
