//! From a URL to a device.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::clock::{Clock, SystemClock};
use crate::controller::{Controller, ControllerError, ControllerOptions};
use crate::disk::Disk;
use crate::emu::{Backing, Config, EmuError, EmulatedController};
use crate::file_disk::{FileDisk, FileDiskError};
use crate::lock::{ImageLock, LockError};
use crate::nvme_disk::NvmeDisk;
use crate::pci::{PciAddress, PciError, PciFunction};
use crate::url::{DEFAULT_SIZE, DeviceUrl, EmulatedBacking, EmulatedUrl};
use crate::vfio::{VfioError, VfioFunction};
use crate::vfio_user::VfioUserFunction;

/// How to open a device.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// How to run its controller.
    pub controller: ControllerOptions,
    /// The clock that deadlines go by.
    pub clock: Arc<dyn Clock>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { controller: ControllerOptions::default(), clock: Arc::new(SystemClock::new()) }
    }
}

/// A device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has the image.
    #[error(transparent)]
    Locked(#[from] LockError),
    /// The image exists and has another size than the URL says.
    #[error("{} has {has} bytes, not {asked}: leave `size` out, or remove the image", path.display())]
    WrongSize {
        /// The image.
        path: PathBuf,
        /// Its size.
        has: u64,
        /// The size in the URL.
        asked: u64,
    },
    /// There is no image, but a PMR by its name: a new drive must not begin with another one's bytes.
    #[error(
        "there is no image {}, but {} is there, the PMR of a drive that was: bring its image back, remove it, or give the new image another name",
        image.display(), pmr.display()
    )]
    StalePmr {
        /// The image that was to be made.
        image: PathBuf,
        /// The file that is in the way.
        pmr: PathBuf,
    },
    /// What is there cannot hold a drive's blocks.
    #[error("{} is neither a regular file nor a block device, and so no image of a drive", path.display())]
    NoImage {
        /// What is there.
        path: PathBuf,
    },
    /// The image could not be opened, created or given its size.
    #[error("cannot {what} {}: {source}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// What was attempted.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The emulated controller could not be made.
    #[error(transparent)]
    Emulated(#[from] EmuError),
    /// The file is no disk.
    #[error(transparent)]
    File(#[from] FileDiskError),
    /// The PCI function could not be opened.
    #[error("{source}")]
    Vfio {
        /// The function.
        address: PciAddress,
        /// What is wrong and what to do.
        source: VfioError,
    },
    /// The controller could not be brought up or used.
    #[error(transparent)]
    Controller(#[from] ControllerError),
    /// There is no vfio-user server, or not a usable one.
    #[error(transparent)]
    VfioUser(PciError),
}

#[derive(Debug)]
enum Kind {
    Nvme {
        controller: Arc<Controller>,
        emulated: Option<Arc<EmulatedController>>,
        lock: Option<Arc<ImageLock>>,
    },
    File(Box<FileDisk>),
}

/// An open device: disks on it, and what is known about it.
#[derive(Debug)]
pub struct Device {
    url: DeviceUrl,
    kind: Kind,
    is_new: bool,
}

/// Opens the device that `url` names: brings its controller up, or locks its file. An `emu:` image that does not exist is
/// created (sparse, zeros).
pub fn open(url: &DeviceUrl, options: &OpenOptions) -> Result<Device, OpenError> {
    let nvme = |function: Arc<dyn PciFunction>, emulated, lock| -> Result<Kind, OpenError> {
        let controller = Controller::new(function, options.controller.clone(), Arc::clone(&options.clock))?;
        // So that an unusable namespace is reported now.
        controller.namespace()?;
        Ok(Kind::Nvme { controller, emulated, lock })
    };
    let mut is_new = false;
    let kind = match url {
        DeviceUrl::Emulated(emulated) => {
            let (EmulatedDrive { controller, lock }, new) = emulated_drive(emulated)?;
            let kind = nvme(controller.function(), Some(controller), lock)?;
            is_new = new.keep();
            kind
        }
        DeviceUrl::File(path) => Kind::File(Box::new(FileDisk::open(path)?)),
        DeviceUrl::Pci(address) => {
            let function = VfioFunction::open(*address);
            nvme(function.map_err(|source| OpenError::Vfio { address: *address, source })?, None, None)?
        }
        DeviceUrl::VfioUser(socket) => {
            nvme(VfioUserFunction::connect(socket).map_err(OpenError::VfioUser)?, None, None)?
        }
    };
    Ok(Device { url: url.clone(), kind, is_new })
}

/// An emulated controller that no driver has taken up.
#[derive(Debug)]
pub struct EmulatedDrive {
    /// The controller.
    pub controller: Arc<EmulatedController>,
    /// What keeps other processes from its image; to be held as long as the controller.
    pub lock: Option<Arc<ImageLock>>,
}

/// Makes the emulated controller that `url` names, without bringing it up: to be served to others. An image that does not
/// exist is created.
pub fn open_emulated(url: &EmulatedUrl) -> Result<EmulatedDrive, OpenError> {
    let (drive, new) = emulated_drive(url)?;
    new.keep();
    Ok(drive)
}

/// Files that were created just now.
struct New {
    image: Option<NewImage>,
    pmr: Option<NewImage>,
}

impl New {
    /// They stay. Says whether the image is one of them.
    fn keep(self) -> bool {
        if let Some(pmr) = self.pmr {
            pmr.keep();
        }
        self.image.map(NewImage::keep).is_some()
    }
}

/// A file that was created just now. It goes again unless it is kept: what refuses to be a drive leaves no file behind.
struct NewImage(Option<PathBuf>);

impl NewImage {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for NewImage {
    fn drop(&mut self) {
        if let Some(path) = &self.0
            && let Err(e) = std::fs::remove_file(path)
            && e.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("{} stays behind: {e}", path.display());
        }
    }
}

fn emulated_drive(url: &EmulatedUrl) -> Result<(EmulatedDrive, New), OpenError> {
    let bytes = url.size.unwrap_or(DEFAULT_SIZE);
    let (mut lock, mut image) = (None, None);
    let namespace = match &url.backing {
        EmulatedBacking::Ram => Backing::Ram { bytes },
        EmulatedBacking::Null => Backing::Null { bytes },
        EmulatedBacking::Image(path) => {
            let (locked, created) = lock_image(path, url.size)?;
            (lock, image) = (Some(Arc::new(locked)), created);
            Backing::File { path: path.clone(), create: None }
        }
    };
    let pmr_file = url.pmr_file();
    if let (Some(image), Some(pmr)) = (&image, &pmr_file)
        && pmr.exists()
    {
        let image = image.0.clone().unwrap_or_default();
        return Err(OpenError::StalePmr { image, pmr: pmr.clone() });
    }
    let pmr_file = pmr_file.filter(|_| url.pmr != 0);
    let pmr = pmr_file.clone().filter(|path| !path.exists()).map(|path| NewImage(Some(path)));
    let new = New { image, pmr };
    let config = Config {
        namespace,
        lba_size: url.lba,
        cmb_size: url.cmb,
        pmr_size: url.pmr,
        pmr_file,
        volatile_cache: url.cache,
        lose_on_kill: url.lossy,
        ..Config::default()
    };
    Ok((EmulatedDrive { controller: EmulatedController::new(&config)?, lock }, new))
}

/// Opens or creates an image and locks it; a new (or empty) one gets its size only under the lock.
fn lock_image(path: &Path, size: Option<u64>) -> Result<(ImageLock, Option<NewImage>), OpenError> {
    let fail = |what| move |source| OpenError::Image { path: path.to_owned(), what, source };
    let mut options = File::options();
    options.read(true).write(true);
    let (file, new) = match options.clone().create_new(true).open(path) {
        Ok(file) => (file, Some(NewImage(Some(path.to_owned())))),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            (options.open(path).map_err(fail("open"))?, None)
        }
        Err(e) => return Err(fail("create")(e)),
    };
    // What has no size cannot be a drive, and would be said to be one that cannot be given any.
    let kind = file.metadata().map_err(fail("look at"))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(OpenError::NoImage { path: path.to_owned() });
    }
    let lock = ImageLock::take(file.try_clone().map_err(fail("open"))?, path)?;
    let end = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0));
    let has = end.map_err(io::Error::from).map_err(fail("find the size of"))?;
    match size {
        _ if has == 0 => file.set_len(size.unwrap_or(DEFAULT_SIZE)).map_err(fail("set the size of"))?,
        Some(asked) if asked != has => {
            return Err(OpenError::WrongSize { path: path.to_owned(), has, asked });
        }
        _ => {}
    }
    Ok((lock, new))
}

