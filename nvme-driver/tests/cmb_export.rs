//! Ranges of the CMB as dma-bufs: which ranges, and until when.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]
mod wrap;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use nvme_driver::clock::ManualClock;
use nvme_driver::cmb::ExportError;
use nvme_driver::controller::{Controller, ControllerOptions};
use nvme_driver::emu::{Config, EmulatedController};
use nvme_driver::mem::Mapping;
use nvme_driver::pci::PciError;
use nvme_driver::spec::regs::{self, Cmbloc};
use wrap::{Hands, Wrapped};

/// Lets parts of BARs be exported, and notes which. The CMB begins 64 KiB into its BAR.
struct Exports(Arc<Mutex<Vec<(u8, u64, u64)>>>);

const CMB_OFFSET: u64 = 64 << 10;

impl Hands for Exports {
    fn register(&self, offset: u64, value: u64) -> u64 {
        match offset {
            regs::CMBLOC => {
                u32::from(Cmbloc::from(value as u32).with_ofst((CMB_OFFSET / 4096) as u32)).into()
            }
            _ => value,
        }
    }
    fn export(&self, bar: u8, offset: u64, len: u64) -> Option<OwnedFd> {
        self.0.lock().unwrap().push((bar, offset, len));
        let memory = Mapping::memfd("exported", len as usize).unwrap();
        Some(memory.fd().unwrap().0.try_clone_to_owned().unwrap())
    }
}

#[test]
fn an_export_is_exactly_its_range_and_never_a_queue() {
    let seen = Arc::default();
    let emulated = EmulatedController::new(&Config { cmb_size: 1 << 20, ..Config::default() }).unwrap();
    let function = Arc::new(Wrapped { inner: emulated.function(), hands: Exports(Arc::clone(&seen)) });
    let options = ControllerOptions { cmb_queue_bytes: 256 << 10, ..ControllerOptions::default() };
    let controller = Controller::new(function, options, Arc::new(ManualClock::new())).unwrap();
    let cmb = controller.cmb().cmb().unwrap();
    let data = cmb.data.memory.len() as u64;
    assert_eq!(data, (1 << 20) - CMB_OFFSET - (256 << 10));
    for (offset, len) in [(0, 4096), (8192, 65536), (data - 4096, 4096), (0, data)] {
        let export = controller.export_cmb(offset, len).unwrap();
        assert_eq!((export.offset(), export.len()), (offset, len));
        assert_eq!(seen.lock().unwrap().pop(), Some((cmb.bar, CMB_OFFSET + offset, len)));
    }
    // The page after the data is a queue's.
    for (offset, len) in [(data, 4096), (0, data + 4096), (data - 4096, 8192)] {
        assert!(matches!(controller.export_cmb(offset, len), Err(ExportError::OutOfRange { .. })));
    }
    for (offset, len) in [(0, 0), (1, 4096), (0, 4095), (u64::MAX - 4095, 4096), (0, u64::MAX - 4095)] {
        assert!(matches!(controller.export_cmb(offset, len), Err(ExportError::OutOfRange { .. })));
    }
    assert!(seen.lock().unwrap().is_empty());
}

#[test]
fn a_reset_makes_an_export_stale_until_it_is_made_again() {
    let emulated = EmulatedController::new(&Config { cmb_size: 1 << 20, ..Config::default() }).unwrap();
    let function = Arc::new(Wrapped { inner: emulated.function(), hands: Exports(Arc::default()) });
    let clock = Arc::new(ManualClock::new());
    let controller = Controller::new(function, ControllerOptions::default(), clock).unwrap();
    let before = controller.export_cmb(0, 4096).unwrap();
    assert!(before.is_current(&controller));
    controller.reset(controller.epoch()).unwrap();
    assert!(!before.is_current(&controller));
    assert!(controller.export_cmb(0, 4096).unwrap().is_current(&controller));
}

#[test]
fn what_cannot_be_exported_says_why() {
    let without = EmulatedController::new(&Config::default()).unwrap();
    let clock = Arc::new(ManualClock::new());
    let controller = Controller::new(without.function(), ControllerOptions::default(), clock).unwrap();
    let error = controller.export_cmb(0, 4096).unwrap_err();
    assert!(matches!(&error, ExportError::Absent { reason, .. } if reason.contains("CAP.CMBS")), "{error}");
    let with = EmulatedController::new(&Config { cmb_size: 1 << 20, ..Config::default() }).unwrap();
    let clock = Arc::new(ManualClock::new());
    let controller = Controller::new(with.function(), ControllerOptions::default(), clock).unwrap();
    let error = controller.export_cmb(0, 4096).unwrap_err();
    assert!(matches!(error, ExportError::Pci(PciError::Unsupported { .. })), "{error}");
}
