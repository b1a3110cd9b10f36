//! BARs and config space as vfio-user regions: description, mappable areas, access by message.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals};
use rustix::io::Errno;

use super::protocol::{Fields, MAX_DATA, Put};
use crate::mem::{Mapping, PAGE};
use crate::pci::{PciError, PciFunction};

/// BARs 0 to 5, ROM, config space, VGA (linux/vfio.h).
pub(super) const COUNT: u32 = 9;
const CONFIG: u32 = 7;
const CONFIG_SIZE: u64 = 4096;
const FLAG_READ: u32 = 1;
const FLAG_WRITE: u32 = 2;
const FLAG_MMAP: u32 = 4;
const FLAG_CAPS: u32 = 8;
const CAP_SPARSE_MMAP: u16 = 1;
/// Bytes of `struct vfio_region_info`.
const INFO: usize = 32;
/// BARs up to this size are searched page by page for areas that can be mapped.
const SEARCH: u64 = 1 << 20;

/// A range of a BAR that the client can map.
struct Area {
    offset: u64,
    memory: Arc<Mapping>,
}

/// One BAR.
struct BarRegion {
    size: u64,
    areas: Vec<Area>,
}

/// The regions of one function.
pub(super) struct Regions {
    function: Arc<dyn PciFunction>,
    bars: Vec<BarRegion>,
}

/// A failed access as an error number.
pub(super) fn errno(e: &PciError) -> Errno {
    match e {
        PciError::OutOfRange { .. } | PciError::Memory(_) => Errno::INVAL,
        PciError::Removed(_) => Errno::NODEV,
        PciError::Unsupported { .. } => Errno::NOTSUP,
        _ => Errno::IO,
    }
}

impl Regions {
    pub(super) fn new(function: Arc<dyn PciFunction>) -> Result<Self, PciError> {
        let bars = (0..6)
            .map(|index| {
                let size = function.bar(index)?.size;
                Ok(BarRegion { size, areas: areas(&*function, index, size) })
            })
            .collect::<Result<_, PciError>>()?;
        Ok(Self { function, bars })
    }

    fn size(&self, region: u32) -> u64 {
        match region {
            CONFIG => CONFIG_SIZE,
            index => self.bars.get(index as usize).map_or(0, |bar| bar.size),
        }
    }

    /// Answers DEVICE_GET_REGION_INFO.
    pub(super) fn info(&self, body: &[u8]) -> Result<(Vec<u8>, Vec<OwnedFd>), Errno> {
        let mut fields = Fields(body);
        let (room, _, index) = (fields.u32()? as usize, fields.u32()?, fields.u32()?);
        if index >= COUNT || room < INFO {
            return Err(Errno::INVAL);
        }
        let size = self.size(index);
        let areas = self.bars.get(index as usize).map_or(&[][..], |bar| &bar.areas);
        let whole = areas.len() == 1 && areas[0].memory.len() as u64 == size;
        let caps = if areas.is_empty() || whole { 0 } else { 16 + 16 * areas.len() };
        let fits = INFO + caps <= room;
        let mut flags = if size == 0 { 0 } else { FLAG_READ | FLAG_WRITE };
        let mut fds = Vec::new();
        let mut file_offset = 0;
        if let Some((fd, offset)) = mappable_fd(areas) {
            flags |= FLAG_MMAP | if caps > 0 { FLAG_CAPS } else { 0 };
            file_offset = offset;
            if fits {
                fds.push(fd.try_clone_to_owned().map_err(|_| Errno::MFILE)?);
            }
        }
        let mut reply = Vec::with_capacity(INFO + caps);
        reply.put_u32((INFO + caps) as u32);
        reply.put_u32(flags);
        reply.put_u32(index);
        // Also when they do not fit: QEMU takes "has capabilities" with an offset of 0 for an error.
        reply.put_u32(if caps > 0 { INFO as u32 } else { 0 });
        reply.put_u64(size);
        reply.put_u64(file_offset);
        if caps > 0 && fits {
            reply.put_u16(CAP_SPARSE_MMAP);
            reply.put_u16(1);
            reply.put_u32(0);
            reply.put_u32(areas.len() as u32);
            reply.put_u32(0);
            for area in areas {
                reply.put_u64(area.offset);
                reply.put_u64(area.memory.len() as u64);
            }
        }
        Ok((reply, fds))
    }

