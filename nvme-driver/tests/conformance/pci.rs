//! Config space and interrupts.

use std::os::fd::OwnedFd;

use nvme_driver::emu::Config;
use nvme_driver::pci::PciFunction;
use nvme_driver::spec::Command;
use nvme_driver::spec::regs;
use rustix::event::{EventfdFlags, eventfd};

use crate::host::{Host, create_cq, create_sq, small, with_cmb};

fn config(f: &dyn PciFunction, at: u16, size: u8) -> u32 {
    f.config_read(at, size).unwrap()
}

/// Offset of capability `id`.
fn capability(f: &dyn PciFunction, id: u8) -> u16 {
    let mut at = config(f, 0x34, 1) as u16;
    for _ in 0..48 {
        assert!(at != 0, "capability {id:#x} is missing");
        if config(f, at, 1) == u32::from(id) {
            return at;
        }
        at = config(f, at + 1, 1) as u16;
    }
    panic!("the capability list does not end");
}

/// NVMe over PCIe 2.1 "PCI Header": type 0, class 01h 08h 02h, capabilities; BARs as they are sized.
#[test]
fn header() {
    let h = Host::new(&Config { pmr_size: 8192, ..with_cmb() });
    let f = &*h.function;
    assert_eq!(config(f, 0x08, 4) >> 8, 0x01_08_02);
    assert_eq!(config(f, 0x0e, 1), 0);
    assert_eq!(config(f, 0x06, 2) & 0x10, 0x10, "there is a capability list");
    assert_eq!(config(f, 0x3d, 1), 0, "no interrupt pin: MSI-X only");
    assert_eq!(config(f, 0x100, 4), 0, "no extended capabilities");
    let mut i = 0;
    while i < 6 {
        let at = 0x10 + 4 * i;
        let bar = f.bar(i as u8).unwrap();
        let kind = config(f, at, 4) & 0xf;
        f.config_write(at, 4, u32::MAX).unwrap();
        let mut mask = u64::from(config(f, at, 4) & !0xf) | !0xffff_ffff;
        if bar.is_64bit {
            f.config_write(at + 4, 4, u32::MAX).unwrap();
            mask = mask & 0xffff_ffff | u64::from(config(f, at + 4, 4)) << 32;
        }
        let size = if mask & 0xffff_ffff == 0 && !bar.is_64bit { 0 } else { (!mask).wrapping_add(1) };
        assert_eq!(size, bar.size, "BAR {i}");
        assert_eq!(kind, u32::from(bar.is_64bit) << 2 | u32::from(bar.prefetchable) << 3);
        i += if bar.is_64bit { 2 } else { 1 };
    }
    assert_eq!(f.bar(0).unwrap().size, 0x2000);
    assert!(f.bar(6).is_err());
}

/// Read-only bytes stay, misaligned and too large accesses are refused.
#[test]
fn config_accesses() {
    let h = Host::new(&small());
    let f = &*h.function;
    let id = config(f, 0, 4);
    f.config_write(0, 4, 0).unwrap();
    assert_eq!(config(f, 0, 4), id);
    assert_eq!(config(f, 0, 2) | config(f, 2, 2) << 16, id);
    for (at, size) in [(1, 2), (2, 4), (0, 3), (0, 8), (0, 0), (4096, 1), (4094, 4), (0xffff, 1)] {
        assert!(f.config_read(at, size).is_err(), "{at:#x} {size}");
        assert!(f.config_write(at, size, 0).is_err(), "{at:#x} {size}");
    }
    f.config_write(0x3c, 1, 0x2a).unwrap();
    assert_eq!(config(f, 0x3c, 1), 0x2a);
    // The command register: memory space, bus master, interrupt disable.
    f.config_write(4, 2, 0xffff).unwrap();
    assert_eq!(config(f, 4, 2), 0x0406);
    f.set_bus_master(false).unwrap();
    assert_eq!(config(f, 4, 2), 0x0402);
}

/// PCI Express capability: an endpoint with Function Level Reset, which works.
#[test]
fn express_capability() {
    let mut h = Host::ready();
    let f = h.function.clone();
    let at = capability(&*f, 0x10);
    assert_eq!(config(&*f, at + 2, 2) & 0xff, 0x02, "version 2, endpoint");
    assert_ne!(config(&*f, at + 4, 4) & (1 << 28), 0, "FLR");
    f.config_write(at + 8, 2, 0x2810 | 1 << 15).unwrap();
    assert_eq!(h.r32(regs::CC), 0);
    assert_eq!(config(&*f, at + 8, 2) & (1 << 15), 0);
    assert_eq!(config(&*f, 4, 2), 0);
    f.set_bus_master(true).unwrap();
    h.enable();
    assert_eq!(config(&*f, capability(&*f, 0x01) + 4, 2), 0x08, "D0, no soft reset");
}

