//! Properties of BAR0: access, enabling, reset, shutdown.

use nvme_driver::emu::{Config, Stuck};
use nvme_driver::pci::PciError;
use nvme_driver::spec::regs::{self, Aqa, Cap, Cc, Csts};
use nvme_driver::spec::{AdminOpcode, Command, Status};

use crate::host::{BASE, Host, get_feature, identify, small, with_cmb};

/// Base 3.1.1 "CAP", 3.1.2 "VS".
#[test]
fn capabilities_and_version() {
    let config = Config { max_queue_entries: 256, ..small() };
    let h = Host::new(&config);
    let cap = Cap::from_bits(h.r64(regs::CAP));
    assert_eq!(cap.mqes(), 255);
    assert!(cap.cqr(), "queues must be contiguous");
    assert_eq!(cap.css() & 1, 1, "the NVM command set");
    assert_eq!((cap.dstrd(), cap.mpsmin()), (0, 0));
    assert!(cap.to() > 0);
    assert!(!cap.cmbs() && !cap.pmrs());
    assert_eq!(h.r32(regs::VS), 0x0001_0400);
    let h = Host::new(&with_cmb());
    assert!(Cap::from_bits(h.r64(regs::CAP)).cmbs());
}

/// Base 3.1: registers are accessed in their native width or aligned 32-bit accesses.
#[test]
fn four_and_eight_byte_accesses_agree() {
    let mut h = Host::new(&with_cmb());
    h.set_admin_queue(8, 8);
    for at in [regs::CAP, regs::ASQ, regs::ACQ, regs::CMBMSC] {
        let halves = u64::from(h.r32(at)) | u64::from(h.r32(at + 4)) << 32;
        assert_eq!(h.r64(at), halves, "register {at:#x}");
    }
    h.w32(regs::ASQ, 0x1234_5000);
    h.w32(regs::ASQ + 4, 0x42);
    assert_eq!(h.r64(regs::ASQ), 0x42_1234_5000);
    h.w64(regs::ASQ, 0x77_7654_3000);
    assert_eq!((h.r32(regs::ASQ), h.r32(regs::ASQ + 4)), (0x7654_3000, 0x77));
    for (bar, at) in [(0, 2), (0, 0x2000), (0, u64::MAX - 3), (1, 0), (3, 0), (6, 0), (2, 1 << 20)] {
        assert!(matches!(h.function.read32(bar, at), Err(PciError::OutOfRange { .. })), "{bar} {at:#x}");
        assert!(matches!(h.function.write32(bar, at, 1), Err(PciError::OutOfRange { .. })), "{bar} {at:#x}");
    }
    assert!(h.function.read64(0, 4).is_err(), "a 64-bit access is aligned to 8 bytes");
    assert!(h.function.read64(0, 0x1ffc).is_err());
}

/// Base 3.1: read-only registers and reserved bits ignore writes, reserved registers read 0.
#[test]
fn reserved_and_read_only_bits_stay() {
    let h = Host::new(&small());
    let fixed = [regs::CAP, regs::CAP + 4, regs::VS, regs::CSTS, regs::CMBLOC, regs::CMBSZ, regs::CMBSTS];
    let before: Vec<u32> = fixed.iter().map(|&r| h.r32(r)).collect();
    for at in (0..0x1000).step_by(4) {
        // CC is left alone here: it would enable the controller.
        if at != regs::CC {
            h.w32(at, u32::MAX);
        }
    }
    assert_eq!(before, fixed.iter().map(|&r| h.r32(r)).collect::<Vec<_>>());
    assert_eq!(h.r32(regs::AQA), 0x0fff_0fff);
    assert_eq!(h.r64(regs::ASQ), !0xfff, "ASQ is page-aligned");
    assert_eq!(h.r64(regs::ACQ), !0xfff);
    assert_eq!(h.r64(regs::CMBMSC), 0, "no CMB: the register does not exist");
    assert_eq!(h.r32(regs::NSSR), 0);
    for at in [0x18, 0x48, 0x100, 0xdfc, regs::PMRCTL, regs::PMRMSCL] {
        assert_eq!(h.r32(at), 0, "register {at:#x}");
    }
    h.w32(regs::CC, !1);
    assert_eq!(h.r32(regs::CC), 0x00ff_fff0);
    assert_eq!(h.r32(0x1000), 0, "doorbells are write-only");
}

