//! The controller's view of the bus: its own CMB and PMR ranges, decoded by itself, and everything else through the IOMMU.

use std::sync::Arc;

use super::iommu::DmaFault;
use super::session::{Session, ignore, store_pair};
use crate::mem::Mapping;

/// What answers at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The Controller Memory Buffer.
    Cmb,
    /// The Persistent Memory Region.
    Pmr,
    /// Whatever the IOMMU maps.
    Host,
}

/// A range of the controller's own memory as it is decoded now.
#[derive(Clone)]
pub(super) struct Window {
    pub(super) place: Place,
    pub(super) base: u64,
    pub(super) memory: Arc<Mapping>,
}

/// All addresses a command may name, for the time of one step.
pub(super) struct Bus<'a> {
    iommu: Session<'a>,
    windows: [Option<Window>; 2],
}

impl<'a> Bus<'a> {
    pub(super) fn new(iommu: Session<'a>, windows: [Option<Window>; 2]) -> Self {
        Self { iommu, windows }
    }

    /// Who answers at `addr`, where in it, and for how many of `len` bytes.
    #[inline]
    fn decode(&self, addr: u64, len: usize) -> (Option<&Window>, usize, usize) {
        let mut len = len;
        for w in self.windows.iter().flatten() {
            if addr >= w.base {
                let into = addr - w.base;
                if into < w.memory.len() as u64 {
                    let into = into as usize;
                    return (Some(w), into, len.min(w.memory.len() - into));
                }
            } else {
                // Stop where the window begins.
                len = len.min(usize::try_from(w.base - addr).unwrap_or(usize::MAX));
            }
        }
        (None, 0, len)
    }

    /// What answers at `addr`.
    #[inline]
    pub(super) fn place(&self, addr: u64) -> Place {
        self.decode(addr, 1).0.map_or(Place::Host, |w| w.place)
    }

    /// Bytes moved so far that were in another device's memory behind the IOMMU.
    pub(super) fn peer_bytes(&self) -> u64 {
        self.iommu.peer_bytes()
    }

    /// How many of `len` bytes at `addr` are in the same place as the first.
    #[inline]
    pub(super) fn len_in_place(&self, addr: u64, len: usize) -> usize {
        self.decode(addr, len).2
    }

    #[inline]
    fn walk(
        &self,
        addr: u64,
        len: usize,
        mut own: impl FnMut(&Mapping, usize, usize, usize),
        mut host: impl FnMut(&Session<'_>, u64, usize, usize) -> Result<(), DmaFault>,
    ) -> Result<(), DmaFault> {
        let mut done = 0;
        while done < len {
            let at = addr.wrapping_add(done as u64);
            let (window, offset, n) = self.decode(at, len - done);
            match window {
                Some(w) => own(&w.memory, offset, done, n),
                None => host(&self.iommu, at, done, n)?,
            }
            done += n;
        }
        Ok(())
    }

    pub(super) fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), DmaFault> {
        let len = into.len();
        let into = std::cell::RefCell::new(into);
        self.walk(
            addr,
            len,
            |m, offset, done, n| ignore(m.read(offset, &mut into.borrow_mut()[done..done + n])),
            |s, at, done, n| s.read(at, &mut into.borrow_mut()[done..done + n]),
        )
    }

    pub(super) fn write(&self, addr: u64, from: &[u8]) -> Result<(), DmaFault> {
        self.walk(
            addr,
            from.len(),
            |m, offset, done, n| ignore(m.write(offset, &from[done..done + n])),
            |s, at, done, n| s.write(at, &from[done..done + n]),
        )
    }

    /// Device memory to the bus.
    pub(super) fn copy_in(&self, addr: u64, from: &Mapping, at: usize, len: usize) -> Result<(), DmaFault> {
        self.walk(
            addr,
            len,
            |m, offset, done, n| ignore(from.copy_to(at + done, m, offset, n)),
            |s, a, done, n| s.copy_in(a, from, at + done, n),
        )
    }

    /// The bus to device memory.
    pub(super) fn copy_out(&self, addr: u64, to: &Mapping, at: usize, len: usize) -> Result<(), DmaFault> {
        self.walk(
            addr,
            len,
            |m, offset, done, n| ignore(m.copy_to(offset, to, at + done, n)),
            |s, a, done, n| s.copy_out(a, to, at + done, n),
        )
    }

    /// Whether the device may read `len` bytes there; a refusal is recorded as the fault it would have been.
    pub(super) fn check_readable(&self, addr: u64, len: usize) -> Result<(), DmaFault> {
        self.walk(
            addr,
            len,
            |_, _, _, _| (),
            |s, at, _, n| s.check(at, n, false).inspect_err(|f| s.fault(*f)),
        )
    }

    /// Writes 16 bytes at a 16-byte aligned address; whoever sees the second half sees the first.
    pub(super) fn publish(&self, addr: u64, words: [u64; 2]) -> Result<(), DmaFault> {
        self.walk(
            addr,
            16,
            |m, offset, _, n| {
                if n == 16 {
                    store_pair(m, offset, words);
                }
            },
            |s, at, _, _| s.publish(at, words),
        )
    }
}
