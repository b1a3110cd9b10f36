//! [`PciFunction`] over `/dev/vfio`.
#![expect(
    unsafe_code,
    reason = "handing eventfds over to vfio-ioctls, which takes its own type, and closing its device in its stead"
)]

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError as CrateError, VfioRegionInfoCap};
use vmm_sys_util::eventfd::EventFd;

use super::error::VfioError;
use super::sysfs::Sysfs;
use super::{ioctl, iova, refusal};
use crate::mem::{Mapping, PAGE};
use crate::pci::{Bar, DmaAccess, PciAddress, PciError, PciFunction};

/// Command register in config space, and its Bus Master Enable bit (PCI local bus specification, 6.2.2).
const PCI_COMMAND: u16 = 4;
const BUS_MASTER: u32 = 1 << 2;

/// Class code and revision. VFIO reads them from the function, where it makes other parts of config space up.
const CLASS: u16 = 8;

/// A region of the device's file descriptor.
#[derive(Clone, Debug, Default)]
struct Region {
    size: u64,
    offset: u64,
    /// Ranges that may be mapped, as start and length.
    mappable: Vec<(u64, u64)>,
}

/// One DMA mapping and what keeps its memory alive.
struct Mapped {
    len: u64,
    _memory: Arc<Mapping>,
}

/// A PCI function that VFIO has given us, in a container (I/O address space) of its own.
pub struct VfioFunction {
    name: String,
    sysfs: Sysfs,
    address: PciAddress,
    /// Never dropped, only closed: see `Drop`.
    device: ManuallyDrop<VfioDevice>,
    container: Arc<VfioContainer>,
    /// BARs 0 to 5, the ROM, and config space, by VFIO's region index.
    regions: Vec<Region>,
    iova: Vec<RangeInclusive<u64>>,
    dma: Mutex<BTreeMap<u64, Mapped>>,
    /// How many MSI-X vectors are switched on.
    vectors: Mutex<usize>,
}

impl fmt::Debug for VfioFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioFunction").field("name", &self.name).finish_non_exhaustive()
    }
}

impl VfioFunction {
    /// Opens the NVMe function at `address`, which must be bound to vfio-pci, in a container of its own.
    pub fn open(address: PciAddress) -> Result<Arc<dyn PciFunction>, VfioError> {
        let sysfs = Sysfs::default();
        sysfs.expect_nvme(address)?;
        let driver = sysfs.driver(address);
        if driver.as_deref() != Some("vfio-pci") {
            return Err(VfioError::NotBound { address, driver });
        }
        let group = sysfs.group(address).ok_or(VfioError::NoIommu(address))?;
        let explain = |e| refusal::of_opening(&sysfs, address, group, e);
        let container = Arc::new(VfioContainer::new(None).map_err(explain)?);
        let device = VfioDevice::new(&sysfs.function(address), container.clone(), false).map_err(explain)?;
        let regions = (0..=VFIO_PCI_CONFIG_REGION_INDEX).map(|i| region(&device, i)).collect();
        let iova = iova_ranges(&container, &sysfs).map_err(|source| VfioError::Io {
            what: format!("cannot read the I/O address ranges of {address}"),
            source,
        })?;
        let function = Arc::new(Self {
            name: address.to_string(),
            sysfs,
            address,
            device: ManuallyDrop::new(device),
            container,
            regions,
            iova,
            dma: Mutex::new(BTreeMap::new()),
            vectors: Mutex::new(0),
        });
        match function.config_read(CLASS, 4) {
            Ok(u32::MAX) | Err(_) => Err(VfioError::Gone(address)),
            Ok(_) => Ok(function),
        }
    }

    fn region(&self, index: u32, what: &'static str) -> Result<&Region, PciError> {
        self.regions.get(index as usize).filter(|r| r.size > 0).ok_or_else(|| self.outside(what, 0))
    }

    fn outside(&self, what: &'static str, offset: u64) -> PciError {
        PciError::OutOfRange { function: self.name.clone(), what, offset }
    }

    fn io(&self, what: &str, source: io::Error) -> PciError {
        // vfio-pci refuses every access with EIO or ENODEV once the function has left.
        let gone = matches!(source.raw_os_error(), Some(libc::ENODEV | libc::EIO));
        if gone && !self.sysfs.function(self.address).exists() {
            return PciError::Removed(self.name.clone());
        }
        PciError::Io { what: format!("cannot {what} of {}", self.name), source }
    }

