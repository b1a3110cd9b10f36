//! Real PCI functions through Linux VFIO (group and container; type 1 IOMMU).
//!
//! * [`VfioFunction`]: the [`PciFunction`](crate::pci::PciFunction) over `/dev/vfio`
//! * [`device_memory`]: CPU access to memory behind a real BAR
//! * [`list`], [`bind`], [`unbind`]: the machine's NVMe functions in sysfs, and which driver they belong to
//! * `iova`: which I/O virtual addresses are free of reservations and of other devices' windows
//! * `refusal`: what the kernel's errors mean, and what to do about them
//! * `ioctl`: the few VFIO calls that `vfio-ioctls` does not offer
//!
//! # How far `vfio-ioctls` carries
//! Groups, containers, region descriptions with their sparse areas, interrupts and exact unmapping come from that crate.
//! Four things do not fit and are done here: it maps DMA memory readable *and* writable always (we map read-only peers); its
//! `reset`, `region_read` and `region_write` swallow errors; it has no `VFIO_IOMMU_GET_INFO`, so no IOVA ranges; and dropping
//! its `VfioDevice` panics when the function has left sysfs by then (surprise removal), so [`VfioFunction`] closes it by hand.
//!
//! The iommufd path (`/dev/vfio/devices`, VFIO cdev) is not used: no kernel that Debian ships builds iommufd, so it could not be run.
pub mod device_memory;
mod error;
mod function;
mod ioctl;
mod iova;
mod refusal;
mod sysfs;

pub use error::VfioError;
pub use function::VfioFunction;
pub use sysfs::{FunctionInfo, Sysfs, bind, list, unbind};
