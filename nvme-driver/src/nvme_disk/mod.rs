//! A namespace of a controller as a [`Disk`]: one I/O queue pair, a bounce buffer, transfers split and kept many in flight.
//!
//! * [`NvmeDisk`]: the disk
//! * `transfer`: one call's commands: split by the longest transfer, submitted, reaped, copied
//! * `recover`: what to do about the ones that do not come back
mod recover;
mod transfer;

use std::sync::Arc;
use std::time::Duration;

use crate::controller::{Controller, ControllerError};
use crate::disk::{CmbMemory, Disk, DiskError, Geometry, Op, ResetHook};
use crate::dma::DmaBuffer;
use crate::io_queue::IoQueue;
use crate::lock::ImageLock;
use crate::mem::{Mapping, PAGE};
use crate::pci::DmaAccess;
use crate::peer_memory::PeerMemory;
use crate::queue::Done;
use transfer::{Job, Memory, Request};

/// Commands in flight at most; each has a piece of the bounce buffer.
const DEPTH: usize = 32;
/// Longest transfer through one piece of the bounce buffer.
const PIECE: usize = 128 << 10;
/// What [`Disk::write_zeroes`] writes where the controller has no such command.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// How often something had to be recovered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recoveries {
    /// Commands that were aborted because they took too long.
    pub aborts: u64,
    /// Commands that were sent again, after a reset, an abort or a status that says "try again".
    pub replays: u64,
    /// Controller resets that this disk asked for.
    pub resets: u64,
    /// Resets that somebody else asked for, after which this disk's queue was made again.
    pub resets_elsewhere: u64,
    /// Completions that made no sense.
    pub protocol_errors: u64,
}

/// A closure that only its owner's life matters of.
struct KeptHook {
    _hook: ResetHook,
}

impl std::fmt::Debug for KeptHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ResetHook")
    }
}

/// A namespace of an NVMe controller as a disk. Keeps its controller alive.
#[derive(Debug)]
pub struct NvmeDisk {
    name: String,
    geometry: Geometry,
    nsid: u32,
    can_write_zeroes: bool,
    cmb: Option<CmbMemory>,
    queue: IoQueue,
    bounce: DmaBuffer,
    /// Bytes of each piece of `bounce`.
    piece: usize,
    /// Pieces not in use; a piece's index is its command's token.
    free: Vec<usize>,
    requests: Box<[Request]>,
    /// Scratch for completions, never longer than `requests`.
    done: Vec<Done>,
    /// Commands that are overdue: (command identifier, token). Scratch.
    late: Vec<(u16, u64)>,
    /// Commands given up in a reset, by token. Scratch.
    abandoned: Vec<u64>,
    watch: recover::Watch,
    recoveries: Recoveries,
    dead: Option<String>,
    /// Kept for the controller, which calls it.
    reset_hook: Option<KeptHook>,
    _lock: Option<Arc<ImageLock>>,
}

impl NvmeDisk {
    /// A disk on the controller's first usable namespace, with an I/O queue pair of its own.
    pub fn new(controller: &Arc<Controller>) -> Result<Self, ControllerError> {
        Self::with_lock(controller, None)
    }

    /// The same, holding on to the lock of the image behind an emulated controller.
    pub(crate) fn with_lock(
        controller: &Arc<Controller>,
        lock: Option<Arc<ImageLock>>,
    ) -> Result<Self, ControllerError> {
        let namespace = controller.namespace()?;
        let identity = controller.identity();
        let mut queue = controller.create_queue()?;
        let depth = DEPTH.min(queue.pair().capacity());
        let max_transfer = controller.max_transfer();
        let piece = max_transfer.min(PIECE);
        let bounce = controller.arena().alloc(depth * piece)?;
        let geometry = Geometry {
            block_size: namespace.block_size,
            blocks: namespace.blocks,
            max_transfer,
            volatile_cache: identity.write_cache,
            can_deallocate: identity.can_deallocate(),
        };
        Ok(Self {
            name: controller.name().to_owned(),
            geometry,
            nsid: namespace.nsid,
            can_write_zeroes: identity.can_write_zeroes(),
            cmb: controller.cmb().cmb().map(|cmb| cmb.data.clone()),
            queue,
            bounce,
            piece,
            free: (0..depth).rev().collect(),
            requests: (0..depth).map(|_| Request::default()).collect(),
            done: Vec::with_capacity(depth),
            late: Vec::with_capacity(depth),
            abandoned: Vec::with_capacity(depth),
            watch: recover::Watch::default(),
            recoveries: Recoveries::default(),
            dead: None,
            reset_hook: None,
            _lock: lock,
        })
    }

