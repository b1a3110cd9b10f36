//! What an emulated controller is made of.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::mem::MapError;

/// Where the namespace's bytes live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// In memory: gone with the controller.
    Ram {
        /// Size in bytes.
        bytes: u64,
    },
    /// In a file, through io_uring.
    File {
        /// The image.
        path: PathBuf,
        /// Size of the image to create (sparse, zeros) if there is none; `None`: it must exist.
        create: Option<u64>,
    },
    /// Nowhere: writes are dropped, reads move no data at all. For measuring the rest.
    Null {
        /// Size in bytes that the namespace claims.
        bytes: u64,
    },
}

/// What the Controller Memory Buffer may be used for (CMBSZ, CMBLOC).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CmbSupport {
    /// Submission queues may lie in it (CMBSZ.SQS).
    pub submission_queues: bool,
    /// Completion queues may lie in it (CMBSZ.CQS).
    pub completion_queues: bool,
    /// PRP lists and SGL segments may lie in it (CMBSZ.LISTS).
    pub lists: bool,
    /// Data that is read from the drive may land in it (CMBSZ.RDS).
    pub read_data: bool,
    /// Data that is written to the drive may come from it (CMBSZ.WDS).
    pub write_data: bool,
    /// One command's data may lie partly in it and partly elsewhere (CMBLOC.CDPMLS).
    pub mixed_data: bool,
}

impl Default for CmbSupport {
    fn default() -> Self {
        Self {
            submission_queues: true,
            completion_queues: true,
            lists: true,
            read_data: true,
            write_data: true,
            mixed_data: true,
        }
    }
}

/// Nanoseconds since the Unix epoch.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// What to emulate. `Config::default()` is a 64 MiB RAM drive with 512-byte blocks, a volatile write cache and no CMB.
#[derive(Clone)]
pub struct Config {
    /// Where the namespace's bytes live.
    pub namespace: Backing,
    /// Bytes per logical block: 512 or 4096.
    pub lba_size: u32,
    /// Bytes of Controller Memory Buffer; 0: none. A multiple of 4 KiB; its BAR is the next power of two.
    pub cmb_size: u64,
    /// What the CMB may be used for.
    pub cmb: CmbSupport,
    /// Bytes of Persistent Memory Region; 0: none. A power of two from 4 KiB.
    pub pmr_size: u64,
    /// The file that keeps the PMR's bytes, created if it does not exist, `pmr_size` bytes long; `None`: they go with the controller.
    pub pmr_file: Option<PathBuf>,
    /// Whether writes are volatile until flushed.
    pub volatile_cache: bool,
    /// Bytes of unflushed writes that the cache holds at most; the oldest are made durable beyond that.
    pub cache_bytes: usize,
    /// Whether unflushed writes to an image stay in this process' memory, so that killing it loses them as a power cut
    /// would. Otherwise they are in the image at once, and only [`power_cut`](super::EmulatedController::power_cut) loses them.
    /// The image is read into memory as a whole.
    pub lose_on_kill: bool,
    /// I/O submission queues, and as many completion queues: 1 to 255.
    pub io_queues: u16,
    /// Largest queue, in entries: 2 to 65,536 (CAP.MQES + 1).
    pub max_queue_entries: u32,
    /// Largest transfer: `4096 << mdts` bytes, 1 to 9.
    pub mdts: u8,
    /// Whether SGLs are offered (Identify Controller, SGLS).
    pub sgls: bool,
    /// Calls of `step` (or reads of CSTS) from CC.EN to CSTS.RDY.
    pub ready_after: u32,
    /// Commands that one `step` executes at most.
    pub commands_per_step: u32,
    /// Serial number, up to 20 ASCII characters.
    pub serial: String,
    /// Feeds everything random: the namespace's identifiers, power cuts, random faults.
    pub seed: u64,
    /// Wall clock, for the Timestamp feature and the SMART log.
    pub clock: Clock,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            namespace: Backing::Ram { bytes: 64 << 20 },
            lba_size: 512,
            cmb_size: 0,
            cmb: CmbSupport::default(),
            pmr_size: 0,
            pmr_file: None,
            volatile_cache: true,
            cache_bytes: 32 << 20,
            lose_on_kill: false,
            io_queues: 64,
            max_queue_entries: 1024,
            mdts: 7,
            sgls: false,
            ready_after: 2,
            commands_per_step: 64,
            serial: "CMBFS-EMULATED".to_owned(),
            seed: 0,
            clock: Arc::new(wall_clock),
        }
    }
}

