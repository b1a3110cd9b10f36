//! The register file of BAR0 (Base Specification, "Controller Properties").

use super::config::{CmbSupport, Config};
use super::state::State;
use crate::spec::regs::{
    self, Aqa, Cap, Cc, Cmbloc, Cmbmsc, Cmbsts, Cmbsz, Csts, Pmrcap, Pmrctl, Pmrsts, Version,
};

/// The BARs.
pub(super) const BAR_REGISTERS: u8 = 0;
/// See [`BAR_REGISTERS`].
pub(super) const BAR_CMB: u8 = 2;
/// See [`BAR_REGISTERS`].
pub(super) const BAR_MSIX: u8 = 4;
/// See [`BAR_REGISTERS`].
pub(super) const BAR_PMR: u8 = 5;

/// Size of BAR0: one page of registers, one page of doorbells.
pub(super) const REGISTERS_SIZE: u64 = 0x2000;

/// "NVMe", the value that makes NSSR reset the subsystem.
const NSSR_MAGIC: u32 = 0x4e56_4d65;

/// Registers that hold state; the rest is computed.
#[derive(Debug)]
pub(super) struct Registers {
    cap: Cap,
    pub(super) cc: Cc,
    pub(super) csts: Csts,
    pub(super) aqa: Aqa,
    pub(super) asq: u64,
    pub(super) acq: u64,
    /// INTMS and INTMC: one bit per vector, set: masked.
    pub(super) int_mask: u32,
    cmb_size: u64,
    cmb: CmbSupport,
    cmbmsc: Cmbmsc,
    pmr_size: u64,
    pmrctl: Pmrctl,
    pmrmsc: u64,
    /// PMRSTS.ERR: the file behind the PMR could not be synced since it was enabled.
    pmr_failed: bool,
}

impl Registers {
    /// Bits of CC that can be written.
    pub(super) const CC_WRITABLE: u32 = 0x00ff_fff1;

    pub(super) fn new(config: &Config) -> Self {
        let cap = Cap::new()
            .with_mqes(u16::try_from(config.max_queue_entries - 1).unwrap_or(u16::MAX))
            .with_cqr(true)
            .with_to(20)
            .with_nssrs(true)
            .with_css(1)
            .with_mpsmin(0)
            .with_mpsmax(4)
            .with_pmrs(config.pmr_size != 0)
            .with_cmbs(config.cmb_size != 0);
        Self {
            cap,
            cc: Cc::new(),
            csts: Csts::new(),
            aqa: Aqa::new(),
            asq: 0,
            acq: 0,
            int_mask: 0,
            cmb_size: config.cmb_size,
            cmb: config.cmb,
            cmbmsc: Cmbmsc::new(),
            pmr_size: config.pmr_size,
            pmrctl: Pmrctl::new(),
            pmrmsc: 0,
            pmr_failed: false,
        }
    }

    /// A function-level reset leaves CMBMSC alone.
    pub(super) fn function_reset(&mut self) {
        self.cc = Cc::new();
        self.csts = Csts::new();
        self.aqa = Aqa::new();
        self.asq = 0;
        self.acq = 0;
        self.int_mask = 0;
    }

    pub(super) fn power_on(&mut self) {
        self.function_reset();
        self.cmbmsc = Cmbmsc::new();
        self.pmrctl = Pmrctl::new();
        self.pmrmsc = 0;
        self.pmr_failed = false;
    }

    /// CC.MPS in bytes.
    pub(super) fn page_size(&self) -> u64 {
        4096 << self.cc.mps()
    }

    /// Whether CC, AQA, ASQ and ACQ are something this controller can be enabled with.
    pub(super) fn configuration_is_valid(&self) -> bool {
        let page = self.page_size();
        self.cc.mps() >= self.cap.mpsmin()
            && self.cc.mps() <= self.cap.mpsmax()
            && self.cc.css() == 0
            && self.cc.ams() == 0
            && self.aqa.asqs() >= 1
            && self.aqa.acqs() >= 1
            && self.asq.is_multiple_of(page)
            && self.acq.is_multiple_of(page)
    }

