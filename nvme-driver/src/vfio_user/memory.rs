//! The client's DMA memory: DMA_MAP and DMA_UNMAP (spec, same names).

use std::collections::BTreeMap;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals, fstat};
use rustix::io::Errno;

use super::protocol::{Fields, Put};
use super::regions::errno;
use super::session::ClientCalls;
use super::version::MAX_DMA_MAPS;
use crate::mem::{Access, Mapping, PAGE};
use crate::pci::{DmaAccess, PciError, PciFunction, RemoteMemory};

const MAP_READ: u32 = 1;
const MAP_WRITE: u32 = 2;
const UNMAP_ALL: u32 = 1 << 1;

/// One region as the client named it, and the parts of it that the function was given.
struct Region {
    size: u64,
    mapped: Vec<(u64, usize)>,
}

/// The client's DMA regions, by address.
pub(super) struct DmaRegions {
    function: Arc<dyn PciFunction>,
    regions: BTreeMap<u64, Region>,
    /// Whether memory that the client could shrink under us is accepted: only from a client that could kill us anyway.
    trusted: bool,
    /// Reaches memory without a descriptor.
    by_message: Option<Arc<ByMessage>>,
}

/// The client's memory by DMA_READ and DMA_WRITE.
#[derive(Debug)]
struct ByMessage {
    client: Arc<dyn ClientCalls>,
    /// Bytes in one message.
    max: usize,
}