fn wall_clock() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("namespace", &self.namespace)
            .field("lba_size", &self.lba_size)
            .field("cmb_size", &self.cmb_size)
            .field("volatile_cache", &self.volatile_cache)
            .field("seed", &self.seed)
            .finish_non_exhaustive()
    }
}

/// An emulated controller could not be made.
#[derive(Debug, thiserror::Error)]
pub enum EmuError {
    /// A value of the configuration is outside what is possible.
    #[error("an emulated controller cannot have {what} = {value}: {allowed}")]
    BadConfig {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it may be.
        allowed: &'static str,
    },
    /// The image could not be opened or created.
    #[error("image {path}: {what}: {source}")]
    Image {
        /// The image.
        path: PathBuf,
        /// What was attempted.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The image is smaller than one block.
    #[error("image {path} of {bytes} bytes is smaller than one block of {block} bytes")]
    ImageTooSmall {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The block size.
        block: u32,
    },
    /// The file of the PMR has another size.
    #[error(
        "{path} keeps a PMR of {has} bytes, not {bytes}; name that size, or remove the file to begin with an empty PMR"
    )]
    PmrSize {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        has: u64,
        /// The size asked for.
        bytes: u64,
    },
    /// Memory could not be had.
    #[error(transparent)]
    Memory(#[from] MapError),
}

impl Config {
    pub(super) fn check(&self) -> Result<(), EmuError> {
        let bad = |what, value, allowed| Err(EmuError::BadConfig { what, value, allowed });
        if !matches!(self.lba_size, 512 | 4096) {
            return bad("lba_size", u64::from(self.lba_size), "512 or 4096");
        }
        if !self.cmb_size.is_multiple_of(4096) || self.cmb_size > 1 << 32 {
            return bad("cmb_size", self.cmb_size, "a multiple of 4 KiB, at most 4 GiB");
        }
        if self.pmr_size != 0
            && (!self.pmr_size.is_power_of_two() || !(4096..=1 << 30).contains(&self.pmr_size))
        {
            return bad("pmr_size", self.pmr_size, "0 or a power of two from 4 KiB to 1 GiB");
        }
        if !(1..=255).contains(&self.io_queues) {
            return bad("io_queues", u64::from(self.io_queues), "1 to 255");
        }
        if !(2..=65536).contains(&self.max_queue_entries) {
            return bad("max_queue_entries", u64::from(self.max_queue_entries), "2 to 65536");
        }
        if !(1..=9).contains(&self.mdts) {
            return bad("mdts", u64::from(self.mdts), "1 to 9");
        }
        if self.commands_per_step == 0 {
            return bad("commands_per_step", 0, "at least 1");
        }
        if self.volatile_cache && !((1 << 20)..=(4 << 30)).contains(&self.cache_bytes) {
            return bad("cache_bytes", self.cache_bytes as u64, "1 MiB to 4 GiB");
        }
        let (Backing::Ram { bytes } | Backing::Null { bytes } | Backing::File { create: Some(bytes), .. }) =
            self.namespace
        else {
            return Ok(());
        };
        if bytes < u64::from(self.lba_size) || bytes > 1 << 46 {
            return bad("namespace size", bytes, "at least one block, at most 64 TiB");
        }
        Ok(())
    }
}