    /// CMBLOC as it reads now.
    fn cmbloc(&self) -> Cmbloc {
        if !self.cmbmsc.cre() || self.cmb_size == 0 {
            return Cmbloc::new();
        }
        Cmbloc::new()
            .with_bir(BAR_CMB)
            .with_cqmms(true)
            .with_cdpmls(self.cmb.mixed_data)
            .with_cdpcils(true)
            .with_cdmmms(true)
            .with_cqda(true)
    }

    /// CMBSZ as it reads now.
    fn cmbsz(&self) -> Cmbsz {
        if !self.cmbmsc.cre() || self.cmb_size == 0 {
            return Cmbsz::new();
        }
        Cmbsz::new()
            .with_sqs(self.cmb.submission_queues)
            .with_cqs(self.cmb.completion_queues)
            .with_lists(self.cmb.lists)
            .with_rds(self.cmb.read_data)
            .with_wds(self.cmb.write_data)
            .with_szu(0)
            .with_sz((self.cmb_size >> 12) as u32)
    }

    /// Whether the CBA cannot be decoded: the range wraps around.
    fn cba_is_invalid(&self) -> bool {
        self.cmbmsc.cmse() && (self.cmbmsc.cba() << 12).checked_add(self.cmb_size).is_none()
    }

    /// Where the controller decodes its CMB, if it does.
    pub(super) fn cmb_base(&self) -> Option<u64> {
        let on = self.cmb_size != 0 && self.cmbmsc.cre() && self.cmbmsc.cmse() && !self.cba_is_invalid();
        on.then(|| self.cmbmsc.cba() << 12)
    }

    fn pmrcap(&self) -> Pmrcap {
        if self.pmr_size == 0 {
            return Pmrcap::new();
        }
        Pmrcap::new()
            .with_rds(true)
            .with_wds(true)
            .with_bir(BAR_PMR)
            .with_pmrwbm(0b11)
            .with_pmrto(20)
            .with_cmss(true)
    }

    fn pmrsts(&self) -> Pmrsts {
        Pmrsts::new()
            .with_err(u8::from(self.pmr_failed))
            .with_nrdy(self.pmr_size != 0 && !self.pmrctl.en())
            .with_cbai(self.pmr_cba_is_invalid())
    }

    fn pmr_cba_is_invalid(&self) -> bool {
        self.pmrmsc & 2 != 0 && (self.pmrmsc & !0xfff).checked_add(self.pmr_size).is_none()
    }

    /// Where the controller decodes its PMR, if it does.
    pub(super) fn pmr_base(&self) -> Option<u64> {
        let on = self.pmr_size != 0 && self.pmrctl.en() && self.pmrmsc & 2 != 0 && !self.pmr_cba_is_invalid();
        on.then_some(self.pmrmsc & !0xfff)
    }

    /// The aligned 32-bit word at `offset`.
    fn read(&self, offset: u64) -> u32 {
        let low = |v: u64| v as u32;
        let high = |v: u64| (v >> 32) as u32;
        match offset {
            regs::CAP => low(self.cap.into_bits()),
            0x04 => high(self.cap.into_bits()),
            regs::VS => Version::new().with_major(1).with_minor(4).into_bits(),
            regs::INTMS | regs::INTMC => self.int_mask,
            regs::CC => self.cc.into_bits(),
            regs::CSTS => self.csts.into_bits(),
            regs::AQA => self.aqa.into_bits(),
            regs::ASQ => low(self.asq),
            0x2c => high(self.asq),
            regs::ACQ => low(self.acq),
            0x34 => high(self.acq),
            regs::CMBLOC => self.cmbloc().into_bits(),
            regs::CMBSZ => self.cmbsz().into_bits(),
            regs::CMBMSC => low(self.cmbmsc.into_bits()),
            0x54 => high(self.cmbmsc.into_bits()),
            regs::CMBSTS => Cmbsts::new().with_cbai(self.cba_is_invalid()).into_bits(),
            regs::PMRCAP => self.pmrcap().into_bits(),
            regs::PMRCTL => self.pmrctl.into_bits(),
            regs::PMRSTS => self.pmrsts().into_bits(),
            regs::PMRMSCL => low(self.pmrmsc),
            regs::PMRMSCU => high(self.pmrmsc),
            // Not implemented, write-only (NSSR) or reserved.
            _ => 0,
        }
    }
}

