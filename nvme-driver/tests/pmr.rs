//! The Persistent Memory Region: enabled in time, kept across everything, and every way it can be broken.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]
mod wrap;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nvme_driver::clock::{Clock, ManualClock};
use nvme_driver::controller::{Controller, ControllerOptions};
use nvme_driver::emu::{Config, EmulatedController, PowerCut};
use nvme_driver::pci::PciError;
use nvme_driver::pmr::{Health, Pmr, PmrError};
use nvme_driver::queue::Data;
use nvme_driver::spec::regs::{self, Pmrcap, Pmrsts};
use wrap::{Hands, Wrapped};

const SIZE: usize = 1 << 20;

/// Registers as the test wants them; PMRSTS by how often it has been read.
struct Bent<F>(F, AtomicU64);

impl<F: Fn(u64, u64, u64) -> u64 + Send + Sync> Hands for Bent<F> {
    fn register(&self, offset: u64, value: u64) -> u64 {
        let reads = if offset == regs::PMRSTS { self.1.fetch_add(1, Ordering::Relaxed) } else { 0 };
        self.0(offset, value, reads)
    }
}

fn emulated() -> Arc<EmulatedController> {
    EmulatedController::new(&Config { pmr_size: SIZE as u64, cmb_size: 1 << 20, ..Config::default() })
        .unwrap()
}

fn controller(emulated: &Arc<EmulatedController>) -> Arc<Controller> {
    Controller::new(emulated.function(), ControllerOptions::default(), Arc::new(ManualClock::new())).unwrap()
}

/// What enabling gives on a controller whose registers are bent, and how long that took.
fn bent(
    bend: impl Fn(u64, u64, u64) -> u64 + Send + Sync + 'static,
) -> (Arc<Controller>, Result<Pmr, PmrError>, Duration) {
    let function = Arc::new(Wrapped { inner: emulated().function(), hands: Bent(bend, AtomicU64::new(0)) });
    let clock = Arc::new(ManualClock::new());
    let controller =
        Controller::new(function, ControllerOptions::default(), Arc::clone(&clock) as Arc<dyn Clock>)
            .unwrap();
    let start = clock.now();
    let pmr = Pmr::enable(&controller);
    let took = clock.now() - start;
    (controller, pmr, took)
}

fn status(value: u64) -> Pmrsts {
    Pmrsts::from(value as u32)
}

fn word(status: Pmrsts) -> u64 {
    u32::from(status).into()
}

/// Sends one command and waits for its success.
fn run(controller: &Arc<Controller>, write: bool, lba: u64, data: Data) {
    let mut queue = controller.create_queue().unwrap();
    let blocks = (data.len / 512) as u32;
    if write { queue.write(1, lba, blocks, data, 0) } else { queue.read(1, lba, blocks, data, 0) }.unwrap();
    queue.ring();
    for _ in 0..1000 {
        if queue.reap(1, |d| assert!(d.status.is_success(), "{}", d.status)).unwrap() == 1 {
            return;
        }
    }
    panic!("no completion");
}

#[test]
fn bytes_survive_resets_and_power_cuts_and_commands_use_them() {
    let emulated = emulated();
    let pattern: Vec<u8> = (0..8192).map(|i| (i / 7) as u8).collect();
    {
        let controller = controller(&emulated);
        let pmr = Pmr::enable(&controller).unwrap();
        assert_eq!((pmr.size(), pmr.health()), (SIZE, Health::Normal));
        assert!(pmr.takes_read_data() && pmr.gives_write_data());
        pmr.write(4096, &pattern).unwrap();
        pmr.barrier().unwrap();
        // Out of it onto the drive, and from there back into it.
        let at = pmr.bus_address().unwrap();
        run(&controller, true, 8, Data { address: at + 4096, len: 8192 });
        controller.reset(0).unwrap();
        run(&controller, false, 8, Data { address: at + 65536, len: 8192 });
        pmr.barrier().unwrap();
        let counters = emulated.counters();
        assert_eq!((counters.pmr_to_drive, counters.drive_to_pmr), (8192, 8192));
        assert!(emulated.domain().faults().is_empty());
    }
    assert_eq!(emulated.function().read32(0, regs::PMRCTL).unwrap(), 0, "dropped, and still enabled");
    assert_eq!(emulated.function().read32(0, regs::PMRMSCL).unwrap(), 0, "dropped, and still decoded");
    emulated.power_cut(PowerCut::LoseAll).unwrap();
    let controller = controller(&emulated);
    let pmr = Pmr::enable(&controller).unwrap();
    for at in [4096, 65536] {
        let mut got = vec![0; pattern.len()];
        pmr.read(at, &mut got).unwrap();
        assert!(got == pattern, "what was at {at:#x} differs after the power cut");
    }
    assert!(matches!(pmr.read(SIZE - 1, &mut [0; 2]), Err(PmrError::Memory(_))));
    assert!(matches!(pmr.write(usize::MAX, &[0; 2]), Err(PmrError::Memory(_))));
}

