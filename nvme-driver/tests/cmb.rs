//! Enabling the CMB of controllers that are not as they should be.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]
mod wrap;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nvme_driver::clock::ManualClock;
use nvme_driver::cmb::CmbStatus;
use nvme_driver::controller::{Controller, ControllerError, ControllerOptions};
use nvme_driver::disk::Disk;
use nvme_driver::emu::{CmbSupport, Config, EmulatedController};
use nvme_driver::nvme_disk::NvmeDisk;
use nvme_driver::spec::regs::{self, Cmbloc, Cmbsts, Cmbsz};
use wrap::{Hands, Wrapped};

impl<F: Fn(u64, u64) -> u64 + Send + Sync> Hands for F {
    fn register(&self, offset: u64, value: u64) -> u64 {
        self(offset, value)
    }
}

fn attach(hands: impl Hands + 'static) -> Result<Arc<Controller>, ControllerError> {
    let emulated = EmulatedController::new(&Config { cmb_size: 1 << 20, ..Config::default() }).unwrap();
    let function = Arc::new(Wrapped { inner: emulated.function(), hands });
    Controller::new(function, ControllerOptions::default(), Arc::new(ManualClock::new()))
}

fn why_absent(hands: impl Hands + 'static) -> String {
    let controller = attach(hands).unwrap();
    match controller.cmb() {
        CmbStatus::Absent(reason) => reason.clone(),
        CmbStatus::Enabled(cmb) => panic!("{cmb:?}"),
    }
}

#[test]
fn a_refused_base_address_means_no_cmb() {
    let reason = why_absent(|offset, value| match offset {
        regs::CMBSTS => u32::from(Cmbsts::new().with_cbai(true)).into(),
        _ => value,
    });
    assert!(reason.contains("CBAI"), "{reason}");
}

#[test]
fn a_place_outside_the_bar_means_no_cmb() {
    let reason = why_absent(|offset, value| match offset {
        regs::CMBLOC => u32::from(Cmbloc::from(value as u32).with_ofst(0xf_ffff)).into(),
        _ => value,
    });
    assert!(reason.contains("outside a BAR"), "{reason}");
}

#[test]
fn a_size_beyond_the_bar_is_cut() {
    let controller = attach(|offset, value| match offset {
        regs::CMBSZ => u32::from(Cmbsz::from(value as u32).with_szu(3)).into(),
        _ => value,
    });
    assert_eq!(controller.unwrap().cmb().cmb().unwrap().size, 1 << 20);
}

#[test]
fn all_ones_mean_no_cmb() {
    why_absent(|offset, value| if matches!(offset, regs::CMBLOC | regs::CMBSZ) { u64::MAX } else { value });
}

#[test]
fn a_cmb_that_a_reset_changed_makes_the_controller_unusable() {
    static SHRUNK: AtomicBool = AtomicBool::new(false);
    let controller = attach(|offset, value| match offset {
        regs::CMBSZ if SHRUNK.load(Ordering::Relaxed) => {
            u32::from(Cmbsz::from(value as u32).with_sz(1)).into()
        }
        _ => value,
    });
    let controller = controller.unwrap();
    controller.reset(0).unwrap();
    let before = Arc::clone(controller.cmb().cmb().unwrap());
    assert_eq!(before.size, 1 << 20);
    SHRUNK.store(true, Ordering::Relaxed);
    let error = controller.reset(1).unwrap_err();
    assert!(matches!(error, ControllerError::Changed { .. }), "{error}");
    assert!(matches!(controller.check(), Err(ControllerError::Dead { .. })));
}

#[test]
fn a_queue_and_its_lists_are_not_parted_where_the_controller_forbids_it() {
    for (cdpcils, lists, used) in [(true, false, true), (false, false, false), (false, true, true)] {
        let emulated = EmulatedController::new(&Config { cmb_size: 4 << 20, ..Config::default() }).unwrap();
        let hands = move |offset, value: u64| match offset {
            regs::CMBLOC => u32::from(Cmbloc::from(value as u32).with_cdpcils(cdpcils)).into(),
            _ => value,
        };
        let function = Arc::new(Wrapped { inner: emulated.function(), hands });
        let options = ControllerOptions {
            cmb_queue_bytes: 2 << 20,
            cmb_prp_lists: lists,
            ..ControllerOptions::default()
        };
        let controller = Controller::new(function, options, Arc::new(ManualClock::new())).unwrap();
        let mut queue = controller.create_queue().unwrap();
        queue.flush(1, 0).unwrap();
        queue.ring();
        let cmb = controller.cmb().cmb().unwrap();
        let mut entry = [0; 64];
        cmb.queues.as_ref().unwrap().0.read(0, &mut entry).unwrap();
        assert_eq!(entry != [0; 64], used, "CDPCILS {cdpcils}, lists {lists}");
    }
}

