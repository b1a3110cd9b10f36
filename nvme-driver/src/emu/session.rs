//! A device's accesses through the emulated IOMMU: translated, checked, counted.

use std::cell::Cell;
use std::io;
use std::sync::RwLockReadGuard;
use std::sync::atomic::Ordering;

use super::iommu::{DmaFault, Domain, Entry, FaultReason};
use super::remote::{pull, push};
use crate::mem::Mapping;
use crate::pci::RemoteMemory;

/// A run of accesses during which the mappings stand still.
pub(crate) struct Session<'a> {
    domain: &'a Domain,
    table: RwLockReadGuard<'a, Vec<Entry>>,
    /// Where the last address was found.
    hint: Cell<usize>,
    read: Cell<u64>,
    written: Cell<u64>,
    /// Of all bytes moved, those in another device's memory.
    peer: Cell<u64>,
}

impl<'a> Session<'a> {
    pub(super) fn new(domain: &'a Domain, table: RwLockReadGuard<'a, Vec<Entry>>) -> Self {
        let zero = || Cell::new(0);
        Self { domain, table, hint: Cell::new(0), read: zero(), written: zero(), peer: zero() }
    }

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

    /// Walks a range piece by piece; `each` gets the data, memory, offset in it, offset in the range, and length; `remote` the same
    /// with the owner of remote memory and the address there.
    #[inline]
    fn walk<D>(
        &self,
        iova: u64,
        len: usize,
        write: bool,
        mut data: D,
        mut each: impl FnMut(&mut D, &Mapping, usize, usize, usize),
        mut remote: impl FnMut(&mut D, &dyn RemoteMemory, u64, usize, usize) -> io::Result<()>,
    ) -> Result<(), DmaFault> {
        let mut done = 0;
        while done < len {
            let at = iova.wrapping_add(done as u64);
            match self.translate(at, len - done, write) {
                Ok((memory, offset, n)) => {
                    each(&mut data, memory, offset, done, n);
                    if memory.is_device() {
                        self.peer.set(self.peer.get() + n as u64);
                    }
                    done += n;
                }
                Err(FaultReason::Unmapped) => {
                    let ask = |owner: &dyn RemoteMemory, n| remote(&mut data, owner, at, done, n);
                    done += self.domain.ask(at, len - done, write, ask)?;
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
                Err(reason) => {
                    let asked = match reason {
                        FaultReason::Unmapped => self.domain.may_ask(at, len - done, write),
                        reason => Err(reason),
                    };
                    done += asked.map_err(|reason| DmaFault { iova: at, len: len - done, write, reason })?;
                }
            }
        }
        Ok(())
    }

    /// Bytes moved so far between the device and the memory of other devices.
    pub(crate) fn peer_bytes(&self) -> u64 {
        self.peer.get()
    }

    pub(crate) fn fault(&self, fault: DmaFault) {
        self.domain.record(fault);
    }

    pub(crate) fn read(&self, iova: u64, into: &mut [u8]) -> Result<(), DmaFault> {
        self.walk(
            iova,
            into.len(),
            false,
            into,
            |into, memory, offset, done, n| ignore(memory.read(offset, &mut into[done..done + n])),
            |into, owner, at, done, n| owner.read(at, &mut into[done..done + n]),
        )
    }

    pub(crate) fn write(&self, iova: u64, from: &[u8]) -> Result<(), DmaFault> {
        self.walk(
            iova,
            from.len(),
            true,
            from,
            |from, memory, offset, done, n| ignore(memory.write(offset, &from[done..done + n])),
            |from, owner, at, done, n| owner.write(at, &from[done..done + n]),
        )
    }

    pub(crate) fn copy_in(&self, iova: u64, from: &Mapping, at: usize, len: usize) -> Result<(), DmaFault> {
        self.walk(
            iova,
            len,
            true,
            from,
            |from, memory, offset, done, n| ignore(from.copy_to(at + done, memory, offset, n)),
            |from, owner, iova, done, n| push(owner, iova, from, at + done, n),
        )
    }

    pub(crate) fn copy_out(&self, iova: u64, to: &Mapping, at: usize, len: usize) -> Result<(), DmaFault> {
        self.walk(
            iova,
            len,
            false,
            to,
            |to, memory, offset, done, n| ignore(memory.copy_to(offset, to, at + done, n)),
            |to, owner, iova, done, n| pull(owner, iova, to, at + done, n),
        )
    }

    /// Writes 16 bytes at a 16-byte aligned address so that whoever sees the second half sees the first.
    pub(crate) fn publish(&self, iova: u64, words: [u64; 2]) -> Result<(), DmaFault> {
        self.walk(
            iova,
            16,
            true,
            words,
            |words, memory, offset, _, n| {
                if n == 16 && offset % 8 == 0 {
                    store_pair(memory, offset, *words);
                }
            },
            |words, owner, at, done, n| {
                let bytes: [u8; 16] = bytemuck::cast(words.map(u64::to_le));
                owner.write(at, &bytes[done..done + n])
            },
        )
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
        self.domain.count(self.read.get(), self.written.get());
    }
}

/// Ranges were checked when they were mapped, so an access inside one cannot fail; overlap with the device's own memory
/// can (a mapping copied onto itself), and then nothing is moved.
pub(crate) fn ignore(result: Result<(), crate::mem::OutOfRange>) {
    if let Err(e) = result {
        tracing::debug!("emulated DMA skipped: {e}");
    }
}
