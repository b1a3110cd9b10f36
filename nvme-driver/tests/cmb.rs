//! Enabling the CMB of controllers that are not as they should be.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]
mod wrap;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nvme_driver::clock::ManualClock;
use nvme_driver::cmb::CmbStatus;
use nvme_driver::controller::{Controller, ControllerError, ControllerOptions};
use nvme_driver::emu::{Config, EmulatedController};
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