    /// Its controller.
    pub fn controller(&self) -> &Arc<Controller> {
        self.queue.controller()
    }

    /// How often something had to be recovered so far.
    pub fn recoveries(&self) -> Recoveries {
        self.recoveries
    }

    /// The bus address of `len` bytes of the CMB at `offset`, if it may be used for `op`.
    fn cmb_address(&self, op: Op, offset: usize, len: usize) -> Result<u64, DiskError> {
        let refuse = |reason: String| DiskError::Cmb { name: self.name.clone(), op, reason };
        let Some(cmb) = &self.cmb else {
            let reason = match self.controller().cmb() {
                crate::cmb::CmbStatus::Absent(reason) => reason.clone(),
                crate::cmb::CmbStatus::Enabled(_) => "it is not mapped".to_owned(),
            };
            return Err(refuse(reason));
        };
        let allowed = if op == Op::Read { cmb.read_data } else { cmb.write_data };
        if !allowed {
            let bit = if op == Op::Read { "RDS" } else { "WDS" };
            return Err(refuse(format!("the controller does not support data there (CMBSZ.{bit} is 0)")));
        }
        let size = cmb.memory.len();
        if offset.checked_add(len).is_none_or(|end| end > size) || !offset.is_multiple_of(4) {
            return Err(refuse(format!("{len} bytes at offset {offset:#x} do not fit its {size:#x} bytes")));
        }
        Ok(cmb.bus_address + offset as u64)
    }

    /// The bus address of `len` bytes at `offset` of another device's memory, if it is mapped for this controller and for `op`.
    fn peer_address(&self, op: Op, memory: &PeerMemory, offset: usize, len: usize) -> Result<u64, DiskError> {
        let refuse = |reason: String| DiskError::Peer { name: self.name.clone(), reason };
        if !Arc::ptr_eq(memory.controller(), self.controller()) {
            return Err(refuse(format!("it is mapped for {}", memory.controller().name())));
        }
        // A read command stores into memory, a write command loads from it.
        let allowed = if op == Op::Read { memory.access().writable() } else { memory.access().readable() };
        if !allowed {
            return Err(refuse(format!("it is not mapped for a {op} command ({:?} only)", memory.access())));
        }
        let size = memory.len();
        if offset.checked_add(len).is_none_or(|end| end > size) || !offset.is_multiple_of(4) {
            return Err(refuse(format!("{len} bytes at offset {offset:#x} are not in its {size:#x} bytes")));
        }
        Ok(memory.bus_address() + offset as u64)
    }
}

