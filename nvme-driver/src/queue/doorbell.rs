//! Doorbell registers: a plain store where the transport can map them, a call where it cannot.
#![expect(
    unsafe_code,
    reason = "stores to a mapped register on the hot path, without a bounds check each time"
)]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::mem::{Mapping, OutOfRange};
use crate::pci::PciFunction;

#[derive(Debug)]
pub(crate) enum Doorbell {
    /// In mapped BAR memory; `_page` keeps it mapped.
    Mapped { register: NonNull<AtomicU32>, _page: Arc<Mapping> },
    /// Reached by a call; `offset` is in BAR 0.
    Call { function: Arc<dyn PciFunction>, offset: u64 },
}

// SAFETY: the pointer is into `_page`, which is Send + Sync and lives as long as this value; access is atomic.
unsafe impl Send for Doorbell {}

impl Doorbell {
    /// The doorbell at `offset` of a mapping of BAR 0.
    pub(crate) fn mapped(page: &Arc<Mapping>, offset: usize) -> Result<Self, OutOfRange> {
        Ok(Self::Mapped { register: NonNull::from(page.u32_at(offset)?), _page: Arc::clone(page) })
    }

    /// Tells the device. Everything stored before is visible to it first.
    #[inline]
    pub(crate) fn ring(&self, value: u16) {
        match self {
            Self::Mapped { register, .. } => {
                // SAFETY: derived from a checked, aligned word of `_page`, which this value keeps mapped.
                unsafe { register.as_ref() }.store(u32::from(value), Ordering::Release);
            }
            Self::Call { .. } => self.call(value),
        }
    }

    /// A doorbell write that fails means that the device is gone: the command's deadline finds that out from the registers.
    #[cold]
    #[inline(never)]
    fn call(&self, value: u16) {
        let Self::Call { function, offset } = self else { return };
        if let Err(e) = function.write32(0, *offset, u32::from(value)) {
            tracing::warn!("{}: doorbell at {offset:#x}: {e}", function.name());
        }
    }
}
