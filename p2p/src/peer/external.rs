//! A device with a driver of its own - a GPU, a NIC, an accelerator - as a peer.
//!
//! Its runtime implements [`ExternalDevice`]: it registers memory that is not its own, either as a dma-buf (what `ibv_reg_dmabuf_mr` and
//! the GPU runtimes' import calls take) or by its address in this process (what `ibv_reg_mr` and `cudaHostRegister` take), and says how
//! its work on such memory is stopped and awaited. [`ExternalPeer`] makes a [`Mapper`] of it for the registry.
//! `examples/external_device.rs` is a complete one.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nvme_driver::controller::Controller;
use nvme_driver::mem::Mapping;
use nvme_driver::pci::DmaAccess;

use super::{Mapper, PeerError};

/// A range of memory as a runtime is told of it.
#[derive(Debug)]
pub enum Import<'a> {
    /// `len` bytes of a dma-buf, from `offset`. The descriptor is the caller's: duplicate it to keep it.
    DmaBuf {
        /// The dma-buf.
        fd: BorrowedFd<'a>,
        /// First byte in it.
        offset: u64,
        /// Length in bytes.
        len: usize,
    },
    /// `len` bytes of `memory` from `offset`, which lie at [`Mapping::as_ptr`] plus `offset` in this process. Keep the `Arc` for as long
    /// as the memory is registered.
    Host {
        /// The memory as mapped here.
        memory: &'a Arc<Mapping>,
        /// First byte in it.
        offset: usize,
        /// Length in bytes.
        len: usize,
    },
}

/// What the runtime of a device must offer for it to be a peer. Errors are texts for people: what failed, and what to do.
///
/// Revocation calls, in this order: [`stop`](Self::stop), [`drained`](Self::drained) until it says so or the grace is over,
/// [`deregister`](Self::deregister), [`is_registered`](Self::is_registered).
pub trait ExternalDevice: Send + fmt::Debug {
    /// The name to use in messages.
    fn name(&self) -> &str;

    /// Whether it takes dma-bufs. They are asked for first: the exporting driver knows who has one, and can take it back.
    fn takes_dma_buf(&self) -> bool;

    /// Whether it takes memory by its address in this process.
    fn takes_host_memory(&self) -> bool;

    /// Lets the device reach the memory, as far as `access` says, and returns where it finds it. Never the same address twice in a
    /// row: a stale one must fault.
    fn register(&mut self, memory: Import<'_>, access: DmaAccess) -> Result<u64, String>;

    /// Takes a registration back. When it returns `Ok`, the device's access there faults: it never lands.
    fn deregister(&mut self, address: u64, len: usize) -> Result<(), String>;

    /// Has it accept no more work on this range.
    fn stop(&mut self, address: u64, len: usize);

    /// Whether no accepted work on this range is left.
    fn drained(&mut self, address: u64, len: usize) -> bool;

    /// Whether any access of the device to this range would still pass.
    fn is_registered(&mut self, address: u64, len: usize) -> bool;

    /// Whether its DMA is coherent with the processors' caches. If not, it gets read access only.
    fn is_coherent(&self) -> bool {
        true
    }
}

/// Where dma-bufs of window memory come from.
pub trait Exporter: Send + fmt::Debug {
    /// A dma-buf that holds `len` bytes of the memory from `offset`, and where in it they begin.
    fn export(&self, memory: &Arc<Mapping>, offset: usize, len: usize) -> Result<(OwnedFd, u64), String>;
}

/// The CMB of a controller, exported by its driver (VFIO, Linux 6.19 and later).
#[derive(Debug)]
pub struct CmbExporter(pub Arc<Controller>);

impl Exporter for CmbExporter {
    fn export(&self, memory: &Arc<Mapping>, offset: usize, len: usize) -> Result<(OwnedFd, u64), String> {
        let cmb = self.0.cmb().cmb().filter(|cmb| Arc::ptr_eq(&cmb.data.memory, memory));
        let cmb = cmb.ok_or_else(|| format!("the memory is not the CMB of {}", self.0.name()))?;
        let start = cmb.bar_offset + offset as u64;
        let fd = self.0.function().export_dma_buf(cmb.bar, start, len as u64).map_err(|e| e.to_string())?;
        Ok((fd, 0))
    }
}

/// Memory of an emulated controller: a memfd, which can be mapped as a dma-buf of a real one cannot.
#[derive(Debug)]
pub struct SharedMemoryExporter;

impl Exporter for SharedMemoryExporter {
    fn export(&self, memory: &Arc<Mapping>, offset: usize, _len: usize) -> Result<(OwnedFd, u64), String> {
        let (fd, start) = memory.fd().ok_or("the memory has no descriptor")?;
        Ok((fd.try_clone_to_owned().map_err(|e| e.to_string())?, start + offset as u64))
    }
}

/// An [`ExternalDevice`] as a [`Mapper`].
#[derive(Debug)]
pub struct ExternalPeer<D> {
    device: D,
    exporter: Option<Box<dyn Exporter>>,
}

impl<D: ExternalDevice> ExternalPeer<D> {
    /// A peer for `device`. With an exporter it is offered dma-bufs, without one host memory only.
    pub fn new(device: D, exporter: Option<Box<dyn Exporter>>) -> Self {
        Self { device, exporter }
    }

    fn register(
        &mut self,
        memory: &Arc<Mapping>,
        offset: usize,
        len: usize,
        access: DmaAccess,
    ) -> Result<u64, String> {
        let mut refused = Vec::new();
        if self.device.takes_dma_buf() {
            let exported = match &self.exporter {
                Some(exporter) => exporter.export(memory, offset, len),
                None => Err("nothing exports the memory".to_owned()),
            };
            let registered = exported.and_then(|(fd, offset)| {
                self.device.register(Import::DmaBuf { fd: fd.as_fd(), offset, len }, access)
            });
            match registered {
                Ok(address) => return Ok(address),
                Err(e) => refused.push(format!("as a dma-buf: {e}")),
            }
        }
        if self.device.takes_host_memory() {
            match self.device.register(Import::Host { memory, offset, len }, access) {
                Ok(address) => return Ok(address),
                Err(e) => refused.push(format!("by its address: {e}")),
            }
        }
        Err(if refused.is_empty() { "it takes no memory of others".to_owned() } else { refused.join("; ") })
    }
}

impl<D: ExternalDevice> Mapper for ExternalPeer<D> {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn map(
        &mut self,
        memory: &Arc<Mapping>,
        _bus_address: u64,
        offset: usize,
        len: usize,
        access: DmaAccess,
    ) -> Result<u64, PeerError> {
        let mapped = self.register(memory, offset, len, access);
        mapped.map_err(|reason| PeerError::Map { peer: self.device.name().to_owned(), len, reason })
    }

    fn unmap(&mut self, iova: u64, len: usize) -> Result<(), PeerError> {
        let done = self.device.deregister(iova, len);
        done.map_err(|reason| PeerError::Unmap { peer: self.device.name().to_owned(), iova, reason })
    }

    fn stop(&mut self, iova: u64, len: usize) {
        self.device.stop(iova, len);
    }

    fn drained(&mut self, iova: u64, len: usize) -> bool {
        self.device.drained(iova, len)
    }

    fn is_mapped(&mut self, iova: u64, len: usize) -> bool {
        self.device.is_registered(iova, len)
    }

    fn is_coherent(&self) -> bool {
        self.device.is_coherent()
    }
}
