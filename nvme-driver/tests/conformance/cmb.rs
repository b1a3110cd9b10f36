//! Controller Memory Buffer and Persistent Memory Region.

use nvme_driver::emu::{CmbSupport, Config, PowerCut};
use nvme_driver::mem::PAGE;
use nvme_driver::spec::regs::{self, Cap, Cmbloc, Cmbsts, Cmbsz, Pmrcap, Pmrsts};
use nvme_driver::spec::{Command, Status};

use crate::host::{BASE, Host, Pair, create_cq, create_sq, pattern, small, with_cmb};

const CBA: u64 = 0x8000_0000;
const P: u64 = PAGE as u64;

/// CRE, CMSE and a base address.
fn enable_at(h: &Host, cba: u64) {
    h.w64(regs::CMBMSC, cba | 3);
}

fn cmd(op: u8, slba: u64, blocks: u32, prp1: u64, prp2: u64) -> Command {
    Command { prp1, prp2, ..Command::new(op, 1).with_blocks(slba, blocks) }
}

fn host_with(support: CmbSupport) -> Host {
    let mut h = Host::with_queue_on(&Config { cmb: support, ..with_cmb() });
    enable_at(&h, CBA);
    h.write_blocks(0, &pattern(1, 16384), 512);
    h
}

/// Base 3.1.11, 3.1.12 "CMBLOC", "CMBSZ": 0 until CMBMSC.CRE is set.
#[test]
fn the_registers_appear_with_cre() {
    let h = Host::new(&with_cmb());
    assert_eq!((h.r32(regs::CMBLOC), h.r32(regs::CMBSZ), h.r64(regs::CMBMSC)), (0, 0, 0));
    h.w64(regs::CMBMSC, 1);
    let loc = Cmbloc::from_bits(h.r32(regs::CMBLOC));
    let size = Cmbsz::from_bits(h.r32(regs::CMBSZ));
    assert_eq!((loc.bir(), loc.ofst()), (2, 0));
    assert_eq!(u64::from(size.sz()) * size.unit().unwrap(), 1 << 20);
    assert!(size.sqs() && size.cqs() && size.lists() && size.rds() && size.wds());
    assert_eq!(h.function.bar(2).unwrap().size, 1 << 20);
    h.w64(regs::CMBMSC, 0);
    assert_eq!((h.r32(regs::CMBLOC), h.r32(regs::CMBSZ)), (0, 0));
    // Reserved bits 11:2 stay 0.
    h.w64(regs::CMBMSC, u64::MAX);
    assert_eq!(h.r64(regs::CMBMSC), u64::MAX << 12 | 3);
}

/// Base 3.1.1 CAP.CMBS: without a CMB there is no such register.
#[test]
fn a_controller_without_a_cmb() {
    let h = Host::new(&small());
    assert!(!Cap::from_bits(h.r64(regs::CAP)).cmbs());
    h.w64(regs::CMBMSC, 3);
    assert_eq!((h.r64(regs::CMBMSC), h.r32(regs::CMBSZ), h.r32(regs::CMBSTS)), (0, 0, 0));
    assert_eq!(h.function.bar(2).unwrap().size, 0);
    assert!(h.controller.cmb().is_none());
}

/// Base 3.1.16, 3.1.17 "CMBMSC", "CMBSTS": a base address that cannot be decoded is reported, and not decoded.
#[test]
fn an_invalid_base_address() {
    let mut h = Host::with_queue_on(&with_cmb());
    let cba = u64::MAX - (1 << 19);
    enable_at(&h, cba & !0xfff);
    assert!(Cmbsts::from_bits(h.r32(regs::CMBSTS)).cbai());
    h.fails(1, cmd(2, 0, 1, cba & !0xfff, 0), Status::DATA_TRANSFER_ERROR);
    enable_at(&h, CBA);
    assert_eq!(h.r32(regs::CMBSTS), 0);
    h.ok(1, cmd(2, 0, 1, CBA, 0));
}

