//! A PCI function that another process serves.
//!
//! The `vfio_user` crate has a client. It is not used here (the server's tests use it, as a client that we did not write): it ignores
//! error replies, and waits forever for the rest of a reply that is shorter because it reports an error; it panics on a version
//! reply without data and on a region description whose sizes disagree; it allocates whatever a reply's size says; its
//! `resettable` is inverted. None of that can be mended from outside, since its socket is private.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals, fstat};
use rustix::io::Errno;

use super::connection::{CallError, Connection};
use super::protocol::{Fields, Put, command};
use crate::mem::{Mapping, PAGE};
use crate::pci::{Bar, DmaAccess, PciError, PciFunction};
use crate::socket_path;

pub(super) const CONFIG: u32 = 7;
const PCI_COMMAND: u16 = 4;
const BUS_MASTER: u32 = 1 << 2;
const MSIX: u32 = 2;
const IRQ_DATA_NONE: u32 = 1;
const IRQ_DATA_EVENTFD: u32 = 1 << 2;
const IRQ_TRIGGER: u32 = 1 << 5;
const DEVICE_RESET: u32 = 1;
const DEVICE_PCI: u32 = 2;
const REGION_MMAP: u32 = 4;
const REGION_CAPS: u32 = 8;
const CAP_SPARSE_MMAP: u16 = 1;
/// Bytes of `struct vfio_region_info`.
const INFO: usize = 32;
/// The longest description of a region that is asked for.
const MAX_INFO: u32 = 64 * 1024;
/// A served function has no IOMMU that would name its ranges. 47 bits fit every target; page 0, x86's interrupt window and the
/// addresses of BARs (`bars`) stay free.
const IOVA: [RangeInclusive<u64>; 2] = [0x1_0000..=0xdfff_ffff, 0x1_0000_0000..=(1 << 47) - 1];

#[derive(Debug, Default)]
struct Region {
    size: u64,
    /// What its mappable areas are mapped from.
    file: Option<OwnedFd>,
    file_offset: u64,
    /// Start and length of what can be mapped.
    areas: Vec<(u64, u64)>,
}

struct Mapped {
    len: usize,
    _memory: Arc<Mapping>,
}

/// A PCI function that another process serves over vfio-user.
pub struct VfioUserFunction {
    name: String,
    connection: Mutex<Connection>,
    regions: Vec<Region>,
    resettable: bool,
    dma: Mutex<BTreeMap<u64, Mapped>>,
}

impl fmt::Debug for VfioUserFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioUserFunction").field("name", &self.name).finish_non_exhaustive()
    }
}

impl VfioUserFunction {
    /// Connects to the server that listens on `socket`.
    pub fn connect(socket: &Path) -> Result<Arc<dyn PciFunction>, PciError> {
        let name = format!("vfio-user:{}", socket.display());
        let fail = |what: &'static str| {
            let name = name.clone();
            move |e| call_error(&name, what, e)
        };
        let mut connection = Connection::open(socket).map_err(|e| match e {
            CallError::Refused(e) | CallError::Gone(e) => PciError::Io {
                what: format!("cannot connect to {name}{}", why_not(socket, e)),
                source: e.into(),
            },
        })?;
        let mut ask = Vec::new();
        [16u32, 0, 0, 0].into_iter().for_each(|word| ask.put_u32(word));
        let (info, _) =
            connection.call(command::DEVICE_GET_INFO, &ask, &[]).map_err(fail("describe the device"))?;
        let broken = |_| PciError::Unsupported {
            function: name.clone(),
            what: "a description of the device that makes sense",
        };
        let mut fields = Fields(&info);
        let mut word = || fields.u32();
        let (_, flags, count) = (word().map_err(broken)?, word().map_err(broken)?, word().map_err(broken)?);
        if flags & DEVICE_PCI == 0 || count <= CONFIG {
            return Err(PciError::Unsupported { function: name, what: "being a PCI function" });
        }
        let trusted = connection.is_trusted();
        let regions = (0..=CONFIG)
            .map(|index| region(&mut connection, index, trusted).map_err(fail("describe a region")))
            .collect::<Result<_, _>>()?;
        let function = Self {
            name,
            connection: Mutex::new(connection),
            regions,
            resettable: flags & DEVICE_RESET != 0,
            dma: Mutex::new(BTreeMap::new()),
        };
        function.place_bars()?;
        Ok(Arc::new(function))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Size of a BAR in bytes; 0: there is none.
    pub(super) fn bar_size(&self, index: u8) -> u64 {
        self.regions.get(usize::from(index)).map_or(0, |region| region.size)
    }