    /// Answers REGION_READ.
    pub(super) fn read(&self, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let mut fields = Fields(body);
        let (offset, region, count) = (fields.u64()?, fields.u32()?, fields.u32()?);
        let len = self.check(region, offset, count)?;
        let mut reply = Vec::with_capacity(16 + len);
        reply.put_u64(offset);
        reply.put_u32(region);
        reply.put_u32(count);
        reply.resize(16 + len, 0);
        self.read_into(region, offset, &mut reply[16..])?;
        Ok(reply)
    }

    /// Answers REGION_WRITE.
    pub(super) fn write(&self, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let mut fields = Fields(body);
        let (offset, region, count) = (fields.u64()?, fields.u32()?, fields.u32()?);
        let len = self.check(region, offset, count)?;
        self.write_from(region, offset, fields.bytes(len)?)?;
        Ok(body[..16].to_vec())
    }

    /// Answers REGION_WRITE_MULTI: up to eight bytes each.
    pub(super) fn write_multi(&self, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let mut fields = Fields(body);
        let writes = fields.u64()?;
        if writes.checked_mul(24) != Some(fields.0.len() as u64) {
            return Err(Errno::INVAL);
        }
        for _ in 0..writes {
            let (offset, region, count) = (fields.u64()?, fields.u32()?, fields.u32()?);
            let data = fields.bytes(8)?;
            let len = self.check(region, offset, count)?;
            self.write_from(region, offset, data.get(..len).ok_or(Errno::INVAL)?)?;
        }
        Ok(writes.to_le_bytes().to_vec())
    }

    fn check(&self, region: u32, offset: u64, count: u32) -> Result<usize, Errno> {
        let end = offset.checked_add(u64::from(count)).ok_or(Errno::INVAL)?;
        let known = region == CONFIG || region < 6;
        if !known || count == 0 || count as usize > MAX_DATA || end > self.size(region) {
            return Err(Errno::INVAL);
        }
        Ok(count as usize)
    }

    fn area(&self, region: u32, offset: u64, len: usize) -> Option<(&Mapping, usize)> {
        let end = offset.checked_add(len as u64)?;
        let bar = self.bars.get(region as usize)?;
        let inside = |a: &&Area| a.offset <= offset && end <= a.offset + a.memory.len() as u64;
        let area = bar.areas.iter().find(inside)?;
        Some((&area.memory, (offset - area.offset) as usize))
    }

