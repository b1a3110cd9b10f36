//! The controller as a PCI function.

use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::controller::EmulatedController;
use super::iommu::Domain;
use super::msix::MSIX_BAR_SIZE;
use super::pci_config::Effect;
use super::registers::{BAR_CMB, BAR_MSIX, BAR_PMR, BAR_REGISTERS, REGISTERS_SIZE};
use super::state::State;
use crate::mem::{Mapping, PAGE};
use crate::pci::{Bar, DmaAccess, PciError, PciFunction, RemoteMemory};
use crate::spec::regs::DOORBELLS;

/// What a removed device reads as.
const REMOVED: u32 = u32::MAX;

impl EmulatedController {
    fn out_of_range(&self, what: &'static str, offset: u64) -> PciError {
        PciError::OutOfRange { function: self.name.clone(), what, offset }
    }
}

impl State {
    /// Reads an aligned 32-bit word of a BAR; `None`: outside.
    fn read_bar(&mut self, bar: u8, offset: u64) -> Option<u32> {
        let memory = match bar {
            BAR_REGISTERS if offset < REGISTERS_SIZE => return Some(self.read_register(offset)),
            BAR_MSIX if offset < MSIX_BAR_SIZE => return Some(self.msix.read(offset)),
            BAR_CMB => self.cmb.as_ref()?,
            BAR_PMR => self.pmr.as_ref()?,
            _ => return None,
        };
        // Beyond the memory the BAR may go on: nothing is there.
        if offset >= memory.len() as u64 {
            return (offset < self.pci.bar(bar)?.size).then_some(REMOVED);
        }
        Some(memory.u32_at(usize::try_from(offset).ok()?).ok()?.load(Ordering::Acquire))
    }

    fn write_bar(&mut self, bar: u8, offset: u64, value: u32) -> Option<()> {
        let memory = match bar {
            BAR_REGISTERS if offset < REGISTERS_SIZE => {
                self.write_register(offset, value);
                return Some(());
            }
            BAR_MSIX if offset < MSIX_BAR_SIZE => {
                self.msix.write(offset, value);
                return Some(());
            }
            BAR_CMB => self.cmb.as_ref()?,
            BAR_PMR => self.pmr.as_ref()?,
            _ => return None,
        };
        if offset >= memory.len() as u64 {
            return (offset < self.pci.bar(bar)?.size).then_some(());
        }
        memory.u32_at(usize::try_from(offset).ok()?).ok()?.store(value, Ordering::Release);
        Some(())
    }
}

impl PciFunction for EmulatedController {
    fn name(&self) -> &str {
        &self.name
    }

    fn config_read(&self, offset: u16, size: u8) -> Result<u32, PciError> {
        let state = self.lock();
        let value = state.pci.read(offset, size);
        let value = value.ok_or_else(|| self.out_of_range("config space", u64::from(offset)))?;
        Ok(if state.removed { REMOVED >> (32 - 8 * u32::from(size)) } else { value })
    }

    fn config_write(&self, offset: u16, size: u8, value: u32) -> Result<(), PciError> {
        let mut state = self.lock();
        if state.removed {
            return Ok(());
        }
        let effect = state.pci.write(offset, size, value);
        match effect.ok_or_else(|| self.out_of_range("config space", u64::from(offset)))? {
            Effect::None => {}
            Effect::FunctionReset => state.function_reset(),
            Effect::Msix => {
                let mask = state.pci.msix_function_mask();
                state.msix.set_function_mask(mask);
            }
        }
        Ok(())
    }

    fn bar(&self, index: u8) -> Result<Bar, PciError> {
        self.lock().pci.bar(index).ok_or_else(|| self.out_of_range("a BAR", u64::from(index)))
    }

    fn read32(&self, bar: u8, offset: u64) -> Result<u32, PciError> {
        if !offset.is_multiple_of(4) {
            return Err(self.out_of_range("a misaligned register", offset));
        }
        let mut state = self.lock();
        let value = state.read_bar(bar, offset).ok_or_else(|| self.out_of_range("a BAR", offset))?;
        Ok(if state.removed { REMOVED } else { value })
    }

    fn write32(&self, bar: u8, offset: u64, value: u32) -> Result<(), PciError> {
        if !offset.is_multiple_of(4) {
            return Err(self.out_of_range("a misaligned register", offset));
        }
        let mut state = self.lock();
        if state.removed {
            return Ok(());
        }
        state.write_bar(bar, offset, value).ok_or_else(|| self.out_of_range("a BAR", offset))
    }

    fn read64(&self, bar: u8, offset: u64) -> Result<u64, PciError> {
        if !offset.is_multiple_of(8) {
            return Err(self.out_of_range("a misaligned register", offset));
        }
        let mut state = self.lock();
        let mut half = |at| state.read_bar(bar, at).ok_or_else(|| self.out_of_range("a BAR", offset));
        let value = u64::from(half(offset)?) | u64::from(half(offset + 4)?) << 32;
        Ok(if state.removed { u64::MAX } else { value })
    }

