//! The VFIO calls that `vfio-ioctls` does not offer: mapping with chosen access, container information, a reset that reports,
//! export as a dma-buf.
#![expect(unsafe_code, reason = "ioctls on VFIO file descriptors")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_FEATURE_DMA_BUF, VFIO_DEVICE_FEATURE_GET, VFIO_DMA_MAP_FLAG_READ,
    VFIO_DMA_MAP_FLAG_WRITE, VFIO_TYPE, vfio_iommu_type1_dma_map, vfio_region_dma_range,
};

use crate::mem::Mapping;
use crate::pci::DmaAccess;

/// `_IO(VFIO_TYPE, VFIO_BASE + nr)` (linux/vfio.h).
const fn request(nr: u32) -> libc::c_ulong {
    ((VFIO_TYPE as u32) << 8 | (VFIO_BASE + nr)) as libc::c_ulong
}
const DEVICE_RESET: libc::c_ulong = request(11);
const IOMMU_GET_INFO: libc::c_ulong = request(12);
const IOMMU_MAP_DMA: libc::c_ulong = request(13);
const DEVICE_FEATURE: libc::c_ulong = request(17);

/// More than the container's information can reasonably need; a bigger answer is refused.
const MAX_INFO: usize = 64 * 1024;

fn check(ret: libc::c_int) -> io::Result<()> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets the container's devices reach `len` bytes of `memory` from `offset` at `iova`. The caller has checked that the range is
/// inside the mapping and keeps the mapping alive until it has unmapped the range again.
pub(super) fn map_dma(
    container: &impl AsRawFd,
    memory: &Mapping,
    offset: usize,
    len: usize,
    iova: u64,
    access: DmaAccess,
) -> io::Result<()> {
    let mut flags = 0;
    if access.readable() {
        flags |= VFIO_DMA_MAP_FLAG_READ;
    }
    if access.writable() {
        flags |= VFIO_DMA_MAP_FLAG_WRITE;
    }
    let map = vfio_iommu_type1_dma_map {
        argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
        flags,
        vaddr: memory.as_ptr().addr() as u64 + offset as u64,
        iova,
        size: len as u64,
    };
    // SAFETY: the descriptor is a VFIO container's, the structure is the one this request reads, and the memory it names is a
    // `Mapping`: no Rust reference to it exists, so a device changing it breaks no aliasing rule.
    check(unsafe { libc::ioctl(container.as_raw_fd(), IOMMU_MAP_DMA, &raw const map) })
}

/// The container's `vfio_iommu_type1_info` with its capability chain, as bytes.
pub(super) fn iommu_info(container: &impl AsRawFd) -> io::Result<Vec<u8>> {
    let mut len = 24_usize;
    for _ in 0..4 {
        let mut info = vec![0u64; len.div_ceil(8)];
        let room = info.len() * 8;
        info[0] = room as u64; // argsz in the low half, flags 0 in the high half (little-endian; VFIO type 1 is x86 and Arm)
        // SAFETY: the descriptor is a VFIO container's; the kernel writes at most `argsz` bytes, which is the buffer's size.
        check(unsafe { libc::ioctl(container.as_raw_fd(), IOMMU_GET_INFO, info.as_mut_ptr()) })?;
        let bytes: Vec<u8> = info.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let wanted = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        if wanted <= room {
            return Ok(bytes);
        }
        if wanted > MAX_INFO {
            break;
        }
        len = wanted;
    }
    Err(io::Error::other("the container's description does not settle on a size"))
}

/// Resets the function.
pub(super) fn reset(device: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: the descriptor is a VFIO device's; the request takes no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_RESET) })
}

/// `vfio_device_feature` with `vfio_device_feature_dma_buf` and one range, as they follow each other (linux/vfio.h).
#[repr(C)]
struct ExportDmaBuf {
    argsz: u32,
    feature: u32,
    region_index: u32,
    open_flags: u32,
    flags: u32,
    nr_ranges: u32,
    range: vfio_region_dma_range,
}

/// A dma-buf of `length` bytes of a region from `offset`.
pub(super) fn export_dma_buf(
    device: &impl AsRawFd,
    region_index: u32,
    offset: u64,
    length: u64,
) -> io::Result<OwnedFd> {
    let export = ExportDmaBuf {
        argsz: size_of::<ExportDmaBuf>() as u32,
        feature: VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_BUF,
        region_index,
        open_flags: (libc::O_RDWR | libc::O_CLOEXEC) as u32,
        flags: 0,
        nr_ranges: 1,
        range: vfio_region_dma_range { offset, length },
    };
    // SAFETY: the descriptor is a VFIO device's, and the kernel reads `argsz` bytes, which is the structure's size.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_FEATURE, &raw const export) };
    check(fd)?;
    // SAFETY: a new descriptor, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