    fn read_into(&self, region: u32, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
        if let Some((memory, at)) = self.area(region, offset, into.len()) {
            return memory.read(at, into).map_err(|_| Errno::INVAL);
        }
        let f = &*self.function;
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let left = into.len() - done;
            let n = if region == CONFIG {
                let n = width(at, left).min(4);
                let value = f.config_read(at as u16, n as u8).map_err(|e| errno(&e))?;
                into[done..done + n].copy_from_slice(&value.to_le_bytes()[..n]);
                n
            } else if at.is_multiple_of(8) && left >= 8 {
                let value = f.read64(region as u8, at).map_err(|e| errno(&e))?;
                into[done..done + 8].copy_from_slice(&value.to_le_bytes());
                8
            } else {
                // Registers are read whole; a narrower read gets its part.
                let word = f.read32(region as u8, at & !3).map_err(|e| errno(&e))?.to_le_bytes();
                let first = (at & 3) as usize;
                let n = left.min(4 - first);
                into[done..done + n].copy_from_slice(&word[first..first + n]);
                n
            };
            done += n;
        }
        Ok(())
    }

    fn write_from(&self, region: u32, offset: u64, from: &[u8]) -> Result<(), Errno> {
        if let Some((memory, at)) = self.area(region, offset, from.len()) {
            // A doorbell is one store; anything else may be copied.
            return match <[u8; 4]>::try_from(from) {
                Ok(word) if at.is_multiple_of(4) => memory
                    .u32_at(at)
                    .map(|w| w.store(u32::from_le_bytes(word), std::sync::atomic::Ordering::Release))
                    .map_err(|_| Errno::INVAL),
                _ => memory.write(at, from).map_err(|_| Errno::INVAL),
            };
        }
        let f = &*self.function;
        let mut done = 0;
        while done < from.len() {
            let at = offset + done as u64;
            let left = from.len() - done;
            let mut word = [0u8; 8];
            let n = if region == CONFIG {
                let n = width(at, left).min(4);
                word[..n].copy_from_slice(&from[done..done + n]);
                f.config_write(at as u16, n as u8, u64::from_le_bytes(word) as u32).map_err(|e| errno(&e))?;
                n
            } else if at.is_multiple_of(8) && left >= 8 {
                word.copy_from_slice(&from[done..done + 8]);
                f.write64(region as u8, at, u64::from_le_bytes(word)).map_err(|e| errno(&e))?;
                8
            } else if at.is_multiple_of(4) && left >= 4 {
                word[..4].copy_from_slice(&from[done..done + 4]);
                f.write32(region as u8, at, u64::from_le_bytes(word) as u32).map_err(|e| errno(&e))?;
                4
            } else {
                // Registers take whole words only (NVMe over PCIe transport specification, register access).
                return Err(Errno::INVAL);
            };
            done += n;
        }
        Ok(())
    }
}

/// The widest aligned power of two up to eight.
fn width(address: u64, left: usize) -> usize {
    [8, 4, 2].into_iter().find(|w| address.is_multiple_of(*w as u64) && *w <= left).unwrap_or(1)
}

/// Which ranges of a BAR can be mapped through a descriptor.
fn areas(function: &dyn PciFunction, index: u8, size: u64) -> Vec<Area> {
    let page = PAGE as u64;
    if size < page {
        return Vec::new();
    }
    let map = |offset, len| function.map_bar(index, offset, len).ok().flatten().filter(seal);
    // Memory fills its BAR from the start (a CMB, perhaps shorter than the BAR): the longest prefix that can be mapped.
    if let Some(mut memory) = map(0, page) {
        let (mut good, mut bad) = (1, size / page + 1);
        while bad - good > 1 {
            let middle = if bad > size / page { bad - 1 } else { good + (bad - good) / 2 };
            match map(0, middle * page) {
                Some(more) => (good, memory) = (middle, more),
                None => bad = middle,
            }
        }
        return vec![Area { offset: 0, memory }];
    }
    // Registers with a page that can be mapped in between (doorbells).
    (1..size.min(SEARCH) / page)
        .filter_map(|i| Some(Area { offset: i * page, memory: map(i * page, page)? }))
        .collect()
}

/// Makes sure that whoever gets the descriptor cannot shrink the file under us, or that it does not matter (a PMR's file cannot be sealed, but is
/// watched). False: then it is not handed out.
fn seal(memory: &Arc<Mapping>) -> bool {
    let wanted = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    memory.fd().is_some_and(|(fd, _)| {
        fcntl_add_seals(fd, wanted).is_ok()
            || fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
            || memory.is_watched()
    })
}

/// The one descriptor through which all areas of a region can be mapped, and the file offset of the region's start in it: an area at
/// `offset` is mapped from the region's file offset plus `offset`, so the file must be laid out like the BAR.
fn mappable_fd(areas: &[Area]) -> Option<(BorrowedFd<'_>, u64)> {
    let area = areas.first()?;
    let (fd, at) = area.memory.fd()?;
    Some((fd, at.checked_sub(area.offset)?))
}
