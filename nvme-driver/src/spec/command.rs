//! Submission queue entries (Base Specification, "Submission Queue Entry"; NVM Command Set Specification).
use bytemuck::{Pod, Zeroable};

/// A submission queue entry, 64 bytes, little-endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct Command {
    /// Opcode (7:0), FUSE (9:8), PSDT (15:14), command identifier (31:16).
    pub cdw0: u32,
    /// Namespace identifier.
    pub nsid: u32,
    /// Command dword 2.
    pub cdw2: u32,
    /// Command dword 3.
    pub cdw3: u32,
    /// Metadata pointer.
    pub mptr: u64,
    /// Data pointer, PRP entry 1.
    pub prp1: u64,
    /// Data pointer, PRP entry 2 or PRP list pointer.
    pub prp2: u64,
    /// Command dword 10.
    pub cdw10: u32,
    /// Command dword 11.
    pub cdw11: u32,
    /// Command dword 12.
    pub cdw12: u32,
    /// Command dword 13.
    pub cdw13: u32,
    /// Command dword 14.
    pub cdw14: u32,
    /// Command dword 15.
    pub cdw15: u32,
}

const _: () = assert!(size_of::<Command>() == 64);

impl Command {
    /// A command with this opcode, no data and command identifier 0.
    pub const fn new(opcode: u8, nsid: u32) -> Self {
        Self {
            cdw0: opcode as u32,
            nsid,
            cdw2: 0,
            cdw3: 0,
            mptr: 0,
            prp1: 0,
            prp2: 0,
            cdw10: 0,
            cdw11: 0,
            cdw12: 0,
            cdw13: 0,
            cdw14: 0,
            cdw15: 0,
        }
    }

    /// Opcode.
    pub const fn opcode(&self) -> u8 {
        self.cdw0 as u8
    }

    /// Fused operation bits; 0: a normal command.
    pub const fn fuse(&self) -> u8 {
        (self.cdw0 >> 8) as u8 & 3
    }

    /// PRP or SGL for Data Transfer; 0: PRPs.
    pub const fn psdt(&self) -> u8 {
        (self.cdw0 >> 14) as u8 & 3
    }

    /// Command identifier.
    pub const fn cid(&self) -> u16 {
        (self.cdw0 >> 16) as u16
    }

    /// The same command with another command identifier.
    pub const fn with_cid(mut self, cid: u16) -> Self {
        self.cdw0 = (self.cdw0 & 0xffff) | ((cid as u32) << 16);
        self
    }

    /// Starting LBA of a Read, Write, Write Zeroes or Compare command (CDW10 and CDW11).
    pub const fn slba(&self) -> u64 {
        self.cdw10 as u64 | ((self.cdw11 as u64) << 32)
    }

    /// Number of logical blocks of such a command: NLB is 0's based, this is not.
    pub const fn blocks(&self) -> u32 {
        (self.cdw12 & 0xffff) + 1
    }

    /// The same command with this starting LBA and number of blocks (1 to 65,536).
    pub const fn with_blocks(mut self, slba: u64, blocks: u32) -> Self {
        self.cdw10 = slba as u32;
        self.cdw11 = (slba >> 32) as u32;
        self.cdw12 = (self.cdw12 & 0xffff_0000) | (blocks.wrapping_sub(1) & 0xffff);
        self
    }
}

/// CDW12 bit 30: Force Unit Access.
pub const FUA: u32 = 1 << 30;
/// CDW12 bit 25 of Write Zeroes: Deallocate.
pub const DEAC: u32 = 1 << 25;
/// CDW11 bit 2 of Dataset Management: Attribute Deallocate.
pub const DSM_AD: u32 = 1 << 2;

/// One range of a Dataset Management command, 16 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct DsmRange {
    /// Context attributes.
    pub cattr: u32,
    /// Length in logical blocks.
    pub nlb: u32,
    /// Starting LBA.
    pub slba: u64,
}

/// Admin command opcodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum AdminOpcode {
    /// Delete I/O Submission Queue.
    DeleteIoSq = 0x00,
    /// Create I/O Submission Queue.
    CreateIoSq = 0x01,
    /// Get Log Page.
    GetLogPage = 0x02,
    /// Delete I/O Completion Queue.
    DeleteIoCq = 0x04,
    /// Create I/O Completion Queue.
    CreateIoCq = 0x05,
    /// Identify.
    Identify = 0x06,
    /// Abort.
    Abort = 0x08,
    /// Set Features.
    SetFeatures = 0x09,
    /// Get Features.
    GetFeatures = 0x0a,
    /// Asynchronous Event Request.
    AsyncEventRequest = 0x0c,
    /// Keep Alive.
    KeepAlive = 0x18,
    /// Format NVM.
    FormatNvm = 0x80,
}

impl AdminOpcode {
    /// The opcode with this number, if it is one we know.
    pub const fn from_u8(op: u8) -> Option<Self> {
        Some(match op {
            0x00 => Self::DeleteIoSq,
            0x01 => Self::CreateIoSq,
            0x02 => Self::GetLogPage,
            0x04 => Self::DeleteIoCq,
            0x05 => Self::CreateIoCq,
            0x06 => Self::Identify,
            0x08 => Self::Abort,
            0x09 => Self::SetFeatures,
            0x0a => Self::GetFeatures,
            0x0c => Self::AsyncEventRequest,
            0x18 => Self::KeepAlive,
            0x80 => Self::FormatNvm,
            _ => return None,
        })
    }
}

/// NVM command set opcodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum NvmOpcode {
    /// Flush.
    Flush = 0x00,
    /// Write.
    Write = 0x01,
    /// Read.
    Read = 0x02,
    /// Write Uncorrectable.
    WriteUncorrectable = 0x04,
    /// Compare.
    Compare = 0x05,
    /// Write Zeroes.
    WriteZeroes = 0x08,
    /// Dataset Management.
    DatasetManagement = 0x09,
    /// Verify.
    Verify = 0x0c,
}

impl NvmOpcode {
    /// The opcode with this number, if it is one we know.
    pub const fn from_u8(op: u8) -> Option<Self> {
        Some(match op {
            0x00 => Self::Flush,
            0x01 => Self::Write,
            0x02 => Self::Read,
            0x04 => Self::WriteUncorrectable,
            0x05 => Self::Compare,
            0x08 => Self::WriteZeroes,
            0x09 => Self::DatasetManagement,
            0x0c => Self::Verify,
            _ => return None,
        })
    }
}
