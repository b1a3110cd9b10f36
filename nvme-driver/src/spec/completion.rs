//! Completion queue entries (Base Specification, "Completion Queue Entry").
use bytemuck::{Pod, Zeroable};

use super::Status;

/// A completion queue entry, 16 bytes, little-endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct Completion {
    /// Command specific.
    pub dw0: u32,
    /// Command specific or reserved.
    pub dw1: u32,
    /// Submission queue head pointer.
    pub sqhd: u16,
    /// Submission queue identifier.
    pub sqid: u16,
    /// Command identifier.
    pub cid: u16,
    /// Phase tag (bit 0) and status field (bits 15:1).
    pub status_phase: u16,
}

const _: () = assert!(size_of::<Completion>() == 16);

impl Completion {
    /// Phase tag.
    pub const fn phase(&self) -> bool {
        self.status_phase & 1 == 1
    }

    /// Status field.
    pub const fn status(&self) -> Status {
        Status::from_field(self.status_phase >> 1)
    }
}
