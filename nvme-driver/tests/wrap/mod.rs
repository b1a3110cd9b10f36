//! A PCI function with the test's hands between it and the driver.
#![allow(dead_code, reason = "each test uses some of it")]
use std::fmt;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nvme_driver::mem::Mapping;
use nvme_driver::pci::{Bar, DmaAccess, PciError, PciFunction};

/// What may be changed. The defaults change nothing.
pub(crate) trait Hands: Send + Sync {
    /// The value that a register read returns.
    fn register(&self, _offset: u64, value: u64) -> u64 {
        value
    }
    /// Before a DMA mapping is made.
    fn map(&self, _memory: &Arc<Mapping>, _len: usize, _iova: u64) -> Result<(), String> {
        Ok(())
    }
    /// Exports part of a BAR, if it is to be possible.
    fn export(&self, _bar: u8, _offset: u64, _len: u64) -> Option<OwnedFd> {
        None
    }
    /// Maps part of a BAR in the function's place.
    fn map_bar(&self, _bar: u8) -> Option<Arc<Mapping>> {
        None
    }
    /// After each step.
    fn stepped(&self, _inner: &dyn PciFunction) {}
    fn iova_ranges(&self, inner: Vec<RangeInclusive<u64>>) -> Vec<RangeInclusive<u64>> {
        inner
    }
}

pub(crate) struct Wrapped<H> {
    pub(crate) inner: Arc<dyn PciFunction>,
    pub(crate) hands: H,
}

impl<H> fmt::Debug for Wrapped<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl<H: Hands> PciFunction for Wrapped<H> {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn config_read(&self, offset: u16, size: u8) -> Result<u32, PciError> {
        self.inner.config_read(offset, size)
    }
    fn config_write(&self, offset: u16, size: u8, value: u32) -> Result<(), PciError> {
        self.inner.config_write(offset, size, value)
    }
    fn bar(&self, index: u8) -> Result<Bar, PciError> {
        self.inner.bar(index)
    }
    fn read32(&self, bar: u8, offset: u64) -> Result<u32, PciError> {
        let value = self.inner.read32(bar, offset)?;
        Ok(if bar == 0 { self.hands.register(offset, value.into()) as u32 } else { value })
    }
    fn write32(&self, bar: u8, offset: u64, value: u32) -> Result<(), PciError> {
        self.inner.write32(bar, offset, value)
    }
    fn read64(&self, bar: u8, offset: u64) -> Result<u64, PciError> {
        let value = self.inner.read64(bar, offset)?;
        Ok(if bar == 0 { self.hands.register(offset, value) } else { value })
    }
    fn write64(&self, bar: u8, offset: u64, value: u64) -> Result<(), PciError> {
        self.inner.write64(bar, offset, value)
    }
    fn map_bar(&self, index: u8, offset: u64, len: u64) -> Result<Option<Arc<Mapping>>, PciError> {
        self.hands.map_bar(index).map_or_else(|| self.inner.map_bar(index, offset, len), |m| Ok(Some(m)))
    }
    fn export_dma_buf(&self, bar: u8, offset: u64, len: u64) -> Result<OwnedFd, PciError> {
        self.hands.export(bar, offset, len).map_or_else(|| self.inner.export_dma_buf(bar, offset, len), Ok)
    }
    fn iova_ranges(&self) -> Vec<RangeInclusive<u64>> {
        self.hands.iova_ranges(self.inner.iova_ranges())
    }
    fn dma_map(
        &self,
        memory: &Arc<Mapping>,
        offset: usize,
        len: usize,
        iova: u64,
        access: DmaAccess,
    ) -> Result<(), PciError> {
        self.hands.map(memory, len, iova).map_err(|reason| PciError::DmaMap {
            function: self.name().to_owned(),
            iova,
            len: len as u64,
            reason,
        })?;
        self.inner.dma_map(memory, offset, len, iova, access)
    }
    fn dma_unmap(&self, iova: u64, len: usize) -> Result<(), PciError> {
        self.inner.dma_unmap(iova, len)
    }
    fn reset(&self) -> Result<(), PciError> {
        self.inner.reset()
    }
    fn set_bus_master(&self, on: bool) -> Result<(), PciError> {
        self.inner.set_bus_master(on)
    }
    fn set_interrupts(&self, eventfds: &[OwnedFd]) -> Result<(), PciError> {
        self.inner.set_interrupts(eventfds)
    }
    fn bars_are_device_memory(&self) -> bool {
        self.inner.bars_are_device_memory()
    }
    fn step(&self) -> bool {
        let worked = self.inner.step();
        self.hands.stepped(self.inner.as_ref());
        worked
    }
    fn needs_step(&self) -> bool {
        self.inner.needs_step()
    }
}
