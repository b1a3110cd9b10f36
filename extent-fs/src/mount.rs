//! Making a filesystem, and taking one up again: superblock, checkpoint, log, free map.

use std::collections::HashMap;

use nvme_driver::disk::Disk;

use crate::checkpoint::write_superblocks;
use crate::chunk::{self, Place};
use crate::commit::Txn;
use crate::error::FsError;
use crate::fault::Faults;
use crate::fs::{Clock, Filesystem};
use crate::inode::Ino;
use crate::io::{BLOCK, BLOCK_LEN, BlockIo};
use crate::item::Item;
use crate::leases::Leases;
use crate::log;
use crate::names::{NewInode, check_placement};
use crate::recover::{free_map, load_checkpoint, replay};
use crate::state::State;
use crate::superblock::{self, COPIES, FIRST_LOG_BLOCK, MAX_LOG_BLOCKS, Superblock};
use crate::time::system_time;
use crate::verify::verify;

/// Smallest device in blocks.
const MIN_BLOCKS: u64 = 64;
/// Smallest log in blocks.
const MIN_LOG_BLOCKS: u64 = 16;
/// Blocks of the log that one write makes zeros.
const ZEROS_AT_ONCE: usize = 64;

/// How to make a filesystem.
#[derive(Clone, Debug, Default)]
pub struct FormatOptions {
    /// Identity; by default random.
    pub uuid: Option<[u8; 16]>,
    /// Size of the log in bytes, at least 64 KiB; by default 1/64 of the device, at least 256 KiB and at most 64 MiB.
    pub log_bytes: Option<u64>,
    /// Owner, group and mode of the root directory; by default it is the superuser's, with mode 0755.
    pub root: Option<NewInode>,
    /// Time of the root directory in nanoseconds since 1970; by default now.
    pub time: Option<u64>,
    /// Placement of files that have none of their own, see [`SetAttr`](crate::SetAttr).
    pub placement: u8,
}

/// How to mount.
pub struct MountOptions {
    /// Refuse all changes, and write nothing at all.
    pub read_only: bool,
    /// Where the time comes from.
    pub clock: Clock,
    /// The device generation that leases are given under; see [`Filesystem::set_device_generation`].
    pub device_generation: u64,
    /// Nanoseconds that a lease holder has to answer a recall before it is fenced.
    pub lease_grace: u64,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            clock: Box::new(system_time),
            device_generation: 0,
            lease_grace: 1_000_000_000,
        }
    }
}

fn random_uuid() -> Result<[u8; 16], FsError> {
    use std::io::Read;
    let mut uuid = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut uuid))
        .map_err(|e| FsError::invalid(format!("/dev/urandom gives no uuid ({e}); pass one")))?;
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Ok(uuid)
}

/// Whether a device holds a cmbfs filesystem of any version, sound or not.
pub fn probe(disk: &mut impl Disk) -> Result<bool, FsError> {
    let mut io = BlockIo::new(disk)?;
    Ok(read_superblocks(&mut io)?.iter().any(|c| *c != superblock::Copy::Foreign))
}

pub(crate) fn read_superblocks<D: Disk>(io: &mut BlockIo<D>) -> Result<[superblock::Copy; 2], FsError> {
    let mut copies = [superblock::Copy::Foreign, superblock::Copy::Foreign];
    let mut block = vec![0; BLOCK_LEN];
    for (copy, at) in copies.iter_mut().zip(COPIES) {
        if at / BLOCK < io.blocks() {
            io.read(at, &mut block)?;
            *copy = superblock::decode(&block);
        }
    }
    Ok(copies)
}

/// Makes an empty filesystem. Everything on the device is lost.
pub fn format<D: Disk>(disk: &mut D, options: &FormatOptions) -> Result<(), FsError> {
    check_placement(options.placement)?;
    let mut io = BlockIo::new(disk)?;
    let blocks = io.blocks();
    let unsuitable = |io: &BlockIo<&mut D>, reason: String| {
        Err(FsError::Unsuitable { name: io.disk.name().to_owned(), reason })
    };
    if blocks < MIN_BLOCKS {
        return unsuitable(&io, format!("{blocks} blocks of 4 KiB (at least {MIN_BLOCKS} are needed)"));
    }
    if blocks >= 1 << 51 {
        return unsuitable(&io, "it is larger than the format allows".to_owned());
    }
    let log_blocks = match options.log_bytes {
        None => (blocks / 64).clamp(64, MAX_LOG_BLOCKS / 4).min(blocks / 4),
        Some(bytes) => bytes / BLOCK,
    };
    if !(MIN_LOG_BLOCKS..=MAX_LOG_BLOCKS).contains(&log_blocks) || log_blocks > blocks / 2 {
        return unsuitable(&io, format!("a log of {log_blocks} blocks does not fit {blocks} blocks"));
    }
    let uuid = match options.uuid {
        Some(uuid) => uuid,
        None => random_uuid()?,
    };
    let time = options.time.unwrap_or_else(system_time);
    let root = options.root.unwrap_or_else(NewInode::directory);
    let mut state = State::fresh(blocks, time, &root, options.placement);
    let place = Place { block: FIRST_LOG_BLOCK + log_blocks, blocks: 1 };
    let sb = Superblock {
        uuid,
        compat: superblock::COMPAT,
        ro_compat: superblock::RO_COMPAT,
        incompat: superblock::INCOMPAT,
        generation: 1,
        blocks,
        log_start: FIRST_LOG_BLOCK,
        log_blocks,
        log_unit: io.lba_size() as u32,
        log_head: 0,
        sequence: 1,
        prev_crc: 0,
        epoch: 0,
        chunk_block: place.block,
        chunk_blocks: 1,
        next_ino: state.next_ino,
        inodes: 1,
    };
    state.begin_capture();
    state.capture_more(usize::MAX);
    let mut bytes = Vec::new();
    let cost = usize::try_from(state.cost).unwrap_or(0);
    let body = state.capture.as_ref().and_then(|c| c.ready(cost)).unwrap_or_default();
    chunk::encode(1, 0, None, 0, &body[..cost], sb.seed(), &mut bytes);
    // The old filesystem, if there was one, ends first: a cut in between leaves no filesystem, never a mixed one.
    for at in COPIES {
        io.write(at, &[0; BLOCK_LEN])?;
    }
    io.flush()?;
    // Written, not only told to be zeros: below a sparse file or a thin volume each block of the log has its place from now on,
    // and a sync makes nothing durable but what it wrote.
    let zeros = vec![0; BLOCK_LEN * ZEROS_AT_ONCE];
    for first in (0..log_blocks).step_by(ZEROS_AT_ONCE) {
        let blocks = (log_blocks - first).min(ZEROS_AT_ONCE as u64);
        io.write((FIRST_LOG_BLOCK + first) * BLOCK, &zeros[..(blocks * BLOCK) as usize])?;
    }
    io.write(place.block * BLOCK, &bytes)?;
    io.flush()?;
    write_superblocks(&sb, |at, bytes| io.write(at, bytes).and_then(|()| io.flush()))
}