impl Device {
    /// A disk on the device, with a queue of its own. May be called more than once.
    pub fn disk(&self) -> Result<Box<dyn Disk>, OpenError> {
        match &self.kind {
            Kind::Nvme { controller, lock, .. } => {
                Ok(Box::new(NvmeDisk::with_lock(controller, lock.clone())?))
            }
            Kind::File(file) => Ok(Box::new(file.again()?)),
        }
    }

    /// Whether opening it created its image.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// The URL it was opened by.
    pub fn url(&self) -> &DeviceUrl {
        &self.url
    }

    /// Its controller: identity, namespaces, CMB, DMA memory. None behind `file:`.
    pub fn controller(&self) -> Option<&Arc<Controller>> {
        match &self.kind {
            Kind::Nvme { controller, .. } => Some(controller),
            Kind::File(_) => None,
        }
    }

    /// The emulated controller behind `emu:`, for its counters, its faults and its IOMMU.
    pub fn emulated(&self) -> Option<&Arc<EmulatedController>> {
        match &self.kind {
            Kind::Nvme { emulated, .. } => emulated.as_ref(),
            Kind::File(_) => None,
        }
    }

    /// Why its DMA memory is not on huge pages, if it is not.
    pub fn dma_fallback(&self) -> Option<&str> {
        self.controller()?.arena().fallback()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open_text(text: &str) -> Result<Device, OpenError> {
        open(&text.parse().unwrap(), &OpenOptions::default())
    }

    #[test]
    fn an_image_is_created_locked_and_keeps_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("emu:{}/disk.img?size=16M&cmb=1M", dir.path().display());
        let device = open_text(&url).unwrap();
        let mut disk = device.disk().unwrap();
        assert_eq!(disk.geometry().bytes(), 16 << 20);
        disk.write(7, &[7; 4096]).unwrap();
        disk.flush().unwrap();
        assert_eq!(device.controller().unwrap().identity().namespaces.len(), 1);
        assert_eq!(device.emulated().unwrap().counters().io_commands[0], 1);
        assert!(matches!(open_text(&url), Err(OpenError::Locked(LockError::Held { .. }))));
        // The disk alone keeps image and controller.
        drop(device);
        assert!(matches!(open_text(&url), Err(OpenError::Locked(_))));
        let mut got = [0; 4096];
        disk.read(7, &mut got).unwrap();
        drop(disk);
        let wrong = url.replace("16M", "32M");
        assert!(matches!(open_text(&wrong), Err(OpenError::WrongSize { has: 0x100_0000, .. })));
        let mut disk = open_text(&url).unwrap().disk().unwrap();
        got = [0; 4096];
        disk.read(7, &mut got).unwrap();
        assert_eq!(got, [7; 4096]);
    }