    /// Where an access of `size` bytes at `offset` of a region lies in the device's file.
    fn at(&self, index: u32, what: &'static str, offset: u64, size: u64) -> Result<u64, PciError> {
        let region = self.region(index, what)?;
        let inside = offset.checked_add(size).is_some_and(|end| end <= region.size);
        match region.offset.checked_add(offset) {
            Some(at) if inside && offset.is_multiple_of(size) => Ok(at),
            _ => Err(self.outside(what, offset)),
        }
    }

    fn device_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to `self.device`, which lives at least as long as this borrow of `self`.
        unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) }
    }

    fn read<const N: usize>(&self, index: u32, what: &'static str, offset: u64) -> Result<[u8; N], PciError> {
        let at = self.at(index, what, offset, N as u64)?;
        let mut bytes = [0u8; N];
        match rustix::io::pread(self.device_fd(), &mut bytes, at) {
            Ok(n) if n == N => Ok(bytes),
            Ok(_) => Err(self.io("read registers", io::ErrorKind::UnexpectedEof.into())),
            Err(e) => Err(self.io("read registers", e.into())),
        }
    }

    fn write(&self, index: u32, what: &'static str, offset: u64, bytes: &[u8]) -> Result<(), PciError> {
        let at = self.at(index, what, offset, bytes.len() as u64)?;
        match rustix::io::pwrite(self.device_fd(), bytes, at) {
            Ok(n) if n == bytes.len() => Ok(()),
            Ok(_) => Err(self.io("write registers", io::ErrorKind::WriteZero.into())),
            Err(e) => Err(self.io("write registers", e.into())),
        }
    }
}

fn region(device: &VfioDevice, index: u32) -> Region {
    let (size, offset) = (device.get_region_size(index), device.get_region_offset(index));
    let mut mappable = Vec::new();
    if device.get_region_flags(index) & VFIO_REGION_INFO_FLAG_MMAP != 0 {
        for cap in device.get_region_caps(index) {
            if let VfioRegionInfoCap::SparseMmap(sparse) = cap {
                mappable.extend(sparse.areas.iter().map(|area| (area.offset, area.size)));
            }
        }
        if mappable.is_empty() {
            mappable.push((0, size));
        }
    }
    Region { size, offset, mappable }
}

fn iova_ranges(container: &VfioContainer, sysfs: &Sysfs) -> io::Result<Vec<RangeInclusive<u64>>> {
    let info = ioctl::iommu_info(container)?;
    // Kernels before 5.4 do not say: keep below 39 bits, the narrowest IOMMU, and clear of x86's interrupt window.
    let ranges =
        iova::ranges_from_info(&info).unwrap_or_else(|| vec![0..=0xfedf_ffff, 0xfef0_0000..=(1 << 39) - 1]);
    Ok(iova::without(ranges, &sysfs.bus_windows()))
}

impl PciFunction for VfioFunction {
    fn name(&self) -> &str {
        &self.name
    }

    fn config_read(&self, offset: u16, size: u8) -> Result<u32, PciError> {
        let (index, what) = (VFIO_PCI_CONFIG_REGION_INDEX, "config space");
        Ok(match size {
            1 => u32::from(u8::from_le_bytes(self.read(index, what, offset.into())?)),
            2 => u32::from(u16::from_le_bytes(self.read(index, what, offset.into())?)),
            4 => u32::from_le_bytes(self.read(index, what, offset.into())?),
            _ => return Err(self.outside(what, offset.into())),
        })
    }

    fn config_write(&self, offset: u16, size: u8, value: u32) -> Result<(), PciError> {
        let (index, what) = (VFIO_PCI_CONFIG_REGION_INDEX, "config space");
        match (size, value.to_le_bytes()) {
            (1, [a, ..]) => self.write(index, what, offset.into(), &[a]),
            (2, [a, b, ..]) => self.write(index, what, offset.into(), &[a, b]),
            (4, bytes) => self.write(index, what, offset.into(), &bytes),
            _ => Err(self.outside(what, offset.into())),
        }
    }

    fn bar(&self, index: u8) -> Result<Bar, PciError> {
        if index > 5 {
            return Err(self.outside("BARs", index.into()));
        }
        let low = self.config_read(0x10 + 4 * u16::from(index), 4)?;
        let memory = low & 1 == 0;
        Ok(Bar {
            size: self.regions.get(usize::from(index)).map_or(0, |region| region.size),
            is_64bit: memory && (low >> 1) & 3 == 2,
            prefetchable: memory && low & 8 != 0,
            // Config space under VFIO holds what we wrote there, not where the device decodes: sysfs knows.
            bus_address: self.sysfs.bars(self.address)[usize::from(index)]
                .as_ref()
                .map(|range| *range.start()),
        })
    }