/// A killed process leaves the region decoded. Where it was is where the next one has its DMA memory, and would get the region's bytes.
#[test]
fn what_a_killed_process_left_decoded_is_in_nobodys_way() {
    let emulated = emulated();
    let killed = Pmr::enable(&controller(&emulated)).unwrap();
    killed.write(0, &[7; 4096]).unwrap();
    killed.barrier().unwrap();
    let left = killed.bus_address().unwrap();
    drop(killed);
    let function = emulated.function();
    function.write32(0, regs::PMRCTL, 1).unwrap();
    function.write32(0, regs::PMRMSCU, (left >> 32) as u32).unwrap();
    function.write32(0, regs::PMRMSCL, left as u32 | 2).unwrap();
    let next = controller(&emulated);
    assert_eq!(emulated.function().read32(0, regs::PMRMSCL).unwrap(), 0, "still decoded, at {left:#x}");
    let pmr = Pmr::enable(&next).unwrap();
    let mut got = [0; 4096];
    pmr.read(0, &mut got).unwrap();
    assert_eq!(got, [7; 4096]);
    // The one that has it keeps it through a reset of its own.
    next.reset(0).unwrap();
    assert_ne!(emulated.function().read32(0, regs::PMRMSCL).unwrap() & 2, 0);
}

/// A reset of more than the controller turns the region off: found by a barrier, or by the driver in a reset of its own. It is on again
/// then, where it was, with its bytes; and the next barrier, one, does not speak for what was stored before.
#[test]
fn a_region_that_a_reset_turned_off_is_on_again_and_that_is_said_once() {
    for by_the_driver in [false, true] {
        let emulated = emulated();
        let controller = controller(&emulated);
        let pmr = Pmr::enable(&controller).unwrap();
        let at = pmr.bus_address().unwrap();
        pmr.write(4096, &[7; 4096]).unwrap();
        pmr.barrier().unwrap();
        // NSSR: the whole subsystem.
        emulated.function().write32(0, regs::NSSR, 0x4e56_4d65).unwrap();
        assert_eq!(emulated.function().read32(0, regs::PMRCTL).unwrap(), 0, "still on");
        let epoch = controller.epoch();
        if by_the_driver {
            controller.reset(epoch).unwrap();
            assert_eq!(emulated.function().read32(0, regs::PMRCTL).unwrap(), 1, "left off");
        }
        let error = pmr.barrier().unwrap_err();
        assert!(matches!(error, PmrError::Interrupted(_)), "{error}");
        assert_eq!(controller.epoch(), epoch + 1, "others are told of one reset");
        assert_eq!((pmr.size(), pmr.bus_address()), (SIZE, Some(at)));
        pmr.barrier().unwrap();
        run(&controller, true, 8, Data { address: at + 4096, len: 4096 });
        run(&controller, false, 8, Data { address: at + 65536, len: 4096 });
        pmr.barrier().unwrap();
        for from in [4096, 65536] {
            let mut got = [0; 4096];
            pmr.read(from, &mut got).unwrap();
            assert_eq!(got, [7; 4096], "at {from}");
        }
        assert!(emulated.domain().faults().is_empty());
        // A reset of the controller alone is none of its business.
        controller.reset(controller.epoch()).unwrap();
        pmr.barrier().unwrap();
    }
}

#[test]
fn one_at_a_time_and_addresses_come_back() {
    let emulated = emulated();
    let controller = controller(&emulated);
    let free = controller.iova().free_bytes();
    for _ in 0..3 {
        let pmr = Pmr::enable(&controller).unwrap();
        assert!(matches!(Pmr::enable(&controller), Err(PmrError::InUse(_))));
        pmr.barrier().unwrap();
        drop(pmr);
        assert_eq!(controller.iova().free_bytes(), free);
    }
}

#[test]
fn without_a_pmr_that_is_said() {
    let plain = EmulatedController::new(&Config::default()).unwrap();
    let error = Pmr::enable(&controller(&plain)).unwrap_err();
    assert!(error.to_string().contains("CAP.PMRS"), "{error}");
    for (cap, word) in [
        (Pmrcap::new().with_bir(1).with_pmrwbm(3), "BAR 1"),
        (Pmrcap::new().with_bir(3).with_pmrwbm(3), "BAR 3"),
        (Pmrcap::new().with_bir(5), "PMRWBM"),
    ] {
        let cap = u64::from(u32::from(cap));
        let (controller, pmr, _) =
            bent(move |offset, value, _| if offset == regs::PMRCAP { cap } else { value });
        let error = pmr.unwrap_err();
        assert!(matches!(error, PmrError::Absent { .. }) && error.to_string().contains(word), "{error}");
        // The refusal leaves the way free.
        assert!(matches!(Pmr::enable(&controller), Err(PmrError::Absent { .. })));
    }
}

