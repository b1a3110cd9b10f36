//! The superblock: what the image is, where its log and its last checkpoint are. Two copies, written one after the other.

use crate::codec::{Put, Seed, Take};
use crate::error::FsError;
use crate::io::{BLOCK, BLOCK_LEN};

/// Version of the on-disk format.
pub const VERSION: u32 = 1;
/// Inodes have a placement.
const PLACEMENT: u64 = 1;
/// Compatible features known here: an image with unknown ones may be used all the same.
pub(crate) const COMPAT: u64 = PLACEMENT;
/// Read-only-compatible features known here: with unknown ones the image may only be read.
pub(crate) const RO_COMPAT: u64 = 0;
/// Incompatible features known here: with unknown ones the image may not even be read.
pub(crate) const INCOMPAT: u64 = 0;

const MAGIC: [u8; 8] = *b"cmbfs\0SB";
/// Where the two copies are, in bytes.
pub(crate) const COPIES: [u64; 2] = [0, 16 * BLOCK];
/// First block behind the fixed places.
pub(crate) const FIRST_LOG_BLOCK: u64 = 17;
/// Largest log, so that reading it is bounded.
pub(crate) const MAX_LOG_BLOCKS: u64 = (256 << 20) / BLOCK;
const CRC_AT: usize = 12;

/// One superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) uuid: [u8; 16],
    pub(crate) compat: u64,
    pub(crate) ro_compat: u64,
    pub(crate) incompat: u64,
    /// Counts checkpoints; the copy with the higher one is newer.
    pub(crate) generation: u64,
    pub(crate) blocks: u64,
    pub(crate) log_start: u64,
    pub(crate) log_blocks: u64,
    /// Bytes per log unit: records begin on multiples of it. The logical block size of the device at mkfs.
    pub(crate) log_unit: u32,
    /// Where in the log, in bytes from its start, the first record after the checkpoint is.
    pub(crate) log_head: u64,
    /// The sequence of that record; everything before it is durable.
    pub(crate) sequence: u64,
    /// CRC of the record before it.
    pub(crate) prev_crc: u32,
    /// Highest epoch used by then.
    pub(crate) epoch: u64,
    /// First chunk of the checkpoint, and its length.
    pub(crate) chunk_block: u64,
    pub(crate) chunk_blocks: u32,
    pub(crate) next_ino: u64,
    /// Inodes in the checkpoint.
    pub(crate) inodes: u64,
}

impl Superblock {
    pub(crate) fn seed(&self) -> Seed {
        Seed::new(&self.uuid)
    }

