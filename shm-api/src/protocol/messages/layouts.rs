//! Layouts: block numbers under a lease, for the server's own uid.

use crate::protocol::wire::wire_struct;

/// `LayoutMap` access: reading the blocks. Shared with other readers.
pub const LAYOUT_READ: u32 = 1;
/// `LayoutMap` access: reading and writing them. Nobody else's.
pub const LAYOUT_WRITE: u32 = 2;

/// Most extents in one message.
pub const MAX_EXTENTS: usize = 512;

wire_struct! {
    /// `LayoutMap`.
    LayoutMapRequest {
        /// An open file; for `LAYOUT_WRITE` one that is open for writing.
        handle: u64,
        /// First byte wanted.
        offset: u64,
        /// Number of bytes wanted.
        len: u64,
        /// `LAYOUT_*`.
        access: u32,
        /// Always 0.
        reserved: u32,
    }
}

wire_struct! {
    /// Reply to `LayoutMap` and `LayoutShare`; `count` [`ExtentRecord`](super::super::records::ExtentRecord)s follow.
    LayoutReply {
        /// Names the lease, here and to other processes.
        lease: u64,
        /// The device generation that it was given under.
        device_generation: u64,
        /// The inode's number.
        ino: u64,
        /// The file's size in bytes.
        size: u64,
        /// The filesystem's uuid.
        uuid: [u8; 16],
        /// Bytes per logical block of the device: what `lba` counts.
        block_size: u32,
        /// `LAYOUT_*`.
        access: u32,
        /// Number of extents. They end before the range asked for does when there are more: map the rest too.
        count: u32,
        /// Always 0.
        reserved: u32,
    }
}

wire_struct! {
    /// `LayoutShare`: one more connection holds the lease.
    LeaseRequest {
        /// From `LayoutMap`.
        lease: u64,
        /// From `LayoutMap`.
        device_generation: u64,
    }
}

wire_struct! {
    /// `LayoutCommit`; `count` [`ExtentRecord`](super::super::records::ExtentRecord)s follow: what was written.
    LayoutCommitRequest {
        /// From `LayoutMap`, for writing.
        lease: u64,
        /// From `LayoutMap`.
        device_generation: u64,
        /// The file is at least this long afterwards, in bytes; 0 leaves the size alone.
        size: u64,
        /// Number of extents, at most [`MAX_EXTENTS`].
        count: u32,
        /// Always 0.
        reserved: u32,
    }
}

wire_struct! {
    /// Reply to `LayoutCommit`: what was written is the file's contents, durably.
    LayoutCommitReply {
        /// The file's size in bytes.
        size: u64,
    }
}

wire_struct! {
    /// `LayoutRelease`: this connection gives a lease back, or a part of it.
    LayoutReleaseRequest {
        /// From `LayoutMap`.
        lease: u64,
        /// From `LayoutMap`.
        device_generation: u64,
        /// First byte given back.
        offset: u64,
        /// Number of bytes; 0: the whole lease.
        len: u64,
    }
}

wire_struct! {
    /// Reply to `LayoutRecalls`; `count` [`RecallRecord`](super::super::records::RecallRecord)s follow.
    RecallsReply {
        /// Number of records.
        count: u32,
        /// 1 if there are more: give these back and ask again.
        more: u32,
    }
}
