//! Memory behind the emulated IOMMU that is reached by asking its owner (a vfio-user client that gave no descriptor).
//!
//! It has a table of its own, which an access looks at only where nothing is mapped: the hot path knows nothing of it.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, PoisonError};

use super::iommu::{DmaFault, Domain, FaultReason};
use crate::mem::Mapping;
use crate::pci::{DmaAccess, RemoteMemory};

/// Bytes of a copy between the device's memory and a remote one that are in between at a time.
const PIECE: usize = 64 << 10;

/// One range.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) len: u64,
    pub(super) owner: Arc<dyn RemoteMemory>,
    pub(super) access: DmaAccess,
}

/// The ranges of one domain, by address. They do not overlap.
#[derive(Debug, Default)]
pub(super) struct RemoteTable(BTreeMap<u64, Remote>);

impl RemoteTable {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn insert(&mut self, iova: u64, remote: Remote) {
        self.0.insert(iova, remote);
    }

    /// Removes the range that is exactly this; says whether there was one.
    pub(super) fn remove_exactly(&mut self, iova: u64, len: u64) -> bool {
        self.0.get(&iova).is_some_and(|r| r.len == len) && self.0.remove(&iova).is_some()
    }

    pub(super) fn overlaps(&self, first: u64, last: u64) -> bool {
        self.0.range(..=last).next_back().is_some_and(|(iova, r)| iova + (r.len - 1) >= first)
    }

    /// The range at `iova`, and how many of `len` bytes are in it.
    fn find(&self, iova: u64, len: usize, write: bool) -> Result<(&Remote, usize), FaultReason> {
        let (start, remote) = self.0.range(..=iova).next_back().ok_or(FaultReason::Unmapped)?;
        let room = remote.len.checked_sub(iova - start).filter(|n| *n > 0).ok_or(FaultReason::Unmapped)?;
        match write {
            true if !remote.access.writable() => Err(FaultReason::NotWritable),
            false if !remote.access.readable() => Err(FaultReason::NotReadable),
            _ => Ok((remote, len.min(usize::try_from(room).unwrap_or(usize::MAX)))),
        }
    }
}

impl Domain {
    /// Accesses remote memory at `iova`, where nothing is mapped: up to `len` bytes, as far as one range goes. Says how many.
    #[cold]
    pub(super) fn ask(
        &self,
        iova: u64,
        len: usize,
        write: bool,
        access: impl FnOnce(&dyn RemoteMemory, usize) -> io::Result<()>,
    ) -> Result<usize, DmaFault> {
        let table = self.remote.read().unwrap_or_else(PoisonError::into_inner);
        let asked = table.find(iova, len, write).and_then(|(remote, n)| {
            access(&*remote.owner, n).map(|()| n).map_err(|e| {
                tracing::debug!("{}: {n} bytes of remote memory at {iova:#x}: {e}", self.name());
                FaultReason::NoAnswer
            })
        });
        asked.map_err(|reason| {
            let fault = DmaFault { iova, len, write, reason };
            self.record(fault);
            fault
        })
    }

    /// How many of `len` bytes of remote memory at `iova` may be accessed.
    #[cold]
    pub(super) fn may_ask(&self, iova: u64, len: usize, write: bool) -> Result<usize, FaultReason> {
        let table = self.remote.read().unwrap_or_else(PoisonError::into_inner);
        table.find(iova, len, write).map(|(_, n)| n)
    }
}

/// Moves `len` bytes of the device's memory `own` from `at` to remote memory.
pub(super) fn push(to: &dyn RemoteMemory, iova: u64, own: &Mapping, at: usize, len: usize) -> io::Result<()> {
    in_pieces(len, |done, piece| {
        own.read(at + done, piece).map_err(io::Error::other)?;
        to.write(iova + done as u64, piece)
    })
}

/// Moves `len` bytes of remote memory to the device's memory `own` at `at`.
pub(super) fn pull(
    from: &dyn RemoteMemory,
    iova: u64,
    own: &Mapping,
    at: usize,
    len: usize,
) -> io::Result<()> {
    in_pieces(len, |done, piece| {
        from.read(iova + done as u64, piece)?;
        own.write(at + done, piece).map_err(io::Error::other)
    })
}

