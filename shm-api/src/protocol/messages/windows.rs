//! Windows: map, fault, read, commit, revoke.

use crate::protocol::wire::wire_struct;

/// `Map` flag: the windows will be written to.
pub const MAP_WRITE: u32 = 1;
/// `Map` and `Fault` flag: prefer the host cache to the CMB.
pub const MAP_HOST: u32 = 2;
/// `Fault` flag: bring it into the CMB now, if there is room. (Without it the server decides when.)
pub const MAP_CMB: u32 = 4;
/// Every flag of `Map` and `Fault`.
pub const MAP_ALL: u32 = 7;

wire_struct! {
    /// `Map`.
    MapRequest {
        /// An open file.
        handle: u64,
        /// First byte wanted.
        offset: u64,
        /// Number of bytes wanted, at most [`MAX_WINDOWS`](crate::protocol::MAX_WINDOWS) windows.
        len: u64,
        /// `MAP_*`.
        flags: u32,
        /// Always 0.
        reserved: u32,
    }
}

wire_struct! {
    /// Reply to `Map`; `count` [`WindowRecord`](crate::protocol::records::WindowRecord)s follow, for consecutive windows.
    MapReply {
        /// Names the mapping in `Unmap`.
        map: u64,
        /// File offset of the first window.
        first: u64,
        /// The file's size in bytes.
        size: u64,
        /// Bytes per window.
        window_size: u64,
        /// Number of windows.
        count: u32,
        /// Always 0.
        reserved: u32,
    }
}

wire_struct! {
    /// `Unmap`.
    UnmapRequest {
        /// From `Map`.
        map: u64,
    }
}

wire_struct! {
    /// `Fault`: make the window at `offset` resident. Also the body of a ring request.
    FaultRequest {
        /// An open file.
        handle: u64,
        /// An offset inside the window.
        offset: u64,
        /// `MAP_*`.
        flags: u32,
        /// Always 0.
        reserved: u32,
    }
}

/// Where a window is: nowhere.
pub const PLACE_NONE: u32 = 0;
/// Where a window is: in the CMB.
pub const PLACE_CMB: u32 = 1;
/// Where a window is: in the host cache.
pub const PLACE_HOST: u32 = 2;

wire_struct! {
    /// Reply to `Fault`.
    FaultReply {
        /// The window's control slot.
        slot: u32,
        /// The slot's incarnation.
        incarnation: u32,
        /// `PLACE_*`.
        place: u32,
        /// Why it is there: a reason of [`PathRecord`](crate::protocol::records::PathRecord).
        reason: u32,
    }
}

/// Most bytes that one `Read` returns.
pub const MAX_READ: u32 = 16 * 1024;

wire_struct! {
    /// `Read`.
    ReadRequest {
        /// An open file.
        handle: u64,
        /// First byte.
        offset: u64,
        /// Number of bytes, at most [`MAX_READ`].
        len: u32,
        /// Always 0.
        reserved: u32,
    }
}

wire_struct! {
    /// Reply to `Read`; the bytes follow. Behind the end of the file they are zeros.
    ReadReply {
        /// Number of bytes.
        len: u32,
        /// Always 0.
        reserved: u32,
    }
}

wire_struct! {
    /// `Commit`.
    CommitRequest {
        /// A file open for writing.
        handle: u64,
        /// First byte.
        offset: u64,
        /// Number of bytes; 0 means to the end.
        len: u64,
        /// The file is at least this long afterwards, in bytes; 0 leaves the size alone.
        size: u64,
    }
}

wire_struct! {
    /// Reply to `Commit`: everything written before is durable.
    CommitReply {
        /// The file's size in bytes.
        size: u64,
        /// Bytes that went to the drive straight from the CMB.
        from_cmb: u64,
        /// Bytes that went to the drive from the host cache.
        from_host: u64,
    }
}

/// `Revoke` scope: one window of an open file.
pub const REVOKE_WINDOW: u32 = 1;
/// `Revoke` scope: one file, by path.
pub const REVOKE_FILE: u32 = 2;
/// `Revoke` scope: everything.
pub const REVOKE_ALL: u32 = 3;
/// `Revoke` scope: the windows over a byte range of a file, by path.
pub const REVOKE_RANGE: u32 = 4;
/// `Revoke` scope: every window that a client holds; it maps nothing more on that connection.
pub const REVOKE_CLIENT: u32 = 5;
/// `Revoke` scope: every mapping of a peer. Windows stay where they are.
pub const REVOKE_PEER: u32 = 6;

wire_struct! {
    /// `Revoke`; with `REVOKE_FILE` and `REVOKE_RANGE` the path follows.
    RevokeRequest {
        /// With `REVOKE_WINDOW`: an open file.
        handle: u64,
        /// With `REVOKE_WINDOW`: an offset inside the window. With `REVOKE_RANGE`: its first byte.
        offset: u64,
        /// With `REVOKE_RANGE`: its length in bytes.
        len: u64,
        /// `REVOKE_*`.
        scope: u32,
        /// With `REVOKE_CLIENT` and `REVOKE_PEER`: its number on this server.
        id: u32,
    }
}

wire_struct! {
    /// Reply to `Revoke`.
    RevokeReply {
        /// Windows that were moved.
        windows: u64,
        /// 4 KiB pages of the CMB that can be reused: nothing reaches them any more.
        freed: u64,
        /// 4 KiB pages that a silent client may still touch: not reused before it answers or is gone.
        quarantined: u64,
        /// Clients whose write section was fenced.
        fenced: u64,
        /// Nanoseconds it took.
        nanoseconds: u64,
    }
}

wire_struct! {
    /// `Allocate`; a name may follow. The reply is that of `Open`.
    AllocateRequest {
        /// Bytes; 0 with a name: whatever others have allocated under it.
        len: u64,
    }
}

/// `Memory`: the drive's Persistent Memory Region.
pub const MEMORY_PMR: u32 = 1;
/// `Memory`: the memory of a peer of this client, which is exported by this.
pub const MEMORY_EXPORT: u32 = 2;
/// `Memory`: what a client of this user has exported under the name.
pub const MEMORY_SHARED: u32 = 3;

wire_struct! {
    /// `Memory`; a name may follow.
    MemoryRequest {
        /// `MEMORY_*`.
        what: u32,
        /// Always 0.
        reserved: u32,
        /// From `PeerAttach`, for `MEMORY_EXPORT`; else 0.
        peer: u64,
    }
}

wire_struct! {
    /// Reply to `Memory`; why the memory itself was not given follows. Descriptors: the host cache, and the memory if `reason` is `CMB_GIVEN`.
    MemoryReply {
        /// Names the open memory in later requests.
        handle: u64,
        /// Its number.
        ino: u64,
        /// Size in bytes.
        size: u64,
        /// Length of the host cache in bytes.
        cache_len: u64,
        /// Bytes per window.
        window_size: u64,
        /// Bytes of the memory to map: where a place says "CMB", an offset in this is meant.
        memory_len: u64,
        /// Where it begins in its descriptor.
        memory_offset: u64,
        /// Offset in the memory of a word that never holds all ones, if it is a device's; all ones: it is ordinary memory.
        canary: u64,
        /// `CMB_*`: whether the memory is given, or why not.
        reason: u32,
        /// Always 0.
        reserved: u32,
    }
}