    fn outside(&self, what: &'static str, offset: u64) -> PciError {
        PciError::OutOfRange { function: self.name.clone(), what, offset }
    }

    fn region(&self, index: u32, offset: u64, len: u64) -> Result<&Region, PciError> {
        let inside = |r: &&Region| offset.checked_add(len).is_some_and(|end| end <= r.size);
        let what = if index == CONFIG { "config space" } else { "a BAR" };
        self.regions.get(index as usize).filter(inside).ok_or_else(|| self.outside(what, offset))
    }

    fn access(&self, index: u32, offset: u64, len: u32) -> Result<Vec<u8>, PciError> {
        if !offset.is_multiple_of(len.into()) {
            return Err(self.outside("a misaligned register", offset));
        }
        self.region(index, offset, len.into())?;
        let mut body = Vec::with_capacity(16 + len as usize);
        body.put_u64(offset);
        body.put_u32(index);
        body.put_u32(len);
        Ok(body)
    }

    fn read<const N: usize>(&self, index: u32, offset: u64) -> Result<[u8; N], PciError> {
        let body = self.access(index, offset, N as u32)?;
        let (reply, _) = self
            .lock()
            .call(command::REGION_READ, &body, &[])
            .map_err(|e| call_error(&self.name, "read a register", e))?;
        // The server repeats what was asked for, then the data.
        let data = reply.strip_prefix(&body[..]).and_then(|data| <[u8; N]>::try_from(data).ok());
        data.ok_or_else(|| call_error(&self.name, "read a register", CallError::Refused(Errno::PROTO)))
    }

    fn write(&self, index: u32, offset: u64, data: &[u8]) -> Result<(), PciError> {
        let mut body = self.access(index, offset, data.len() as u32)?;
        body.extend_from_slice(data);
        self.call(command::REGION_WRITE, &body, "write a register")
    }

    fn call(&self, command: u16, body: &[u8], what: &str) -> Result<(), PciError> {
        self.lock().call(command, body, &[]).map(|_| ()).map_err(|e| call_error(&self.name, what, e))
    }

    fn set_irqs(&self, flags: u32, start: usize, fds: &[OwnedFd]) -> Result<(), PciError> {
        let mut body = Vec::with_capacity(20);
        for word in [20, flags | IRQ_TRIGGER, MSIX, start as u32, fds.len() as u32] {
            body.put_u32(word);
        }
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let answer = self.lock().call(command::DEVICE_SET_IRQS, &body, &fds);
        answer.map(|_| ()).map_err(|e| call_error(&self.name, "set up interrupts", e))
    }
}

pub(super) fn call_error(name: &str, what: &str, e: CallError) -> PciError {
    match e {
        CallError::Gone(Errno::PIPE | Errno::CONNRESET) | CallError::Refused(Errno::NODEV) => {
            PciError::Removed(name.to_owned())
        }
        CallError::Gone(Errno::AGAIN) => PciError::Io {
            what: format!("{name} does not answer (to {what})"),
            source: Errno::TIMEDOUT.into(),
        },
        CallError::Gone(e) | CallError::Refused(e) => {
            PciError::Io { what: format!("{name}: cannot {what}"), source: e.into() }
        }
    }
}

