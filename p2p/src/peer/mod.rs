//! Peers: other devices that DMA to windows.
//!
//! * [`Mapper`]: what a peer's runtime provides: map, unmap, stop, drain
//! * [`EmulatedEngine`]: a DMA engine behind an IOMMU domain of its own, with memory of its own
//! * [`NvmePeer`]: another NVMe controller, whose drive reads into windows and writes from them
//! * [`DriveTransfer`]: as many commands of such a controller as it takes for a range; [`try_out`]: whether what they move arrives
//! * [`ExternalPeer`]: a GPU, a NIC or whatever has a runtime that implements [`ExternalDevice`]
//! * `addresses`: I/O virtual addresses that come round as late as possible
mod addresses;
mod emulated;
mod external;
mod nvme;
mod transfer;
mod trial;

use std::fmt;
use std::sync::Arc;

use nvme_driver::mem::Mapping;
use nvme_driver::pci::DmaAccess;

pub use emulated::{CopyId, CopyState, EmulatedEngine, EngineCounters};
pub use external::{CmbExporter, Exporter, ExternalDevice, ExternalPeer, Import, SharedMemoryExporter};
pub use nvme::NvmePeer;
pub use transfer::DriveTransfer;
pub use trial::try_out;

/// A peer could not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// A mapping was refused.
    #[error("{peer} cannot map {len} bytes: {reason}")]
    Map {
        /// The peer.
        peer: String,
        /// Length in bytes.
        len: usize,
        /// Why, and what to do about it.
        reason: String,
    },
    /// A mapping could not be taken back: its pages stay quarantined until the peer is reset or unregistered.
    #[error("{peer} cannot unmap IOVA {iova:#x}: {reason}")]
    Unmap {
        /// The peer.
        peer: String,
        /// I/O virtual address of the mapping.
        iova: u64,
        /// Why.
        reason: String,
    },
    /// A transfer was refused or faulted.
    #[error("{peer}: {reason}")]
    Transfer {
        /// The peer.
        peer: String,
        /// What happened.
        reason: String,
    },
    /// The window is not the peer's any more, or its commands were cut off for another's sake: map it again, and ask again.
    #[error("{peer}: {reason}")]
    Revoked {
        /// The peer.
        peer: String,
        /// What happened.
        reason: String,
    },
    /// It has as much to do as it can take: ask again when something is done.
    #[error("{peer} is busy: ask again")]
    Busy {
        /// The peer.
        peer: String,
    },
    /// The device failed, or is gone.
    #[error("{peer} failed: {reason}")]
    Drive {
        /// The peer.
        peer: String,
        /// How.
        reason: String,
    },
}

/// How a peer reaches windows.
///
/// Revocation uses it in this order: [`stop`](Self::stop), [`drained`](Self::drained) until it says so or the grace is over,
/// [`unmap`](Self::unmap), [`is_mapped`](Self::is_mapped) to verify.
pub trait Mapper: Send + fmt::Debug {
    /// The name to use in messages.
    fn name(&self) -> &str;

    /// Lets the peer reach `len` bytes of `memory` (the CMB as mapped here) from `offset`, and returns where it finds them.
    /// `bus_address` is where the memory's first byte is on the bus.
    fn map(
        &mut self,
        memory: &Arc<Mapping>,
        bus_address: u64,
        offset: usize,
        len: usize,
        access: DmaAccess,
    ) -> Result<u64, PeerError>;

    /// Takes a mapping back. When it returns, a DMA there faults: it never lands.
    fn unmap(&mut self, iova: u64, len: usize) -> Result<(), PeerError>;

    /// Has the peer accept no more work on this range.
    fn stop(&mut self, iova: u64, len: usize);

    /// Whether no accepted work on this range is left.
    fn drained(&mut self, iova: u64, len: usize) -> bool;

    /// Whether any access to this range would still pass.
    fn is_mapped(&mut self, iova: u64, len: usize) -> bool;

    /// Whether its DMA is coherent with the processors' caches: if not, it gets read access only.
    fn is_coherent(&self) -> bool {
        true
    }
}