    fn write64(&self, bar: u8, offset: u64, value: u64) -> Result<(), PciError> {
        if !offset.is_multiple_of(8) {
            return Err(self.out_of_range("a misaligned register", offset));
        }
        let mut state = self.lock();
        if state.removed {
            return Ok(());
        }
        for (at, half) in [(offset, value as u32), (offset + 4, (value >> 32) as u32)] {
            state.write_bar(bar, at, half).ok_or_else(|| self.out_of_range("a BAR", offset))?;
        }
        Ok(())
    }

    /// The doorbell page of BAR0, or all of the CMB's or the PMR's memory; anything else goes through registers.
    fn map_bar(&self, index: u8, offset: u64, len: u64) -> Result<Option<Arc<Mapping>>, PciError> {
        let state = self.lock();
        let memory = match index {
            BAR_REGISTERS if offset == DOORBELLS && len == PAGE as u64 => {
                return Ok(Some(Arc::clone(&state.doorbells)));
            }
            BAR_CMB => state.cmb.as_ref(),
            BAR_PMR => state.pmr.as_ref(),
            _ => None,
        };
        let Some(memory) = memory else { return Ok(None) };
        let outside = || self.out_of_range("a BAR", offset);
        let (at, n) = (usize::try_from(offset), usize::try_from(len));
        let (at, n) = (at.map_err(|_| outside())?, n.map_err(|_| outside())?);
        if at == 0 && n == memory.len() {
            return Ok(Some(Arc::clone(memory)));
        }
        if at % PAGE != 0 || n % PAGE != 0 || at.checked_add(n).is_none_or(|end| end > memory.len()) {
            return Err(outside());
        }
        let Some((fd, start)) = memory.fd() else { return Ok(None) };
        let failed = |source| PciError::Io { what: format!("map BAR {index} of {}", self.name), source };
        let fd = fd.try_clone_to_owned().map_err(failed)?;
        let part = Mapping::of_device(fd, start + offset, n).map_err(|e| failed(e.source))?;
        Ok(Some(part))
    }

    fn iova_ranges(&self) -> Vec<RangeInclusive<u64>> {
        Domain::iova_ranges()
    }

    fn dma_map(
        &self,
        memory: &Arc<Mapping>,
        offset: usize,
        len: usize,
        iova: u64,
        access: DmaAccess,
    ) -> Result<(), PciError> {
        self.domain.map(iova, Arc::clone(memory), offset, len, access).map_err(|e| PciError::DmaMap {
            function: self.name.clone(),
            iova,
            len: len as u64,
            reason: e.reason,
        })
    }

    fn dma_map_remote(
        &self,
        owner: Arc<dyn RemoteMemory>,
        iova: u64,
        len: usize,
        access: DmaAccess,
    ) -> Result<(), PciError> {
        self.domain.map_remote(iova, owner, len, access).map_err(|e| PciError::DmaMap {
            function: self.name.clone(),
            iova,
            len: len as u64,
            reason: e.reason,
        })
    }

    fn dma_unmap(&self, iova: u64, len: usize) -> Result<(), PciError> {
        self.domain.unmap(iova, len).map_err(|e| PciError::DmaUnmap {
            function: self.name.clone(),
            iova,
            len: len as u64,
            reason: e.reason,
        })
    }

    fn dma_reaches(&self, iova: u64, len: usize) -> bool {
        let passes = |at, access| self.domain.is_mapped(at, PAGE, access);
        (0..len).step_by(PAGE).any(|at| {
            let at = iova.saturating_add(at as u64);
            passes(at, DmaAccess::Read) || passes(at, DmaAccess::Write)
        })
    }

    fn reset(&self) -> Result<(), PciError> {
        let mut state = self.lock();
        if state.removed {
            return Err(PciError::Removed(self.name.clone()));
        }
        state.function_reset();
        Ok(())
    }

    fn set_bus_master(&self, on: bool) -> Result<(), PciError> {
        let mut state = self.lock();
        if state.removed {
            return Err(PciError::Removed(self.name.clone()));
        }
        state.pci.set_bus_master(on);
        Ok(())
    }

    fn set_interrupts(&self, eventfds: &[OwnedFd]) -> Result<(), PciError> {
        let failed = |source| PciError::Io { what: format!("keep an eventfd for {}", self.name), source };
        let fds: Result<Vec<OwnedFd>, _> = eventfds.iter().map(OwnedFd::try_clone).collect();
        self.lock().msix.set_eventfds(fds.map_err(failed)?);
        Ok(())
    }

    fn bars_are_device_memory(&self) -> bool {
        false
    }

    fn step(&self) -> bool {
        Self::step(self)
    }

    fn needs_step(&self) -> bool {
        !self.has_thread.load(Ordering::Acquire)
    }
}