    fn read32(&self, bar: u8, offset: u64) -> Result<u32, PciError> {
        Ok(u32::from_le_bytes(self.read(bar.min(6).into(), "a BAR", offset)?))
    }

    fn write32(&self, bar: u8, offset: u64, value: u32) -> Result<(), PciError> {
        self.write(bar.min(6).into(), "a BAR", offset, &value.to_le_bytes())
    }

    fn read64(&self, bar: u8, offset: u64) -> Result<u64, PciError> {
        let low = self.read32(bar, offset)?;
        let high = self.read32(bar, offset.checked_add(4).ok_or_else(|| self.outside("a BAR", offset))?)?;
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    fn write64(&self, bar: u8, offset: u64, value: u64) -> Result<(), PciError> {
        self.write32(bar, offset, value as u32)?;
        let high = offset.checked_add(4).ok_or_else(|| self.outside("a BAR", offset))?;
        self.write32(bar, high, (value >> 32) as u32)
    }

    fn map_bar(&self, index: u8, offset: u64, len: u64) -> Result<Option<Arc<Mapping>>, PciError> {
        let region = self.region(index.min(6).into(), "a BAR")?;
        let end = offset.checked_add(len).filter(|end| *end <= region.size);
        let (Some(end), Ok(size), Some(at)) = (end, usize::try_from(len), region.offset.checked_add(offset))
        else {
            return Err(self.outside("a BAR", offset));
        };
        let page = PAGE as u64;
        if index > 5 || len == 0 || !offset.is_multiple_of(page) || !len.is_multiple_of(page) {
            return Err(self.outside("a BAR", offset));
        }
        if !region.mappable.iter().any(|(start, len)| *start <= offset && end <= start.saturating_add(*len)) {
            return Ok(None);
        }
        let fd = self.device_fd().try_clone_to_owned().map_err(|e| self.io("share the descriptor", e))?;
        Ok(Some(Mapping::of_device(fd, at, size).map_err(|e| self.io("map a BAR", e.source))?))
    }

    fn export_dma_buf(&self, index: u8, offset: u64, len: u64) -> Result<OwnedFd, PciError> {
        let region = self.region(index.min(6).into(), "a BAR")?;
        let page = PAGE as u64;
        let inside = offset.checked_add(len).is_some_and(|end| end <= region.size);
        if index > 5 || len == 0 || !inside || !offset.is_multiple_of(page) || !len.is_multiple_of(page) {
            return Err(self.outside("a BAR", offset));
        }
        ioctl::export_dma_buf(&*self.device, index.into(), offset, len).map_err(|e| match e.raw_os_error() {
            Some(libc::ENOTTY | libc::EOPNOTSUPP) => PciError::Unsupported {
                function: self.name.clone(),
                what: "exporting its memory as a dma-buf (vfio-pci offers that from Linux 6.19 on, with CONFIG_VFIO_PCI_DMABUF)",
            },
            _ => self.io("export memory as a dma-buf", e),
        })
    }

    fn iova_ranges(&self) -> Vec<RangeInclusive<u64>> {
        self.iova.clone()
    }

    fn dma_map(
        &self,
        memory: &Arc<Mapping>,
        offset: usize,
        len: usize,
        iova: u64,
        access: DmaAccess,
    ) -> Result<(), PciError> {
        crate::pci::check_dma_range(memory, offset, len, iova)?;
        let mut dma = self.dma.lock().unwrap_or_else(PoisonError::into_inner);
        ioctl::map_dma(&*self.container, memory, offset, len, iova, access).map_err(|e| {
            PciError::DmaMap {
                function: self.name.clone(),
                iova,
                len: len as u64,
                reason: refusal::of_mapping(&e, &self.iova),
            }
        })?;
        dma.insert(iova, Mapped { len: len as u64, _memory: Arc::clone(memory) });
        Ok(())
    }

    fn dma_unmap(&self, iova: u64, len: usize) -> Result<(), PciError> {
        let fail = |reason: String| PciError::DmaUnmap {
            function: self.name.clone(),
            iova,
            len: len as u64,
            reason,
        };
        let mut dma = self.dma.lock().unwrap_or_else(PoisonError::into_inner);
        match dma.get(&iova) {
            Some(mapped) if mapped.len == len as u64 => {}
            Some(mapped) => {
                return Err(fail(format!(
                    "it is {} bytes long, and a mapping is only taken back whole",
                    mapped.len
                )));
            }
            None => return Err(fail("nothing is mapped there".to_owned())),
        }
        // The memory is let go only once the IOMMU has: on an error it stays, pinned, for as long as this function lives.
        self.container.vfio_dma_unmap(iova, len).map_err(|e| fail(e.to_string()))?;
        dma.remove(&iova);
        Ok(())
    }

    /// What the kernel was told to map and has not said that it unmapped: its answer names the bytes, and fewer are an error.
    fn dma_reaches(&self, iova: u64, len: usize) -> bool {
        let end = iova.saturating_add(len as u64);
        let dma = self.dma.lock().unwrap_or_else(PoisonError::into_inner);
        dma.range(..end).next_back().is_some_and(|(start, mapped)| start.saturating_add(mapped.len) > iova)
    }

    fn reset(&self) -> Result<(), PciError> {
        // Off first, so that nothing is on its way while the function resets; and off is how a function comes out of power-on.
        self.set_bus_master(false)?;
        ioctl::reset(&*self.device).map_err(|e| match e.raw_os_error() {
            Some(libc::EINVAL | libc::ENOTTY) => {
                PciError::Unsupported { function: self.name.clone(), what: "function level reset" }
            }
            _ => self.io("reset", e),
        })?;
        self.set_bus_master(false)
    }

    fn set_bus_master(&self, on: bool) -> Result<(), PciError> {
        let command = self.config_read(PCI_COMMAND, 2)?;
        let wanted = if on { command | BUS_MASTER } else { command & !BUS_MASTER };
        if wanted != command {
            self.config_write(PCI_COMMAND, 2, wanted)?;
        }
        Ok(())
    }

    fn set_interrupts(&self, eventfds: &[OwnedFd]) -> Result<(), PciError> {
        let fail = |e: CrateError| self.io("set up the interrupts", io::Error::other(e));
        let mut vectors = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
        if *vectors > 0 {
            // Before Linux 6.5 the number of vectors cannot change while MSI-X is on.
            self.device.disable_msix().map_err(fail)?;
            *vectors = 0;
        }
        if eventfds.is_empty() {
            return Ok(());
        }
        let have = self.device.get_irq_info(VFIO_PCI_MSIX_IRQ_INDEX).map_or(0, |irq| irq.count);
        if eventfds.len() > have as usize {
            return Err(PciError::Unsupported {
                function: self.name.clone(),
                what: "that many MSI-X vectors",
            });
        }
        let mut copies = Vec::with_capacity(eventfds.len());
        for fd in eventfds {
            let copy = fd.try_clone().map_err(|e| self.io("share an eventfd", e))?;
            // SAFETY: a descriptor that nothing else owns; the `EventFd` closes it.
            copies.push(unsafe { EventFd::from_raw_fd(copy.into_raw_fd()) });
        }
        self.device.enable_msix(copies.iter().collect()).map_err(fail)?;
        *vectors = eventfds.len();
        Ok(())
    }
}

impl Drop for VfioFunction {
    fn drop(&mut self) {
        // Off, so that nothing in flight outlives the mappings; an error means that the function is gone, which is as good.
        let _ = self.set_bus_master(false);
        let dma = std::mem::take(self.dma.get_mut().unwrap_or_else(PoisonError::into_inner));
        for (iova, mapped) in dma {
            // Held on to until the container is closed if this fails: the kernel has the pages pinned.
            let _ = self.container.vfio_dma_unmap(iova, mapped.len as usize);
        }
        // The crate's `Drop` of its device is not run: it panics when the function has left sysfs (surprise removal), and complains when a
        // mapped BAR is still in use somewhere. Closing the descriptors is all that the kernel needs; a mapped BAR keeps the device
        // until it is unmapped.
        // SAFETY: the descriptor belongs to `device`, which is never dropped nor used again.
        drop(unsafe { OwnedFd::from_raw_fd(self.device.as_raw_fd()) });
        // SAFETY: `device` holds one count of this very `Arc` (it was made with a clone of it), which it will never give up itself.
        unsafe { Arc::decrement_strong_count(Arc::as_ptr(&self.container)) };
    }
}
