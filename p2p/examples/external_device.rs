//! A device with a runtime of its own as a peer: what a GPU's or a NIC's integration looks like, with the emulated DMA engine as the device.
//!
//! Run it with `cargo run -p p2p --example external_device`; `tests/external_peer.rs` runs it too.

use std::error::Error;
use std::sync::Arc;

use nvme_driver::disk::CmbMemory;
use nvme_driver::mem::{Access, Mapping};
use nvme_driver::pci::DmaAccess;
use p2p::backing::{Backing, BackingError};
use p2p::peer::{EmulatedEngine, ExternalDevice, ExternalPeer, Import, Mapper, SharedMemoryExporter};
use p2p::windows::{Config, ObjectOptions, PeerPath, Placement, Progress, Scope, Windows};

const WINDOW: usize = 64 * 1024;

/// The runtime of the device. A real one calls its driver where this one calls the engine.
#[derive(Clone, Debug)]
pub(crate) struct Accelerator {
    engine: EmulatedEngine,
    dma_bufs: bool,
    host_memory: bool,
}

impl Accelerator {
    /// With 64 KiB of memory of its own, and what kinds of memory it takes.
    pub(crate) fn new(dma_bufs: bool, host_memory: bool) -> Result<Self, Box<dyn Error>> {
        Ok(Self { engine: EmulatedEngine::new("accelerator", WINDOW)?, dma_bufs, host_memory })
    }

    /// The device itself: work is queued and done there.
    pub(crate) fn engine(&self) -> &EmulatedEngine {
        &self.engine
    }
}

impl ExternalDevice for Accelerator {
    fn name(&self) -> &str {
        "accelerator"
    }

    fn takes_dma_buf(&self) -> bool {
        self.dma_bufs
    }

    fn takes_host_memory(&self) -> bool {
        self.host_memory
    }

    fn register(&mut self, memory: Import<'_>, access: DmaAccess) -> Result<u64, String> {
        // Both ways end at memory that the device's IOMMU is told of. With a GPU: import the dma-buf, or register `as_ptr() + offset`.
        let (memory, offset, len) = match memory {
            Import::DmaBuf { fd, offset, len } => {
                let fd = fd.try_clone_to_owned().map_err(|e| e.to_string())?;
                let ours = Mapping::from_fd(fd, offset, len, Access::ReadWrite).map_err(|e| e.to_string())?;
                (ours, 0, len)
            }
            Import::Host { memory, offset, len } => (Arc::clone(memory), offset, len),
        };
        self.engine.map(&memory, 0, offset, len, access).map_err(|e| e.to_string())
    }

    fn deregister(&mut self, address: u64, len: usize) -> Result<(), String> {
        self.engine.unmap(address, len).map_err(|e| e.to_string())
    }

    fn stop(&mut self, address: u64, len: usize) {
        self.engine.stop(address, len);
    }

    fn drained(&mut self, address: u64, len: usize) -> bool {
        self.engine.drained(address, len)
    }

    fn is_registered(&mut self, address: u64, len: usize) -> bool {
        self.engine.is_mapped(address, len)
    }
}

/// Where the windows' bytes come from: here a drive that holds one letter. With files that is the filesystem's part.
struct Letters(Arc<Mapping>);

impl Backing for Letters {
    fn read_to_cmb(&mut self, _: u64, _: u64, cmb_offset: usize, len: usize) -> Result<(), BackingError> {
        let write = self.0.write(cmb_offset, &vec![b'a'; len]);
        write.map_err(|e| BackingError::Failed { what: "a fill".to_owned(), source: Box::new(e) })
    }
    fn read_to_host(&mut self, _: u64, _: u64, into: &mut [u8]) -> Result<(), BackingError> {
        into.fill(b'a');
        Ok(())
    }
    fn write_from_cmb(&mut self, _: u64, _: u64, _: usize, _: usize) -> Result<(), BackingError> {
        Ok(())
    }
    fn write_from_host(&mut self, _: u64, _: u64, _: &[u8]) -> Result<(), BackingError> {
        Ok(())
    }
}

/// The whole story for one device: register, map, DMA, revoke, fault.
pub(crate) fn run(accelerator: &Accelerator) -> Result<(), Box<dyn Error>> {
    // The CMB: a controller's `cmb()`, in real life.
    let cmb = Mapping::memfd("cmb", 4 * WINDOW)?;
    let memory = CmbMemory {
        memory: Arc::clone(&cmb),
        bus_address: 0x1000_0000,
        is_device_memory: false,
        read_data: true,
        write_data: true,
    };
    let mut drive = Letters(cmb);
    let mut windows = Windows::new(Some(memory), Config::default())?;
    let options = ObjectOptions { window_size: WINDOW, placement: Placement::CmbOnly };
    windows.add_object(1, options)?;
    let (client, _region) = windows.attach()?;
    let window = windows.hold(client, 1, 0, true)?.handle.index;

    let peer = windows.register_peer(Box::new(ExternalPeer::new(
        accelerator.clone(),
        Some(Box::new(SharedMemoryExporter)), // `CmbExporter` for a real drive's CMB
    )));
    let mapping = match windows.map_peer(peer, window, true, &mut drive, 0)? {
        PeerPath::Direct(mapping) => mapping,
        PeerPath::Bounce(why) => return Err(format!("through host memory: {why}").into()),
        PeerPath::Moving => return Err("nothing moves here".into()),
    };
    // The device works on the window: in and out, without the processor.
    let device = accelerator.engine();
    device.copy(mapping.iova, 0, mapping.len, false)?;
    let mut first = [0; 5];
    device.local().read(0, &mut first)?;
    println!("the device read {:?} from the window", String::from_utf8_lossy(&first));
    device.copy(mapping.iova, 0, 4096, true)?;

    // Taken back: stopped, drained, deregistered, verified. After that its DMA faults.
    let ticket = windows.revoke(&Scope::Peer(peer), &mut drive, 0)?;
    if !matches!(windows.progress(ticket), Some(Progress::Done(report)) if report.failed.is_empty()) {
        return Err("the device was idle, so nothing has to be waited for".into());
    }
    match device.copy(mapping.iova, 0, 8, false) {
        Err(e) => println!("after the revocation: {e}"),
        Ok(()) => return Err("a revoked device's DMA went through".into()),
    }
    windows.unregister_peer(peer, 0)?;
    Ok(())
}

/// One device that imports dma-bufs, and one that wants an address.
pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    run(&Accelerator::new(true, false)?)?;
    run(&Accelerator::new(false, true)?)
}
