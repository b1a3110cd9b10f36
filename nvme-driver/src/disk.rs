//! A block device as the layers above see it: logical blocks in, logical blocks out, errors typed.
//!
//! Calls return when the device has completed the command. `write` does not promise durability: [`Disk::flush`] does
//! (NVMe base specification, Flush command).

use std::fmt;
use std::sync::Arc;

use crate::mem::Mapping;
use crate::pci::DmaAccess;
use crate::peer_memory::PeerMemory;
use crate::spec::Status;

/// Size, granularity and abilities of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes per logical block (LBA): 512 or 4096.
    pub block_size: u32,
    /// Number of logical blocks.
    pub blocks: u64,
    /// Largest number of bytes that one command moves; bigger transfers are split.
    pub max_transfer: usize,
    /// Whether the device has a volatile write cache: then only `flush` makes writes durable.
    pub volatile_cache: bool,
    /// Whether `deallocate` does anything.
    pub can_deallocate: bool,
}

impl Geometry {
    /// Checks that `bytes` bytes from `lba` are whole blocks of the disk, and says how many.
    pub(crate) fn check(&self, op: Op, lba: u64, bytes: u64) -> Result<u64, DiskError> {
        let block_size = u64::from(self.block_size);
        let count = bytes / block_size;
        if !bytes.is_multiple_of(block_size) || lba.checked_add(count).is_none_or(|end| end > self.blocks) {
            return Err(DiskError::BadRange {
                op,
                lba,
                bytes,
                blocks: self.blocks,
                block_size: self.block_size,
            });
        }
        Ok(count)
    }

    /// Checks that `count` blocks from `lba` are on the disk.
    pub(crate) fn check_blocks(&self, op: Op, lba: u64, count: u64) -> Result<(), DiskError> {
        self.check(op, lba, count.saturating_mul(u64::from(self.block_size))).map(|_| ())
    }

    /// Capacity in bytes.
    pub fn bytes(&self) -> u64 {
        self.blocks.saturating_mul(u64::from(self.block_size))
    }
}

/// The kind of transfer that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Drive to memory.
    Read,
    /// Memory to drive.
    Write,
    /// Volatile cache to media.
    Flush,
    /// Blocks to zero, without data.
    WriteZeroes,
    /// Trim (dataset management, deallocate).
    Deallocate,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::WriteZeroes => "write zeroes",
            Self::Deallocate => "deallocate",
        })
    }
}

/// A disk could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The range is outside the disk, or the buffer is not a whole number of blocks.
    #[error(
        "{op} of {bytes} bytes at LBA {lba} does not fit a disk of {blocks} blocks of {block_size} bytes"
    )]
    BadRange {
        /// What was asked.
        op: Op,
        /// First logical block.
        lba: u64,
        /// Length in bytes.
        bytes: u64,
        /// Blocks on the disk.
        blocks: u64,
        /// Bytes per block.
        block_size: u32,
    },
    /// The device completed the command with an error status.
    #[error("{op} at LBA {lba} failed: {status}{}", advice(*.status))]
    Device {
        /// What was asked.
        op: Op,
        /// First logical block.
        lba: u64,
        /// The status in the completion.
        status: Status,
    },
    /// The command did not complete in time and could not be recovered.
    #[error("{op} at LBA {lba} did not complete within {waited_ms} ms")]
    TimedOut {
        /// What was asked.
        op: Op,
        /// First logical block.
        lba: u64,
        /// How long it was waited for, in milliseconds.
        waited_ms: u64,
    },
    /// The device broke the protocol while the command was in flight, and went on doing so after a reset.
    #[error("{op} at LBA {lba} got no valid completion: {reason}")]
    Protocol {
        /// What was asked.
        op: Op,
        /// First logical block.
        lba: u64,
        /// What the device did.
        reason: String,
    },
    /// The device is gone or failed as a whole.
    #[error("{name} is unusable: {reason}")]
    Dead {
        /// The device's name.
        name: String,
        /// What happened to it.
        reason: String,
    },
    /// The disk has no CMB, or this range of it cannot be used that way.
    #[error("{name} cannot use its CMB for this {op}: {reason}")]
    Cmb {
        /// The device's name.
        name: String,
        /// What was asked.
        op: Op,
        /// Why not.
        reason: String,
    },
    /// The device was reset before a write from its CMB was over: the data there is gone. Per block, the medium has the old
    /// bytes or the new ones.
    #[error("{op} at LBA {lba} was cut short by a reset of the device, and its data in the CMB is gone")]
    CmbLost {
        /// What was asked.
        op: Op,
        /// First logical block.
        lba: u64,
    },
    /// The disk cannot reach that memory of another device.
    #[error("{name} cannot reach the other device's memory: {reason}")]
    Peer {
        /// The disk's name.
        name: String,
        /// Why not.
        reason: String,
    },
    /// The system refused.
    #[error("{op} at LBA {lba}: {source}")]
    Io {
        /// What was asked.
        op: Op,
        /// First logical block.
        lba: u64,
        /// The system's answer.
        source: std::io::Error,
    },
}

