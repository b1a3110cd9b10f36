//! An emulated IOMMU: which memory a device may reach, at which address, and whether to read or to write it.
//!
//! One [`Domain`] is what one device lives behind. Every access is translated, permission is checked, and what fails is
//! recorded as a fault. [`Domain::unmap`] waits for accesses in flight: when it returns, a late DMA faults.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use crate::mem::{Access, Mapping, PAGE};
use crate::pci::DmaAccess;

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
}

impl fmt::Display for FaultReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unmapped => "nothing is mapped there",
            Self::NotReadable => "the device may not read there",
            Self::NotWritable => "the device may not write there",
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

#[derive(Debug)]
struct Entry {
    iova: u64,
    len: u64,
    memory: Arc<Mapping>,
    offset: usize,
    access: DmaAccess,
}

/// The address space of one device.
#[derive(Debug)]
pub struct Domain {
    name: String,
    /// Sorted by address, not overlapping.
    table: RwLock<Vec<Entry>>,
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
        let page = PAGE as u64;
        if len == 0
            || !len64.is_multiple_of(page)
            || !iova.is_multiple_of(page)
            || !offset.is_multiple_of(PAGE)
        {
            return refuse("address, offset and length must be multiples of 4 KiB, and the length not 0");
        }
        if offset.checked_add(len).is_none_or(|end| end > memory.len()) {
            return refuse("the range is not inside the memory to be mapped");
        }
        if access.writable() && memory.access() == Access::ReadOnly {
            return refuse("the memory is mapped read-only in this process, so the device may only read it");
        }
        let Some(last) = iova.checked_add(len64 - 1) else {
            return refuse("the range wraps around the address space");
        };
        if !Self::iova_ranges().iter().any(|r| r.contains(&iova) && r.contains(&last)) {
            return refuse("the range is not inside the usable addresses (see iova_ranges)");
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let at = table.partition_point(|e| e.iova <= last);
        if at > 0 && table[at - 1].iova + table[at - 1].len > iova {
            return refuse("something is already mapped there; unmap it first");
        }
        table.insert(at, Entry { iova, len: len64, memory, offset, access });
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
        let mappings = self.table.read().unwrap_or_else(PoisonError::into_inner).len() as u64;
        DomainCounters {
            bytes_read: self.bytes_read.load(Ordering::Relaxed),
            bytes_written: self.bytes_written.load(Ordering::Relaxed),
            faults: self.fault_count.load(Ordering::Relaxed),
            mappings,
        }
    }

    /// The latest faults, oldest first (64 are kept).
    pub fn faults(&self) -> Vec<DmaFault> {
        self.fault_list().iter().copied().collect()
    }

    fn fault_list(&self) -> MutexGuard<'_, VecDeque<DmaFault>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, fault: DmaFault) {
        self.fault_count.fetch_add(1, Ordering::Relaxed);
        let mut list = self.fault_list();
        if list.len() == FAULTS_KEPT {
            list.pop_front();
        }
        list.push_back(fault);
    }

    /// Several accesses under one lock: nothing is unmapped before the session is dropped.
    pub(crate) fn session(&self) -> Session<'_> {
        Session {
            domain: self,
            table: self.table.read().unwrap_or_else(PoisonError::into_inner),
            hint: Cell::new(0),
            read: Cell::new(0),
            written: Cell::new(0),
        }
    }
}

/// A run of accesses during which the mappings stand still.
pub(crate) struct Session<'a> {
    domain: &'a Domain,
    table: RwLockReadGuard<'a, Vec<Entry>>,
    /// Where the last address was found.
    hint: Cell<usize>,
    read: Cell<u64>,
    written: Cell<u64>,
}

