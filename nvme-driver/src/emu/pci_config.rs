//! Config space: a type 0 header with power management, MSI-X and PCI Express capabilities.

use super::msix::{MSIX_BAR_SIZE, PBA_OFFSET};
use super::registers::{BAR_CMB, BAR_MSIX, BAR_PMR, BAR_REGISTERS, REGISTERS_SIZE};
use crate::pci::Bar;

/// Vendor and device that no driver has special cases for.
pub(super) const VENDOR_ID: u16 = 0x4e58;
const DEVICE_ID: u16 = 0x0c3b;

const COMMAND: usize = 0x04;
const BARS: usize = 0x10;
const PM_CAP: usize = 0x40;
const MSIX_CAP: usize = 0x50;
const PCIE_CAP: usize = 0x60;
/// PCI Express: Device Control.
const DEVICE_CONTROL: usize = PCIE_CAP + 8;

const BUS_MASTER: u8 = 1 << 2;
/// Config space of a PCI Express function.
const SIZE: usize = 4096;

/// What a write to config space asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// Initiate Function Level Reset.
    FunctionReset,
    /// Message Control of MSI-X was written.
    Msix,
}

#[derive(Debug)]
pub(super) struct ConfigSpace {
    bytes: Vec<u8>,
    /// Bits that can be written.
    writable: Vec<u8>,
    initial: Vec<u8>,
    bars: [Bar; 6],
}

const NO_BAR: Bar = Bar { size: 0, is_64bit: false, prefetchable: false, bus_address: None };

