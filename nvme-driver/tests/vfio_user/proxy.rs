//! Between our client and a server: what the client sends is passed on and written down, and checked against what targets that nobody
//! here wrote insist on.
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nvme_driver::disk::Disk;
use nvme_driver::emu::{Config, EmulatedController};
use nvme_driver::mem::Mapping;
use nvme_driver::pci::{Bar, DmaAccess, PciError, PciFunction};
use nvme_driver::url::DeviceUrl;
use nvme_driver::vfio_user::command;
use nvme_driver::{OpenOptions, open};

use crate::raw::{Client, Served, config, u32_at, u64_at};

/// Command, body, number of descriptors.
type Sent = (u16, Vec<u8>, usize);

struct Proxy {
    path: PathBuf,
    sent: Arc<Mutex<Vec<Sent>>>,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Proxy {
    /// Passes one client on to the server at `to`.
    fn new(to: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("proxy");
        let listener = UnixListener::bind(&path).unwrap();
        let (to, sent) = (to.to_owned(), Arc::new(Mutex::new(Vec::new())));
        let log = Arc::clone(&sent);
        let thread = std::thread::spawn(move || {
            let mut client = Client::over(listener.accept().unwrap().0);
            let mut server = Client::open(&to);
            while let Some((header, body, fds)) = client.receive_any() {
                log.lock().unwrap().push((header.command, body.clone(), fds.len()));
                server.send(header, &body, &fds.iter().collect::<Vec<_>>());
                let (header, body, fds) = server.receive_any().unwrap();
                client.send(header, &body, &fds.iter().collect::<Vec<_>>());
            }
        });
        Self { path, sent, thread: Some(thread), _dir: dir }
    }

    /// What the client sent, once it has gone.
    fn finish(mut self) -> Vec<Sent> {
        self.thread.take().unwrap().join().unwrap();
        std::mem::take(&mut *self.sent.lock().unwrap())
    }
}

/// The driver writes and reads through a connection to `to`; what it sent.
fn drive(to: &Path, cmb: bool) -> Vec<Sent> {
    let proxy = Proxy::new(to);
    let device = open(&DeviceUrl::VfioUser(proxy.path.clone()), &OpenOptions::default()).unwrap();
    let mut disk = device.disk().unwrap();
    let bytes: Vec<u8> = (0..3u32 << 20).map(|i| (i / 512 + i) as u8).collect();
    disk.write(0, &bytes).unwrap();
    disk.flush().unwrap();
    let mut back = vec![0; bytes.len()];
    disk.read(0, &mut back).unwrap();
    assert!(back == bytes);
    assert_eq!(disk.cmb().is_some(), cmb);
    drop((disk, device));
    proxy.finish()
}

/// Accesses to registers are aligned and of 4 or 8 bytes, to config space of 1, 2 or 4: (region, offset, count, write).
fn accesses(sent: &[Sent]) -> Vec<(u32, u64, u32, bool)> {
    let accesses = sent.iter().filter(|(c, _, _)| matches!(*c, command::REGION_READ | command::REGION_WRITE));
    accesses
        .map(|(c, body, _)| {
            let (offset, region, count) = (u64_at(body, 0), u32_at(body, 8), u32_at(body, 12));
            let widths: &[u32] = if region == 7 { &[1, 2, 4] } else { &[4, 8] };
            assert!(widths.contains(&count) && offset.is_multiple_of(count.into()), "{offset:#x} {count}");
            assert!(region == 7 || region == 0, "region {region}");
            (region, offset, count, *c == command::REGION_WRITE)
        })
        .collect()
}

#[test]
fn the_driver_speaks_by_the_book() {
    let served = Served::new();
    let sent = drive(&served.path, true);
    let accesses = accesses(&sent);
    assert!(accesses.contains(&(0, 0x14, 4, true)), "CC is written by message");
    assert!(
        accesses.iter().all(|(region, offset, ..)| *region == 7 || *offset < 0x1000),
        "doorbells are mapped"
    );
    let maps: Vec<_> = sent.iter().filter(|(c, ..)| *c == command::DMA_MAP).collect();
    assert!(!maps.is_empty());
    for (_, body, fds) in maps {
        let (flags, offset) = (u32_at(body, 4), u64_at(body, 8));
        assert_eq!((body.len(), u32_at(body, 0), flags, offset, *fds), (32, 32, 3, 0, 1));
        for number in [u64_at(body, 16), u64_at(body, 24)] {
            assert!(number > 0 && number.is_multiple_of(2 << 20), "{number:#x} is no multiple of 2 MiB");
        }
    }
    assert_eq!(served.controller.counters().iommu_faults, 0);
}

/// A function of which nothing can be mapped.
#[derive(Debug)]
struct Bare(Arc<dyn PciFunction>);

impl PciFunction for Bare {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn config_read(&self, offset: u16, size: u8) -> Result<u32, PciError> {
        self.0.config_read(offset, size)
    }
    fn config_write(&self, offset: u16, size: u8, value: u32) -> Result<(), PciError> {
        self.0.config_write(offset, size, value)
    }
    fn bar(&self, index: u8) -> Result<Bar, PciError> {
        self.0.bar(index)
    }
    fn read32(&self, bar: u8, offset: u64) -> Result<u32, PciError> {
        self.0.read32(bar, offset)
    }
    fn write32(&self, bar: u8, offset: u64, value: u32) -> Result<(), PciError> {
        self.0.write32(bar, offset, value)
    }
    fn read64(&self, bar: u8, offset: u64) -> Result<u64, PciError> {
        self.0.read64(bar, offset)
    }
    fn write64(&self, bar: u8, offset: u64, value: u64) -> Result<(), PciError> {
        self.0.write64(bar, offset, value)
    }
    fn map_bar(&self, _index: u8, _offset: u64, _len: u64) -> Result<Option<Arc<Mapping>>, PciError> {
        Ok(None)
    }
    fn iova_ranges(&self) -> Vec<std::ops::RangeInclusive<u64>> {
        self.0.iova_ranges()
    }
    fn dma_map(
        &self,
        memory: &Arc<Mapping>,
        offset: usize,
        len: usize,
        iova: u64,
        access: DmaAccess,
    ) -> Result<(), PciError> {
        self.0.dma_map(memory, offset, len, iova, access)
    }
    fn dma_unmap(&self, iova: u64, len: usize) -> Result<(), PciError> {
        self.0.dma_unmap(iova, len)
    }
    fn reset(&self) -> Result<(), PciError> {
        self.0.reset()
    }
    fn set_bus_master(&self, on: bool) -> Result<(), PciError> {
        self.0.set_bus_master(on)
    }
    fn set_interrupts(&self, eventfds: &[OwnedFd]) -> Result<(), PciError> {
        self.0.set_interrupts(eventfds)
    }
    fn bars_are_device_memory(&self) -> bool {
        self.0.bars_are_device_memory()
    }
    fn step(&self) -> bool {
        self.0.step()
    }
    fn needs_step(&self) -> bool {
        self.0.needs_step()
    }
}

/// Without a CMB and without anything that can be mapped: doorbells are four-byte writes.
#[test]
fn a_target_that_maps_nothing_and_has_no_cmb_works() {
    let controller = EmulatedController::new(&Config { cmb_size: 0, ..config() }).unwrap();
    let served = Served::over(Arc::new(Bare(controller.function())), controller);
    let accesses = accesses(&drive(&served.path, false));
    let doorbells: Vec<_> =
        accesses.iter().filter(|(region, offset, ..)| *region == 0 && *offset >= 0x1000).collect();
    assert!(doorbells.len() > 10 && doorbells.iter().all(|(.., count, write)| (*count, *write) == (4, true)));
}

/// A CMB that can be enabled but not mapped is none, and the driver goes on without it.
#[test]
fn a_cmb_that_cannot_be_mapped_is_not_used() {
    let controller = EmulatedController::new(&config()).unwrap();
    let served = Served::over(Arc::new(Bare(controller.function())), controller);
    drive(&served.path, false);
}
