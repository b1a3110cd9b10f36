//! An emulated IOMMU: which memory a device may reach, at which address, and whether to read or to write it.
//!
//! One [`Domain`] is what one device lives behind. Every access is translated, permission is checked, and what fails is
//! recorded as a fault. [`Domain::unmap`] waits for accesses in flight: when it returns, a late DMA faults.

use std::collections::VecDeque;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::remote::{Remote, RemoteTable};
use super::session::Session;
use crate::mem::{Access, Mapping, PAGE};
use crate::pci::{DmaAccess, RemoteMemory};

/// The highest address plus one: 48 bits of I/O virtual address.
const ADDRESS_END: u64 = 1 << 48;
/// Where message-signalled interrupts are decoded on x86: never memory.
const MSI_RANGE: RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;
/// Faults kept for [`Domain::faults`]; the counter goes on counting.
const FAULTS_KEPT: usize = 64;

/// Why a DMA was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultReason {
    /// Nothing is mapped at the address.
    Unmapped,
    /// The memory is mapped, but not for reading by the device.
    NotReadable,
    /// The memory is mapped, but not for writing by the device.
    NotWritable,
    /// The memory is another process', which was asked and refused, or did not answer in time.
    NoAnswer,
}

impl fmt::Display for FaultReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unmapped => "nothing is mapped there",
            Self::NotReadable => "the device may not read there",
            Self::NotWritable => "the device may not write there",
            Self::NoAnswer => "the process whose memory it is refused, or did not answer",
        })
    }
}

/// A DMA that the IOMMU refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("DMA {} of {len} bytes at IOVA {iova:#x} faulted: {reason}", if *.write { "write" } else { "read" })]
pub struct DmaFault {
    /// First address that was refused.
    pub iova: u64,
    /// Bytes that were still to be moved.
    pub len: usize,
    /// Whether the device wanted to write.
    pub write: bool,
    /// Why it was refused.
    pub reason: FaultReason,
}

/// A mapping or unmapping was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len:#x} bytes at IOVA {iova:#x}: {reason}")]
pub struct DomainError {
    /// First address.
    pub iova: u64,
    /// Length in bytes.
    pub len: u64,
    /// What is wrong, and what to do about it.
    pub reason: String,
}

/// What a domain has let through and what it has refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DomainCounters {
    /// Bytes the device read.
    pub bytes_read: u64,
    /// Bytes the device wrote.
    pub bytes_written: u64,
    /// Accesses that faulted.
    pub faults: u64,
    /// Mappings that exist now.
    pub mappings: u64,
}

/// One mapping.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) iova: u64,
    pub(super) len: u64,
    pub(super) memory: Arc<Mapping>,
    pub(super) offset: usize,
    pub(super) access: DmaAccess,
}

/// The address space of one device.
#[derive(Debug)]
pub struct Domain {
    name: String,
    /// Sorted by address, not overlapping.
    table: RwLock<Vec<Entry>>,
    /// What is reached by asking for it. Locked after `table`, if both are.
    pub(super) remote: RwLock<RemoteTable>,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    fault_count: AtomicU64,
    faults: Mutex<VecDeque<DmaFault>>,
}