    #[test]
    fn an_images_pmr_is_kept_beside_it() {
        use crate::pmr::{Health, Pmr};
        let dir = tempfile::tempdir().unwrap();
        let url = format!("emu:{}/disk.img?size=16M&pmr=1M", dir.path().display());
        let kept = dir.path().join("disk.img.pmr");
        {
            let device = open_text(&url).unwrap();
            let pmr = Pmr::enable(device.controller().unwrap()).unwrap();
            assert_eq!((pmr.size(), pmr.health()), (1 << 20, Health::Normal));
            pmr.write(5000, b"kept").unwrap();
            let before = device.emulated().unwrap().counters().pmr_barriers;
            pmr.barrier().unwrap();
            assert_eq!(device.emulated().unwrap().counters().pmr_barriers, before + 1);
        }
        assert_eq!(std::fs::read(&kept).unwrap()[5000..5004], *b"kept");
        let device = open_text(&url).unwrap();
        let pmr = Pmr::enable(device.controller().unwrap()).unwrap();
        let mut got = [0; 4];
        pmr.read(5000, &mut got).unwrap();
        assert_eq!(&got, b"kept");
        drop((pmr, device));
        let other = open_text(&url.replace("pmr=1M", "pmr=2M")).unwrap_err().to_string();
        assert!(other.contains("keeps a PMR of 1048576 bytes"), "{other}");
        // What refuses to be a drive leaves no file behind.
        let refused = format!("emu:{}/new.img?size=1&pmr=1M", dir.path().display());
        assert!(open_text(&refused).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        // Nor does a new drive begin with the PMR of one that is gone, now or when it is first asked for.
        std::fs::remove_file(dir.path().join("disk.img")).unwrap();
        for stale in [url.as_str(), &url.replace("&pmr=1M", "")] {
            let said = open_text(stale).unwrap_err().to_string();
            assert!(said.contains("disk.img.pmr is there"), "{said}");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        }
        assert_eq!(std::fs::read(&kept).unwrap()[5000..5004], *b"kept");
    }

    #[test]
    fn a_file_is_a_disk_without_a_controller() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let device = open_text(&format!("file:{}", path.display())).unwrap();
        assert!(device.controller().is_none() && device.emulated().is_none());
        let mut disk = device.disk().unwrap();
        disk.write(0, &[1; 4096]).unwrap();
        assert!(disk.cmb().is_none());
    }

    #[test]
    fn what_cannot_be_opened_says_why() {
        assert!(matches!(open_text("emu:/no/such/folder/x"), Err(OpenError::Image { .. })));
        assert!(matches!(open_text("emu:/dev/null"), Err(OpenError::NoImage { .. })));
        assert!(matches!(open_text("file:/no/such/file"), Err(OpenError::File(_))));
        assert!(matches!(open_text("pci:ffff:ff:1f.7"), Err(OpenError::Vfio { .. })));
        assert!(matches!(open_text("emu:ram?size=1"), Err(OpenError::Emulated(_))));
    }
}