/// What to do about a connection that did not come about, where the system's answer does not tell.
fn why_not(socket: &Path, e: Errno) -> String {
    let why = match e {
        Errno::AGAIN => "its server does not answer: it may have a client already, and has one at a time",
        Errno::PROTOTYPE => "that is another kind of socket, not a vfio-user server's",
        e => {
            let why = socket_path::why_refused(socket, &e.into(), "its server, say `cmbfs emulate`,");
            let more = match socket_path::what_else(socket) {
                Some(socket_path::PLAIN_FILE) => "; a drive's image is opened as emu:PATH",
                Some(socket_path::DIRECTORY) if socket.join("cntrl").exists() => {
                    "; the one in it is PATH/cntrl"
                }
                _ => "",
            };
            return why.map_or(String::new(), |why| format!(" ({why}{more})"));
        }
    };
    format!(" ({why})")
}

/// Asks for a region: once for its size, once more if it has capabilities.
fn region(connection: &mut Connection, index: u32, trusted: bool) -> Result<Region, CallError> {
    let mut argsz = INFO as u32;
    loop {
        let mut ask = Vec::with_capacity(INFO);
        [argsz, 0, index, 0].into_iter().for_each(|word| ask.put_u32(word));
        ask.resize(INFO, 0);
        let (info, fds) = connection.call(command::DEVICE_GET_REGION_INFO, &ask, &[])?;
        let wanted = Fields(&info).u32().map_err(CallError::Refused)?;
        if wanted > argsz && wanted <= MAX_INFO && argsz == INFO as u32 {
            argsz = wanted;
            continue;
        }
        return described(&info, fds, trusted).map_err(CallError::Refused);
    }
}

fn described(info: &[u8], fds: Vec<OwnedFd>, trusted: bool) -> Result<Region, Errno> {
    let mut fields = Fields(info);
    let (_, flags, _, caps) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
    let (size, file_offset) = (fields.u64()?, fields.u64()?);
    let file = fds.into_iter().next();
    let mut region = Region { size, file_offset, ..Region::default() };
    let Some(file) = file.filter(|file| flags & REGION_MMAP != 0 && cannot_shrink(file, trusted)) else {
        return Ok(region);
    };
    region.areas = match flags & REGION_CAPS {
        0 => vec![(0, size)],
        _ => sparse_areas(info, caps as usize)?.unwrap_or_else(|| vec![(0, size)]),
    };
    // A page beyond the end of the file would be a SIGBUS.
    let end = u64::try_from(fstat(&file)?.st_size).unwrap_or(0);
    region.areas.retain(|(start, len)| {
        let last = start.checked_add(*len).filter(|last| *last <= size);
        last.and_then(|last| last.checked_add(file_offset)).is_some_and(|last| last <= end)
    });
    region.file = Some(file);
    Ok(region)
}

/// Whether the server cannot take mapped pages away under us; or is trusted not to.
fn cannot_shrink(file: &OwnedFd, trusted: bool) -> bool {
    fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
        || fcntl_add_seals(file, SealFlags::SHRINK).is_ok()
        || trusted
}

/// The areas of the sparse-mmap capability in a region's description; `None` without one.
fn sparse_areas(info: &[u8], mut at: usize) -> Result<Option<Vec<(u64, u64)>>, Errno> {
    while at != 0 {
        let mut fields = Fields(info.get(at..).ok_or(Errno::PROTO)?);
        let (id, _, next) = (fields.u16()?, fields.u16()?, fields.u32()? as usize);
        if id == CAP_SPARSE_MMAP {
            let (count, _) = (fields.u32()?, fields.u32()?);
            return (0..count)
                .map(|_| Ok((fields.u64()?, fields.u64()?)))
                .collect::<Result<_, _>>()
                .map(Some);
        }
        // Chains go forward, so they end.
        if next != 0 && next <= at {
            return Err(Errno::PROTO);
        }
        at = next;
    }
    Ok(None)
}