    pub(crate) fn log_bytes(&self) -> u64 {
        self.log_blocks * BLOCK
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut b = Vec::with_capacity(BLOCK_LEN);
        b.put(&MAGIC);
        b.u32(VERSION);
        b.u32(0);
        b.put(&self.uuid);
        b.u64(self.compat);
        b.u64(self.ro_compat);
        b.u64(self.incompat);
        b.u64(self.generation);
        b.u32(BLOCK as u32);
        b.u32(self.log_unit);
        b.u64(self.blocks);
        b.u64(self.log_start);
        b.u64(self.log_blocks);
        b.u64(self.log_head);
        b.u64(self.sequence);
        b.u64(self.epoch);
        b.u32(self.prev_crc);
        b.u32(self.chunk_blocks);
        b.u64(self.chunk_block);
        b.u64(self.next_ino);
        b.u64(self.inodes);
        b.resize(BLOCK_LEN, 0);
        let crc = self.seed().crc(&b);
        b[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        b
    }

    fn fields(block: &[u8]) -> Option<Self> {
        let mut t = Take(block.get(16..)?);
        let uuid = t.bytes(16)?.try_into().ok()?;
        let (compat, ro_compat, incompat, generation) = (t.u64()?, t.u64()?, t.u64()?, t.u64()?);
        let block_size = t.u32()?;
        let log_unit = t.u32()?;
        let sb = Self {
            uuid,
            compat,
            ro_compat,
            incompat,
            generation,
            log_unit,
            blocks: t.u64()?,
            log_start: t.u64()?,
            log_blocks: t.u64()?,
            log_head: t.u64()?,
            sequence: t.u64()?,
            epoch: t.u64()?,
            prev_crc: t.u32()?,
            chunk_blocks: t.u32()?,
            chunk_block: t.u64()?,
            next_ino: t.u64()?,
            inodes: t.u64()?,
        };
        let log_end = sb.log_start.checked_add(sb.log_blocks)?;
        let chunk_end = sb.chunk_block.checked_add(u64::from(sb.chunk_blocks))?;
        let sound = u64::from(block_size) == BLOCK
            && sb.log_unit.is_power_of_two()
            && (512..=4096).contains(&sb.log_unit)
            && sb.log_start >= FIRST_LOG_BLOCK
            && (1..=MAX_LOG_BLOCKS).contains(&sb.log_blocks)
            && log_end <= sb.chunk_block
            && sb.log_head < sb.log_bytes()
            && sb.log_head.is_multiple_of(u64::from(sb.log_unit))
            && chunk_end <= sb.blocks
            && sb.blocks < 1 << 51
            && sb.sequence > 0
            && sb.next_ino < 1 << 63
            && sb.epoch < 1 << 63
            && sb.sequence < 1 << 63
            && sb.generation < 1 << 63;
        sound.then_some(sb)
    }

    /// Refuses images that this program must not touch; says whether it may write.
    pub(crate) fn check_features(&self) -> Result<bool, FsError> {
        match self.incompat & !INCOMPAT {
            0 => Ok(self.ro_compat & !RO_COMPAT == 0),
            bits => Err(FsError::Features { bits, class: "incompatible" }),
        }
    }
}

/// What one copy turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Copy {
    Good(Box<Superblock>),
    /// It is one of ours, but of another version.
    OtherVersion(u32),
    /// It carries the magic, but the checksum or the fields are wrong.
    Bad,
    /// Nothing of ours.
    Foreign,
}

/// Decodes one copy. Magic, version and CRC are at the same place in every version.
pub(crate) fn decode(block: &[u8]) -> Copy {
    let mut t = Take(block);
    if t.bytes(8) != Some(&MAGIC) {
        return Copy::Foreign;
    }
    let (Some(version), Some(crc)) = (t.u32(), t.u32()) else { return Copy::Bad };
    let Some(uuid) = t.bytes(16).and_then(|u| <[u8; 16]>::try_from(u).ok()) else { return Copy::Bad };
    let mut zeroed = block.to_vec();
    zeroed[CRC_AT..CRC_AT + 4].fill(0);
    if Seed::new(&uuid).crc(&zeroed) != crc {
        return Copy::Bad;
    }
    if version != VERSION {
        return Copy::OtherVersion(version);
    }
    Superblock::fields(block).map_or(Copy::Bad, |sb| Copy::Good(Box::new(sb)))
}

/// Chooses the newer good copy.
pub(crate) fn choose(copies: [Copy; 2], name: &str) -> Result<Superblock, FsError> {
    let mut best: Option<Superblock> = None;
    let mut other = None;
    let mut bad = false;
    for copy in copies {
        match copy {
            Copy::Good(sb) if best.as_ref().is_none_or(|b| b.generation < sb.generation) => best = Some(*sb),
            Copy::Good(_) | Copy::Foreign => {}
            Copy::OtherVersion(v) => other = Some(v),
            Copy::Bad => bad = true,
        }
    }
    match (best, other) {
        (Some(sb), _) => Ok(sb),
        (None, Some(found)) => Err(FsError::Version { found, known: VERSION }),
        (None, None) if bad => Err(FsError::damaged("both superblocks are unreadable")),
        (None, None) => Err(FsError::NotCmbfs { name: name.to_owned() }),
    }
}