impl DiskError {
    /// Whether there was no room for the blocks where the drive keeps them: the host's disk under an image, or a pool that a drive is
    /// thinly provisioned from.
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::Device { status, .. } => status.is(Status::CAPACITY_EXCEEDED),
            Self::Io { source, .. } => is_full(source),
            _ => false,
        }
    }
}

/// Whether the system says that there is no room for more, for anybody or for this user.
pub(crate) fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

/// What to do about a status, where its name does not tell.
fn advice(status: Status) -> &'static str {
    if !status.is(Status::CAPACITY_EXCEEDED) {
        return "";
    }
    "; no space left where the drive keeps its blocks (of an image: on the host's disk), free some there"
}

/// A disk's Controller Memory Buffer as mapped into this process.
#[derive(Clone, Debug)]
pub struct CmbMemory {
    /// Its bytes, from CMB offset 0. Backed by a file descriptor where other processes can map it too.
    pub memory: Arc<Mapping>,
    /// The address at which this controller and its peers reach offset 0 (the CBA, an IOVA).
    pub bus_address: u64,
    /// Whether CPU access goes over a bus (uncached, at most 8 aligned bytes at a time) or is ordinary memory (emulated).
    pub is_device_memory: bool,
    /// Bytes usable for data: read data may land there (CMBSZ.RDS) and write data may come from there (CMBSZ.WDS).
    pub read_data: bool,
    /// See `read_data`.
    pub write_data: bool,
}

/// Called just before a device is reset. It must be quick, and not use the device.
pub type ResetHook = Arc<dyn Fn() + Send + Sync>;

/// A block device.
pub trait Disk: Send {
    /// The name to use in messages.
    fn name(&self) -> &str;

    /// Size and abilities.
    fn geometry(&self) -> &Geometry;

    /// Reads `into.len()` bytes (a whole number of blocks) from `lba`.
    fn read(&mut self, lba: u64, into: &mut [u8]) -> Result<(), DiskError>;

    /// Writes `from` (a whole number of blocks) at `lba`.
    fn write(&mut self, lba: u64, from: &[u8]) -> Result<(), DiskError>;

    /// Returns when everything written before is durable.
    fn flush(&mut self) -> Result<(), DiskError>;

    /// Makes `blocks` blocks from `lba` read as zeros.
    fn write_zeroes(&mut self, lba: u64, blocks: u64) -> Result<(), DiskError>;

    /// Tells the device that `blocks` blocks from `lba` hold nothing of value. What they read as afterwards is undefined.
    fn deallocate(&mut self, lba: u64, blocks: u64) -> Result<(), DiskError>;

    /// The CMB, if the device has one that is enabled and mapped.
    fn cmb(&self) -> Option<&CmbMemory> {
        None
    }

    /// Why the device cannot be used at all any more, if that is known: it was removed, or given up. Sends no command and waits for nobody.
    fn failure(&self) -> Option<String> {
        None
    }

    /// Has `hook` called before each reset of the device, whoever asks for it, from any thread. Nothing in the CMB can be relied on
    /// from that call on: the specification promises nothing about its contents across a reset. (A device that fails for good, or is
    /// gone, is reset in vain, so the call comes then too.) One hook per disk; it goes with the disk.
    fn on_reset(&mut self, hook: ResetHook) {
        // Without a CMB there is nothing to lose.
        let _ = hook;
    }

    /// Reads `len` bytes from `lba` straight into the CMB at `offset`: no byte passes host memory.
    fn read_to_cmb(&mut self, lba: u64, offset: usize, len: usize) -> Result<(), DiskError> {
        let _ = (lba, offset, len);
        Err(DiskError::Cmb { name: self.name().to_owned(), op: Op::Read, reason: "it has none".to_owned() })
    }