impl PciFunction for VfioUserFunction {
    fn name(&self) -> &str {
        &self.name
    }

    fn config_read(&self, offset: u16, size: u8) -> Result<u32, PciError> {
        Ok(match size {
            1 => u32::from(u8::from_le_bytes(self.read(CONFIG, offset.into())?)),
            2 => u32::from(u16::from_le_bytes(self.read(CONFIG, offset.into())?)),
            4 => u32::from_le_bytes(self.read(CONFIG, offset.into())?),
            _ => return Err(self.outside("config space", offset.into())),
        })
    }

    fn is_gone(&self) -> bool {
        // A call that is under way finds out by itself.
        self.connection.try_lock().is_ok_and(|connection| connection.is_over())
    }

    fn config_write(&self, offset: u16, size: u8, value: u32) -> Result<(), PciError> {
        match (size, value.to_le_bytes()) {
            (1, [a, ..]) => self.write(CONFIG, offset.into(), &[a]),
            (2, [a, b, ..]) => self.write(CONFIG, offset.into(), &[a, b]),
            (4, bytes) => self.write(CONFIG, offset.into(), &bytes),
            _ => Err(self.outside("config space", offset.into())),
        }
    }

    fn bar(&self, index: u8) -> Result<Bar, PciError> {
        let region = self.regions.get(usize::from(index)).filter(|_| index < 6);
        let region = region.ok_or_else(|| self.outside("BARs", index.into()))?;
        let low = self.config_read(0x10 + 4 * u16::from(index), 4)?;
        let memory = low & 1 == 0;
        Ok(Bar {
            size: region.size,
            is_64bit: memory && (low >> 1) & 3 == 2,
            prefetchable: memory && low & 8 != 0,
            bus_address: None,
        })
    }

    fn read32(&self, bar: u8, offset: u64) -> Result<u32, PciError> {
        Ok(u32::from_le_bytes(self.read(bar.min(6).into(), offset)?))
    }

    fn write32(&self, bar: u8, offset: u64, value: u32) -> Result<(), PciError> {
        self.write(bar.min(6).into(), offset, &value.to_le_bytes())
    }

    fn read64(&self, bar: u8, offset: u64) -> Result<u64, PciError> {
        Ok(u64::from_le_bytes(self.read(bar.min(6).into(), offset)?))
    }

    fn write64(&self, bar: u8, offset: u64, value: u64) -> Result<(), PciError> {
        self.write(bar.min(6).into(), offset, &value.to_le_bytes())
    }

    fn map_bar(&self, index: u8, offset: u64, len: u64) -> Result<Option<Arc<Mapping>>, PciError> {
        let region = self.region(index.min(6).into(), offset, len)?;
        let page = PAGE as u64;
        let (Some(end), Ok(size)) = (offset.checked_add(len), usize::try_from(len)) else {
            return Err(self.outside("a BAR", offset));
        };
        if len == 0 || !offset.is_multiple_of(page) || !len.is_multiple_of(page) {
            return Err(self.outside("a BAR", offset));
        }
        let inside = |(start, len): &(u64, u64)| *start <= offset && end <= start.saturating_add(*len);
        let (Some(file), Some(at)) = (&region.file, region.file_offset.checked_add(offset)) else {
            return Ok(None);
        };
        if !region.areas.iter().any(inside) {
            return Ok(None);
        }
        let fail = |source| PciError::Io { what: format!("cannot map a BAR of {}", self.name), source };
        let file = file.try_clone().map_err(fail)?;
        Ok(Some(Mapping::of_device(file, at, size).map_err(|e| fail(e.source))?))
    }

    fn iova_ranges(&self) -> Vec<RangeInclusive<u64>> {
        IOVA.to_vec()
    }