/// Replaces one half of a 64-bit register.
fn merge(old: u64, offset: u64, value: u32) -> u64 {
    if offset.is_multiple_of(8) {
        (old & !0xffff_ffff) | u64::from(value)
    } else {
        (old & 0xffff_ffff) | (u64::from(value) << 32)
    }
}

impl State {
    /// Reads the aligned 32-bit register at `offset` of BAR0.
    pub(super) fn read_register(&mut self, offset: u64) -> u32 {
        if offset >= regs::DOORBELLS {
            // Doorbells are write-only; what they read as is for the vendor to say.
            return 0;
        }
        if offset == regs::CSTS {
            self.become_ready();
        }
        if offset == regs::PMRSTS && self.regs.pmrctl.en() {
            self.pmr_barrier();
        }
        self.regs.read(offset)
    }

    /// PMRSTS is read: what was stored in the PMR before is persistent (PMRCAP.PMRWBM), or PMRSTS.ERR says that it may not be.
    fn pmr_barrier(&mut self) {
        self.counters.pmr_barriers += 1;
        if let Some(file) = &self.pmr_file
            && let Err(e) = file.sync_data()
        {
            tracing::error!("the file of the PMR: {e}");
            self.regs.pmr_failed = true;
        }
    }

    /// Writes the aligned 32-bit register at `offset` of BAR0.
    pub(super) fn write_register(&mut self, offset: u64, value: u32) {
        let disabled = !self.regs.cc.en();
        match offset {
            // There is no interrupt pin, and MSI-X has masks of its own: these only hold their bits.
            regs::INTMS => self.regs.int_mask |= value,
            regs::INTMC => self.regs.int_mask &= !value,
            regs::CC => self.write_cc(value),
            // NSSRO is cleared by writing 1.
            regs::CSTS if value & (1 << 4) != 0 => self.regs.csts.set_nssro(false),
            regs::NSSR if value == NSSR_MAGIC => {
                self.function_reset();
                // With the subsystem every PMR in it is disabled. It keeps its bytes.
                (self.regs.pmrctl, self.regs.pmrmsc) = (Pmrctl::new(), 0);
                self.regs.csts.set_nssro(true);
            }
            // The admin queue's registers are for a disabled controller; a change while it runs would move the queue under it.
            regs::AQA if disabled => self.regs.aqa = Aqa::from_bits(value & 0x0fff_0fff),
            regs::ASQ | 0x2c if disabled => self.regs.asq = merge(self.regs.asq, offset, value) & !0xfff,
            regs::ACQ | 0x34 if disabled => self.regs.acq = merge(self.regs.acq, offset, value) & !0xfff,
            regs::CMBMSC | 0x54 if self.regs.cmb_size != 0 => {
                let bits = merge(self.regs.cmbmsc.into_bits(), offset, value) & !0xffc;
                self.regs.cmbmsc = Cmbmsc::from_bits(bits);
            }
            regs::PMRCTL if self.regs.pmr_size != 0 => {
                self.regs.pmrctl = Pmrctl::from_bits(value & 1);
                self.regs.pmr_failed &= self.regs.pmrctl.en();
            }
            regs::PMRMSCL if self.regs.pmr_size != 0 => {
                self.regs.pmrmsc = (self.regs.pmrmsc & !0xffff_ffff) | u64::from(value & !0xffd);
            }
            regs::PMRMSCU if self.regs.pmr_size != 0 => {
                self.regs.pmrmsc = (self.regs.pmrmsc & 0xffff_ffff) | (u64::from(value) << 32);
            }
            regs::DOORBELLS.. => self.write_doorbell(offset, value),
            // Read-only or reserved.
            _ => tracing::debug!("write of {value:#x} to register {offset:#x} ignored"),
        }
    }
}
