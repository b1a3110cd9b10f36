//! Opening a device by its URL, and the filesystem on it.

use std::ffi::OsString;
use std::time::Duration;

use cmbfs::nvme_driver::controller::ControllerOptions;
use cmbfs::nvme_driver::url::{EmulatedBacking, EmulatedUrl};
use cmbfs::{Device, DeviceUrl, Disk, Filesystem, MountOptions, OpenOptions};

use super::failure::{Failure, one_line};
use super::place::text;
use super::waiting;

/// Whatever disk the URL names.
pub(crate) type AnyDisk = Box<dyn Disk>;

/// A DEVICE argument.
pub(crate) fn url(arg: OsString) -> Result<DeviceUrl, Failure> {
    text(arg, "DEVICE")?.parse().map_err(Failure::usage)
}

/// Opens a device. An emulated one is created if it does not exist.
pub(crate) fn open(url: &DeviceUrl) -> Result<Device, Failure> {
    open_with(url, &OpenOptions::default())
}

fn open_with(url: &DeviceUrl, options: &OpenOptions) -> Result<Device, Failure> {
    if !matches!(url, DeviceUrl::VfioUser(_)) {
        return Ok(cmbfs::open(url, options)?);
    }
    // A drive's server that has a client lets the next one wait, and says nothing: so say at once what is waited for.
    let what = format!("waiting for {url}: another client may have it, it takes one at a time");
    Ok(waiting::saying(one_line(&what), || cmbfs::open(url, options))?)
}

/// Opens a device that is to hold something already: a mistyped name creates no image. An image that has no PMR yet gets none
/// either: who only wants the files does without.
pub(crate) fn open_existing(url: &DeviceUrl) -> Result<Device, Failure> {
    open_existing_with(url, &OpenOptions::default())
}

/// Opens a device that is to be a peer of a server's windows, as [`open_existing`]. Its server waits for nobody, and less for this drive
/// than for its own.
pub(crate) fn open_peer(url: &DeviceUrl) -> Result<Device, Failure> {
    let controller = ControllerOptions {
        io_timeout: Duration::from_secs(10),
        admin_timeout: Duration::from_secs(2),
        ..ControllerOptions::default()
    };
    open_existing_with(url, &OpenOptions { controller, ..OpenOptions::default() })
}

fn open_existing_with(url: &DeviceUrl, options: &OpenOptions) -> Result<Device, Failure> {
    if let DeviceUrl::Emulated(emulated) = url
        && let EmulatedBacking::Image(image) = &emulated.backing
        && image.exists()
        && emulated.pmr_file().is_some_and(|pmr| !pmr.exists())
    {
        return must_exist(&DeviceUrl::Emulated(EmulatedUrl { pmr: 0, ..emulated.clone() }), options);
    }
    must_exist(url, options)
}

/// As [`open_existing`], but whoever gets the device may want its PMR, so it is made now if the URL has one.
pub(crate) fn open_to_serve(url: &DeviceUrl) -> Result<Device, Failure> {
    must_exist(url, &OpenOptions::default())
}

fn must_exist(url: &DeviceUrl, options: &OpenOptions) -> Result<Device, Failure> {
    if let DeviceUrl::Emulated(emulated) = url
        && let EmulatedBacking::Image(path) = &emulated.backing
        && !path.exists()
    {
        return Err(Failure::new(format!("there is no image {}", path.display()))
            .hint(format!("make it, and a filesystem on it, with: cmbfs mkfs '{url}'")));
    }
    open_with(url, options)
}

/// Whether two URLs name one device: it can be opened once only.
pub(crate) fn is_same(a: &DeviceUrl, b: &DeviceUrl) -> bool {
    let file = |url: &DeviceUrl| match url {
        DeviceUrl::Emulated(emulated) => match &emulated.backing {
            EmulatedBacking::Image(path) => path.canonicalize().ok(),
            EmulatedBacking::Ram | EmulatedBacking::Null => None,
        },
        DeviceUrl::File(path) | DeviceUrl::VfioUser(path) => path.canonicalize().ok(),
        DeviceUrl::Pci(_) => None,
    };
    match (a, b) {
        (DeviceUrl::Pci(a), DeviceUrl::Pci(b)) => a == b,
        (a, b) => file(a).is_some_and(|path| Some(path) == file(b)),
    }
}

/// Takes up the filesystem on a device.
pub(crate) fn mount(device: &Device) -> Result<Filesystem<AnyDisk>, Failure> {
    Ok(Filesystem::mount(device.disk()?, MountOptions::default())?)
}