    /// Writes `len` bytes at `lba` straight from the CMB at `offset`. Not sent again after a reset: [`DiskError::CmbLost`].
    fn write_from_cmb(&mut self, lba: u64, offset: usize, len: usize) -> Result<(), DiskError> {
        let _ = (lba, offset, len);
        Err(DiskError::Cmb { name: self.name().to_owned(), op: Op::Write, reason: "it has none".to_owned() })
    }

    /// Lets this device reach `len` bytes of another device's memory (a CMB, as mapped here) from `offset`, as far as `access` says.
    fn map_peer(
        &mut self,
        memory: &Arc<Mapping>,
        offset: usize,
        len: usize,
        access: DmaAccess,
    ) -> Result<PeerMemory, DiskError> {
        let _ = (memory, offset, len, access);
        Err(self.no_peer())
    }

    /// Reads `len` bytes from `lba` straight into another device's memory, `offset` bytes into what was mapped.
    fn read_to_peer(
        &mut self,
        lba: u64,
        to: &PeerMemory,
        offset: usize,
        len: usize,
    ) -> Result<(), DiskError> {
        let _ = (lba, to, offset, len);
        Err(self.no_peer())
    }

    /// Writes `len` bytes at `lba` straight from another device's memory.
    fn write_from_peer(
        &mut self,
        lba: u64,
        from: &PeerMemory,
        offset: usize,
        len: usize,
    ) -> Result<(), DiskError> {
        let _ = (lba, from, offset, len);
        Err(self.no_peer())
    }

    /// The error of a device that reaches host memory only.
    #[doc(hidden)]
    fn no_peer(&self) -> DiskError {
        DiskError::Peer {
            name: self.name().to_owned(),
            reason: "it is no NVMe controller of ours".to_owned(),
        }
    }
}

/// Whatever points to a disk is one: every call goes on to it, those that have a default too.
macro_rules! disk_by_pointer {
    ($($pointer:ty),*) => {$(
        impl<D: Disk + ?Sized> Disk for $pointer {
            fn name(&self) -> &str {
                (**self).name()
            }
            fn geometry(&self) -> &Geometry {
                (**self).geometry()
            }
            fn read(&mut self, lba: u64, into: &mut [u8]) -> Result<(), DiskError> {
                (**self).read(lba, into)
            }
            fn write(&mut self, lba: u64, from: &[u8]) -> Result<(), DiskError> {
                (**self).write(lba, from)
            }
            fn flush(&mut self) -> Result<(), DiskError> {
                (**self).flush()
            }
            fn write_zeroes(&mut self, lba: u64, blocks: u64) -> Result<(), DiskError> {
                (**self).write_zeroes(lba, blocks)
            }
            fn deallocate(&mut self, lba: u64, blocks: u64) -> Result<(), DiskError> {
                (**self).deallocate(lba, blocks)
            }
            fn cmb(&self) -> Option<&CmbMemory> {
                (**self).cmb()
            }
            fn failure(&self) -> Option<String> {
                (**self).failure()
            }
            fn on_reset(&mut self, hook: ResetHook) {
                (**self).on_reset(hook);
            }
            fn read_to_cmb(&mut self, lba: u64, offset: usize, len: usize) -> Result<(), DiskError> {
                (**self).read_to_cmb(lba, offset, len)
            }
            fn write_from_cmb(&mut self, lba: u64, offset: usize, len: usize) -> Result<(), DiskError> {
                (**self).write_from_cmb(lba, offset, len)
            }
            fn map_peer(
                &mut self,
                memory: &Arc<Mapping>,
                offset: usize,
                len: usize,
                access: DmaAccess,
            ) -> Result<PeerMemory, DiskError> {
                (**self).map_peer(memory, offset, len, access)
            }
            fn read_to_peer(
                &mut self,
                lba: u64,
                to: &PeerMemory,
                offset: usize,
                len: usize,
            ) -> Result<(), DiskError> {
                (**self).read_to_peer(lba, to, offset, len)
            }
            fn write_from_peer(
                &mut self,
                lba: u64,
                from: &PeerMemory,
                offset: usize,
                len: usize,
            ) -> Result<(), DiskError> {
                (**self).write_from_peer(lba, from, offset, len)
            }
        }
    )*};
}

disk_by_pointer!(Box<D>, &mut D);
