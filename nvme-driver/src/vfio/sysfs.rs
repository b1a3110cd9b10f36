//! The machine's NVMe functions as sysfs shows them, and moving one between drivers.

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::error::VfioError;
use crate::pci::PciAddress;

/// NVM controller with the NVM Express interface (PCI class code; the last byte is the programming interface).
const CLASS_NVME: u32 = 0x01_0802;
/// `IORESOURCE_MEM` in the flags column of a function's `resource` file.
const RESOURCE_MEM: u64 = 0x200;

/// One NVMe function of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionInfo {
    /// Its address.
    pub address: PciAddress,
    /// PCI vendor id.
    pub vendor: u16,
    /// PCI device id.
    pub device: u16,
    /// The driver it is bound to.
    pub driver: Option<String>,
    /// Its IOMMU group; `None` without an IOMMU.
    pub iommu_group: Option<u32>,
    /// Size of its CMB in bytes, where the kernel's nvme driver shows it.
    pub cmb_bytes: Option<u64>,
    /// The kernel's names of its namespaces (`nvme0n1`), if its nvme driver has it.
    pub block_devices: Vec<String>,
}

/// Where sysfs, procfs and devfs are mounted: `/sys`, `/proc` and `/dev`, except in tests.
#[derive(Clone, Debug)]
pub struct Sysfs {
    /// sysfs.
    pub sys: PathBuf,
    /// procfs.
    pub proc: PathBuf,
    /// Device nodes.
    pub dev: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self { sys: "/sys".into(), proc: "/proc".into(), dev: "/dev".into() }
    }
}

/// All NVMe functions of this machine, by address.
pub fn list() -> Result<Vec<FunctionInfo>, VfioError> {
    Sysfs::default().list()
}

/// Takes an NVMe function from its driver and gives it to vfio-pci. Refuses one whose namespaces are mounted or in use.
pub fn bind(address: PciAddress) -> Result<(), VfioError> {
    Sysfs::default().bind(address)
}

/// Gives an NVMe function back to the driver that the kernel would choose. Refuses one that a process holds through VFIO.
pub fn unbind(address: PciAddress) -> Result<(), VfioError> {
    Sysfs::default().unbind(address)
}

fn io_error(what: &str, path: &Path) -> impl FnOnce(io::Error) -> VfioError {
    let what = format!("cannot {what} {}", path.display());
    move |source| VfioError::Io { what, source }
}

fn read_trimmed(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn read_hex(path: &Path) -> Option<u64> {
    u64::from_str_radix(read_trimmed(path)?.trim_start_matches("0x"), 16).ok()
}

/// The last component of where a link points.
fn link_name(path: &Path) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}

