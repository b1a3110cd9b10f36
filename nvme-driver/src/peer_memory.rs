//! Another device's memory, mapped for a controller: what its commands may read and write there.

use std::sync::Arc;

use crate::controller::Controller;
use crate::dma::DmaError;
use crate::mem::{Mapping, PAGE};
use crate::pci::{DmaAccess, PciError};

/// Ranges at least this long are aligned to it, so that the IOMMU can map them with large pages.
const LARGE: usize = 2 << 20;

/// A range of another device's memory (its CMB, as mapped into this process) where a controller reaches it. Taken back when dropped.
///
/// How it is mapped is the controller's transport's affair: the IOMMU by the BAR's address (VFIO), a file descriptor handed to
/// the process that serves the controller (vfio-user), the emulated IOMMU.
#[derive(Debug)]
pub struct PeerMemory {
    controller: Arc<Controller>,
    /// Kept until it is unmapped.
    memory: Option<Arc<Mapping>>,
    iova: u64,
    len: usize,
    access: DmaAccess,
}

impl PeerMemory {
    /// Lets `controller` reach `len` bytes of `memory` from `offset` (multiples of 4 KiB), as far as `access` says.
    pub fn map(
        controller: &Arc<Controller>,
        memory: &Arc<Mapping>,
        offset: usize,
        len: usize,
        access: DmaAccess,
    ) -> Result<Self, DmaError> {
        let align = if len >= LARGE { LARGE } else { PAGE };
        let iova = controller.iova().take(len as u64, align as u64)?;
        if let Err(e) = controller.function().dma_map(memory, offset, len, iova, access) {
            give(controller, iova, len);
            return Err(e.into());
        }
        let controller = Arc::clone(controller);
        Ok(Self { controller, memory: Some(Arc::clone(memory)), iova, len, access })
    }

    /// The address at which the controller reaches the first byte.
    pub fn bus_address(&self) -> u64 {
        self.iova
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: nothing is mapped by 0 bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What the controller may do there.
    pub fn access(&self) -> DmaAccess {
        self.access
    }

    /// The controller that may.
    pub fn controller(&self) -> &Arc<Controller> {
        &self.controller
    }

    /// Takes it back now, and says how that went: when this returns `Ok`, the controller's DMA there faults.
    pub fn unmap(mut self) -> Result<(), PciError> {
        self.take_back()
    }

    fn take_back(&mut self) -> Result<(), PciError> {
        let Some(memory) = self.memory.take() else { return Ok(()) };
        let unmapped = self.controller.function().dma_unmap(self.iova, self.len);
        match &unmapped {
            Ok(()) => give(&self.controller, self.iova, self.len),
            // The controller may still reach it: neither the address nor the memory is let go.
            Err(_) => std::mem::forget(memory),
        }
        unmapped
    }
}

fn give(controller: &Controller, iova: u64, len: usize) {
    if let Err(e) = controller.iova().give(iova, len as u64) {
        tracing::error!("{}: returning I/O virtual addresses: {e}", controller.name());
    }
}

impl Drop for PeerMemory {
    fn drop(&mut self) {
        if let Err(e) = self.take_back() {
            tracing::error!("leaking {} bytes of another device's memory: {e}", self.len);
        }
    }
}
