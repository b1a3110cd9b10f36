//! DMA memory when the IOMMU or the system refuses.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]
mod wrap;

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nvme_driver::dma::{DmaArena, DmaError};
use nvme_driver::emu::{Config, EmulatedController};
use nvme_driver::iova::IovaAllocator;
use nvme_driver::mem::Mapping;
use nvme_driver::pci::{DmaAccess, PciError, PciFunction};
use wrap::{Hands, Wrapped};

/// An IOMMU that refuses so many mappings, with room for two chunks and a hole between them.
struct Refusing(AtomicU32);

impl Hands for Refusing {
    fn map(&self, _memory: &Arc<Mapping>, _len: usize, _iova: u64) -> Result<(), String> {
        if self.0.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        self.0.fetch_sub(1, Ordering::Relaxed);
        Err("RLIMIT_MEMLOCK is too small".to_owned())
    }
    fn iova_ranges(&self, _inner: Vec<RangeInclusive<u64>>) -> Vec<RangeInclusive<u64>> {
        vec![0x0020_0000..=0x003f_ffff, 0x0080_0000..=0x009f_ffff]
    }
}

fn refusing(times: u32) -> (Arc<EmulatedController>, Arc<IovaAllocator>, DmaArena) {
    let emulated = EmulatedController::new(&Config::default()).unwrap();
    let function: Arc<dyn PciFunction> =
        Arc::new(Wrapped { inner: emulated.function(), hands: Refusing(AtomicU32::new(times)) });
    let iova = Arc::new(IovaAllocator::new(function.iova_ranges()));
    let arena = DmaArena::new(function, Arc::clone(&iova));
    (emulated, iova, arena)
}

#[test]
fn a_refused_mapping_is_an_error_and_costs_no_address() {
    let (emulated, iova, arena) = refusing(1);
    let before = iova.free_bytes();
    let error = arena.alloc(4096).unwrap_err();
    assert!(matches!(error, DmaError::Map(PciError::DmaMap { .. })), "{error}");
    assert!(error.to_string().contains("RLIMIT_MEMLOCK"));
    assert_eq!((iova.free_bytes(), arena.in_use()), (before, 0));
    let buffer = arena.alloc(4096).unwrap();
    assert!(emulated.domain().is_mapped(buffer.bus_address(), 4096, DmaAccess::ReadWrite));
}

#[test]
fn buffers_are_apart_reach_their_own_memory_and_come_back() {
    let (emulated, iova, arena) = refusing(0);
    let before = iova.free_bytes();
    let (a, b) = (arena.alloc(100).unwrap(), arena.alloc(8192).unwrap());
    assert_eq!((a.len(), b.len()), (4096, 8192));
    assert_eq!(arena.in_use(), 12288);
    a.write(0, &[1; 4096]).unwrap();
    b.write(0, &[2; 8192]).unwrap();
    let mut got = [0; 4096];
    emulated.domain().read(a.bus_address(), &mut got).unwrap();
    assert_eq!(got, [1; 4096]);
    emulated.domain().read(b.bus_address() + 4096, &mut got).unwrap();
    assert_eq!(got, [2; 4096]);
    assert!(a.write(4095, &[0; 2]).is_err());
    assert!(b.read(usize::MAX, &mut [0]).is_err());
    let at = a.bus_address();
    drop(a);
    assert_eq!(arena.alloc(4096).unwrap().bus_address(), at);
    assert_eq!(arena.in_use(), 8192);
    drop(arena);
    // The last buffer keeps the memory mapped.
    assert!(emulated.domain().is_mapped(b.bus_address(), 8192, DmaAccess::ReadWrite));
    drop(b);
    assert_eq!(iova.free_bytes(), before);
    assert!(!emulated.domain().is_mapped(at, 4096, DmaAccess::Read));
}

#[test]
fn running_out_of_addresses_is_an_error() {
    let (_emulated, _iova, arena) = refusing(0);
    assert!(matches!(arena.alloc(4 << 20), Err(DmaError::Iova(_))), "no range is that long");
    let _both = (arena.alloc(2 << 20).unwrap(), arena.alloc(2 << 20).unwrap());
    assert!(matches!(arena.alloc(1), Err(DmaError::Iova(_))));
    assert!(matches!(arena.alloc(0), Err(DmaError::BadSize(0))));
    assert!(matches!(arena.alloc(usize::MAX), Err(DmaError::BadSize(_))));
}
