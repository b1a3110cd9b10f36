//! Window memory as this process has mapped it, and the copies to and from it.
#![expect(unsafe_code, reason = "volatile 8-byte accesses to device memory")]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use nvme_driver::mem::{Mapping, OutOfRange};

use crate::layout::{Home, Place};

/// What kind of memory a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    /// Ordinary memory: host cache, or the CMB of an emulated controller.
    Ordinary,
    /// Memory on a device, behind a bus: aligned accesses of at most 8 bytes, and a canary word at this offset of the
    /// region that never holds all ones; reading all ones there means that the device is gone.
    Device {
        /// Offset of the canary in the CMB, in bytes.
        canary: u64,
    },
}

/// One mapped stretch of the CMB or of a host-cache file.
#[derive(Clone, Debug)]
pub struct Region {
    memory: Arc<Mapping>,
    base: u64,
    kind: RegionKind,
}

impl Region {
    /// `memory` holds the bytes from `base` on, in bytes of the CMB or of the host-cache file.
    pub fn new(memory: Arc<Mapping>, base: u64, kind: RegionKind) -> Self {
        Self { memory, base, kind }
    }

    /// The mapping.
    pub fn memory(&self) -> &Arc<Mapping> {
        &self.memory
    }

    /// Where `len` bytes from `offset` (of the CMB or file) lie in the mapping, if they all do.
    #[inline]
    pub fn locate(&self, offset: u64, len: usize) -> Option<usize> {
        let at = usize::try_from(offset.checked_sub(self.base)?).ok()?;
        (at.checked_add(len)? <= self.memory.len()).then_some(at)
    }

    /// Copies out `into.len()` bytes from `at` bytes into the mapping.
    #[inline]
    pub(crate) fn read(&self, at: usize, into: &mut [u8]) -> Result<(), OutOfRange> {
        match self.kind {
            RegionKind::Ordinary => self.memory.read(at, into),
            RegionKind::Device { .. } => self.read_device(at, into),
        }
    }

    /// Copies in `from` at `at` bytes into the mapping.
    #[inline]
    pub(crate) fn write(&self, at: usize, from: &[u8]) -> Result<(), OutOfRange> {
        match self.kind {
            RegionKind::Ordinary => self.memory.write(at, from),
            RegionKind::Device { .. } => self.write_device(at, from),
        }
    }

    /// Whether the device behind the region still answers. Always true for ordinary memory.
    #[inline]
    pub(crate) fn present(&self) -> bool {
        let RegionKind::Device { canary } = self.kind else { return true };
        self.locate(canary, 8)
            .and_then(|at| self.memory.u64_at(at).ok())
            .is_none_or(|w| w.load(Ordering::Acquire) != u64::MAX)
    }

    /// Aligned words of 8 bytes, and single bytes at unaligned ends: wide loads on a device's BAR are undefined there.
    #[cold]
    fn read_device(&self, at: usize, into: &mut [u8]) -> Result<(), OutOfRange> {
        self.check(at, into.len())?;
        let mut done = 0;
        while done < into.len() {
            let p = self.memory.as_ptr().wrapping_add(at + done);
            if p.addr().is_multiple_of(8) && into.len() - done >= 8 {
                // SAFETY: `check` put the range inside the live mapping; 8-byte aligned, volatile, any bit pattern is a u64.
                let word = unsafe { p.cast::<u64>().read_volatile() };
                into[done..done + 8].copy_from_slice(&word.to_ne_bytes());
                done += 8;
            } else {
                // SAFETY: as above, one byte.
                into[done] = unsafe { p.read_volatile() };
                done += 1;
            }
        }
        Ok(())
    }

    #[cold]
    fn write_device(&self, at: usize, from: &[u8]) -> Result<(), OutOfRange> {
        self.check(at, from.len())?;
        if self.memory.access() == nvme_driver::mem::Access::ReadOnly {
            return self.memory.write(at, from);
        }
        let mut done = 0;
        while done < from.len() {
            let p = self.memory.as_ptr().wrapping_add(at + done);
            if p.addr().is_multiple_of(8)
                && let Some(word) = from[done..].first_chunk::<8>()
            {
                // SAFETY: `check` put the range inside the live, writable mapping; 8-byte aligned, volatile.
                unsafe { p.cast::<u64>().write_volatile(u64::from_ne_bytes(*word)) };
                done += 8;
            } else {
                // SAFETY: as above, one byte.
                unsafe { p.write_volatile(from[done]) };
                done += 1;
            }
        }
        if let Some(last) = from.len().checked_sub(1) {
            let p = self.memory.as_ptr().wrapping_add(at + last);
            // Posted writes are on their way until something is read back; only then may anyone be told of them.
            // SAFETY: the last byte of the range checked above.
            unsafe { p.read_volatile() };
        }
        Ok(())
    }

    fn check(&self, at: usize, len: usize) -> Result<(), OutOfRange> {
        if at.checked_add(len).is_some_and(|end| end <= self.memory.len()) {
            return Ok(());
        }
        Err(OutOfRange { offset: at, len, size: self.memory.len(), access: self.memory.access() })
    }
}

/// The memory that a reader or writer of one object has mapped.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// The CMB, if this process may map it.
    pub cmb: Option<Region>,
    /// Stretches of the object's host-cache file; usually one.
    pub host: Vec<Region>,
}

impl View {
    /// The region that holds `len` bytes at `offset` bytes into the window at `place`, and where in it they are.
    #[inline]
    pub fn locate(&self, place: Place, offset: usize, len: usize) -> Option<(&Region, usize)> {
        let from = place.offset().checked_add(offset as u64)?;
        match place.home() {
            Home::Cmb => {
                let region = self.cmb.as_ref()?;
                Some((region, region.locate(from, len)?))
            }
            Home::Host => self.host.iter().find_map(|region| Some((region, region.locate(from, len)?))),
            Home::None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_memory_is_copied_word_by_word_to_the_same_bytes() {
        let memory = Mapping::memfd("region", 8192).unwrap();
        let region = Region::new(Arc::clone(&memory), 4096, RegionKind::Device { canary: 4096 + 8184 });
        let bytes: Vec<u8> = (0..61).collect();
        for at in 0..9 {
            region.write(at, &bytes).unwrap();
            let (mut a, mut b) = (vec![0; 61], vec![0; 61]);
            region.read(at, &mut a).unwrap();
            memory.read(at, &mut b).unwrap();
            assert_eq!((&a, &b), (&bytes, &bytes));
        }
        assert!(region.present());
        memory.write(8184, &[0xff; 8]).unwrap();
        assert!(!region.present());
        assert!(region.read(8190, &mut [0; 3]).is_err());
        assert_eq!(region.locate(4095, 1), None);
        assert_eq!(region.locate(4096 + 8192 - 1, 1), Some(8191));
    }
}