/// Base 3.1.3, 3.1.4 "INTMS", "INTMC".
#[test]
fn interrupt_masks_set_and_clear() {
    let h = Host::new(&small());
    h.w32(regs::INTMS, 0xf0);
    h.w32(regs::INTMS, 0x0f);
    h.w32(regs::INTMC, 0x81);
    assert_eq!((h.r32(regs::INTMS), h.r32(regs::INTMC)), (0x7e, 0x7e));
}

/// Base 3.1.5 "CC", 3.1.6 "CSTS": RDY follows EN, not at once.
#[test]
fn ready_follows_enable() {
    let mut h = Host::new(&Config { ready_after: 5, ..small() });
    assert!(!h.csts().rdy());
    h.enable();
    assert!(h.csts().rdy());
    h.disable();
    assert!(!h.csts().rdy());
    let csts = h.csts();
    assert!(!csts.cfs() && csts.shst() == 0);
}

/// Base 3.1.5: what cannot be enabled gives CSTS.CFS, and a reset cures it.
#[test]
fn unsupported_configurations_are_fatal() {
    let good = Host::cc_enabled();
    let bad = [good.with_mps(5), good.with_mps(15), good.with_css(1), good.with_css(7), good.with_ams(1)];
    for cc in bad {
        let mut h = Host::new(&small());
        h.set_admin_queue(8, 8);
        h.w32(regs::CC, cc.into_bits());
        h.step(20);
        assert!(h.csts().cfs() && !h.csts().rdy(), "{cc:?}");
        h.w32(regs::CC, 0);
        assert_eq!(h.csts(), Csts::new());
        h.enable();
    }
    // Base 3.1.8 "AQA": a queue has at least two entries.
    for aqa in [Aqa::new().with_acqs(7), Aqa::new().with_asqs(7)] {
        let mut h = Host::new(&small());
        h.set_admin_queue(8, 8);
        h.w32(regs::AQA, aqa.into_bits());
        h.w32(regs::CC, good.into_bits());
        h.step(20);
        assert!(h.csts().cfs(), "{aqa:?}");
    }
}

/// Base 3.1.5: MPS, CSS and AMS change only while EN is 0; 3.1.8 to 3.1.10: so do the admin queue's registers.
#[test]
fn some_fields_are_frozen_while_enabled() {
    let mut h = Host::ready();
    let (asq, acq, aqa) = (h.r64(regs::ASQ), h.r64(regs::ACQ), h.r32(regs::AQA));
    h.w32(regs::CC, Host::cc_enabled().with_mps(2).with_ams(1).with_css(3).into_bits());
    assert_eq!(h.r32(regs::CC), Host::cc_enabled().into_bits());
    h.w64(regs::ASQ, 0x5000);
    h.w64(regs::ACQ, 0x5000);
    h.w32(regs::AQA, 0);
    assert_eq!((h.r64(regs::ASQ), h.r64(regs::ACQ), h.r32(regs::AQA)), (asq, acq, aqa));
    h.ok(0, get_feature(7));
}

/// Base 3.1.5 CC.MPS: larger memory pages, up to CAP.MPSMAX.
#[test]
fn larger_memory_pages_work() {
    let mut h = Host::new(&small());
    let wasted = h.pages(12);
    assert_eq!(wasted % 0x1_0000, 0);
    let _ = h.pages(4);
    h.set_admin_queue(32, 32);
    let mut align = || h.pages(16) & !0xffff;
    let (sq, cq, at) = (align() + 0x1_0000, align() + 0x1_0000, align() + 0x1_0000);
    h.w64(regs::ASQ, sq);
    h.w64(regs::ACQ, cq);
    let pair = h.pairs.get_mut(&0).unwrap();
    (pair.sq, pair.cq) = (sq, cq);
    h.w32(regs::CC, Host::cc_enabled().with_mps(4).into_bits());
    h.wait_ready();
    // 4 KiB from the last 8 bytes of a 4 KiB page: one PRP is enough in a page of 64 KiB.
    h.ok(0, identify(1, 0, at + 0xff8));
    assert_eq!(h.get(at + 0xff8, 2), 0x4e58u16.to_le_bytes());
    h.fails(0, Command { prp2: at + 0x1000, ..identify(1, 0, at + 0xf800) }, Status::INVALID_PRP_OFFSET);
}