/// Base 4.7 "Controller Memory Buffer": its addresses are decoded while CMSE is set, and pass no IOMMU; otherwise they
/// are addresses like all others.
#[test]
fn decoding_follows_cmse() {
    let mut h = host_with(CmbSupport::default());
    let bytes = pattern(1, 16384);
    let cmb = h.controller.cmb().unwrap();
    h.ok(1, cmd(2, 0, 8, CBA + 0x3000, 0));
    let mut got = vec![0; 4096];
    cmb.read(0x3000, &mut got).unwrap();
    assert_eq!(got, bytes[..4096]);
    // From the CMB to other blocks and back.
    h.ok(1, cmd(1, 100, 8, CBA + 0x3000, 0));
    assert_eq!(h.read_blocks(100, 8, 512), bytes[..4096]);
    // The last block of it, and one beyond.
    h.ok(1, cmd(2, 0, 1, CBA + (1 << 20) - 512, 0));
    h.fails(1, cmd(2, 0, 2, CBA + (1 << 20) - 512, CBA + (1 << 20)), Status::DATA_TRANSFER_ERROR);
    let c = h.controller.counters();
    assert_eq!((c.drive_to_cmb, c.cmb_to_drive), (4096 + 512 + 512, 4096));
    for off in [1, CBA | 1, 0] {
        h.w64(regs::CMBMSC, off);
        h.fails(1, cmd(2, 0, 8, CBA + 0x3000, 0), Status::DATA_TRANSFER_ERROR);
    }
    // Elsewhere now.
    enable_at(&h, 2 * CBA);
    h.fails(1, cmd(2, 0, 8, CBA, 0), Status::DATA_TRANSFER_ERROR);
    h.ok(1, cmd(2, 0, 8, 2 * CBA, 0));
}

/// The controller's own range comes first where the IOMMU maps something at the same address.
#[test]
fn the_cmb_hides_what_the_iommu_maps() {
    let mut h = host_with(CmbSupport::default());
    enable_at(&h, BASE + 0x40_0000);
    let shadowed = BASE + 0x40_0000;
    h.ok(1, cmd(2, 0, 1, shadowed, 0));
    assert_eq!(h.get(shadowed, 512), vec![0; 512]);
    assert_eq!(h.controller.counters().drive_to_cmb, 512);
}

/// Base 3.1.12 CMBSZ.RDS, WDS, LISTS and 3.1.11 CMBLOC.CDPMLS: what is not supported is Invalid Use of CMB.
#[test]
fn unsupported_uses_are_refused() {
    let all = CmbSupport::default();
    let invalid = Status::INVALID_USE_OF_CMB;
    let mut h = host_with(CmbSupport { read_data: false, ..all });
    h.fails(1, cmd(2, 0, 1, CBA, 0), invalid);
    h.ok(1, cmd(1, 0, 1, CBA, 0));
    let mut h = host_with(CmbSupport { write_data: false, ..all });
    h.fails(1, cmd(1, 0, 1, CBA, 0), invalid);
    h.ok(1, cmd(2, 0, 1, CBA, 0));
    let mut h = host_with(CmbSupport { mixed_data: false, ..all });
    let at = h.pages(1);
    h.fails(1, cmd(2, 0, 16, CBA, at), invalid);
    h.fails(1, cmd(2, 0, 16, at, CBA), invalid);
    h.ok(1, cmd(2, 0, 16, CBA, CBA + P));
    let mut h = host_with(all);
    let at = h.pages(1);
    h.ok(1, cmd(2, 0, 16, CBA, at));
    assert_eq!(h.get(at, 4096), pattern(1, 16384)[4096..8192]);
    let c = h.controller.counters();
    assert_eq!((c.drive_to_cmb, c.drive_to_host), (4096, 4096));
}

/// Base 3.1.12 CMBSZ.LISTS: PRP lists in the CMB.
#[test]
fn lists_in_the_cmb() {
    for lists in [true, false] {
        let mut h = host_with(CmbSupport { lists, ..CmbSupport::default() });
        let at = h.pages(4);
        let cmb = h.controller.cmb().unwrap();
        for i in 0..3 {
            cmb.write(0x5000 + 8 * i, &(at + (i as u64 + 1) * P).to_le_bytes()).unwrap();
        }
        let cmd = cmd(2, 0, 32, at, CBA + 0x5000);
        if lists {
            h.ok(1, cmd);
            assert_eq!(h.get(at, 16384), pattern(1, 16384));
        } else {
            h.fails(1, cmd, Status::INVALID_USE_OF_CMB);
        }
    }
}

