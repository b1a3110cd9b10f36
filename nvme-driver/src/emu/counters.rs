//! What the controller has done, counted where it happens.

/// Bytes of command data by kind of memory and direction, commands by opcode, and mishaps. Queue entries, PRP lists,
/// identify data and log pages are not data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Bytes read from the namespace into the CMB.
    pub drive_to_cmb: u64,
    /// Bytes written to the namespace from the CMB.
    pub cmb_to_drive: u64,
    /// Bytes read from the namespace into the host's memory, behind the IOMMU.
    pub drive_to_host: u64,
    /// Bytes written to the namespace from the host's memory.
    pub host_to_drive: u64,
    /// Bytes read from the namespace into another device's memory (its CMB or PMR), behind the IOMMU.
    pub drive_to_peer: u64,
    /// Bytes written to the namespace from another device's memory.
    pub peer_to_drive: u64,
    /// Bytes read from the namespace into the Persistent Memory Region.
    pub drive_to_pmr: u64,
    /// Bytes written to the namespace from the Persistent Memory Region.
    pub pmr_to_drive: u64,
    /// Times that PMRSTS was read while the Persistent Memory Region was enabled: what was stored there before is persistent.
    pub pmr_barriers: u64,
    /// Admin commands by opcode.
    pub admin_commands: [u64; 256],
    /// I/O commands by opcode.
    pub io_commands: [u64; 256],
    /// Commands completed with a status other than success.
    pub errors: u64,
    /// DMA that the IOMMU refused.
    pub iommu_faults: u64,
    /// Doorbell writes that were invalid.
    pub bad_doorbells: u64,
    /// Interrupts signalled.
    pub interrupts: u64,
    /// Times the controller was reset, by whatever means.
    pub resets: u64,
    /// Faults that were injected.
    pub injected: u64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            drive_to_cmb: 0,
            cmb_to_drive: 0,
            drive_to_host: 0,
            host_to_drive: 0,
            drive_to_peer: 0,
            peer_to_drive: 0,
            drive_to_pmr: 0,
            pmr_to_drive: 0,
            pmr_barriers: 0,
            admin_commands: [0; 256],
            io_commands: [0; 256],
            errors: 0,
            iommu_faults: 0,
            bad_doorbells: 0,
            interrupts: 0,
            resets: 0,
            injected: 0,
        }
    }
}

impl Counters {
    /// I/O commands of all opcodes.
    pub fn io_total(&self) -> u64 {
        self.io_commands.iter().sum()
    }
}
