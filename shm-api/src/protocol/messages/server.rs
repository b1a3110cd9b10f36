//! Hello, and what a server says about itself.

use crate::protocol::wire::wire_struct;

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

/// The device does what is asked.
pub const DEVICE_WORKS: u32 = 0;
/// Nothing is written to it any more: an error, or the filesystem was mounted that way.
pub const DEVICE_READ_ONLY: u32 = 1;
/// It is gone or has failed.
pub const DEVICE_FAILED: u32 = 2;

wire_struct! {
    /// Reply to `Status`; `reasons` [`PathRecord`](crate::protocol::records::PathRecord)s follow, then `listed`
    /// [`ClientRecord`](crate::protocol::records::ClientRecord)s, then why the device does not work as it should.
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
        /// Bytes of host cache in use.
        host_bytes: u64,
        /// Bytes of host cache that may be used.
        host_limit: u64,
        /// Resets of the device since the start.
        resets: u64,
        /// Bytes that were written and not committed, and that a reset took.
        lost_bytes: u64,
        /// Bytes of the host cache in use that are kept for windows of the CMB until somebody needs the room.
        spare_bytes: u64,
        /// Bytes of device memory that are objects: a PMR, what peers export.
        memory_bytes: u64,
        /// Windows resident there.
        memory_windows: u64,
        /// Number of path records.
        reasons: u32,
        /// Number of client records.
        listed: u32,
        /// Where windows of files without a choice of their own may live: the number of a [`Placement`](crate::Placement).
        placement: u32,
        /// What `auto` means for readers on the processor: `PLACE_CMB`, or `PLACE_HOST` where the CMB was measured to be slow for them
        /// or there is none.
        readers: u32,
        /// How the device is: `DEVICE_WORKS`, `DEVICE_READ_ONLY` or `DEVICE_FAILED`.
        device: u32,
        /// Bytes of the text that says why.
        trouble_len: u32,
    }
}