/// The newer superblock. Where there is none, but a log, that is said: it is not a device on which there is nothing to lose.
pub(crate) fn choose_superblock<D: Disk>(
    io: &mut BlockIo<D>,
    copies: [superblock::Copy; 2],
) -> Result<Superblock, FsError> {
    let chosen = superblock::choose(copies, io.disk.name());
    if matches!(chosen, Err(FsError::NotCmbfs { .. }))
        && let Some(last) = log::remains(io)?
    {
        return Err(FsError::damaged(format!(
            "both superblocks (at bytes 0 and {}) are overwritten, but behind them is the log of a cmbfs filesystem, up to record {last}; \
             without its uuid, which only they have, nothing there can be read: put one of them back from a copy of the device",
            COPIES[1]
        )));
    }
    chosen
}

impl<D: Disk> Filesystem<D> {
    /// Takes up a filesystem: reads its last checkpoint, replays its log. Writes nothing.
    pub fn mount(disk: D, options: MountOptions) -> Result<Self, FsError> {
        let mut io = BlockIo::new(disk)?;
        let copies = read_superblocks(&mut io)?;
        let sb = choose_superblock(&mut io, copies)?;
        let writable = sb.check_features()?;
        if sb.blocks > io.blocks() {
            return Err(FsError::damaged(format!(
                "the filesystem has {} blocks, the device only {}",
                sb.blocks,
                io.blocks()
            )));
        }
        if io.lba_size() > u64::from(sb.log_unit) {
            return Err(FsError::Unsuitable {
                name: io.disk.name().to_owned(),
                reason: format!(
                    "the filesystem was made for logical blocks of {} bytes, it has {}",
                    sb.log_unit,
                    io.lba_size()
                ),
            });
        }
        if options.read_only {
            io.latch_quietly("mounted read-only");
        } else if !writable {
            io.latch_quietly("the image uses features that this program can only read");
        } else {
            // What recovery reads may lie in the device's cache only: after this it does not.
            io.flush()?;
        }
        let mut faults = Faults::strict();
        let (mut state, places) = load_checkpoint(&mut io, &sb, &mut faults)?;
        let replay = replay(&mut io, &sb, &mut state, &mut faults)?;
        verify(&sb, &state, &places, &mut faults)?;
        let free = free_map(&sb, &state, &places)
            .map_err(|block| FsError::damaged(format!("block {block} is used twice, or lies outside")))?;
        tracing::debug!(records = replay.records, inodes = state.count(), "mounted");
        let mut fs = Self {
            io,
            seed: sb.seed(),
            sb,
            state,
            free,
            ring: replay.ring,
            txn: Txn::default(),
            guarded: replay.guarded,
            places,
            checkpoint: None,
            goal: 0,
            opens: HashMap::new(),
            leases: Leases::new(options.device_generation),
            lease_grace: options.lease_grace,
            clock: options.clock,
            scratch: vec![0; BLOCK_LEN].into_boxed_slice(),
            record: Vec::new(),
        };
        fs.forget_orphans()?;
        Ok(fs)
    }

    /// Files that were open without a name when the last mount ended go now.
    fn forget_orphans(&mut self) -> Result<(), FsError> {
        if self.io.latched().is_some() {
            return Ok(());
        }
        let orphans: Vec<Ino> = self.state.iter().filter(|(_, i)| i.nlink == 0).map(|(ino, _)| ino).collect();
        for ino in orphans {
            self.begin(16)?;
            self.log(&Item::Forget { ino })?;
        }
        Ok(())
    }

    /// Makes everything durable and gives the device back.
    pub fn unmount(mut self) -> Result<D, FsError> {
        if self.io.latched().is_none() {
            let orphans: Vec<Ino> = self.opens.drain().map(|(ino, _)| ino).collect();
            for ino in orphans {
                if self.state.get(ino).is_some_and(|i| i.nlink == 0) {
                    self.begin(16)?;
                    self.log(&Item::Forget { ino })?;
                }
            }
            self.commit()?;
            // A record behind the last one, so that damage to the last one will be known for what it is.
            self.barrier()?;
        }
        Ok(self.io.disk)
    }
}