    fn dma_map(
        &self,
        memory: &Arc<Mapping>,
        offset: usize,
        len: usize,
        iova: u64,
        access: DmaAccess,
    ) -> Result<(), PciError> {
        crate::pci::check_dma_range(memory, offset, len, iova)?;
        let fail =
            |reason: String| PciError::DmaMap { function: self.name.clone(), iova, len: len as u64, reason };
        let Some((fd, start)) = memory.fd() else {
            return Err(fail(
                "the memory has no file descriptor, so the server's process cannot map it".to_owned(),
            ));
        };
        let mut body = Vec::with_capacity(32);
        body.put_u32(32);
        body.put_u32(u32::from(access.readable()) | u32::from(access.writable()) << 1);
        body.put_u64(start + offset as u64);
        body.put_u64(iova);
        body.put_u64(len as u64);
        let mut dma = self.dma.lock().unwrap_or_else(PoisonError::into_inner);
        self.lock().call(command::DMA_MAP, &body, &[fd]).map_err(|e| match e {
            CallError::Refused(e) => fail(format!("the server refused: {e}")),
            CallError::Gone(_) => call_error(&self.name, "map DMA memory", e),
        })?;
        dma.insert(iova, Mapped { len, _memory: Arc::clone(memory) });
        Ok(())
    }

    fn dma_unmap(&self, iova: u64, len: usize) -> Result<(), PciError> {
        let fail = |reason: String| PciError::DmaUnmap {
            function: self.name.clone(),
            iova,
            len: len as u64,
            reason,
        };
        let mut dma = self.dma.lock().unwrap_or_else(PoisonError::into_inner);
        if dma.get(&iova).is_none_or(|mapped| mapped.len != len) {
            return Err(fail("no mapping starts there with that length".to_owned()));
        }
        let mut body = Vec::with_capacity(24);
        body.put_u32(24);
        body.put_u32(0);
        body.put_u64(iova);
        body.put_u64(len as u64);
        // The reply says that no DMA is under way any more. A server that is gone has unmapped nothing that we could know of: the
        // memory is kept, in case its process still runs.
        self.lock().call(command::DMA_UNMAP, &body, &[]).map_err(|e| match e {
            CallError::Refused(e) => fail(format!("the server refused: {e}")),
            CallError::Gone(_) => call_error(&self.name, "unmap DMA memory", e),
        })?;
        dma.remove(&iova);
        Ok(())
    }

    /// What the server was told to map and has not said that it unmapped.
    fn dma_reaches(&self, iova: u64, len: usize) -> bool {
        let end = iova.saturating_add(len as u64);
        let dma = self.dma.lock().unwrap_or_else(PoisonError::into_inner);
        dma.range(..end)
            .next_back()
            .is_some_and(|(start, mapped)| start.saturating_add(mapped.len as u64) > iova)
    }

    fn reset(&self) -> Result<(), PciError> {
        if !self.resettable {
            return Err(PciError::Unsupported { function: self.name.clone(), what: "reset" });
        }
        self.call(command::DEVICE_RESET, &[], "reset")?;
        self.place_bars()
    }

    fn set_bus_master(&self, on: bool) -> Result<(), PciError> {
        let command = self.config_read(PCI_COMMAND, 2)?;
        let wanted = if on { command | BUS_MASTER } else { command & !BUS_MASTER };
        if wanted == command { Ok(()) } else { self.config_write(PCI_COMMAND, 2, wanted) }
    }

    fn set_interrupts(&self, eventfds: &[OwnedFd]) -> Result<(), PciError> {
        self.set_irqs(IRQ_DATA_NONE, 0, &[])?;
        let chunk = self.lock().max_fds;
        for (i, fds) in eventfds.chunks(chunk).enumerate() {
            self.set_irqs(IRQ_DATA_EVENTFD, i * chunk, fds)?;
        }
        Ok(())
    }

    fn bars_are_device_memory(&self) -> bool {
        false
    }
}
