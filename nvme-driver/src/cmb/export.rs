//! Ranges of the CMB as dma-bufs, for devices whose drivers are in the kernel (a NIC, a GPU).
//!
//! # Revocation
//! The kernel revokes a dma-buf while the function is being reset and for good when it is closed: its importers are told to let go
//! and cannot map it again. It has no call that revokes one buffer. So pages under an export belong to it: they are given to nobody
//! else before every copy of the descriptor is closed, or the function is. After a reset the importers may map the buffer
//! again, and find what the controller left there: [`CmbExport::is_current`] says whether the bytes are still those that were
//! exported; if not, export again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::CmbStatus;
use crate::controller::Controller;
use crate::mem::PAGE;
use crate::pci::PciError;

/// A range of the CMB could not be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// There is no CMB.
    #[error("{name} has no CMB to export from: {reason}")]
    Absent {
        /// The controller.
        name: String,
        /// Why.
        reason: String,
    },
    /// The range is empty, not in whole pages, or not inside the CMB's part for data.
    #[error(
        "{len} bytes at {offset:#x} of the CMB of {name} cannot be exported: whole pages of its {size} bytes for data can"
    )]
    OutOfRange {
        /// The controller.
        name: String,
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Bytes for data: the CMB without its queues.
        size: u64,
    },
    /// The function cannot do it ([`PciError::Unsupported`]), or failed.
    #[error(transparent)]
    Pci(#[from] PciError),
}

/// An exported range. The buffer lives as long as any copy of its descriptor.
#[derive(Debug)]
pub struct CmbExport {
    fd: OwnedFd,
    offset: u64,
    len: u64,
    epoch: u64,
}

impl CmbExport {
    /// Where the range begins in the CMB, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it is empty (it never is: empty ranges are refused).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether `controller`, which made it, has not been reset since. A reset leaves the CMB's content undefined.
    pub fn is_current(&self, controller: &Controller) -> bool {
        self.epoch == controller.epoch()
    }
}

impl AsFd for CmbExport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Controller {
    /// Exports `len` bytes of the CMB from `offset` as a dma-buf. Both are multiples of 4 KiB, and the range is inside the part for
    /// data: whoever reached a queue there could send commands.
    pub fn export_cmb(&self, offset: u64, len: u64) -> Result<CmbExport, ExportError> {
        let name = || self.name().to_owned();
        let cmb = match self.cmb() {
            CmbStatus::Enabled(cmb) => cmb,
            CmbStatus::Absent(reason) => {
                return Err(ExportError::Absent { name: name(), reason: reason.clone() });
            }
        };
        let size = cmb.data.memory.len() as u64;
        let page = PAGE as u64;
        let inside = offset.checked_add(len).is_some_and(|end| end <= size);
        if len == 0 || !inside || !offset.is_multiple_of(page) || !len.is_multiple_of(page) {
            return Err(ExportError::OutOfRange { name: name(), offset, len, size });
        }
        // Read first: a reset in between makes the export stale, never a stale one current.
        let epoch = self.epoch();
        let fd = self.function().export_dma_buf(cmb.bar, cmb.bar_offset + offset, len)?;
        Ok(CmbExport { fd, offset, len, epoch })
    }
}