/// SQS, LISTS, RDS and WDS in every combination, on a controller that refuses what it did not offer and any command whose data lies
/// partly in the CMB: queues and lists go there only where they may, data is refused by name, and no command is ever refused by the drive.
#[test]
fn every_combination_of_what_a_cmb_may_hold_is_honoured() {
    const QUEUES: u64 = 1280 << 10;
    for bits in 0..16u8 {
        let [sqs, lists, rds, wds] = [1, 2, 4, 8].map(|bit| bits & bit != 0);
        let cmb = CmbSupport {
            submission_queues: sqs,
            lists,
            read_data: rds,
            write_data: wds,
            mixed_data: false,
            ..CmbSupport::default()
        };
        let config = Config { cmb_size: 4 << 20, cmb, lba_size: 4096, mdts: 8, ..Config::default() };
        let emulated = EmulatedController::new(&config).unwrap();
        let options = ControllerOptions {
            cmb_queue_bytes: QUEUES,
            cmb_prp_lists: true,
            ..ControllerOptions::default()
        };
        let controller = Controller::new(emulated.function(), options, Arc::new(ManualClock::new())).unwrap();
        let mut disk = NvmeDisk::new(&controller).unwrap();
        let bytes: Vec<u8> = (0..1u32 << 20).map(|i| (i / 4096 + i) as u8).collect();
        disk.write(0, &bytes).unwrap();
        let mut back = vec![0; bytes.len()];
        disk.read(0, &mut back).unwrap();
        assert!(back == bytes);
        let end = disk.cmb().unwrap().memory.len();
        assert_eq!(end as u64, (4 << 20) - if sqs { QUEUES } else { 0 }, "{bits:#06b}");
        // Up to the last byte for data, and not one byte further.
        for len in [4096, 1 << 20] {
            let (read, write) = (disk.read_to_cmb(0, end - len, len), disk.write_from_cmb(0, end - len, len));
            assert_eq!((read.is_ok(), write.is_ok()), (rds, wds), "{bits:#06b}: {read:?} {write:?}");
        }
        assert!(disk.read_to_cmb(0, end - 4096, 8192).is_err());
        let queues = controller.cmb().cmb().unwrap().queues.as_ref().map(|(memory, _)| {
            let mut first = [0; 64];
            memory.read(0, &mut first).unwrap();
            first != [0; 64]
        });
        assert_eq!(queues.is_some(), sqs);
        // Without lists there, a queue may lie there all the same: this controller has CDPCILS.
        assert!(queues.is_none_or(|used| used), "{bits:#06b}: the queue is not in the CMB");
        assert_eq!(emulated.counters().errors, 0, "{bits:#06b}: the drive refused something");
    }
}

/// CMBs of before NVMe 1.4 (no CAP.CMBS, CMBLOC and CMBSZ always there) are left alone, and that is said.
#[test]
fn a_legacy_cmb_is_not_used() {
    let emulated = EmulatedController::new(&Config { cmb_size: 1 << 20, ..Config::default() }).unwrap();
    let hands = |offset, value: u64| match offset {
        regs::CAP => regs::Cap::from(value).with_cmbs(false).into(),
        regs::CMBLOC => u32::from(Cmbloc::new().with_bir(2)).into(),
        regs::CMBSZ => {
            u32::from(Cmbsz::new().with_sqs(true).with_rds(true).with_wds(true).with_sz(256)).into()
        }
        _ => value,
    };
    let function = Arc::new(Wrapped { inner: emulated.function(), hands });
    let controller =
        Controller::new(function, ControllerOptions::default(), Arc::new(ManualClock::new())).unwrap();
    let CmbStatus::Absent(reason) = controller.cmb() else { panic!("it is used") };
    assert!(reason.contains("before NVMe 1.4"), "{reason}");
    assert_eq!(emulated.function().read64(0, regs::CMBMSC).unwrap(), 0, "never touched");
    let mut disk = NvmeDisk::new(&controller).unwrap();
    disk.write(0, &[1; 512]).unwrap();
    assert!(disk.read_to_cmb(0, 0, 512).is_err());
}