fn entries(path: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(path)
        .map(|dir| dir.flatten().filter_map(|e| e.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    names.sort();
    names
}

/// The size in the kernel's `cmb` attribute ("cmbloc : 0x...\ncmbsz  : 0x..."): SZ in units of 4 KiB << (4 * SZU) (NVMe base
/// specification, CMBSZ).
fn cmb_bytes(attribute: &str) -> Option<u64> {
    let line = attribute.lines().find(|line| line.starts_with("cmbsz"))?;
    let text = line.split_once(':')?.1.trim().trim_start_matches("0x");
    let cmbsz = u64::from(u32::from_str_radix(text, 16).ok()?);
    let unit = 4096u64.checked_shl(u32::try_from(4 * ((cmbsz >> 8) & 0xf)).ok()?)?;
    (cmbsz >> 12).checked_mul(unit).filter(|bytes| *bytes > 0)
}

/// `nvme0c1n2` is one path to the namespace whose block device is `nvme0n2`.
fn block_name(namespace: &str) -> Option<String> {
    let rest = namespace.strip_prefix("nvme")?;
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    let (head, nsid) = rest.rsplit_once('n')?;
    let controller = head.split_once('c').map_or(head, |(subsystem, _)| subsystem);
    (digits(controller) && digits(nsid)).then(|| format!("nvme{controller}n{nsid}"))
}

impl Sysfs {
    /// A function's folder.
    pub(super) fn function(&self, address: PciAddress) -> PathBuf {
        self.sys.join("bus/pci/devices").join(address.to_string())
    }

    /// The driver a function is bound to.
    pub(super) fn driver(&self, address: PciAddress) -> Option<String> {
        link_name(&self.function(address).join("driver"))
    }

    /// A function's IOMMU group.
    pub(super) fn group(&self, address: PciAddress) -> Option<u32> {
        link_name(&self.function(address).join("iommu_group"))?.parse().ok()
    }

    /// The other functions of a group that keep it from being viable, with their drivers. Bridges never do.
    pub(super) fn group_blockers(&self, group: u32) -> String {
        let folder = self.sys.join("kernel/iommu_groups").join(group.to_string()).join("devices");
        let others: Vec<String> = entries(&folder)
            .into_iter()
            .filter_map(|name| {
                let driver = link_name(&folder.join(&name).join("driver"))?;
                (!["vfio-pci", "pcieport", "pci-stub"].contains(&driver.as_str()))
                    .then(|| format!("{name} ({driver})"))
            })
            .collect();
        if others.is_empty() { "some of them".to_owned() } else { others.join(", ") }
    }

    /// Checks that the function exists and is an NVMe controller.
    pub(super) fn expect_nvme(&self, address: PciAddress) -> Result<(), VfioError> {
        let folder = self.function(address);
        if !folder.exists() {
            return Err(VfioError::NoSuchFunction(address));
        }
        match read_hex(&folder.join("class")) {
            Some(class) if class == u64::from(CLASS_NVME) => Ok(()),
            class => Err(VfioError::NotNvme { address, class: class.unwrap_or(0) as u32 }),
        }
    }

    /// A function's BARs (0 to 5) as bus address and size; `None` where not implemented.
    pub(super) fn bars(&self, address: PciAddress) -> [Option<RangeInclusive<u64>>; 6] {
        let mut bars = [const { None }; 6];
        for (bar, (range, _)) in bars.iter_mut().zip(resources(&self.function(address))) {
            *bar = range;
        }
        bars
    }

    /// Every range of bus addresses that some function or bridge of the machine decodes: no IOVA should lie there, because a
    /// switch may route it to that device without asking the IOMMU.
    pub(super) fn bus_windows(&self) -> Vec<RangeInclusive<u64>> {
        let folder = self.sys.join("bus/pci/devices");
        entries(&folder)
            .iter()
            .flat_map(|name| resources(&folder.join(name)))
            .filter_map(|(range, flags)| range.filter(|_| flags & RESOURCE_MEM != 0))
            .collect()
    }

    fn namespaces(&self, address: PciAddress) -> Vec<String> {
        let controllers = self.function(address).join("nvme");
        let mut names: Vec<String> = entries(&controllers)
            .iter()
            .flat_map(|controller| entries(&controllers.join(controller)))
            .filter_map(|name| block_name(&name))
            .collect();
        names.sort();
        names.dedup();
        names
    }

    fn info(&self, address: PciAddress) -> FunctionInfo {
        let folder = self.function(address);
        let id = |name: &str| read_hex(&folder.join(name)).and_then(|v| u16::try_from(v).ok()).unwrap_or(0);
        let cmb = entries(&folder.join("nvme")).iter().find_map(|controller| {
            cmb_bytes(&read_trimmed(&folder.join("nvme").join(controller).join("cmb"))?)
        });
        FunctionInfo {
            address,
            vendor: id("vendor"),
            device: id("device"),
            driver: self.driver(address),
            iommu_group: self.group(address),
            cmb_bytes: cmb,
            block_devices: self.namespaces(address),
        }
    }

    /// All NVMe functions, by address.
    pub fn list(&self) -> Result<Vec<FunctionInfo>, VfioError> {
        let folder = self.sys.join("bus/pci/devices");
        fs::metadata(&folder).map_err(io_error("read", &folder))?;
        let mut found: Vec<FunctionInfo> = entries(&folder)
            .iter()
            .filter_map(|name| name.parse().ok())
            .filter(|address| self.expect_nvme(*address).is_ok())
            .map(|address| self.info(address))
            .collect();
        found.sort_by_key(|info| info.address);
        Ok(found)
    }

    /// Who uses a block device or one of its partitions: a mount, swap, or a device stacked on it.
    fn user_of(&self, block: &str) -> Option<String> {
        let folder = self.sys.join("class/block").join(block);
        let partitions = entries(&folder).into_iter().filter(|name| name.starts_with(block));
        for name in std::iter::once(block.to_owned()).chain(partitions) {
            let folder = self.sys.join("class/block").join(&name);
            if let Some(number) = read_trimmed(&folder.join("dev")) {
                let mounts = fs::read_to_string(self.proc.join("self/mountinfo")).unwrap_or_default();
                let mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|fields| {
                    let source = fields.iter().position(|f| *f == "-").and_then(|dash| fields.get(dash + 2));
                    fields.get(2) == Some(&number.as_str())
                        || source == Some(&format!("/dev/{name}").as_str())
                });
                if let Some(point) = mount.and_then(|fields| fields.get(4).map(|s| (*s).to_owned())) {
                    return Some(format!("{name} is mounted on {point}"));
                }
            }
            if let Some(holder) = entries(&folder.join("holders")).first() {
                return Some(format!("{name} is part of {holder}"));
            }
            let swaps = fs::read_to_string(self.proc.join("swaps")).unwrap_or_default();
            if swaps.lines().any(|line| line.split_whitespace().next() == Some(&format!("/dev/{name}"))) {
                return Some(format!("{name} is swap space"));
            }
            // What the above does not show (a mount in another namespace, a raw user with an exclusive open) the kernel does.
            let exclusive =
                rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::EXCL | rustix::fs::OFlags::CLOEXEC;
            if rustix::fs::open(self.dev.join(&name), exclusive, rustix::fs::Mode::empty()).err()
                == Some(rustix::io::Errno::BUSY)
            {
                return Some(format!("something holds /dev/{name} exclusively"));
            }
        }
        None
    }

    fn write(&self, path: &Path, text: &str) -> Result<(), VfioError> {
        fs::write(path, text).map_err(io_error("write to", path))
    }

    fn release(&self, address: PciAddress) -> Result<(), VfioError> {
        let unbind = self.function(address).join("driver/unbind");
        if self.driver(address).is_some() { self.write(&unbind, &address.to_string()) } else { Ok(()) }
    }

    /// See [`bind`].
    pub fn bind(&self, address: PciAddress) -> Result<(), VfioError> {
        self.expect_nvme(address)?;
        if self.driver(address).as_deref() == Some("vfio-pci") {
            return Ok(());
        }
        if self.group(address).is_none() {
            return Err(VfioError::NoIommu(address));
        }
        if !self.sys.join("bus/pci/drivers/vfio-pci").exists() {
            return Err(VfioError::NoVfio(self.sys.join("bus/pci/drivers/vfio-pci")));
        }
        for block in self.namespaces(address) {
            if let Some(user) = self.user_of(&block) {
                return Err(VfioError::InUse { address, user });
            }
        }
        let before = self.driver(address);
        self.write(&self.function(address).join("driver_override"), "vfio-pci")?;
        let moved = self.release(address).and_then(|()| self.probe(address, "vfio-pci"));
        if moved.is_err() && self.driver(address) != before {
            // Do not leave the machine without its drive.
            let _ = self.write(&self.function(address).join("driver_override"), "\n");
            let _ = self.write(&self.sys.join("bus/pci/drivers_probe"), &address.to_string());
        }
        moved
    }

    /// See [`unbind`].
    pub fn unbind(&self, address: PciAddress) -> Result<(), VfioError> {
        self.expect_nvme(address)?;
        self.write(&self.function(address).join("driver_override"), "\n")?;
        if self.driver(address).as_deref() != Some("vfio-pci") {
            return Ok(());
        }
        // vfio-pci waits for its users before it lets go of a function: without this check the caller would hang.
        if let Some(group) = self.group(address) {
            let node = self.dev.join("vfio").join(group.to_string());
            match fs::File::options().read(true).write(true).open(&node) {
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    return Err(VfioError::Busy { address, group });
                }
                _ => {}
            }
        }
        self.release(address)?;
        self.write(&self.sys.join("bus/pci/drivers_probe"), &address.to_string())
    }

    fn probe(&self, address: PciAddress, wanted: &str) -> Result<(), VfioError> {
        self.write(&self.sys.join("bus/pci/drivers_probe"), &address.to_string())?;
        let got = self.driver(address);
        if got.as_deref() == Some(wanted) {
            return Ok(());
        }
        Err(VfioError::DidNotBind { address, wanted: wanted.to_owned(), got })
    }
}

/// The lines of a function's `resource` file: range (if any) and flags.
fn resources(function: &Path) -> Vec<(Option<RangeInclusive<u64>>, u64)> {
    let text = fs::read_to_string(function.join("resource")).unwrap_or_default();
    text.lines()
        .map(|line| {
            let mut numbers = line
                .split_whitespace()
                .map(|n| u64::from_str_radix(n.trim_start_matches("0x"), 16).unwrap_or(0));
            let (start, end, flags) =
                (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
            ((end > start).then_some(start..=end), flags)
        })
        .collect()
}

#[cfg(test)]
#[path = "sysfs_tests.rs"]
mod tests;
