//! What the driver needs of a PCI function, and nothing more.
//!
//! Three backings implement [`PciFunction`]: VFIO, vfio-user, and the emulated controller. All methods take
//! `&self`: a function is shared between the controller, its queues and whoever maps peers.

use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::sync::Arc;

use crate::mem::{Mapping, OutOfRange, PAGE};

/// A PCI address, `DDDD:BB:DD.F`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    /// Domain (segment).
    pub domain: u16,
    /// Bus number.
    pub bus: u8,
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

/// A text is no PCI address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no PCI address; it looks like 0000:01:00.0 (domain:bus:device.function in hexadecimal; the domain may be left out)"
)]
pub struct BadPciAddress(pub String);

impl FromStr for PciAddress {
    type Err = BadPciAddress;

    fn from_str(text: &str) -> Result<Self, BadPciAddress> {
        let parse = || {
            let hex = |s: &str, max: u16| {
                let plain = (1..=4).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_hexdigit());
                if plain { u16::from_str_radix(s, 16).ok().filter(|v| *v <= max) } else { None }
            };
            let (rest, function) = text.rsplit_once('.')?;
            let (rest, device) = rest.rsplit_once(':')?;
            let (domain, bus) = rest.split_once(':').unwrap_or(("0", rest));
            Some(Self {
                domain: hex(domain, u16::MAX)?,
                bus: u8::try_from(hex(bus, 0xff)?).ok()?,
                device: u8::try_from(hex(device, 31)?).ok()?,
                function: u8::try_from(hex(function, 7)?).ok()?,
            })
        };
        parse().ok_or_else(|| BadPciAddress(text.to_owned()))
    }
}

/// What a device may do with memory that is mapped for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaAccess {
    /// The device may read it.
    Read,
    /// The device may write it.
    Write,
    /// Both.
    ReadWrite,
}

impl DmaAccess {
    /// Whether the device may read.
    pub fn readable(self) -> bool {
        self != Self::Write
    }

    /// Whether the device may write.
    pub fn writable(self) -> bool {
        self != Self::Read
    }
}

/// One base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Size in bytes; 0 when not implemented.
    pub size: u64,
    /// A 64-bit BAR.
    pub is_64bit: bool,
    /// A prefetchable BAR.
    pub prefetchable: bool,
    /// The address on the bus where the device decodes it, if known (VFIO: from sysfs or config space).
    pub bus_address: Option<u64>,
}

/// Access to a PCI function failed.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// Register or config access outside what the function has.
    #[error("{what} at offset {offset:#x} is outside what {function} has")]
    OutOfRange {
        /// The function's name.
        function: String,
        /// What was accessed.
        what: &'static str,
        /// Offset in bytes.
        offset: u64,
    },
    /// A DMA mapping was refused.
    #[error("cannot map {len} bytes at IOVA {iova:#x} for {function}: {reason}")]
    DmaMap {
        /// The function's name.
        function: String,
        /// First I/O virtual address.
        iova: u64,
        /// Length in bytes.
        len: u64,
        /// Why, and what to do about it.
        reason: String,
    },
    /// A DMA unmapping was refused.
    #[error("cannot unmap {len} bytes at IOVA {iova:#x} of {function}: {reason}")]
    DmaUnmap {
        /// The function's name.
        function: String,
        /// First I/O virtual address.
        iova: u64,
        /// Length in bytes.
        len: u64,
        /// Why.
        reason: String,
    },
    /// The function is gone: its registers read as all ones or its socket is closed.
    #[error("{0} has been removed")]
    Removed(String),
    /// The function cannot do this.
    #[error("{function} does not support {what}")]
    Unsupported {
        /// The function's name.
        function: String,
        /// What it does not support.
        what: &'static str,
    },
    /// Memory behind a BAR or DMA range was addressed out of range.
    #[error(transparent)]
    Memory(#[from] OutOfRange),
    /// The system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, and on what.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
}

/// Memory of another process that cannot be mapped here and is read and written by asking its owner.
pub trait RemoteMemory: Send + Sync + fmt::Debug {
    /// Reads `into.len()` bytes at bus address `address`. An error: the owner refused, or did not answer in time.
    fn read(&self, address: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes `from` at bus address `address`. When it returns `Ok`, the owner has the bytes.
    fn write(&self, address: u64, from: &[u8]) -> io::Result<()>;
}

/// A PCI function: BARs, config space, DMA map and unmap, reset, interrupts.
pub trait PciFunction: Send + Sync + fmt::Debug {
    /// The name to use in messages: a PCI address, a socket path, an image path.
    fn name(&self) -> &str;

    /// Reads `size` (1, 2 or 4) bytes of config space at `offset`.
    fn config_read(&self, offset: u16, size: u8) -> Result<u32, PciError>;

    /// Writes `size` (1, 2 or 4) bytes of config space at `offset`.
    fn config_write(&self, offset: u16, size: u8, value: u32) -> Result<(), PciError>;

    /// Describes BAR `index` (0 to 5).
    fn bar(&self, index: u8) -> Result<Bar, PciError>;

    /// Reads a 32-bit register.
    fn read32(&self, bar: u8, offset: u64) -> Result<u32, PciError>;

    /// Writes a 32-bit register.
    fn write32(&self, bar: u8, offset: u64, value: u32) -> Result<(), PciError>;

