//! `cmbfs bind` and `cmbfs unbind`: a drive from the kernel to us, and back.

use std::io::{self, Write};

use clap::Args;
use cmbfs::nvme_driver::pci::PciAddress;
use cmbfs::nvme_driver::vfio;

use super::failure::Failure;

/// Take an NVMe function from the kernel and give it to vfio-pci, for use as pci:ADDR
///
/// Refused while one of its namespaces is mounted, swap, part of another device or held exclusively. Needs root, an IOMMU,
/// and the module vfio-pci. Lasts until `cmbfs unbind` or the next boot.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  cmbfs bind 0000:01:00.0")]
pub(crate) struct Bind {
    /// The function's address, as `cmbfs devices` lists it
    #[arg(value_name = "ADDR")]
    address: PciAddress,
}

/// Give an NVMe function back to the kernel
///
/// Refused while a process holds it. Needs root.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  cmbfs unbind 0000:01:00.0")]
pub(crate) struct Unbind {
    /// The function's address, as `cmbfs devices` lists it
    #[arg(value_name = "ADDR")]
    address: PciAddress,
}

impl Bind {
    pub(crate) fn run(self) -> Result<(), Failure> {
        vfio::bind(self.address)?;
        Ok(writeln!(io::stdout(), "bound to vfio-pci: pci:{}", self.address)?)
    }
}

impl Unbind {
    pub(crate) fn run(self) -> Result<(), Failure> {
        vfio::unbind(self.address)?;
        Ok(writeln!(io::stdout(), "{} is the kernel's again", self.address)?)
    }
}