#[test]
fn readiness_is_waited_for_and_no_longer_than_the_controller_says() {
    // 20 times 500 ms, as the emulated controller says.
    let (controller, pmr, took) = bent(|offset, value, reads| match offset {
        regs::PMRSTS => word(status(value).with_nrdy(reads <= 500)),
        _ => value,
    });
    pmr.unwrap().barrier().unwrap();
    assert!(took >= Duration::from_millis(499) && took < Duration::from_secs(10), "{took:?}");
    drop(controller);
    let never = |unit: u8, count: u8| {
        bent(move |offset, value, _| match offset {
            regs::PMRCAP => u32::from(Pmrcap::from(value as u32).with_pmrtu(unit).with_pmrto(count)).into(),
            regs::PMRSTS => word(status(value).with_nrdy(true)),
            _ => value,
        })
    };
    for (unit, count, limit) in [(0, 20, 10_000), (0, 1, 500), (0, 0, 500), (1, 2, 120_000)] {
        let (controller, pmr, took) = never(unit, count);
        let error = pmr.unwrap_err();
        assert!(matches!(error, PmrError::NotReady { enabled: true, .. }), "{error}");
        let limit = Duration::from_millis(limit);
        assert!(took >= limit && took < limit + Duration::from_millis(50), "{took:?} and not {limit:?}");
        assert!(matches!(Pmr::enable(&controller), Err(PmrError::NotReady { .. })));
    }
    // One that does not go off.
    let (_controller, pmr, _) = bent(|offset, value, _| match offset {
        regs::PMRSTS => word(status(value).with_nrdy(false)),
        _ => value,
    });
    assert!(matches!(pmr, Err(PmrError::NotReady { enabled: false, .. })));
}

#[test]
fn a_refused_bus_address_leaves_the_memory_usable() {
    for refuse_by_status in [true, false] {
        let (controller, pmr, _) = bent(move |offset, value, _| match offset {
            regs::PMRSTS if refuse_by_status => word(status(value).with_cbai(true)),
            regs::PMRCAP if !refuse_by_status => {
                u32::from(Pmrcap::from(value as u32).with_cmss(false)).into()
            }
            _ => value,
        });
        let pmr = pmr.unwrap();
        assert_eq!(pmr.bus_address(), None);
        assert_eq!(controller.function().read32(0, regs::PMRMSCL).unwrap(), 0);
        pmr.write(0, b"here").unwrap();
        pmr.barrier().unwrap();
    }
}

#[test]
fn what_the_status_reports_is_not_passed_over() {
    let enabled = |bad: Pmrsts| {
        bent(move |offset, value, _| match offset {
            regs::PMRSTS => value | word(bad),
            _ => value,
        })
        .1
    };
    let error = enabled(Pmrsts::new().with_err(3)).unwrap_err();
    assert!(matches!(error, PmrError::Failed { .. }) && error.to_string().contains("0x3"), "{error}");
    for (hsts, health, good) in [
        (0, Health::Normal, true),
        (1, Health::ContentLost, true),
        (2, Health::ReadOnly, false),
        (3, Health::Unreliable, false),
        (7, Health::Unreliable, false),
    ] {
        let pmr = enabled(Pmrsts::new().with_hsts(hsts)).unwrap();
        assert_eq!((pmr.health(), pmr.barrier().is_ok()), (health, good), "HSTS {hsts}");
    }
}

#[test]
fn what_happens_later_is_found_by_the_barrier() {
    static MOOD: AtomicU64 = AtomicU64::new(0);
    for only_by_memory in [false, true] {
        MOOD.store(0, Ordering::Relaxed);
        let (_controller, pmr, _) =
            bent(move |offset, value, _| match (offset, MOOD.load(Ordering::Relaxed)) {
                (regs::PMRCAP, _) if only_by_memory => {
                    u32::from(Pmrcap::from(value as u32).with_pmrwbm(1)).into()
                }
                (regs::PMRSTS, 1) => word(status(value).with_err(0x40)),
                (regs::PMRSTS, 2) => word(status(value).with_nrdy(true)),
                (regs::PMRSTS, 3) => u32::MAX.into(),
                _ => value,
            });
        let pmr = pmr.unwrap();
        let in_mood = |mood| {
            MOOD.store(mood, Ordering::Relaxed);
            pmr.write(0, b"bytes").unwrap();
            pmr.barrier()
        };
        assert!(in_mood(0).is_ok());
        assert!(matches!(in_mood(1), Err(PmrError::Failed { .. })));
        assert!(matches!(in_mood(2), Err(PmrError::NotReady { waited: Duration::ZERO, .. })));
        assert!(matches!(in_mood(3), Err(PmrError::Pci(PciError::Removed(_)))));
        assert!(matches!(in_mood(0), Err(PmrError::Interrupted(_))), "it was off");
        assert!(in_mood(0).is_ok());
    }
}