/// Base 7.3.2 "Controller Level Reset": a controller reset keeps AQA, ASQ, ACQ and CMBMSC and forgets all queues.
#[test]
fn controller_reset_keeps_the_admin_queue_registers() {
    let mut h = Host::with_queue_on(&with_cmb());
    h.w64(regs::CMBMSC, 0x7000_0000 | 3);
    h.w32(regs::INTMS, 5);
    let before = (h.r32(regs::AQA), h.r64(regs::ASQ), h.r64(regs::ACQ), h.r64(regs::CMBMSC));
    h.disable();
    assert_eq!((h.r32(regs::AQA), h.r64(regs::ASQ), h.r64(regs::ACQ), h.r64(regs::CMBMSC)), before);
    assert_eq!(h.r32(regs::INTMS), 0);
    h.w32(regs::CC, Host::cc_enabled().into_bits());
    h.wait_ready();
    let pair = h.pairs.get_mut(&0).unwrap();
    (pair.tail, pair.head, pair.phase) = (0, 0, true);
    h.memory.zero((pair.cq - BASE) as usize, 4096).unwrap();
    // The I/O queues are gone.
    let cmd = Command { cdw10: 1, ..Command::new(AdminOpcode::DeleteIoSq as u8, 0) };
    h.fails(0, cmd, Status::INVALID_QUEUE_ID);
}

/// Base 7.3.2: a reset in the middle of work: what was not completed never is, and nothing moves any more.
#[test]
fn reset_in_the_middle_stops_everything() {
    let mut h = Host::with_queue();
    let at = h.pages(1);
    for lba in 0..40 {
        h.place(1, Command { prp1: at, ..Command::new(2, 1).with_blocks(lba, 1) });
    }
    h.ring_queue(1);
    h.disable();
    let moved = h.controller.counters().drive_to_host;
    h.step(50);
    assert_eq!(h.peek(1), None);
    assert_eq!(h.controller.counters().drive_to_host, moved);
    // The doorbells start again from 0, and the old queue's entries are not looked at.
    h.enable();
    h.create_pair(1, 64);
    h.expect_silence(1);
    h.ok(1, Command { prp1: at, ..Command::new(2, 1).with_blocks(0, 1) });
}

/// PCI Express "Function Level Reset"; Base 7.3.2: CMBMSC is reset by neither a controller reset nor an FLR.
#[test]
fn function_level_reset() {
    let mut h = Host::with_queue_on(&with_cmb());
    h.w64(regs::CMBMSC, 0x7000_0000 | 3);
    h.function.reset().unwrap();
    assert_eq!((h.r32(regs::CC), h.r32(regs::CSTS), h.r32(regs::AQA)), (0, 0, 0));
    assert_eq!((h.r64(regs::ASQ), h.r64(regs::ACQ)), (0, 0));
    assert_eq!(h.r64(regs::CMBMSC), 0x7000_0000 | 3);
    // Bus mastering is off after it: nothing is fetched.
    h.enable();
    h.submit(0, get_feature(7));
    h.expect_silence(0);
    h.function.set_bus_master(true).unwrap();
    h.wait(0);
}

/// Base 3.1.7 "NSSR": only the magic value resets, and CSTS.NSSRO tells (write 1 to clear).
#[test]
fn subsystem_reset() {
    let h = Host::ready();
    h.w32(regs::NSSR, 0x1234_5678);
    assert!(h.csts().rdy());
    h.w32(regs::NSSR, 0x4e56_4d65);
    assert_eq!((h.r32(regs::CC), h.csts()), (0, Csts::new().with_nssro(true)));
    assert_eq!(h.r32(regs::NSSR), 0);
    h.w32(regs::CSTS, 0);
    assert!(h.csts().nssro());
    h.w32(regs::CSTS, 1 << 4);
    assert_eq!(h.csts(), Csts::new());
}

