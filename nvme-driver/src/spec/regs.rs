//! Controller properties: the registers at the start of BAR0 (Base Specification, "Controller Properties").
use bitfield_struct::bitfield;

/// Controller Capabilities, 64 bits, read-only.
pub const CAP: u64 = 0x00;
/// Version, 32 bits, read-only.
pub const VS: u64 = 0x08;
/// Interrupt Mask Set, 32 bits.
pub const INTMS: u64 = 0x0c;
/// Interrupt Mask Clear, 32 bits.
pub const INTMC: u64 = 0x10;
/// Controller Configuration, 32 bits.
pub const CC: u64 = 0x14;
/// Controller Status, 32 bits.
pub const CSTS: u64 = 0x1c;
/// NVM Subsystem Reset, 32 bits.
pub const NSSR: u64 = 0x20;
/// Admin Queue Attributes, 32 bits.
pub const AQA: u64 = 0x24;
/// Admin Submission Queue Base Address, 64 bits.
pub const ASQ: u64 = 0x28;
/// Admin Completion Queue Base Address, 64 bits.
pub const ACQ: u64 = 0x30;
/// Controller Memory Buffer Location, 32 bits, read-only.
pub const CMBLOC: u64 = 0x38;
/// Controller Memory Buffer Size, 32 bits, read-only.
pub const CMBSZ: u64 = 0x3c;
/// Controller Memory Buffer Memory Space Control, 64 bits.
pub const CMBMSC: u64 = 0x50;
/// Controller Memory Buffer Status, 32 bits, read-only.
pub const CMBSTS: u64 = 0x58;
/// Controller Ready Timeouts, 32 bits, read-only.
pub const CRTO: u64 = 0x68;
/// Persistent Memory Region Capabilities, 32 bits, read-only.
pub const PMRCAP: u64 = 0xe00;
/// Persistent Memory Region Control, 32 bits.
pub const PMRCTL: u64 = 0xe04;
/// Persistent Memory Region Status, 32 bits, read-only.
pub const PMRSTS: u64 = 0xe08;
/// Persistent Memory Region Elasticity Buffer Size, 32 bits, read-only.
pub const PMREBS: u64 = 0xe0c;
/// Persistent Memory Region Sustained Write Throughput, 32 bits, read-only.
pub const PMRSWTP: u64 = 0xe10;
/// Persistent Memory Region Memory Space Control, low half.
pub const PMRMSCL: u64 = 0xe14;
/// Persistent Memory Region Memory Space Control, high half.
pub const PMRMSCU: u64 = 0xe18;
/// First doorbell: submission queue 0 tail.
pub const DOORBELLS: u64 = 0x1000;

/// Offset of the tail doorbell of submission queue `qid`, given CAP.DSTRD.
pub const fn sq_tail_doorbell(qid: u16, dstrd: u8) -> u64 {
    DOORBELLS + (2 * qid as u64) * (4 << dstrd)
}

/// Offset of the head doorbell of completion queue `qid`, given CAP.DSTRD.
pub const fn cq_head_doorbell(qid: u16, dstrd: u8) -> u64 {
    DOORBELLS + (2 * qid as u64 + 1) * (4 << dstrd)
}

/// CAP: Controller Capabilities.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cap {
    /// Maximum Queue Entries Supported, 0's based.
    pub mqes: u16,
    /// Contiguous Queues Required.
    pub cqr: bool,
    /// Arbitration Mechanism Supported.
    #[bits(2)]
    pub ams: u8,
    #[bits(5)]
    __: u8,
    /// Timeout: worst-case wait for CSTS.RDY, in 500 ms units.
    pub to: u8,
    /// Doorbell Stride: doorbells are `4 << dstrd` bytes apart.
    #[bits(4)]
    pub dstrd: u8,
    /// NVM Subsystem Reset Supported.
    pub nssrs: bool,
    /// Command Sets Supported; bit 0: NVM command set.
    pub css: u8,
    /// Boot Partition Support.
    pub bps: bool,
    /// Controller Power Scope.
    #[bits(2)]
    pub cps: u8,
    /// Memory Page Size Minimum: `1 << (12 + mpsmin)` bytes.
    #[bits(4)]
    pub mpsmin: u8,
    /// Memory Page Size Maximum: `1 << (12 + mpsmax)` bytes.
    #[bits(4)]
    pub mpsmax: u8,
    /// Persistent Memory Region Supported.
    pub pmrs: bool,
    /// Controller Memory Buffer Supported (through CMBMSC, as of 1.4).
    pub cmbs: bool,
    /// NVM Subsystem Shutdown Supported.
    pub nsss: bool,
    /// Controller Ready Modes Supported.
    #[bits(2)]
    pub crms: u8,
    #[bits(3)]
    __: u8,
}

/// VS: Version.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Version {
    /// Tertiary version number.
    pub tertiary: u8,
    /// Minor version number.
    pub minor: u8,
    /// Major version number.
    pub major: u16,
}

