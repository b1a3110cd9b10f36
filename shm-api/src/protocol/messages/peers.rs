//! Peers: emulated ones that clients attach, and drives that the server has.

use crate::protocol::wire::wire_struct;

wire_struct! {
    /// `PeerAttach`.
    PeerAttachRequest {
        /// Bytes of local memory the peer is to have; a multiple of 4 KiB.
        local_len: u64,
        /// `PEER_*`.
        flags: u32,
        /// Always 0.
        reserved: u32,
    }
}

/// `flags`: its DMA is not coherent with the processors' caches, so it gets windows for reading only.
pub const PEER_NOT_COHERENT: u32 = 1;

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
    /// `PeerRevoke`, `PeerDetach`, `PeerFlush`.
    PeerRequest {
        /// From `PeerAttach` or `PeerOpen`.
        peer: u64,
    }
}

wire_struct! {
    /// `PeerList`.
    PeerListRequest {
        /// The file or raw memory that is meant; 0: everything. Only root and the server's own uid may ask for one.
        ino: u64,
    }
}

wire_struct! {
    /// Reply to `PeerList`; the peers' records follow, then the mappings'. Of one file only: the peers that reach it, with how
    /// many of its windows they do.
    PeerListReply {
        /// Number of peers.
        peers: u32,
        /// Number of mappings that follow: none for a client whose uid is neither root's nor the server's.
        mappings: u32,
        /// Mappings there are in all of what was asked for.
        all_mappings: u64,
    }
}

wire_struct! {
    /// `PeerRead`: part of one window into the peer's memory. `PeerWrite`: the other way.
    PeerReadRequest {
        /// From `PeerAttach`.
        peer: u64,
        /// An open file.
        handle: u64,
        /// Where in the file, inside a window that is mapped.
        offset: u64,
        /// Where in the peer's local memory, in bytes.
        local: u64,
        /// Number of bytes, all inside that window.
        len: u64,
    }
}

wire_struct! {
    /// Reply to `PeerRead` and `PeerWrite`: which path the bytes took, and why.
    PeerReadReply {
        /// Number of bytes moved.
        bytes: u64,
        /// `PATH_*`.
        path: u32,
        /// Why: a reason's number, as in status.
        reason: u32,
    }
}

wire_struct! {
    /// Reply to `PeerOpen`, whose request has no body but the drive's name behind it. What is "local" to a drive is a byte offset in its
    /// namespace: a multiple of the block size, like the length. Only root and the server's own uid may open one.
    PeerOpenReply {
        /// Names the peer, on this connection.
        peer: u64,
        /// Bytes of its namespace.
        local_len: u64,
        /// Bytes of a logical block.
        block_size: u32,
        /// `DRIVE_*`.
        flags: u32,
    }
}

/// `flags` of a drive that is a peer, and of any peer as listed: it is a drive of the server's.
pub const DRIVE: u32 = 1;
/// `flags`: its blocks may be written.
pub const DRIVE_WRITABLE: u32 = 2;
/// `flags`: it has failed, or is gone.
pub const DRIVE_FAILED: u32 = 4;
/// `flags`: its bytes go through host memory only: there is no way between it and the CMB.
pub const DRIVE_BOUNCES: u32 = 8;

/// `path`: between the CMB and the peer.
pub const PATH_PEER: u32 = 1;
/// `path`: through host memory.
pub const PATH_BOUNCE: u32 = 3;