impl RemoteMemory for ByMessage {
    fn read(&self, address: u64, into: &mut [u8]) -> io::Result<()> {
        let mut at = address;
        for piece in into.chunks_mut(self.max) {
            self.client.dma_read(at, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn write(&self, address: u64, from: &[u8]) -> io::Result<()> {
        let mut at = address;
        for piece in from.chunks(self.max) {
            self.client.dma_write(at, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }
}

impl DmaRegions {
    pub(super) fn new(function: Arc<dyn PciFunction>, trusted: bool) -> Self {
        Self { function, regions: BTreeMap::new(), trusted, by_message: None }
    }

    /// From now on, memory without a descriptor is reached by asking `client`, for at most `max` bytes at a time.
    pub(super) fn ask(&mut self, client: Arc<dyn ClientCalls>, max: usize) {
        self.by_message = Some(Arc::new(ByMessage { client, max }));
    }

    /// Answers DMA_MAP.
    pub(super) fn map(&mut self, body: &[u8], fds: Vec<OwnedFd>) -> Result<Vec<u8>, Errno> {
        let mut fields = Fields(body);
        let (argsz, flags) = (fields.u32()?, fields.u32()?);
        let (file_offset, iova, size) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let last = iova.checked_add(size.checked_sub(1).ok_or(Errno::INVAL)?).ok_or(Errno::INVAL)?;
        let page = PAGE as u64;
        if argsz < 32 || [iova, size, file_offset].iter().any(|n| !n.is_multiple_of(page)) {
            return Err(Errno::INVAL);
        }
        let access = match flags & (MAP_READ | MAP_WRITE) {
            MAP_READ => DmaAccess::Read,
            MAP_WRITE => DmaAccess::Write,
            0 => return Err(Errno::INVAL),
            _ => DmaAccess::ReadWrite,
        };
        if self.regions.len() >= MAX_DMA_MAPS {
            return Err(Errno::NOSPC);
        }
        let before = self.regions.range(..=last).next_back();
        if before.is_some_and(|(start, region)| start.saturating_add(region.size - 1) >= iova) {
            return Err(Errno::EXIST);
        }
        let mut fds = fds.into_iter();
        let mapped = match (fds.next(), fds.next()) {
            (None, _) => self.give_remote(iova..=last, access)?,
            (Some(fd), None) => self.give(fd, file_offset, iova..=last, access)?,
            (Some(_), Some(_)) => return Err(Errno::INVAL),
        };
        self.regions.insert(iova, Region { size, mapped });
        Ok(Vec::new())
    }

    /// Maps a descriptor and gives it to the function.
    fn give(
        &self,
        fd: OwnedFd,
        file_offset: u64,
        range: RangeInclusive<u64>,
        access: DmaAccess,
    ) -> Result<Vec<(u64, usize)>, Errno> {
        let (iova, size) = (*range.start(), range.end() - range.start() + 1);
        let len = usize::try_from(size).map_err(|_| Errno::INVAL)?;
        let end = file_offset.checked_add(size).ok_or(Errno::INVAL)?;
        let sealed = fcntl_add_seals(&fd, SealFlags::SHRINK).is_ok()
            || fcntl_get_seals(&fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        if !sealed && !self.trusted {
            return Err(Errno::PERM);
        }
        // A page beyond the file's end would be a SIGBUS for us. Sealed first, then looked at: it can only have grown since.
        if u64::try_from(fstat(&fd)?.st_size).unwrap_or(0) < end {
            return Err(Errno::INVAL);
        }
        let ours = if access.writable() { Access::ReadWrite } else { Access::ReadOnly };
        // Without the descriptor: a client may have more regions than we may have open files.
        let memory = Mapping::from_borrowed_fd(fd.as_fd(), file_offset, len, ours)
            .map_err(|e| Errno::from_io_error(&e.source).unwrap_or(Errno::NOMEM))?;
        self.map_usable(range, |first, len| {
            self.function.dma_map(&memory, (first - iova) as usize, len, first, access)
        })
    }

    /// Gives the function memory that is reached by message. A function that cannot do that faults there, as where nothing is mapped.
    fn give_remote(&self, range: RangeInclusive<u64>, access: DmaAccess) -> Result<Vec<(u64, usize)>, Errno> {
        let Some(owner) = &self.by_message else { return Ok(Vec::new()) };
        let given = self.map_usable(range, |first, len| {
            self.function.dma_map_remote(Arc::clone(owner) as Arc<dyn RemoteMemory>, first, len, access)
        });
        match given {
            Err(Errno::NOTSUP) => Ok(Vec::new()),
            given => given,
        }
    }

    /// Has `map` give the function those parts of the range that its IOMMU accepts: all or none of them.
    fn map_usable(
        &self,
        range: RangeInclusive<u64>,
        map: impl Fn(u64, usize) -> Result<(), PciError>,
    ) -> Result<Vec<(u64, usize)>, Errno> {
        let mut mapped = Vec::new();
        for usable in self.function.iova_ranges() {
            let (first, last) = ((*range.start()).max(*usable.start()), (*range.end()).min(*usable.end()));
            if first >= last {
                continue;
            }
            let len = (last - first) as usize + 1;
            if let Err(e) = map(first, len) {
                tracing::debug!("DMA_MAP of {len:#x} bytes at {first:#x}: {e}");
                self.take_back(&mapped);
                return Err(errno(&e));
            }
            mapped.push((first, len));
        }
        Ok(mapped)
    }

    fn take_back(&self, mapped: &[(u64, usize)]) {
        for (iova, len) in mapped {
            if let Err(e) = self.function.dma_unmap(*iova, *len) {
                tracing::error!("vfio-user: {e}");
            }
        }
    }

    /// Answers DMA_UNMAP: whole regions only, one or more; when it replies, no DMA reaches them.
    pub(super) fn unmap(&mut self, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let mut fields = Fields(body);
        let (argsz, flags, iova, size) = (fields.u32()?, fields.u32()?, fields.u64()?, fields.u64()?);
        if argsz < 24 || flags & !UNMAP_ALL != 0 {
            return Err(Errno::INVAL); // no dirty bitmaps: migration was not agreed on
        }
        if flags & UNMAP_ALL != 0 {
            if iova != 0 || size != 0 {
                return Err(Errno::INVAL);
            }
            self.clear();
        } else {
            let last = iova.checked_add(size.checked_sub(1).ok_or(Errno::INVAL)?).ok_or(Errno::INVAL)?;
            let cut = |(start, region): (&u64, &Region)| {
                let end = start.saturating_add(region.size - 1);
                end >= iova && (*start < iova || end > last)
            };
            if self.regions.range(..=last).next_back().is_some_and(cut)
                || self.regions.range(..iova).next_back().is_some_and(cut)
            {
                return Err(Errno::INVAL);
            }
            let inside: Vec<u64> = self.regions.range(iova..=last).map(|(start, _)| *start).collect();
            if inside.is_empty() {
                return Err(Errno::NOENT);
            }
            for start in inside {
                if let Some(region) = self.regions.remove(&start) {
                    self.take_back(&region.mapped);
                }
            }
        }
        let mut reply = Vec::with_capacity(24);
        reply.put_u32(24);
        reply.put_u32(flags);
        reply.put_u64(iova);
        reply.put_u64(size);
        Ok(reply)
    }

    /// Takes everything back: the client is gone.
    pub(super) fn clear(&mut self) {
        for region in std::mem::take(&mut self.regions).into_values() {
            self.take_back(&region.mapped);
        }
    }
}