impl ConfigSpace {
    pub(super) fn new(cmb_size: u64, pmr_size: u64, vectors: u16) -> Self {
        let mut bars = [NO_BAR; 6];
        bars[usize::from(BAR_REGISTERS)] = Bar { size: REGISTERS_SIZE, is_64bit: true, ..NO_BAR };
        if cmb_size != 0 {
            let size = cmb_size.next_power_of_two();
            bars[usize::from(BAR_CMB)] = Bar { size, is_64bit: true, prefetchable: true, ..NO_BAR };
        }
        bars[usize::from(BAR_MSIX)] = Bar { size: MSIX_BAR_SIZE, ..NO_BAR };
        if pmr_size != 0 {
            bars[usize::from(BAR_PMR)] = Bar { size: pmr_size, prefetchable: true, ..NO_BAR };
        }
        let mut space = Self { bytes: vec![0; SIZE], writable: vec![0; SIZE], initial: Vec::new(), bars };
        space.fill(vectors);
        space.initial = space.bytes.clone();
        space
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    fn fill(&mut self, vectors: u16) {
        self.put(0x00, &VENDOR_ID.to_le_bytes());
        self.put(0x02, &DEVICE_ID.to_le_bytes());
        // Memory space, bus master, interrupt disable.
        self.allow(COMMAND, &[0b110, 0b100]);
        // Status: capabilities list.
        self.put(0x06, &[0x10, 0]);
        // Class: mass storage, NVM, NVM Express.
        self.put(0x09, &[0x02, 0x08, 0x01]);
        self.allow(0x0c, &[0xff]);
        self.put(0x2c, &VENDOR_ID.to_le_bytes());
        self.put(0x2e, &DEVICE_ID.to_le_bytes());
        self.put(0x34, &[PM_CAP as u8]);
        // Interrupt line is the system's note. No interrupt pin: MSI-X is all there is, and a host that saw a pin would set it up.
        self.allow(0x3c, &[0xff]);
        for (i, bar) in self.bars.into_iter().enumerate().filter(|(_, b)| b.size != 0) {
            let kind = u8::from(bar.is_64bit) << 2 | u8::from(bar.prefetchable) << 3;
            self.put(BARS + 4 * i, &[kind]);
            let mask = !(bar.size - 1);
            self.allow(BARS + 4 * i, &(mask as u32).to_le_bytes());
            if bar.is_64bit {
                self.allow(BARS + 4 * i + 4, &((mask >> 32) as u32).to_le_bytes());
            }
        }
        // Power management version 3; a soft reset does not happen on D3hot to D0.
        self.put(PM_CAP, &[0x01, MSIX_CAP as u8, 0x03, 0x00, 0x08, 0x00]);
        self.allow(PM_CAP + 4, &[0x03]);
        // MSI-X: table and pending bits in one BAR.
        self.put(MSIX_CAP, &[0x11, PCIE_CAP as u8]);
        self.put(MSIX_CAP + 2, &(vectors - 1).to_le_bytes());
        self.allow(MSIX_CAP + 3, &[0xc0]);
        self.put(MSIX_CAP + 4, &u32::from(BAR_MSIX).to_le_bytes());
        self.put(MSIX_CAP + 8, &(PBA_OFFSET as u32 | u32::from(BAR_MSIX)).to_le_bytes());
        // PCI Express endpoint, version 2; role-based error reporting, Function Level Reset.
        self.put(PCIE_CAP, &[0x10, 0x00, 0x02, 0x00]);
        self.put(PCIE_CAP + 4, &(1u32 << 15 | 1 << 28).to_le_bytes());
        self.put(DEVICE_CONTROL, &[0x10, 0x28]);
        self.allow(DEVICE_CONTROL, &[0xff, 0x7f]);
        // Link: 2.5 GT/s, one lane, as capability and as status.
        self.put(PCIE_CAP + 0x0c, &[0x11, 0x00]);
        self.put(PCIE_CAP + 0x12, &[0x11, 0x00]);
    }

    /// After a function level reset; BAR addresses are the system's to restore.
    pub(super) fn reset(&mut self) {
        self.bytes.copy_from_slice(&self.initial);
    }

    pub(super) fn bar(&self, index: u8) -> Option<Bar> {
        self.bars.get(usize::from(index)).copied()
    }

    pub(super) fn bus_master(&self) -> bool {
        self.bytes[COMMAND] & BUS_MASTER != 0
    }

    pub(super) fn set_bus_master(&mut self, on: bool) {
        self.bytes[COMMAND] = (self.bytes[COMMAND] & !BUS_MASTER) | if on { BUS_MASTER } else { 0 };
    }

    /// MSI-X Function Mask.
    pub(super) fn msix_function_mask(&self) -> bool {
        self.bytes[MSIX_CAP + 3] & 0x40 != 0
    }

    /// Reads `size` bytes (1, 2 or 4); `None`: outside, or misaligned.
    pub(super) fn read(&self, offset: u16, size: u8) -> Option<u32> {
        let (at, n) = place(offset, size)?;
        Some(self.bytes[at..at + n].iter().rev().fold(0, |word, b| word << 8 | u32::from(*b)))
    }

    /// Writes `size` bytes; read-only bits stay.
    pub(super) fn write(&mut self, offset: u16, size: u8, value: u32) -> Option<Effect> {
        let (at, n) = place(offset, size)?;
        for (i, new) in value.to_le_bytes().into_iter().take(n).enumerate() {
            let (byte, mask) = (&mut self.bytes[at + i], self.writable[at + i]);
            *byte = (*byte & !mask) | (new & mask);
        }
        let touches = |byte: usize| (at..at + n).contains(&byte);
        // Initiate Function Level Reset reads as 0, so it is not a writable bit.
        if touches(DEVICE_CONTROL + 1) && value >> (8 * (DEVICE_CONTROL + 1 - at)) & 0x80 != 0 {
            return Some(Effect::FunctionReset);
        }
        if touches(MSIX_CAP + 3) {
            return Some(Effect::Msix);
        }
        Some(Effect::None)
    }
}

fn place(offset: u16, size: u8) -> Option<(usize, usize)> {
    let (at, n) = (usize::from(offset), usize::from(size));
    (matches!(n, 1 | 2 | 4) && at % n == 0 && at + n <= SIZE).then_some((at, n))
}
