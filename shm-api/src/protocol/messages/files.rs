//! Names and files.

use crate::protocol::wire::wire_struct;

/// `Open` flag: for reading.
pub const OPEN_READ: u32 = 1;
/// `Open` flag: for writing.
pub const OPEN_WRITE: u32 = 2;
/// `Open` flag: create it if it does not exist.
pub const OPEN_CREATE: u32 = 4;
/// `Open` flag, with `OPEN_CREATE`: fail if it exists.
pub const OPEN_EXCLUSIVE: u32 = 8;
/// `Open` flag, with `OPEN_WRITE`: cut it to nothing.
pub const OPEN_TRUNCATE: u32 = 16;
/// `Open` flag, with `OPEN_CREATE` and `OPEN_EXCLUSIVE`: its name goes when the handle is closed or the client is gone, unless it was renamed.
pub const OPEN_TEMPORARY: u32 = 32;
/// Every flag of `Open`.
pub const OPEN_ALL: u32 = 63;

wire_struct! {
    /// `Open`; the path follows.
    OpenRequest {
        /// `OPEN_*`.
        flags: u32,
        /// Permission bits of a file that is created.
        mode: u32,
    }
}

wire_struct! {
    /// Reply to `Open`. One descriptor: the file's host cache, read-only unless opened for writing.
    OpenReply {
        /// Names the open file in later requests.
        handle: u64,
        /// The inode's number.
        ino: u64,
        /// Size in bytes.
        size: u64,
        /// Length of the host cache in bytes (sparse; a window's bytes lie at its file offset).
        cache_len: u64,
        /// Bytes per window of this file.
        window_size: u64,
    }
}

wire_struct! {
    /// `Close`, `FileStat`: an open file.
    HandleRequest {
        /// From `Open`.
        handle: u64,
    }
}

/// `kind`: a file.
pub const KIND_FILE: u32 = 1;
/// `kind`: a directory.
pub const KIND_DIRECTORY: u32 = 2;

wire_struct! {
    /// Reply to `Stat` and `FileStat`.
    StatReply {
        /// The inode's number.
        ino: u64,
        /// Size in bytes.
        size: u64,
        /// Bytes of blocks allocated to it.
        allocated: u64,
        /// Last change of the content, in nanoseconds since 1970.
        mtime_ns: u64,
        /// Last change of the attributes, in nanoseconds since 1970.
        ctime_ns: u64,
        /// `KIND_*`.
        kind: u32,
        /// Permission bits.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Names it has.
        links: u32,
        /// Where its windows may live: the number of a [`Placement`](crate::Placement).
        placement: u16,
        /// Who says so: the number of a [`PlacedBy`](crate::PlacedBy).
        placed_by: u16,
    }
}

wire_struct! {
    /// `List`: the directory's path and then the name after which to go on (empty at first) follow.
    ListRequest {
        /// Length of the path in bytes.
        path_len: u32,
        /// Length of the name in bytes.
        after_len: u32,
    }
}

wire_struct! {
    /// Reply to `List`; `count` records follow ([`DirRecord`](crate::protocol::records::DirRecord) and name each), in the order of the names' bytes.
    ListReply {
        /// Number of records.
        count: u32,
        /// 1 if there are more names after the last one here.
        more: u32,
    }
}

wire_struct! {
    /// `Mkdir`; the path follows.
    MkdirRequest {
        /// Permission bits.
        mode: u32,
        /// Always 0.
        reserved: u32,
    }
}

wire_struct! {
    /// `Rename`; both paths follow.
    RenameRequest {
        /// Length of the old path in bytes.
        from_len: u32,
        /// Length of the new path in bytes.
        to_len: u32,
    }
}

wire_struct! {
    /// `Truncate`.
    TruncateRequest {
        /// An open file, for writing.
        handle: u64,
        /// Its new size in bytes.
        size: u64,
    }
}

/// `SetAttr` field: `mode` is to be set.
pub const SET_MODE: u32 = 1;
/// `SetAttr` field: `uid` and `gid` are to be set.
pub const SET_OWNER: u32 = 2;

wire_struct! {
    /// `SetAttr`; the path follows.
    SetAttrRequest {
        /// `SET_*`.
        fields: u32,
        /// Permission bits.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
    }
}

/// No choice of its own: a file goes by its filesystem again.
pub const PLACEMENT_NONE: u32 = 3;

wire_struct! {
    /// `SetPlacement`; the path follows. The reply is that of `Revoke`: what had to leave.
    SetPlacementRequest {
        /// The number of a [`Placement`](crate::Placement), or [`PLACEMENT_NONE`].
        placement: u32,
        /// Always 0.
        reserved: u32,
    }
}
