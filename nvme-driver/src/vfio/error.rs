//! What can go wrong before a function is ours, and what to do about it.

use std::io;
use std::path::PathBuf;

use crate::pci::PciAddress;

/// A function could not be opened, bound or unbound.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// No such PCI function.
    #[error("there is no PCI function {0}; `cmbfs devices` lists the NVMe functions of this machine")]
    NoSuchFunction(PciAddress),
    /// The function is still listed, but nobody answers there.
    #[error(
        "{0} does not answer: it was pulled out or has no power; the kernel will forget it, or `echo 1 > /sys/bus/pci/rescan` finds it again"
    )]
    Gone(PciAddress),
    /// The function is no NVMe controller.
    #[error("{address} is no NVMe controller (class {class:#08x}); refusing to touch it")]
    NotNvme {
        /// The function.
        address: PciAddress,
        /// Its PCI class code.
        class: u32,
    },
    /// Another driver, or none, owns the function.
    #[error("{address} is bound to {}, not to vfio-pci; run `cmbfs bind {address}` as root first",
        driver.as_deref().unwrap_or("no driver"))]
    NotBound {
        /// The function.
        address: PciAddress,
        /// The driver that owns it.
        driver: Option<String>,
    },
    /// The kernel gave the function no IOMMU group.
    #[error(
        "{0} is in no IOMMU group: turn the IOMMU on in the firmware and boot with intel_iommu=on (Intel) or amd_iommu=on (AMD)"
    )]
    NoIommu(PciAddress),
    /// `/dev/vfio/vfio` does not exist.
    #[error("{} does not exist: load the module with `modprobe vfio-pci` (as root)", .0.display())]
    NoVfio(PathBuf),
    /// The user may not open the group.
    #[error("no permission to open {}: run as root, or `chown $USER {}` (as root)", .0.display(), .0.display())]
    Permission(PathBuf),
    /// Another process has the group open.
    #[error("{address} (VFIO group {group}) is in use by another process")]
    Busy {
        /// The function.
        address: PciAddress,
        /// Its IOMMU group.
        group: u32,
    },
    /// Other functions of the group belong to host drivers.
    #[error(
        "IOMMU group {group} of {address} is not viable: all of its functions must be bound to vfio-pci or to nothing, but {others} \
         are not; bind them too, or use a slot whose group is its own"
    )]
    NotViable {
        /// The function.
        address: PciAddress,
        /// Its IOMMU group.
        group: u32,
        /// The functions in the way, with their drivers.
        others: String,
    },
    /// The platform cannot isolate interrupts.
    #[error(
        "the IOMMU of {0} has no interrupt remapping, so a device could forge interrupts: enable it in the firmware (in QEMU: \
         -device intel-iommu,intremap=on with kernel-irqchip=split), or, if you trust the device, load vfio_iommu_type1 with allow_unsafe_interrupts=1"
    )]
    NoInterruptRemapping(PciAddress),
    /// A namespace of the function is in use by the host.
    #[error("{address} is in use: {user}; refusing to take it away")]
    InUse {
        /// The function.
        address: PciAddress,
        /// By what.
        user: String,
    },
    /// The driver did not take the function after all.
    #[error("{address} did not bind to {wanted} (bound to {}); see `dmesg`", got.as_deref().unwrap_or("no driver"))]
    DidNotBind {
        /// The function.
        address: PciAddress,
        /// The wanted driver.
        wanted: String,
        /// The driver it is bound to now.
        got: Option<String>,
    },
    /// The system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, and on what.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// VFIO refused in a way that has no better name here.
    #[error("{address}: {source}")]
    Vfio {
        /// The function.
        address: PciAddress,
        /// The crate's error.
        source: vfio_ioctls::VfioError,
    },
}
