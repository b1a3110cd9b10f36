//! The Identify data structures, 4,096 bytes each: the fields this stack reads or reports, at the specification's offsets.
use bytemuck::{Pod, Zeroable};

/// Identify Controller (CNS 01h). Multi-byte fields are little-endian; strings are ASCII, padded with spaces.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct IdentifyController {
    /// PCI Vendor ID.
    pub vid: u16,
    /// PCI Subsystem Vendor ID.
    pub ssvid: u16,
    /// Serial Number.
    pub sn: [u8; 20],
    /// Model Number.
    pub mn: [u8; 40],
    /// Firmware Revision.
    pub fr: [u8; 8],
    /// Recommended Arbitration Burst.
    pub rab: u8,
    /// IEEE OUI Identifier.
    pub ieee: [u8; 3],
    /// Controller Multi-Path I/O and Namespace Sharing Capabilities.
    pub cmic: u8,
    /// Maximum Data Transfer Size, as a power of two of the minimum memory page size; 0: no limit.
    pub mdts: u8,
    /// Controller ID.
    pub cntlid: u16,
    /// Version.
    pub ver: u32,
    /// RTD3 Resume Latency.
    pub rtd3r: u32,
    /// RTD3 Entry Latency.
    pub rtd3e: u32,
    /// Optional Asynchronous Events Supported.
    pub oaes: u32,
    /// Controller Attributes.
    pub ctratt: u32,
    reserved_100: [u8; 11],
    /// Controller Type; 1: I/O controller.
    pub cntrltype: u8,
    reserved_112: [u8; 144],
    /// Optional Admin Command Support.
    pub oacs: u16,
    /// Abort Command Limit, 0's based.
    pub acl: u8,
    /// Asynchronous Event Request Limit, 0's based.
    pub aerl: u8,
    /// Firmware Updates.
    pub frmw: u8,
    /// Log Page Attributes.
    pub lpa: u8,
    /// Error Log Page Entries, 0's based.
    pub elpe: u8,
    /// Number of Power States Support, 0's based.
    pub npss: u8,
    /// Admin Vendor Specific Command Configuration.
    pub avscc: u8,
    /// Autonomous Power State Transition Attributes.
    pub apsta: u8,
    /// Warning Composite Temperature Threshold, kelvins.
    pub wctemp: u16,
    /// Critical Composite Temperature Threshold, kelvins.
    pub cctemp: u16,
    reserved_270: [u8; 242],
    /// Submission Queue Entry Size: maximum (7:4) and required (3:0), powers of two.
    pub sqes: u8,
    /// Completion Queue Entry Size: maximum (7:4) and required (3:0), powers of two.
    pub cqes: u8,
    /// Maximum Outstanding Commands.
    pub maxcmd: u16,
    /// Number of Namespaces.
    pub nn: u32,
    /// Optional NVM Command Support: bit 2 dataset management, bit 3 write zeroes.
    pub oncs: u16,
    /// Fused Operation Support.
    pub fuses: u16,
    /// Format NVM Attributes.
    pub fna: u8,
    /// Volatile Write Cache: bit 0, present.
    pub vwc: u8,
    /// Atomic Write Unit Normal, 0's based logical blocks.
    pub awun: u16,
    /// Atomic Write Unit Power Fail, 0's based logical blocks.
    pub awupf: u16,
    /// I/O Command Set Vendor Specific Command Configuration.
    pub icsvscc: u8,
    /// Namespace Write Protection Capabilities.
    pub nwpc: u8,
    /// Atomic Compare and Write Unit.
    pub acwu: u16,
    reserved_534: [u8; 2],
    /// SGL Support; bits 1:0: 0 none, 1 supported, 2 supported with dword alignment.
    pub sgls: u32,
    /// Maximum Number of Allowed Namespaces.
    pub mnan: u32,
    reserved_544: [u8; 224],
    /// NVM Subsystem NVMe Qualified Name, NUL-terminated UTF-8.
    pub subnqn: [u8; 256],
    reserved_1024: [u8; 1024],
    /// Power State Descriptors, 32 bytes each.
    pub psd: [[u8; 32]; 32],
    reserved_3072: [u8; 1024],
}

const _: () = {
    assert!(size_of::<IdentifyController>() == 4096);
    assert!(std::mem::offset_of!(IdentifyController, mdts) == 77);
    assert!(std::mem::offset_of!(IdentifyController, cntrltype) == 111);
    assert!(std::mem::offset_of!(IdentifyController, oacs) == 256);
    assert!(std::mem::offset_of!(IdentifyController, sqes) == 512);
    assert!(std::mem::offset_of!(IdentifyController, oncs) == 520);
    assert!(std::mem::offset_of!(IdentifyController, vwc) == 525);
    assert!(std::mem::offset_of!(IdentifyController, sgls) == 536);
    assert!(std::mem::offset_of!(IdentifyController, subnqn) == 768);
    assert!(std::mem::offset_of!(IdentifyController, psd) == 2048);
};

/// ONCS bit 2: Dataset Management supported.
pub const ONCS_DSM: u16 = 1 << 2;
/// ONCS bit 3: Write Zeroes supported.
pub const ONCS_WRITE_ZEROES: u16 = 1 << 3;
/// ONCS bit 0: Compare supported.
pub const ONCS_COMPARE: u16 = 1 << 0;

/// An LBA format of a namespace, 4 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct LbaFormat {
    /// Metadata Size in bytes.
    pub ms: u16,
    /// LBA Data Size, as a power of two.
    pub lbads: u8,
    /// Relative Performance.
    pub rp: u8,
}

/// Identify Namespace (CNS 00h).
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// Namespace Size, logical blocks.
    pub nsze: u64,
    /// Namespace Capacity, logical blocks.
    pub ncap: u64,
    /// Namespace Utilization, logical blocks.
    pub nuse: u64,
    /// Namespace Features: bit 0 thin provisioning.
    pub nsfeat: u8,
    /// Number of LBA Formats, 0's based.
    pub nlbaf: u8,
    /// Formatted LBA Size: index into `lbaf` (3:0).
    pub flbas: u8,
    /// Metadata Capabilities.
    pub mc: u8,
    /// End-to-end Data Protection Capabilities.
    pub dpc: u8,
    /// End-to-end Data Protection Type Settings.
    pub dps: u8,
    /// Namespace Multi-path I/O and Namespace Sharing Capabilities.
    pub nmic: u8,
    /// Reservation Capabilities.
    pub rescap: u8,
    /// Format Progress Indicator.
    pub fpi: u8,
    /// Deallocate Logical Block Features; bits 2:0: 1, deallocated blocks read as zeros.
    pub dlfeat: u8,
    reserved_34: [u8; 70],
    /// Namespace Globally Unique Identifier.
    pub nguid: [u8; 16],
    /// IEEE Extended Unique Identifier.
    pub eui64: [u8; 8],
    /// LBA Formats.
    pub lbaf: [LbaFormat; 64],
    reserved_384: [u8; 3712],
}

const _: () = {
    assert!(size_of::<IdentifyNamespace>() == 4096);
    assert!(std::mem::offset_of!(IdentifyNamespace, nguid) == 104);
    assert!(std::mem::offset_of!(IdentifyNamespace, lbaf) == 128);
};
