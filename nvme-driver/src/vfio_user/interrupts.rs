//! Interrupts: DEVICE_GET_IRQ_INFO and DEVICE_SET_IRQS (spec, same names). Only MSI-X, and only by eventfd.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::protocol::{Fields, Put};
use super::regions::errno;
use crate::pci::PciFunction;

/// INTx, MSI, MSI-X, error, request (linux/vfio.h).
pub(super) const KINDS: u32 = 5;
const MSIX: u32 = 2;
const INFO_EVENTFD: u32 = 1;
const INFO_NORESIZE: u32 = 1 << 3;
const DATA_NONE: u32 = 1;
const DATA_BOOL: u32 = 1 << 1;
const DATA_EVENTFD: u32 = 1 << 2;
const ACTION_TRIGGER: u32 = 1 << 5;

/// The client's eventfds, by vector.
pub(super) struct Interrupts {
    function: Arc<dyn PciFunction>,
    eventfds: Vec<Option<OwnedFd>>,
}

/// Vectors in the function's MSI-X capability (PCI local bus specification, "MSI-X Capability"); 0 without one.
fn msix_vectors(function: &dyn PciFunction) -> usize {
    let read = |at: u16, size: u8| function.config_read(at, size).unwrap_or(0);
    if read(6, 2) & (1 << 4) == 0 {
        return 0;
    }
    let mut at = (read(0x34, 1) & 0xfc) as u16;
    for _ in 0..48 {
        if at < 0x40 {
            return 0;
        }
        if read(at, 1) == 0x11 {
            return (read(at + 2, 2) & 0x7ff) as usize + 1;
        }
        at = (read(at + 1, 1) & 0xfc) as u16;
    }
    0
}

impl Interrupts {
    pub(super) fn new(function: Arc<dyn PciFunction>) -> Self {
        let vectors = msix_vectors(&*function);
        Self { function, eventfds: std::iter::repeat_with(|| None).take(vectors).collect() }
    }

    fn count(&self, kind: u32) -> usize {
        if kind == MSIX { self.eventfds.len() } else { 0 }
    }

    /// Answers DEVICE_GET_IRQ_INFO.
    pub(super) fn info(&self, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let mut fields = Fields(body);
        let (argsz, _, kind) = (fields.u32()?, fields.u32()?, fields.u32()?);
        if argsz < 16 || kind >= KINDS {
            return Err(Errno::INVAL);
        }
        let count = self.count(kind);
        let mut reply = Vec::with_capacity(16);
        reply.put_u32(16);
        reply.put_u32(if count > 0 { INFO_EVENTFD | INFO_NORESIZE } else { 0 });
        reply.put_u32(kind);
        reply.put_u32(count as u32);
        Ok(reply)
    }

    /// Answers DEVICE_SET_IRQS.
    pub(super) fn set(&mut self, body: &[u8], fds: Vec<OwnedFd>) -> Result<Vec<u8>, Errno> {
        let mut fields = Fields(body);
        let (argsz, flags, kind) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let (start, count) = (fields.u32()? as usize, fields.u32()? as usize);
        let end = start.checked_add(count).ok_or(Errno::INVAL)?;
        if argsz < 20 || kind >= KINDS || end > self.count(kind) || fds.len() > count {
            return Err(Errno::INVAL);
        }
        if flags & !(DATA_NONE | DATA_BOOL | DATA_EVENTFD) != ACTION_TRIGGER {
            return Err(Errno::INVAL); // masking is done in the MSI-X table
        }
        if !fds.iter().all(is_eventfd) {
            return Err(Errno::INVAL);
        }
        let range = start..end;
        match (flags & !ACTION_TRIGGER, count) {
            (DATA_NONE, 0) => self.eventfds.iter_mut().for_each(|fd| *fd = None),
            (DATA_EVENTFD, _) if fds.is_empty() => self.eventfds[range].iter_mut().for_each(|fd| *fd = None),
            (DATA_EVENTFD, _) if fds.len() == count => {
                for (slot, fd) in self.eventfds[range].iter_mut().zip(fds) {
                    *slot = Some(fd);
                }
            }
            // Asked to signal as if the device had: a client's self-test.
            (DATA_NONE, _) => return self.signal(range, None),
            (DATA_BOOL, _) => return self.signal(range, Some(fields.bytes(count)?)),
            _ => return Err(Errno::INVAL),
        }
        self.apply()?;
        Ok(Vec::new())
    }

    fn signal(&self, range: std::ops::Range<usize>, which: Option<&[u8]>) -> Result<Vec<u8>, Errno> {
        for (i, slot) in self.eventfds[range].iter().enumerate() {
            if let Some(fd) = slot
                && which.is_none_or(|bits| bits.get(i).is_some_and(|b| *b != 0))
            {
                signal(fd);
            }
        }
        Ok(Vec::new())
    }

    /// Hands the eventfds up to the last one in use to the function; vectors in between that the client left out go nowhere.
    fn apply(&self) -> Result<(), Errno> {
        let used = self.eventfds.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        let mut all = Vec::with_capacity(used);
        for slot in &self.eventfds[..used] {
            all.push(match slot {
                Some(fd) => fd.try_clone().map_err(|_| Errno::MFILE)?,
                None => eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            });
        }
        self.function.set_interrupts(&all).map_err(|e| errno(&e))
    }

    /// Lets go of every eventfd: the client is gone.
    pub(super) fn clear(&mut self) {
        self.eventfds.iter_mut().for_each(|fd| *fd = None);
        if let Err(e) = self.apply() {
            tracing::debug!("vfio-user: turning interrupts off: {e}");
        }
    }
}

/// Whether this is an eventfd. Writing to anything else might block, or raise SIGPIPE.
fn is_eventfd(fd: &OwnedFd) -> bool {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::readlink(link, Vec::new()).is_ok_and(|to| to.to_bytes() == b"anon_inode:[eventfd]")
}

/// Signals an eventfd without blocking.
fn signal(fd: &OwnedFd) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut ready = [PollFd::new(fd, PollFlags::OUT)];
    if poll(&mut ready, Some(&now)).is_ok_and(|n| n == 1) {
        let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
    }
}
