//! Addresses for the BARs of a served function.
//!
//! No firmware has run for it: its BARs have no addresses, and it does not decode memory. A server that routes accesses
//! through a bus of its own (QEMU's) answers at a BAR only once both are set; to others they mean nothing.

use super::client::{CONFIG, VfioUserFunction};
use super::connection::CallError;
use super::protocol::{Put, command};
use crate::mem::PAGE;
use crate::pci::{PciError, PciFunction};

/// Where BARs of 32 bits go: below x86's interrupt window, and never used for DMA.
const LOW: std::ops::Range<u64> = 0xe000_0000..0xfec0_0000;
/// Where BARs of 64 bits go: above everything that is used for DMA.
const HIGH: u64 = 1 << 47;

const FIRST_BAR: u16 = 0x10;
const COMMAND: u16 = 4;
const MEMORY_SPACE: u32 = 1 << 1;

/// What the low bits of a BAR say (PCI Local Bus Specification, "Base Address Registers").
const IS_IO: u32 = 1;
const TYPE: u32 = 0b110;
const TYPE_64: u32 = 0b100;

impl VfioUserFunction {
    /// Gives each memory BAR an address and has memory decoded. Also after a reset, which takes both away.
    pub(super) fn place_bars(&self) -> Result<(), PciError> {
        let (mut low, mut high) = (LOW.start, HIGH);
        let mut index = 0u8;
        while index < 6 {
            let register = FIRST_BAR + 4 * u16::from(index);
            let kind = self.config_read(register, 4)?;
            let wide = kind & (IS_IO | TYPE) == TYPE_64;
            let next = if wide { &mut high } else { &mut low };
            let size = self.bar_size(index).max(PAGE as u64).checked_next_power_of_two();
            if kind & IS_IO == 0
                && self.bar_size(index) != 0
                && let Some(at) = size.and_then(|size| next.checked_next_multiple_of(size))
                && let Some(end) = size.and_then(|size| at.checked_add(size))
                && (wide || end <= LOW.end)
            {
                *next = end;
                self.offer(register, at as u32)?;
                if wide {
                    self.offer(register + 4, (at >> 32) as u32)?;
                }
            }
            index += if wide { 2 } else { 1 };
        }
        let command = self.config_read(COMMAND, 2)?;
        self.config_write(COMMAND, 2, command | MEMORY_SPACE)
    }

    /// Writes a word of config space; a server that refuses has no use for it.
    fn offer(&self, offset: u16, value: u32) -> Result<(), PciError> {
        let mut body = Vec::with_capacity(20);
        body.put_u64(offset.into());
        body.put_u32(CONFIG);
        body.put_u32(4);
        body.put_u32(value);
        match self.lock().call(command::REGION_WRITE, &body, &[]) {
            Err(CallError::Refused(e)) => {
                tracing::debug!("{}: config space at {offset:#x} stays as it is: {e}", self.name());
                Ok(())
            }
            Err(e) => Err(super::client::call_error(self.name(), "place a BAR", e)),
            Ok(_) => Ok(()),
        }
    }
}
