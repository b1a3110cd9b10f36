//! `cmbfs mkfs`: makes an empty filesystem.

use std::ffi::OsString;
use std::io::{self, Write};

use clap::Args;
use cmbfs::extent_fs::{BLOCK, ROOT};
use cmbfs::nvme_driver::url::EmulatedBacking;
use cmbfs::{Device, DeviceUrl, FormatOptions, Placement, extent_fs};

use super::device::{self, AnyDisk};
use super::failure::Failure;
use super::units::Bytes;

/// Make an empty filesystem on a device
///
/// Its root directory belongs to whoever runs this: only they, and root, can change the top of it through a server.
/// Refused without --force where anything is: bytes that are no cmbfs filesystem, or a cmbfs filesystem with files.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  cmbfs mkfs 'emu:disk.img?cmb=64M&size=1G'    # creates the image if there is none\n  cmbfs mkfs pci:0000:01:00.0\n  cmbfs mkfs --placement host 'emu:disk.img'    # its files stay out of the CMB"
)]
pub(crate) struct Mkfs {
    /// The device's URL
    device: OsString,
    /// Format whatever is there
    #[arg(long)]
    force: bool,
    /// Where windows may live of files that have no choice of their own: auto, cmb (while there is room) or host (never in the CMB); `cmbfs
    /// placement` changes it
    #[arg(long, value_name = "WHERE")]
    placement: Option<Placement>,
}

impl Mkfs {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let url = device::url(self.device.clone())?;
        let device = device::open(&url)?;
        let made = self.make(&url, &device);
        if made.is_err() && device.is_new() {
            remove_image(&url);
        }
        made
    }

    fn make(&self, url: &DeviceUrl, device: &Device) -> Result<(), Failure> {
        let mut disk = device.disk()?;
        if !self.force
            && let Some(there) = what_is_there(device, &mut disk)?
        {
            return Err(Failure::new(format!("{url} holds {there}"))
                .hint("--force formats it: all that is lost then"));
        }
        let placement = Placement::kept(self.placement);
        cmbfs::format(&mut disk, &FormatOptions { placement, ..FormatOptions::default() })?;
        let fs = device::mount(device)?;
        let (space, uuid) = (fs.statfs(), fs.uuid());
        let free = Bytes(space.free.saturating_sub(space.reserved).saturating_mul(BLOCK));
        writeln!(io::stdout(), "{url}: filesystem {}, {free} free", uuid_text(uuid))?;
        Ok(())
    }
}

/// An image that was made for a filesystem that was refused goes again, and its PMR: a new image's is new.
fn remove_image(url: &DeviceUrl) {
    let DeviceUrl::Emulated(emulated) = url else { return };
    let EmulatedBacking::Image(path) = &emulated.backing else { return };
    for path in [Some(path.clone()), emulated.pmr_file().filter(|_| emulated.pmr != 0)].iter().flatten() {
        if let Err(e) = std::fs::remove_file(path) {
            eprintln!("cmbfs: {} stays behind: {e}", path.display());
        }
    }
}

/// What would be lost, if anything.
fn what_is_there(device: &Device, disk: &mut AnyDisk) -> Result<Option<&'static str>, Failure> {
    if extent_fs::probe(disk)? {
        // One that cannot be mounted may hold files all the same.
        let empty =
            device::mount(device).is_ok_and(|fs| fs.readdir(ROOT).is_ok_and(|names| names.is_empty()));
        return Ok(if empty { None } else { Some("a cmbfs filesystem that is not empty") });
    }
    Ok(if is_blank(disk)? { None } else { Some("data, and no cmbfs filesystem") })
}

/// Whether the disk reads as zeros: all of a small one; of a large one its start, its end and samples between, since
/// whatever keeps data on a disk says so at its start or its end.
fn is_blank(disk: &mut AnyDisk) -> Result<bool, Failure> {
    const READ: u64 = 64 << 10;
    const WHOLE: u64 = 16 << 20;
    const SAMPLES: u64 = 256;
    let (bytes, block) = (disk.geometry().bytes(), u64::from(disk.geometry().block_size));
    let mut buffer = vec![0; READ as usize];
    let mut starts: Vec<u64> = (0..bytes.min(WHOLE)).step_by(READ as usize).collect();
    if bytes > WHOLE {
        starts.extend((1..=SAMPLES).map(|n| (bytes - READ) / SAMPLES * n / block * block));
        starts.push(bytes - READ);
    }
    for start in starts {
        let n = READ.min(bytes - start) as usize;
        disk.read(start / block, &mut buffer[..n])?;
        if buffer[..n].iter().any(|&b| b != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The usual text of a uuid.
pub(crate) fn uuid_text(uuid: [u8; 16]) -> String {
    let hex = uuid.iter().fold(String::new(), |text, b| format!("{text}{b:02x}"));
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
