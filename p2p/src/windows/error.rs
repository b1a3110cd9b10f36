//! What windows cannot do, and why.

use nvme_driver::mem::OutOfRange;

use crate::backing::BackingError;
use crate::control::ControlError;

/// Windows could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum WindowsError {
    /// No such client is attached.
    #[error("no client {0} is attached")]
    UnknownClient(u32),
    /// The client was revoked as a whole.
    #[error("client {0} was revoked as a whole and maps nothing more; it may connect again")]
    Barred(u32),
    /// No such window, or this client does not hold it.
    #[error("window {0} is not held by that client, or does not exist")]
    UnknownWindow(u32),
    /// The client is inside a write section or borrow of the window.
    #[error("window {0} is in use by a section or borrow of that client; end it first")]
    InSection(u32),
    /// No such object.
    #[error("object {0} is not registered")]
    UnknownObject(u64),
    /// There is no room for so much raw memory.
    #[error(
        "{len} bytes of raw memory are more than the {room} that are left; free some, or serve with more host cache"
    )]
    NoRoomForRaw {
        /// Bytes asked for.
        len: u64,
        /// Bytes left.
        room: u64,
    },
    /// This memory cannot be an object.
    #[error("object {object} cannot have this device memory: {why}")]
    BadMemory {
        /// The object.
        object: u64,
        /// Why not.
        why: String,
    },
    /// The object's own device memory ends before.
    #[error("offset {offset:#x} is beyond the {len} bytes of device memory of object {object}")]
    BeyondMemory {
        /// The object.
        object: u64,
        /// The offset.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Someone silent past the grace may still touch the window's place in device memory.
    #[error(
        "the device memory of the window at {offset:#x} of object {object} is not written while a client or peer that was cut off \
         there has not answered; its bytes are in the host cache: try again when it has answered or is gone"
    )]
    MemoryHeld {
        /// The object.
        object: u64,
        /// Where the window begins.
        offset: u64,
    },
    /// Raw memory that was to leave its place has no other now.
    #[error("raw memory has no other place now, and there is nothing behind it")]
    RawKept,
    /// The device whose memory the object is does not answer any more.
    #[error("the device is gone whose memory object {0} was, and what was in it is lost")]
    MemoryGone(u64),
    /// The object exists.
    #[error("object {0} is registered already")]
    Registered(u64),
    /// No such peer.
    #[error("no peer {0} is registered")]
    UnknownPeer(u32),
    /// Window sizes are powers of two from 4 KiB.
    #[error("{0} bytes is no window size: it must be a power of two, at least 4096 and at most 1 GiB")]
    BadWindowSize(usize),
    /// The object is registered with another window size.
    #[error("object {0} is already registered with windows of {1} bytes")]
    OtherWindowSize(u64, usize),
    /// Offsets must be below 1 PiB.
    #[error("offset {0:#x} is beyond the largest object of 1 PiB")]
    TooFar(u64),
    /// All control slots are taken by windows that are held.
    #[error("all {0} window slots are held; close some mappings or serve with more slots")]
    TooManyWindows(u32),
    /// This client's dirty bits are all in use.
    #[error("client {0} has no room for more dirty bits; close some writable mappings")]
    TooManyDirtyPages(u32),
    /// Too many mass revocations were announced before the windows could follow.
    #[error("mass revocations are announced faster than windows can follow; poll first")]
    TooManyAnnouncements,
    /// The device was reset, and with it what its CMB held.
    #[error("the device was reset, and what its CMB held is lost")]
    DeviceReset,
    /// Shared memory could not be set up.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The host cache failed.
    #[error("host cache: {0}")]
    Host(#[from] std::io::Error),
    /// The drive failed.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// A peer refused.
    #[error(transparent)]
    Peer(#[from] crate::peer::PeerError),
    /// An access outside mapped memory, which would be a defect here.
    #[error(transparent)]
    Memory(#[from] OutOfRange),
}