    /// Reads a 64-bit register (as one access, or low half first where the transport has only 32 bits).
    fn read64(&self, bar: u8, offset: u64) -> Result<u64, PciError>;

    /// Writes a 64-bit register (as above).
    fn write64(&self, bar: u8, offset: u64, value: u64) -> Result<(), PciError>;

    /// Maps `len` bytes of BAR `index` from `offset` into this process, or `None` where that range can only be
    /// reached through `read32` and its siblings. `offset` and `len` are multiples of 4 KiB.
    fn map_bar(&self, index: u8, offset: u64, len: u64) -> Result<Option<Arc<Mapping>>, PciError>;

    /// Exports `len` bytes of BAR `index` from `offset` (multiples of 4 KiB) as a dma-buf, which the drivers of other devices can
    /// import; the buffer is exactly that range. The kernel takes it from its importers for the time of a
    /// [`reset`](Self::reset), and for good when the function is closed.
    fn export_dma_buf(&self, index: u8, offset: u64, len: u64) -> Result<OwnedFd, PciError> {
        let _ = (index, offset, len);
        Err(PciError::Unsupported {
            function: self.name().to_owned(),
            what: "exporting its memory as a dma-buf (only VFIO does)",
        })
    }

    /// I/O virtual addresses the IOMMU accepts, reserved ranges taken out, in ascending order.
    fn iova_ranges(&self) -> Vec<RangeInclusive<u64>>;

    /// Lets the device reach `len` bytes of `memory` from `offset` at `iova`. All are multiples of 4 KiB. The function
    /// keeps the `Arc` until [`dma_unmap`](Self::dma_unmap), so the memory cannot go away under the device.
    fn dma_map(
        &self,
        memory: &Arc<Mapping>,
        offset: usize,
        len: usize,
        iova: u64,
        access: DmaAccess,
    ) -> Result<(), PciError>;

    /// Lets the device reach `len` bytes at `iova` by asking `owner`. Both are multiples of 4 KiB. Only a device that is software
    /// can do that.
    fn dma_map_remote(
        &self,
        _owner: Arc<dyn RemoteMemory>,
        _iova: u64,
        _len: usize,
        _access: DmaAccess,
    ) -> Result<(), PciError> {
        let function = self.name().to_owned();
        Err(PciError::Unsupported { function, what: "DMA to memory that cannot be mapped" })
    }

    /// Takes exactly one earlier mapping back. When it returns, a DMA to it faults.
    fn dma_unmap(&self, iova: u64, len: usize) -> Result<(), PciError>;

    /// Whether some DMA of the function to these addresses would still pass, as far as the transport can tell.
    fn dma_reaches(&self, iova: u64, len: usize) -> bool {
        let _ = (iova, len);
        false
    }

    /// Resets the function (FLR or equivalent). DMA mappings survive; everything else is as after power-on.
    fn reset(&self) -> Result<(), PciError>;

    /// Sets or clears Bus Master Enable: off, the function cannot DMA at all.
    fn set_bus_master(&self, on: bool) -> Result<(), PciError>;

    /// Has MSI-X vector `n` signal `eventfds[n]`. An empty slice turns MSI-X off.
    fn set_interrupts(&self, eventfds: &[OwnedFd]) -> Result<(), PciError>;

    /// Whether the function is known to be gone: pulled out, or its server's process ended. Waits for nobody.
    fn is_gone(&self) -> bool {
        // Vendor and device: no function has all ones there.
        matches!(self.config_read(0, 4), Ok(u32::MAX) | Err(PciError::Removed(_)))
    }

    /// Whether CPU access to mapped BARs goes over a bus (uncached: aligned accesses of at most 8 bytes). `false` where
    /// they are ordinary memory of another piece of software.
    fn bars_are_device_memory(&self) -> bool {
        true
    }

    /// Lets a device that is emulated inline make progress; says whether it did any work. Real hardware makes its own progress.
    fn step(&self) -> bool {
        false
    }

    /// Whether [`step`](Self::step) must be called for the device to make progress.
    fn needs_step(&self) -> bool {
        false
    }
}

/// What every backing asks of a [`PciFunction::dma_map`]: whole pages, at least one, inside the memory.
pub(crate) fn check_dma_range(
    memory: &Mapping,
    offset: usize,
    len: usize,
    iova: u64,
) -> Result<(), OutOfRange> {
    let inside = offset.checked_add(len).is_some_and(|end| end <= memory.len());
    let aligned = [offset, len].iter().all(|n| n.is_multiple_of(PAGE)) && iova.is_multiple_of(PAGE as u64);
    if !inside || !aligned || len == 0 {
        return Err(OutOfRange { offset, len, size: memory.len(), access: memory.access() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_parse_and_print() {
        for text in ["0000:01:00.0", "ffff:ff:1f.7"] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), text);
        }
        assert_eq!("01:02.3".parse::<PciAddress>().unwrap().to_string(), "0000:01:02.3");
        for text in [
            "",
            "0:0:0",
            "0000:00:20.0",
            "0000:00:00.8",
            "g:0:0.0",
            "+1:00:00.0",
            "0000:00:00.0.0",
            "1:2:3:4.0",
        ] {
            assert!(text.parse::<PciAddress>().is_err(), "{text}");
        }
    }
}