impl Domain {
    /// An empty domain: every access faults.
    pub fn new(name: &str) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            table: RwLock::default(),
            remote: RwLock::default(),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            fault_count: AtomicU64::new(0),
            faults: Mutex::default(),
        })
    }

    /// The name given to [`new`](Self::new).
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Addresses that [`map`](Self::map) accepts: 48 bits, without page 0 and without the range of interrupt messages.
    pub fn iova_ranges() -> Vec<RangeInclusive<u64>> {
        vec![PAGE as u64..=MSI_RANGE.start() - 1, MSI_RANGE.end() + 1..=ADDRESS_END - 1]
    }

    /// Lets the device reach `len` bytes of `memory` from `offset` at `iova`. All are multiples of 4 KiB.
    pub fn map(
        &self,
        iova: u64,
        memory: Arc<Mapping>,
        offset: usize,
        len: usize,
        access: DmaAccess,
    ) -> Result<(), DomainError> {
        let len64 = len as u64;
        let refuse = |reason: &str| Err(DomainError { iova, len: len64, reason: reason.to_owned() });
        if !offset.is_multiple_of(PAGE) {
            return refuse("the offset must be a multiple of 4 KiB");
        }
        if offset.checked_add(len).is_none_or(|end| end > memory.len()) {
            return refuse("the range is not inside the memory to be mapped");
        }
        if access.writable() && memory.access() == Access::ReadOnly {
            return refuse("the memory is mapped read-only in this process, so the device may only read it");
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let remote = self.remote.read().unwrap_or_else(PoisonError::into_inner);
        let at = free_range(&table, &remote, iova, len64)?;
        table.insert(at, Entry { iova, len: len64, memory, offset, access });
        Ok(())
    }

    /// Lets the device reach `len` bytes at `iova` by asking `owner`. Both are multiples of 4 KiB.
    pub fn map_remote(
        &self,
        iova: u64,
        owner: Arc<dyn RemoteMemory>,
        len: usize,
        access: DmaAccess,
    ) -> Result<(), DomainError> {
        let table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let mut remote = self.remote.write().unwrap_or_else(PoisonError::into_inner);
        free_range(&table, &remote, iova, len as u64)?;
        remote.insert(iova, Remote { len: len as u64, owner, access });
        Ok(())
    }

    /// Takes exactly one earlier mapping back. When it returns, no access to it is in flight and every later one faults.
    pub fn unmap(&self, iova: u64, len: usize) -> Result<(), DomainError> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        match table.binary_search_by_key(&iova, |e| e.iova) {
            Ok(at) if table[at].len == len as u64 => {
                table.remove(at);
                Ok(())
            }
            // An access to remote memory holds this lock until it is done.
            _ if self
                .remote
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .remove_exactly(iova, len as u64) =>
            {
                Ok(())
            }
            _ => Err(DomainError {
                iova,
                len: len as u64,
                reason: "no mapping starts there with that length; unmap what was mapped, as it was mapped"
                    .to_owned(),
            }),
        }
    }

    /// Whether all `len` bytes at `iova` are mapped with this permission.
    pub fn is_mapped(&self, iova: u64, len: usize, access: DmaAccess) -> bool {
        let session = self.session();
        (!access.readable() || session.check(iova, len, false).is_ok())
            && (!access.writable() || session.check(iova, len, true).is_ok())
    }

    /// A device reads memory at `iova`.
    pub fn read(&self, iova: u64, into: &mut [u8]) -> Result<(), DmaFault> {
        self.session().read(iova, into)
    }

    /// A device writes memory at `iova`.
    pub fn write(&self, iova: u64, from: &[u8]) -> Result<(), DmaFault> {
        self.session().write(iova, from)
    }

    /// A device writes `len` bytes of its own memory `from`, starting at `offset`, to `iova`.
    pub fn copy_in(&self, iova: u64, from: &Mapping, offset: usize, len: usize) -> Result<(), DmaFault> {
        self.session().copy_in(iova, from, offset, len)
    }

    /// A device reads `len` bytes at `iova` into its own memory `to`, starting at `offset`.
    pub fn copy_out(&self, iova: u64, to: &Mapping, offset: usize, len: usize) -> Result<(), DmaFault> {
        self.session().copy_out(iova, to, offset, len)
    }

    /// What was let through and what was refused.
    pub fn counters(&self) -> DomainCounters {
        let mapped = self.table.read().unwrap_or_else(PoisonError::into_inner).len();
        let remote = self.remote.read().unwrap_or_else(PoisonError::into_inner).len();
        DomainCounters {
            bytes_read: self.bytes_read.load(Ordering::Relaxed),
            bytes_written: self.bytes_written.load(Ordering::Relaxed),
            faults: self.fault_count.load(Ordering::Relaxed),
            mappings: (mapped + remote) as u64,
        }
    }

    /// A session moved this many bytes.
    pub(super) fn count(&self, read: u64, written: u64) {
        if read != 0 {
            self.bytes_read.fetch_add(read, Ordering::Relaxed);
        }
        if written != 0 {
            self.bytes_written.fetch_add(written, Ordering::Relaxed);
        }
    }

    /// The latest faults, oldest first (64 are kept).
    pub fn faults(&self) -> Vec<DmaFault> {
        self.fault_list().iter().copied().collect()
    }

    fn fault_list(&self) -> MutexGuard<'_, VecDeque<DmaFault>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn record(&self, fault: DmaFault) {
        self.fault_count.fetch_add(1, Ordering::Relaxed);
        let mut list = self.fault_list();
        if list.len() == FAULTS_KEPT {
            list.pop_front();
        }
        list.push_back(fault);
    }

    /// Several accesses under one lock: nothing is unmapped before the session is dropped.
    pub(crate) fn session(&self) -> Session<'_> {
        Session::new(self, self.table.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Checks that nothing is mapped in a range and that it may be: the place in `table` of a new entry there.
fn free_range(table: &[Entry], remote: &RemoteTable, iova: u64, len: u64) -> Result<usize, DomainError> {
    let refuse = |reason: &str| Err(DomainError { iova, len, reason: reason.to_owned() });
    let page = PAGE as u64;
    if len == 0 || !len.is_multiple_of(page) || !iova.is_multiple_of(page) {
        return refuse("address and length must be multiples of 4 KiB, and the length not 0");
    }
    let Some(last) = iova.checked_add(len - 1) else {
        return refuse("the range wraps around the address space");
    };
    if !Domain::iova_ranges().iter().any(|r| r.contains(&iova) && r.contains(&last)) {
        return refuse("the range is not inside the usable addresses (see iova_ranges)");
    }
    let at = table.partition_point(|e| e.iova <= last);
    let taken = at > 0 && table[at - 1].iova + table[at - 1].len > iova;
    if taken || remote.overlaps(iova, last) {
        return refuse("something is already mapped there; unmap it first");
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_enforced_and_faults_recorded() {
        let d = Domain::new("test");
        let m = Mapping::anonymous(3 * PAGE).unwrap();
        d.map(0x10000, Arc::clone(&m), 0, PAGE, DmaAccess::Read).unwrap();
        d.map(0x11000, Arc::clone(&m), PAGE, PAGE, DmaAccess::ReadWrite).unwrap();
        d.map(0x12000, Arc::clone(&m), 2 * PAGE, PAGE, DmaAccess::Write).unwrap();
        let mut buf = [0u8; 32];
        d.read(0x10ff0, &mut buf).unwrap();
        d.write(0x11ff0, &buf).unwrap();
        assert_eq!(d.write(0x10000, &buf).unwrap_err().reason, FaultReason::NotWritable);
        assert_eq!(d.read(0x12000, &mut buf).unwrap_err().reason, FaultReason::NotReadable);
        let e = d.write(0x12ff0, &buf).unwrap_err();
        assert_eq!((e.reason, e.iova, e.len), (FaultReason::Unmapped, 0x13000, 16));
        assert_eq!(
            d.counters(),
            DomainCounters { bytes_read: 32, bytes_written: 32, faults: 3, mappings: 3 }
        );
        assert_eq!(d.faults().len(), 3);
    }

    #[test]
    fn an_unmapped_range_faults() {
        let d = Domain::new("test");
        let m = Mapping::anonymous(PAGE).unwrap();
        d.map(0x10000, Arc::clone(&m), 0, PAGE, DmaAccess::ReadWrite).unwrap();
        assert!(d.unmap(0x10000, 2 * PAGE).is_err());
        d.write(0x10000, b"landed").unwrap();
        d.unmap(0x10000, PAGE).unwrap();
        assert!(d.write(0x10000, b"late").is_err());
        assert!(d.unmap(0x10000, PAGE).is_err());
        let mut got = [0; 6];
        m.read(0, &mut got).unwrap();
        assert_eq!(&got, b"landed");
        assert_eq!(Arc::strong_count(&m), 1, "the domain gave its reference back");
    }

    #[test]
    fn bad_mappings_are_refused() {
        let d = Domain::new("test");
        let m = Mapping::anonymous(2 * PAGE).unwrap();
        let map = |iova, off, len| d.map(iova, Arc::clone(&m), off, len, DmaAccess::ReadWrite);
        map(0x20000, 0, 2 * PAGE).unwrap();
        for (iova, off, len) in [
            (0x21000, 0, PAGE),
            (0x1f000, 0, 2 * PAGE),
            (0x30001, 0, PAGE),
            (0x30000, 1, PAGE),
            (0x30000, 0, 0),
            (0x30000, PAGE, 2 * PAGE),
            (0x30000, usize::MAX - 4095, PAGE),
            (0, 0, PAGE),
            (0xfee0_0000, 0, PAGE),
            (0xfedf_f000, 0, 2 * PAGE),
            (1 << 48, 0, PAGE),
            (u64::MAX - 4095, 0, 2 * PAGE),
        ] {
            assert!(map(iova, off, len).is_err(), "{iova:#x} {off:#x} {len:#x}");
        }
        let fd = Mapping::memfd("t", PAGE).unwrap();
        let ro =
            Mapping::from_fd(fd.fd().unwrap().0.try_clone_to_owned().unwrap(), 0, PAGE, Access::ReadOnly);
        let ro = ro.unwrap();
        assert!(d.map(0x40000, Arc::clone(&ro), 0, PAGE, DmaAccess::ReadWrite).is_err());
        d.map(0x40000, ro, 0, PAGE, DmaAccess::Read).unwrap();
    }
}