impl Disk for NvmeDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn read(&mut self, lba: u64, into: &mut [u8]) -> Result<(), DiskError> {
        let blocks = self.geometry.check(Op::Read, lba, into.len() as u64)?;
        self.run(Job { op: Op::Read, lba, blocks, piece: self.piece }, Memory::Into(into))
    }

    fn write(&mut self, lba: u64, from: &[u8]) -> Result<(), DiskError> {
        let blocks = self.geometry.check(Op::Write, lba, from.len() as u64)?;
        self.run(Job { op: Op::Write, lba, blocks, piece: self.piece }, Memory::From(from))
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        self.run(Job { op: Op::Flush, lba: 0, blocks: 1, piece: self.piece }, Memory::None)
    }

    fn write_zeroes(&mut self, lba: u64, blocks: u64) -> Result<(), DiskError> {
        self.geometry.check_blocks(Op::WriteZeroes, lba, blocks)?;
        if self.can_write_zeroes {
            // At most what a transfer may be: controllers that limit the command apart from MDTS allow more, not less.
            let piece = self.geometry.max_transfer;
            return self.run(Job { op: Op::WriteZeroes, lba, blocks, piece }, Memory::None);
        }
        let per = ZEROS.len() as u64 / u64::from(self.geometry.block_size);
        let mut done = 0;
        while done < blocks {
            let n = per.min(blocks - done);
            self.write(lba + done, &ZEROS[..n as usize * self.geometry.block_size as usize])?;
            done += n;
        }
        Ok(())
    }

    fn deallocate(&mut self, lba: u64, blocks: u64) -> Result<(), DiskError> {
        self.geometry.check_blocks(Op::Deallocate, lba, blocks)?;
        if !self.geometry.can_deallocate {
            return Ok(());
        }
        // One range a command; a range is at most 2^32 - 1 blocks, far from overflowing a usize in bytes.
        let piece = (u32::MAX as usize) * self.geometry.block_size as usize;
        self.run(Job { op: Op::Deallocate, lba, blocks, piece }, Memory::None)
    }

    fn cmb(&self) -> Option<&CmbMemory> {
        self.cmb.as_ref()
    }

    fn failure(&self) -> Option<String> {
        self.dead.clone().or_else(|| self.controller().failure())
    }

    fn on_reset(&mut self, hook: ResetHook) {
        self.controller().on_reset(&hook);
        self.reset_hook = Some(KeptHook { _hook: hook });
    }

    fn read_to_cmb(&mut self, lba: u64, offset: usize, len: usize) -> Result<(), DiskError> {
        let blocks = self.geometry.check(Op::Read, lba, len as u64)?;
        let address = self.cmb_address(Op::Read, offset, len)?;
        let piece = self.geometry.max_transfer;
        self.run(Job { op: Op::Read, lba, blocks, piece }, Memory::Bus(address))
    }

    fn write_from_cmb(&mut self, lba: u64, offset: usize, len: usize) -> Result<(), DiskError> {
        let blocks = self.geometry.check(Op::Write, lba, len as u64)?;
        let address = self.cmb_address(Op::Write, offset, len)?;
        let piece = self.geometry.max_transfer;
        self.run(Job { op: Op::Write, lba, blocks, piece }, Memory::Bus(address))
    }

    fn map_peer(
        &mut self,
        memory: &Arc<Mapping>,
        offset: usize,
        len: usize,
        access: DmaAccess,
    ) -> Result<PeerMemory, DiskError> {
        PeerMemory::map(self.controller(), memory, offset, len, access)
            .map_err(|e| DiskError::Peer { name: self.name.clone(), reason: e.to_string() })
    }

    fn read_to_peer(
        &mut self,
        lba: u64,
        to: &PeerMemory,
        offset: usize,
        len: usize,
    ) -> Result<(), DiskError> {
        let blocks = self.geometry.check(Op::Read, lba, len as u64)?;
        let address = self.peer_address(Op::Read, to, offset, len)?;
        let piece = self.geometry.max_transfer;
        self.run(Job { op: Op::Read, lba, blocks, piece }, Memory::Peer(address))
    }

    fn write_from_peer(
        &mut self,
        lba: u64,
        from: &PeerMemory,
        offset: usize,
        len: usize,
    ) -> Result<(), DiskError> {
        let blocks = self.geometry.check(Op::Write, lba, len as u64)?;
        let address = self.peer_address(Op::Write, from, offset, len)?;
        let piece = self.geometry.max_transfer;
        self.run(Job { op: Op::Write, lba, blocks, piece }, Memory::Peer(address))
    }
}

// A piece holds at least one Dataset Management range and a whole number of blocks.
const _: () = assert!(PIECE.is_multiple_of(PAGE) && DEPTH > 0);
/// How often a waiting call looks at CSTS, so that a removed controller is noticed long before its commands are late.
const HEALTH: Duration = Duration::from_secs(1);