impl Session<'_> {
    /// The memory behind `iova`, the offset in it, and how many bytes of `len` are contiguous there.
    #[inline]
    fn translate(&self, iova: u64, len: usize, write: bool) -> Result<(&Mapping, usize, usize), FaultReason> {
        let inside = |e: &Entry| iova >= e.iova && iova - e.iova < e.len;
        let entry = match self.table.get(self.hint.get()) {
            Some(e) if inside(e) => e,
            _ => {
                let at = self
                    .table
                    .partition_point(|e| e.iova <= iova)
                    .checked_sub(1)
                    .ok_or(FaultReason::Unmapped)?;
                let e = self.table.get(at).filter(|e| inside(e)).ok_or(FaultReason::Unmapped)?;
                self.hint.set(at);
                e
            }
        };
        if write && !entry.access.writable() {
            return Err(FaultReason::NotWritable);
        }
        if !write && !entry.access.readable() {
            return Err(FaultReason::NotReadable);
        }
        let into = iova - entry.iova;
        let room = usize::try_from(entry.len - into).unwrap_or(usize::MAX);
        Ok((&entry.memory, entry.offset + into as usize, len.min(room)))
    }

    /// Walks a range piece by piece; `each` gets memory, offset in it, offset in the range, and length.
    #[inline]
    fn walk(
        &self,
        iova: u64,
        len: usize,
        write: bool,
        mut each: impl FnMut(&Mapping, usize, usize, usize),
    ) -> Result<(), DmaFault> {
        let mut done = 0;
        while done < len {
            let at = iova.wrapping_add(done as u64);
            match self.translate(at, len - done, write) {
                Ok((memory, offset, n)) => {
                    each(memory, offset, done, n);
                    done += n;
                }
                Err(reason) => {
                    let fault = DmaFault { iova: at, len: len - done, write, reason };
                    self.domain.record(fault);
                    return Err(fault);
                }
            }
        }
        let counter = if write { &self.written } else { &self.read };
        counter.set(counter.get() + len as u64);
        Ok(())
    }

    /// Whether the whole range may be accessed. A refusal is not recorded: see [`fault`](Self::fault).
    pub(crate) fn check(&self, iova: u64, len: usize, write: bool) -> Result<(), DmaFault> {
        let mut done = 0;
        while done < len {
            let at = iova.wrapping_add(done as u64);
            match self.translate(at, len - done, write) {
                Ok((_, _, n)) => done += n,
                Err(reason) => return Err(DmaFault { iova: at, len: len - done, write, reason }),
            }
        }
        Ok(())
    }

    pub(crate) fn fault(&self, fault: DmaFault) {
        self.domain.record(fault);
    }

    pub(crate) fn read(&self, iova: u64, into: &mut [u8]) -> Result<(), DmaFault> {
        self.walk(iova, into.len(), false, |memory, offset, done, n| {
            ignore(memory.read(offset, &mut into[done..done + n]));
        })
    }

    pub(crate) fn write(&self, iova: u64, from: &[u8]) -> Result<(), DmaFault> {
        self.walk(iova, from.len(), true, |memory, offset, done, n| {
            ignore(memory.write(offset, &from[done..done + n]));
        })
    }

    pub(crate) fn copy_in(&self, iova: u64, from: &Mapping, at: usize, len: usize) -> Result<(), DmaFault> {
        self.walk(iova, len, true, |memory, offset, done, n| {
            ignore(from.copy_to(at + done, memory, offset, n));
        })
    }

    pub(crate) fn copy_out(&self, iova: u64, to: &Mapping, at: usize, len: usize) -> Result<(), DmaFault> {
        self.walk(iova, len, false, |memory, offset, done, n| {
            ignore(memory.copy_to(offset, to, at + done, n));
        })
    }

    /// Writes 16 bytes at a 16-byte aligned address so that whoever sees the second half sees the first.
    pub(crate) fn publish(&self, iova: u64, words: [u64; 2]) -> Result<(), DmaFault> {
        self.walk(iova, 16, true, |memory, offset, _, n| {
            if n == 16 && offset % 8 == 0 {
                store_pair(memory, offset, words);
            }
        })
    }
}

/// Stores two words, the second with release order.
pub(crate) fn store_pair(memory: &Mapping, offset: usize, words: [u64; 2]) {
    if let (Ok(first), Ok(second)) = (memory.u64_at(offset), memory.u64_at(offset + 8)) {
        first.store(words[0], Ordering::Relaxed);
        second.store(words[1], Ordering::Release);
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        if self.read.get() != 0 {
            self.domain.bytes_read.fetch_add(self.read.get(), Ordering::Relaxed);
        }
        if self.written.get() != 0 {
            self.domain.bytes_written.fetch_add(self.written.get(), Ordering::Relaxed);
        }
    }
}

/// Ranges were checked when they were mapped, so an access inside one cannot fail; overlap with the device's own memory
/// can (a mapping copied onto itself), and then nothing is moved.
pub(crate) fn ignore(result: Result<(), crate::mem::OutOfRange>) {
    if let Err(e) = result {
        tracing::debug!("emulated DMA skipped: {e}");
    }
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