fn in_pieces(len: usize, mut each: impl FnMut(usize, &mut [u8]) -> io::Result<()>) -> io::Result<()> {
    let mut buffer = vec![0; len.min(PIECE)];
    let mut done = 0;
    while done < len {
        let n = (len - done).min(buffer.len());
        each(done, &mut buffer[..n])?;
        done += n;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::mem::PAGE;

    /// Two pages of memory, and an owner that may refuse.
    #[derive(Debug)]
    struct Owner {
        base: u64,
        bytes: Mutex<Vec<u8>>,
        refuses: bool,
    }

    impl RemoteMemory for Owner {
        fn read(&self, address: u64, into: &mut [u8]) -> io::Result<()> {
            let at = (address - self.base) as usize;
            into.copy_from_slice(&self.bytes.lock().unwrap()[at..at + into.len()]);
            if self.refuses { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
        }
        fn write(&self, address: u64, from: &[u8]) -> io::Result<()> {
            let at = (address - self.base) as usize;
            self.bytes.lock().unwrap()[at..at + from.len()].copy_from_slice(from);
            if self.refuses { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
        }
    }

    fn owner(base: u64, refuses: bool) -> Arc<Owner> {
        Arc::new(Owner { base, bytes: Mutex::new(vec![0; 2 * PAGE]), refuses })
    }

    #[test]
    fn an_access_may_lie_across_mapped_and_remote_memory() {
        let d = Domain::new("test");
        let m = Mapping::anonymous(PAGE).unwrap();
        let far = owner(0x11000, false);
        d.map(0x10000, Arc::clone(&m), 0, PAGE, DmaAccess::ReadWrite).unwrap();
        d.map_remote(0x11000, far.clone(), 2 * PAGE, DmaAccess::ReadWrite).unwrap();
        d.map(0x13000, Arc::clone(&m), 0, PAGE, DmaAccess::ReadWrite).unwrap();
        let bytes: Vec<u8> = (0..2 * PAGE + 16).map(|i| (i % 251) as u8).collect();
        d.write(0x10ff8, &bytes).unwrap();
        let mut back = vec![0; bytes.len()];
        d.read(0x10ff8, &mut back).unwrap();
        assert!(back == bytes);
        assert_eq!(far.bytes.lock().unwrap()[..8], bytes[8..16]);
        // The device's own memory there and back.
        let own = Mapping::anonymous(4 * PAGE).unwrap();
        d.copy_out(0x10ff8, &own, 8, bytes.len()).unwrap();
        own.read(8, &mut back).unwrap();
        assert!(back == bytes);
        d.copy_in(0x11000, &own, 0, 2 * PAGE).unwrap();
        assert_eq!(far.bytes.lock().unwrap()[8..16], bytes[..8]);
        let c = d.counters();
        assert_eq!((c.mappings, c.faults), (3, 0));
        assert_eq!(c.bytes_written as usize, bytes.len() + 2 * PAGE);
    }

    #[test]
    fn what_is_refused_faults_and_says_why() {
        let d = Domain::new("test");
        d.map_remote(0x10000, owner(0x10000, false), PAGE, DmaAccess::Read).unwrap();
        d.map_remote(0x11000, owner(0x11000, false), PAGE, DmaAccess::Write).unwrap();
        d.map_remote(0x12000, owner(0x12000, true), PAGE, DmaAccess::ReadWrite).unwrap();
        let mut buf = [0; 8];
        assert_eq!(d.write(0x10000, &buf).unwrap_err().reason, FaultReason::NotWritable);
        assert_eq!(d.read(0x11000, &mut buf).unwrap_err().reason, FaultReason::NotReadable);
        assert_eq!(d.read(0x12000, &mut buf).unwrap_err().reason, FaultReason::NoAnswer);
        assert_eq!(d.write(0x12000, &buf).unwrap_err().reason, FaultReason::NoAnswer);
        assert_eq!(d.read(0x13000, &mut buf).unwrap_err().reason, FaultReason::Unmapped);
        assert!(d.is_mapped(0x12000, PAGE, DmaAccess::ReadWrite));
        assert!(!d.is_mapped(0x10000, 2 * PAGE, DmaAccess::Read));
        assert_eq!(d.counters().faults, 5);
        for (iova, len) in [(0x10000, PAGE), (0xf000, 2 * PAGE), (0x20000, 0), (0x20001, PAGE), (0, PAGE)] {
            assert!(d.map_remote(iova, owner(iova, false), len, DmaAccess::Read).is_err(), "{iova:#x}");
        }
        let m = Mapping::anonymous(2 * PAGE).unwrap();
        assert!(d.map(0xf000, m, 0, 2 * PAGE, DmaAccess::Read).is_err(), "over remote memory");
        assert!(d.unmap(0x10000, 2 * PAGE).is_err());
        d.unmap(0x10000, PAGE).unwrap();
        assert_eq!(d.read(0x10000, &mut buf).unwrap_err().reason, FaultReason::Unmapped);
    }
}