/// CC: Controller Configuration.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cc {
    /// Enable.
    pub en: bool,
    #[bits(3)]
    __: u8,
    /// I/O Command Set Selected; 0: NVM command set.
    #[bits(3)]
    pub css: u8,
    /// Memory Page Size: `1 << (12 + mps)` bytes.
    #[bits(4)]
    pub mps: u8,
    /// Arbitration Mechanism Selected; 0: round robin.
    #[bits(3)]
    pub ams: u8,
    /// Shutdown Notification; 1: normal, 2: abrupt.
    #[bits(2)]
    pub shn: u8,
    /// I/O Submission Queue Entry Size, as a power of two (6: 64 bytes).
    #[bits(4)]
    pub iosqes: u8,
    /// I/O Completion Queue Entry Size, as a power of two (4: 16 bytes).
    #[bits(4)]
    pub iocqes: u8,
    /// Controller Ready Independent of Media Enable.
    pub crime: bool,
    #[bits(7)]
    __: u8,
}

/// CSTS: Controller Status.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Csts {
    /// Ready.
    pub rdy: bool,
    /// Controller Fatal Status.
    pub cfs: bool,
    /// Shutdown Status; 0: normal operation, 1: shutdown in progress, 2: shutdown complete.
    #[bits(2)]
    pub shst: u8,
    /// NVM Subsystem Reset Occurred.
    pub nssro: bool,
    /// Processing Paused.
    pub pp: bool,
    /// Shutdown Type.
    pub st: bool,
    #[bits(25)]
    __: u32,
}

/// AQA: Admin Queue Attributes.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Aqa {
    /// Admin Submission Queue Size, 0's based.
    #[bits(12)]
    pub asqs: u16,
    #[bits(4)]
    __: u8,
    /// Admin Completion Queue Size, 0's based.
    #[bits(12)]
    pub acqs: u16,
    #[bits(4)]
    __: u8,
}

/// CMBLOC: Controller Memory Buffer Location. Reads 0 until CMBMSC.CRE is set.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cmbloc {
    /// Base Indicator Register: the BAR (0, 2, 3, 4 or 5) that holds the CMB.
    #[bits(3)]
    pub bir: u8,
    /// CMB Queue Mixed Memory Support.
    pub cqmms: bool,
    /// CMB Queue Physically Discontiguous Support.
    pub cqpds: bool,
    /// CMB Data Pointer Mixed Locations Support.
    pub cdpmls: bool,
    /// CMB Data Pointer and Command Independent Locations Support.
    pub cdpcils: bool,
    /// CMB Data Metadata Mixed Memory Support.
    pub cdmmms: bool,
    /// CMB Queue Dword Alignment.
    pub cqda: bool,
    #[bits(3)]
    __: u8,
    /// Offset within the BAR, in multiples of the Size Unit of CMBSZ.
    #[bits(20)]
    pub ofst: u32,
}

/// CMBSZ: Controller Memory Buffer Size. Reads 0 until CMBMSC.CRE is set.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cmbsz {
    /// Submission Queue Support.
    pub sqs: bool,
    /// Completion Queue Support.
    pub cqs: bool,
    /// PRP SGL List Support.
    pub lists: bool,
    /// Read Data Support.
    pub rds: bool,
    /// Write Data Support.
    pub wds: bool,
    #[bits(3)]
    __: u8,
    /// Size Units: `4 KiB << (4 * szu)`; 7 and above are reserved.
    #[bits(4)]
    pub szu: u8,
    /// Size, in multiples of the Size Unit.
    #[bits(20)]
    pub sz: u32,
}

impl Cmbsz {
    /// The Size Unit in bytes, or `None` for a reserved encoding.
    pub const fn unit(&self) -> Option<u64> {
        if self.szu() > 6 { None } else { Some(4096 << (4 * self.szu() as u64)) }
    }
}

/// CMBMSC: Controller Memory Buffer Memory Space Control.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cmbmsc {
    /// Capabilities Registers Enabled: CMBLOC and CMBSZ hold values.
    pub cre: bool,
    /// Controller Memory Space Enable: the controller decodes its CBA.
    pub cmse: bool,
    #[bits(10)]
    __: u16,
    /// Controller Base Address, bits 63:12.
    #[bits(52)]
    pub cba: u64,
}

/// CMBSTS: Controller Memory Buffer Status.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cmbsts {
    /// Controller Base Address Invalid.
    pub cbai: bool,
    #[bits(31)]
    __: u32,
}

/// PMRCAP: Persistent Memory Region Capabilities.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Pmrcap {
    #[bits(3)]
    __: u8,
    /// Read Data Support.
    pub rds: bool,
    /// Write Data Support.
    pub wds: bool,
    /// Base Indicator Register.
    #[bits(3)]
    pub bir: u8,
    /// PMR Time Units; 0: 500 ms, 1: minutes.
    #[bits(2)]
    pub pmrtu: u8,
    /// PMR Write Barrier Mechanisms: bit 0, a read of the PMR; bit 1, a read of PMRSTS.
    #[bits(4)]
    pub pmrwbm: u8,
    #[bits(2)]
    __: u8,
    /// PMR Timeout, in PMRTU units.
    pub pmrto: u8,
    /// Controller Memory Space Supported.
    pub cmss: bool,
    #[bits(7)]
    __: u8,
}

/// PMRCTL: Persistent Memory Region Control.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Pmrctl {
    /// Enable.
    pub en: bool,
    #[bits(31)]
    __: u32,
}

/// PMRSTS: Persistent Memory Region Status.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Pmrsts {
    /// Error; 0: none.
    pub err: u8,
    /// Not Ready.
    pub nrdy: bool,
    /// Health Status.
    #[bits(3)]
    pub hsts: u8,
    /// Controller Base Address Invalid.
    pub cbai: bool,
    #[bits(19)]
    __: u32,
}
