//! Opening a device by its URL, and the filesystem on it.

use std::ffi::OsString;

use cmbfs::nvme_driver::url::EmulatedBacking;
use cmbfs::{Device, DeviceUrl, Disk, Filesystem, MountOptions, OpenOptions};

use super::failure::Failure;
use super::place::text;

/// Whatever disk the URL names.
pub(crate) type AnyDisk = Box<dyn Disk>;

/// A DEVICE argument.
pub(crate) fn url(arg: OsString) -> Result<DeviceUrl, Failure> {
    text(arg, "DEVICE")?.parse().map_err(Failure::usage)
}

/// Opens a device. An emulated one is created if it does not exist.
pub(crate) fn open(url: &DeviceUrl) -> Result<Device, Failure> {
    Ok(cmbfs::open(url, &OpenOptions::default())?)
}

/// Opens a device that is to hold something already: a mistyped name creates no image.
pub(crate) fn open_existing(url: &DeviceUrl) -> Result<Device, Failure> {
    if let DeviceUrl::Emulated(emulated) = url
        && let EmulatedBacking::Image(path) = &emulated.backing
        && !path.exists()
    {
        return Err(Failure::new(format!("there is no image {}", path.display()))
            .hint(format!("make it, and a filesystem on it, with: cmbfs mkfs '{url}'")));
    }
    open(url)
}

/// Takes up the filesystem on a device.
pub(crate) fn mount(device: &Device) -> Result<Filesystem<AnyDisk>, Failure> {
    Ok(Filesystem::mount(device.disk()?, MountOptions::default())?)
}
