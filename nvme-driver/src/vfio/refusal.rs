//! What the kernel's refusals mean, and what to do about them.

use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use vfio_ioctls::VfioError as CrateError;

use super::error::VfioError;
use super::sysfs::Sysfs;
use crate::pci::PciAddress;

/// Of opening the function at `address`.
pub(super) fn of_opening(sysfs: &Sysfs, address: PciAddress, group: u32, e: CrateError) -> VfioError {
    let denied = |e: &io::Error| e.kind() == io::ErrorKind::PermissionDenied;
    let node = |name: String| -> PathBuf { sysfs.dev.join("vfio").join(name) };
    match e {
        CrateError::OpenContainer(e) if e.kind() == io::ErrorKind::NotFound => {
            VfioError::NoVfio(node("vfio".into()))
        }
        CrateError::OpenContainer(e) if denied(&e) => VfioError::Permission(node("vfio".into())),
        CrateError::OpenGroup(e, _) if e.kind() == io::ErrorKind::NotFound => {
            VfioError::NoVfio(node(group.to_string()))
        }
        CrateError::OpenGroup(e, _) if denied(&e) => VfioError::Permission(node(group.to_string())),
        CrateError::OpenGroup(e, _) if e.raw_os_error() == Some(libc::EBUSY) => {
            VfioError::Busy { address, group }
        }
        CrateError::GroupViable => {
            VfioError::NotViable { address, group, others: sysfs.group_blockers(group) }
        }
        CrateError::ContainerSetIOMMU(e) if e.errno() == libc::EPERM => {
            VfioError::NoInterruptRemapping(address)
        }
        source => VfioError::Vfio { address, source },
    }
}

/// Of a DMA mapping; `accepted` is what the container says it accepts.
pub(super) fn of_mapping(e: &io::Error, accepted: &[RangeInclusive<u64>]) -> String {
    match e.raw_os_error() {
        Some(libc::ENOMEM) => {
            let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
            let limit = limit.map_or("unlimited".to_owned(), |bytes| format!("{} KiB", bytes / 1024));
            format!(
                "the memory would have to be locked, and this user's limit (RLIMIT_MEMLOCK) is {limit}: raise it with `ulimit -l`, \
                 in /etc/security/limits.conf, or with LimitMEMLOCK= in a systemd unit"
            )
        }
        Some(libc::EEXIST) => "part of the range is mapped already".to_owned(),
        Some(libc::ENOSPC) => {
            "the container is full (65535 mappings, see vfio_iommu_type1's dma_entry_limit): use fewer, bigger ones".to_owned()
        }
        Some(libc::EINVAL) => {
            let ranges: Vec<_> =
                accepted.iter().map(|r| format!("{:#x} to {:#x}", r.start(), r.end())).collect();
            format!("the IOMMU does not accept these addresses; it accepts {}", ranges.join(", "))
        }
        Some(libc::EFAULT) => {
            "the memory cannot be pinned (a BAR of a function that is being reset, or memory the kernel does not let devices reach)"
                .to_owned()
        }
        _ => e.to_string(),
    }
}