fn eventfds(n: usize) -> Vec<OwnedFd> {
    (0..n).map(|_| eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()).collect()
}

/// Signals since the last call.
fn signals(fd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(_) => 0,
    }
}

/// A host with MSI-X on and queue 1 on vector 2.
fn with_vectors() -> (Host, Vec<OwnedFd>) {
    let mut h = Host::ready_with(&Config { io_queues: 4, ..small() });
    let fds = eventfds(5);
    h.function.set_interrupts(&fds).unwrap();
    let (sq, cq) = (h.pages(1), h.pages(1));
    h.ok(0, Command { cdw11: 3 | 2 << 16, ..create_cq(1, cq, 16) });
    h.ok(0, create_sq(1, sq, 16, 1));
    let pair = crate::host::Pair { sq, cq, sq_entries: 16, cq_entries: 16, tail: 0, head: 0, phase: true };
    h.pairs.insert(1, pair);
    signals(&fds[0]);
    (h, fds)
}

/// Base 7.5 "Interrupts": MSI-X by eventfd, on the queue's own vector, only where interrupts are enabled.
#[test]
fn msix_signals_the_queues_vector() {
    let (mut h, fds) = with_vectors();
    h.ok(1, Command::new(0, 1));
    let got: Vec<u64> = fds.iter().map(signals).collect();
    assert_eq!(got, [0, 0, 1, 0, 0]);
    h.ok(0, crate::host::get_feature(7));
    assert_eq!(signals(&fds[0]), 1, "the admin queue is vector 0");
    // A queue without IEN.
    h.create_pair(2, 8);
    fds.iter().for_each(|f| _ = signals(f));
    h.ok(2, Command::new(0, 1));
    assert!(fds.iter().all(|f| signals(f) == 0));
    assert_eq!(h.controller.counters().interrupts, 6);
    h.function.set_interrupts(&[]).unwrap();
    h.ok(1, Command::new(0, 1));
    assert!(fds.iter().all(|f| signals(f) == 0));
}

/// PCI "MSI-X Capability and Table Structure": table and PBA in a BAR of their own; a masked vector is pending, and is
/// signalled when it is unmasked.
#[test]
fn masked_vectors_are_pending() {
    let (mut h, fds) = with_vectors();
    let f = h.function.clone();
    let at = capability(&*f, 0x11);
    assert_eq!(config(&*f, at + 2, 2) & 0x7ff, 4, "five vectors, 0's based");
    let (table, pba) = (config(&*f, at + 4, 4), config(&*f, at + 8, 4));
    let bar = (table & 7) as u8;
    assert_eq!(pba & 7, table & 7);
    assert!(bar != 0 && bar != 2);
    let (table, pba) = (u64::from(table & !7), u64::from(pba & !7));
    assert_eq!(f.read32(bar, table + 2 * 16 + 12).unwrap(), 1, "masked after reset");
    f.write32(bar, table + 2 * 16, 0xfee0_0003).unwrap();
    assert_eq!(f.read32(bar, table + 2 * 16).unwrap(), 0xfee0_0000);
    f.write32(bar, table + 2 * 16 + 12, 1).unwrap();
    h.ok(1, Command::new(0, 1));
    h.ok(1, Command::new(0, 1));
    assert_eq!((signals(&fds[2]), f.read32(bar, pba).unwrap()), (0, 1 << 2));
    f.write32(bar, pba, 0).unwrap();
    assert_eq!(f.read64(bar, pba).unwrap(), 1 << 2, "the PBA is read-only");
    f.write32(bar, table + 2 * 16 + 12, 0).unwrap();
    assert_eq!((signals(&fds[2]), f.read32(bar, pba).unwrap()), (1, 0));
    h.ok(1, Command::new(0, 1));
    assert_eq!(signals(&fds[2]), 1);
    // Function Mask, in the capability's Message Control.
    f.config_write(at + 2, 2, 0xc000).unwrap();
    h.ok(1, Command::new(0, 1));
    assert_eq!((signals(&fds[2]), f.read32(bar, pba).unwrap()), (0, 1 << 2));
    f.config_write(at + 2, 2, 0x8000).unwrap();
    assert_eq!((signals(&fds[2]), f.read32(bar, pba).unwrap()), (1, 0));
}