/// Base 3.1.5 CC.SHN, 7.6.2 "Shutdown": processing is reported complete, and nothing is executed until a reset.
#[test]
fn shutdown() {
    for shn in [1, 2] {
        let mut h = Host::with_queue();
        h.w32(regs::CC, Host::cc_enabled().with_shn(shn).into_bits());
        h.step(5);
        assert_eq!(h.csts().shst(), 2);
        h.submit(0, get_feature(7));
        h.expect_silence(0);
        // CC.SHN back to 0 alone does not revive it: a reset does.
        h.w32(regs::CC, Host::cc_enabled().into_bits());
        h.expect_silence(0);
        h.disable();
        assert_eq!(h.csts().shst(), 0);
        h.enable();
        h.ok(0, get_feature(7));
    }
}

/// Base 3.1.5: EN may be cleared and shutdown asked for in one write.
#[test]
fn shutdown_while_disabled() {
    let mut h = Host::ready();
    h.w32(regs::CC, Host::cc_enabled().with_en(false).with_shn(1).into_bits());
    assert_eq!((h.csts().rdy(), h.csts().shst()), (false, 2));
    h.enable();
    assert_eq!(h.csts().shst(), 0);
    h.ok(0, get_feature(7));
}

/// PCI "Bus Master Enable": off, the function does no DMA; on again, it goes on.
#[test]
fn bus_mastering_off_means_no_dma() {
    let mut h = Host::with_queue();
    h.function.set_bus_master(false).unwrap();
    h.submit(0, get_feature(7));
    h.expect_silence(0);
    h.function.set_bus_master(true).unwrap();
    assert!(h.wait(0).status().is_success());
}

/// Base 9.5 "Controller Fatal Status Condition", and waits that do not end.
#[test]
fn a_controller_that_is_stuck() {
    let mut h = Host::new(&small());
    h.controller.faults().set_stuck(Some(Stuck::Enabling));
    h.set_admin_queue(8, 8);
    h.w32(regs::CC, Host::cc_enabled().into_bits());
    h.step(1000);
    assert!(!h.csts().rdy());
    h.controller.faults().clear();
    h.wait_ready();
    h.controller.faults().set_stuck(Some(Stuck::Disabling));
    h.disable();
    h.step(100);
    assert!(h.csts().rdy());
    h.controller.faults().clear();
    h.w32(regs::CC, 0);
    h.enable();
    h.controller.faults().set_stuck(Some(Stuck::ShuttingDown));
    h.w32(regs::CC, Host::cc_enabled().with_shn(1).into_bits());
    h.step(100);
    assert_eq!(h.csts().shst(), 1);
}

/// PCI Express: a removed device reads as all ones, and writes go nowhere.
#[test]
fn a_removed_controller_reads_as_ones() {
    let mut h = Host::with_queue_on(&with_cmb());
    h.controller.faults().remove();
    assert_eq!((h.r32(regs::CSTS), h.r64(regs::CAP)), (u32::MAX, u64::MAX));
    assert_eq!(h.function.config_read(0, 2).unwrap(), 0xffff);
    h.w32(regs::CC, 0);
    h.submit(1, Command::new(0, 1));
    h.expect_silence(1);
    assert_eq!(h.r32(regs::CC), u32::MAX);
    assert_eq!(
        h.controller.cmb().unwrap().u64_at(0).unwrap().load(std::sync::atomic::Ordering::Relaxed),
        u64::MAX
    );
    assert!(h.function.reset().is_err());
}

/// Base 3.1.5: CC is readable as written, reserved bits 0.
#[test]
fn cc_reads_back() {
    let h = Host::new(&small());
    let cc = Cc::new().with_mps(3).with_iosqes(6).with_iocqes(4);
    h.w32(regs::CC, cc.into_bits() | 0xff00_000e);
    assert_eq!(h.r32(regs::CC), cc.into_bits());
}
