//! The body of every request and reply. Handles, map ids and peer ids are the server's numbers: opaque to clients, and
//! checked against the connection they came over.

use super::wire::wire_struct;

wire_struct! {
    /// A request or reply that says nothing more.
    Empty {}
}

wire_struct! {
    /// `Hello`: what the client speaks.
    HelloRequest {
        /// Lowest version the client speaks.
        min_version: u16,
        /// Highest version the client speaks.
        max_version: u16,
        /// Always 0.
        reserved: u32,
    }
}

/// `cmb_reason`: the CMB came with the reply.
pub const CMB_GIVEN: u32 = 0;
/// `cmb_reason`: the device has none (or it is not mappable).
pub const CMB_NONE: u32 = 1;
/// `cmb_reason`: a mapping of it spans every file's bytes, so only the server's own uid gets it.
pub const CMB_OTHER_UID: u32 = 2;
/// `cmb_reason`: the server was told not to hand it out.
pub const CMB_OFF: u32 = 3;

wire_struct! {
    /// Reply to `Hello`. Descriptors, in this order: control page (read-only), the client's slots, the client's rings,
    /// and the CMB if `cmb_reason` is [`CMB_GIVEN`].
    HelloReply {
        /// Length of the control page in bytes.
        control_len: u64,
        /// Length of the client's slot region in bytes.
        slots_len: u64,
        /// Length of the ring region in bytes.
        ring_len: u64,
        /// Length of the CMB in bytes, or 0.
        cmb_len: u64,
        /// Offset of the CMB in its descriptor.
        cmb_offset: u64,
        /// The filesystem's uuid.
        uuid: [u8; 16],
        /// The version to speak.
        version: u16,
        /// Always 0.
        reserved: u16,
        /// Why the CMB was given or not.
        cmb_reason: u32,
        /// The client's uid as the server sees it.
        uid: u32,
        /// The client's number on this server.
        client: u32,
    }
}

wire_struct! {
    /// Reply to `Info`; the device's name follows.
    InfoReply {
        /// Capacity of the filesystem in bytes.
        bytes: u64,
        /// Bytes free.
        free_bytes: u64,
        /// Size of the CMB in bytes, or 0.
        cmb_bytes: u64,
        /// The device generation.
        device_generation: u64,
        /// The filesystem's uuid.
        uuid: [u8; 16],
        /// The server's process id.
        pid: u32,
        /// The server's uid.
        uid: u32,
        /// Connected clients.
        clients: u32,
        /// Milliseconds a silent client delays a revocation at most.
        grace_ms: u32,
    }
}

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
/// Every flag of `Open`.
pub const OPEN_ALL: u32 = 31;

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
        /// Always 0.
        reserved: u32,
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
    /// Reply to `List`; `count` records follow ([`DirRecord`](super::records::DirRecord) and name each), in the order of the names' bytes.
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
        /// Number of bytes wanted, at most [`MAX_WINDOWS`](super::MAX_WINDOWS) windows.
        len: u64,
        /// `MAP_*`.
        flags: u32,
        /// Always 0.
        reserved: u32,
    }
}

wire_struct! {
    /// Reply to `Map`; `count` [`WindowRecord`](super::records::WindowRecord)s follow, for consecutive windows.
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
        /// Why it is there: a reason of [`PathRecord`](super::records::PathRecord).
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

wire_struct! {
    /// `Revoke`; with `REVOKE_FILE` the path follows.
    RevokeRequest {
        /// With `REVOKE_WINDOW`: an open file.
        handle: u64,
        /// With `REVOKE_WINDOW`: an offset inside the window.
        offset: u64,
        /// `REVOKE_*`.
        scope: u32,
        /// Always 0.
        reserved: u32,
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
    /// Reply to `Status`; `reasons` [`PathRecord`](super::records::PathRecord)s follow.
    StatusReply {
        /// Clients connected now.
        clients: u64,
        /// Files open now.
        open_files: u64,
        /// Windows resident in the CMB.
        cmb_windows: u64,
        /// Windows resident in the host cache.
        host_windows: u64,
        /// Bytes of the CMB for windows.
        cmb_bytes: u64,
        /// Bytes of it in use.
        cmb_used: u64,
        /// Bytes of it that wait for a silent client.
        cmb_quarantined: u64,
        /// Window moves since the start.
        revocations: u64,
        /// Write sections fenced.
        fenced: u64,
        /// Commits.
        commits: u64,
        /// Clients that were disconnected for breaking the protocol or not reading.
        expelled: u64,
        /// Clients that died without saying goodbye.
        died: u64,
        /// The device generation.
        device_generation: u64,
        /// Number of records.
        reasons: u32,
        /// Always 0.
        reserved: u32,
    }
}

wire_struct! {
    /// `PeerAttach`.
    PeerAttachRequest {
        /// Bytes of local memory the peer is to have; a multiple of 4 KiB.
        local_len: u64,
    }
}

wire_struct! {
    /// Reply to `PeerAttach`. One descriptor: the peer's local memory, so that the client can see what a DMA brought.
    PeerAttachReply {
        /// Names the peer.
        peer: u64,
        /// Length of its local memory in bytes.
        local_len: u64,
    }
}

wire_struct! {
    /// `PeerMap`: let the peer reach the window at `offset`.
    PeerMapRequest {
        /// From `PeerAttach`.
        peer: u64,
        /// An open file.
        handle: u64,
        /// An offset inside the window.
        offset: u64,
        /// 1 if the peer is to write it (the file is open for writing).
        write: u32,
        /// Always 0.
        reserved: u32,
    }
}

wire_struct! {
    /// Reply to `PeerMap`.
    PeerMapReply {
        /// The I/O virtual address of the window's first byte.
        iova: u64,
        /// Bytes mapped there.
        len: u64,
        /// File offset of the window's first byte.
        first: u64,
        /// `PLACE_*`.
        place: u32,
        /// Why it is there.
        reason: u32,
    }
}

/// `PeerDma` direction: from the window into the peer's local memory.
pub const DMA_READ: u32 = 1;
/// `PeerDma` direction: from the peer's local memory into the window.
pub const DMA_WRITE: u32 = 2;

wire_struct! {
    /// `PeerDma`.
    PeerDmaRequest {
        /// From `PeerAttach`.
        peer: u64,
        /// Where in the peer's address space.
        iova: u64,
        /// Where in its local memory, in bytes.
        local: u64,
        /// Number of bytes.
        len: u64,
        /// `DMA_*`.
        direction: u32,
        /// Always 0.
        reserved: u32,
    }
}

wire_struct! {
    /// Reply to `PeerDma`: it went through. (A refused one is a `PeerFault` error.)
    PeerDmaReply {
        /// Number of bytes moved.
        bytes: u64,
    }
}

wire_struct! {
    /// `PeerRevoke`, `PeerDetach`.
    PeerRequest {
        /// From `PeerAttach`.
        peer: u64,
    }
}