/// Base 3.1.12 CMBSZ.SQS, CQS: queues in the CMB.
#[test]
fn queues_in_the_cmb() {
    let mut h = host_with(CmbSupport::default());
    h.ok(0, create_cq(2, CBA, 16));
    h.ok(0, create_sq(2, CBA + P, 16, 2));
    let cmb = h.controller.cmb().unwrap();
    let (mut tail, mut head, mut phase) = (0usize, 0usize, 1u16);
    for cid in 0..100u16 {
        let flush = Command::new(0, 1).with_cid(cid);
        cmb.write(PAGE + 64 * tail, bytemuck::bytes_of(&flush)).unwrap();
        tail = (tail + 1) % 16;
        h.ring_tail(2, tail as u32);
        h.step(1);
        let mut entry = [0; 16];
        cmb.read(16 * head, &mut entry).unwrap();
        let entry: nvme_driver::spec::Completion = bytemuck::pod_read_unaligned(&entry);
        assert_eq!((entry.cid, entry.status_phase), (cid, phase));
        head = (head + 1) % 16;
        phase ^= u16::from(head == 0);
        h.ring_head(2, head as u32);
    }
    let mut h =
        host_with(CmbSupport { submission_queues: false, completion_queues: false, ..CmbSupport::default() });
    h.fails(0, create_cq(2, CBA, 16), Status::INVALID_USE_OF_CMB);
    let at = h.pages(1);
    h.ok(0, create_cq(2, at, 16));
    h.fails(0, create_sq(2, CBA, 16, 2), Status::INVALID_USE_OF_CMB);
    // A queue that leaves the CMB halfway.
    let mut h = host_with(CmbSupport::default());
    let at = h.pages(1);
    h.ok(0, create_cq(2, at, 128));
    h.fails(0, create_sq(2, CBA + (1 << 20) - P, 128, 2), Status::INVALID_USE_OF_CMB);
}

/// The CMB is memory that can be mapped and handed to other processes, whole or in parts of a page.
#[test]
fn the_cmb_is_shared_memory() {
    let h = host_with(CmbSupport::default());
    let whole = h.function.map_bar(2, 0, 1 << 20).unwrap().unwrap();
    let part = h.function.map_bar(2, 0x3000, P).unwrap().unwrap();
    whole.write(0x3010, b"here").unwrap();
    let mut got = [0; 4];
    part.read(0x10, &mut got).unwrap();
    assert_eq!(&got, b"here");
    assert_eq!(h.function.read32(2, 0x3010).unwrap(), u32::from_le_bytes(*b"here"));
    h.function.write64(2, 0x3018, 0x1122_3344_5566_7788).unwrap();
    assert_eq!(part.u64_at(0x18).unwrap().load(std::sync::atomic::Ordering::Relaxed), 0x1122_3344_5566_7788);
    assert!(whole.fd().is_some());
    for (at, len) in [(0, (1u64 << 20) + P), (1 << 20, P), (0x800, P), (0, 100), (u64::MAX - 0xfff, 2 * P)] {
        assert!(h.function.map_bar(2, at, len).is_err(), "{at:#x} {len:#x}");
    }
}

/// A CMB that is no power of two: its BAR is larger, the rest of the BAR is nothing.
#[test]
fn a_cmb_smaller_than_its_bar() {
    let mut h = Host::with_queue_on(&Config { cmb_size: 5 * P, ..with_cmb() });
    enable_at(&h, CBA);
    assert_eq!(h.function.bar(2).unwrap().size, 8 * P);
    assert_eq!(Cmbsz::from_bits(h.r32(regs::CMBSZ)).sz(), 5);
    h.ok(1, cmd(2, 0, 8, CBA + 4 * P, 0));
    h.fails(1, cmd(2, 0, 8, CBA + 5 * P, 0), Status::DATA_TRANSFER_ERROR);
    assert_eq!(h.function.read32(2, 5 * P).unwrap(), u32::MAX);
    h.function.write32(2, 5 * P, 1).unwrap();
    assert!(h.function.read32(2, 8 * P).is_err());
}

/// Base 3.1.18 ff. "PMRCAP", "PMRCTL", "PMRSTS", "PMRMSC"; 4.8: it keeps its content when the power goes.
#[test]
fn persistent_memory_region() {
    let config = Config { pmr_size: 1 << 16, ..with_cmb() };
    let mut h = Host::with_queue_on(&config);
    assert!(Cap::from_bits(h.r64(regs::CAP)).pmrs());
    let cap = Pmrcap::from_bits(h.r32(regs::PMRCAP));
    assert!(cap.rds() && cap.wds() && cap.cmss());
    let bar = cap.bir();
    assert_eq!(h.function.bar(bar).unwrap().size, 1 << 16);
    assert!(Pmrsts::from_bits(h.r32(regs::PMRSTS)).nrdy());
    let set_base = |h: &Host, base: u64| {
        h.w32(regs::PMRMSCU, (base >> 32) as u32);
        h.w32(regs::PMRMSCL, base as u32 | 2);
    };
    set_base(&h, CBA);
    h.fails(1, cmd(2, 0, 1, CBA, 0), Status::DATA_TRANSFER_ERROR);
    h.w32(regs::PMRCTL, 1);
    assert_eq!(h.r32(regs::PMRSTS), 0);
    h.write_blocks(0, &pattern(3, 4096), 512);
    h.ok(1, cmd(2, 0, 8, CBA + 0x2000, 0));
    let c = h.controller.counters();
    assert_eq!((c.drive_to_pmr, c.drive_to_cmb), (4096, 0));
    // Queues do not go there.
    h.fails(0, create_cq(2, CBA, 16), Status::INVALID_USE_OF_CMB);
    let memory = h.function.map_bar(bar, 0, 1 << 16).unwrap().unwrap();
    h.controller.power_cut(PowerCut::LoseAll).unwrap();
    assert_eq!(h.r32(regs::PMRCTL), 0);
    let mut got = vec![0; 4096];
    memory.read(0x2000, &mut got).unwrap();
    assert_eq!(got, pattern(3, 4096));
    // A base address that wraps around.
    set_base(&h, !0xfff);
    assert!(Pmrsts::from_bits(h.r32(regs::PMRSTS)).cbai());
}

/// The CMB is not persistent: zeros after a power cut, and CMBMSC is 0.
#[test]
fn a_power_cut_clears_the_cmb() {
    let mut h = host_with(CmbSupport::default());
    h.ok(1, cmd(2, 0, 8, CBA, 0));
    h.controller.power_cut(PowerCut::KeepAll).unwrap();
    assert_eq!(h.r64(regs::CMBMSC), 0);
    let mut got = vec![1; 4096];
    h.controller.cmb().unwrap().read(0, &mut got).unwrap();
    assert_eq!(got, vec![0; 4096]);
}

/// Base 3.1.12: admin queues in the CMB.
#[test]
fn admin_queues_in_the_cmb() {
    let mut h = Host::new(&with_cmb());
    enable_at(&h, CBA);
    h.set_admin_queue(16, 16);
    h.w64(regs::ASQ, CBA);
    h.w64(regs::ACQ, CBA + P);
    h.w32(regs::CC, Host::cc_enabled().into_bits());
    h.wait_ready();
    let cmb = h.controller.cmb().unwrap();
    let feature = crate::host::get_feature(7).with_cid(77);
    cmb.write(0, bytemuck::bytes_of(&feature)).unwrap();
    h.ring_tail(0, 1);
    h.step(2);
    assert_eq!(cmb.u64_at(PAGE + 8).unwrap().load(std::sync::atomic::Ordering::Acquire) >> 32, 0x1_0000 | 77);
    let _: &Pair = &h.pairs[&0];
}
