//! The volatile write cache, kept as its opposite: writes go to the medium at once, and what they replaced is kept until
//! a flush. A power cut then puts some of it back.
//!
//! So reads need no lookup, and a power cut can leave any mixture that a real cache could: per block, any version written
//! since the last flush, or the one before. The oldest writes become durable when the cache is full, as in a real one.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

use super::config::EmuError;
use super::media::Media;
use super::ranges::Ranges;
use crate::mem::Mapping;

/// Longest range whose old bytes are kept: the largest transfer.
const MOST_KEPT: u64 = 2 << 20;

/// What becomes of writes that were not flushed when the power goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerCut {
    /// All of them are lost.
    LoseAll,
    /// All of them made it.
    KeepAll,
    /// Each one, by the controller's seed, is lost, kept or torn between blocks; later ones may be kept where earlier
    /// ones are lost.
    Random,
}

/// What a power cut did to the writes in the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PowerCutReport {
    /// Writes of which no block was kept.
    pub lost: u64,
    /// Writes of which all blocks were kept.
    pub kept: u64,
    /// Writes of which some blocks were kept.
    pub torn: u64,
}

/// One write since the last flush.
#[derive(Clone, Copy, Debug)]
struct Unflushed {
    /// Byte range on the medium.
    offset: u64,
    len: u64,
    /// Where the bytes it replaced are in the arena; `None`: the write was durable (FUA) and older versions are moot.
    before: Option<usize>,
}

#[derive(Debug)]
pub(super) struct Cache {
    enabled: bool,
    writes: VecDeque<Unflushed>,
    /// A ring of replaced bytes, in the order of `writes`.
    arena: Arc<Mapping>,
    /// Where the next bytes go.
    next: usize,
    random: Xoshiro256PlusPlus,
}

impl Cache {
    pub(super) fn new(bytes: usize, seed: u64) -> Result<Self, EmuError> {
        Ok(Self {
            enabled: true,
            writes: VecDeque::with_capacity(1024),
            arena: Mapping::anonymous(bytes.next_multiple_of(4096))?,
            next: 0,
            random: Xoshiro256PlusPlus::seed_from_u64(seed ^ 0x6361_6368_6520),
        })
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Feature Volatile Write Cache. The caller has flushed.
    pub(super) fn set_enabled(&mut self, on: bool) {
        self.enabled = on;
    }

    /// A range is about to be overwritten, durably or not.
    pub(super) fn before_write(
        &mut self,
        media: &mut Media,
        offset: u64,
        len: u64,
        durable: bool,
    ) -> io::Result<()> {
        // What does not fit is written through: a cache may do that at any time. So the work per command is bounded.
        let most = MOST_KEPT.min(self.arena.len() as u64 / 2);
        let fits = len <= most;
        if durable || !self.enabled || !fits {
            if !self.writes.is_empty() {
                self.writes.push_back(Unflushed { offset, len, before: None });
            }
            return Ok(());
        }
        let at = self.make_room(len as usize);
        media.read(offset, &self.arena, at, len as usize)?;
        self.writes.push_back(Unflushed { offset, len, before: Some(at) });
        Ok(())
    }

    /// Room for `len` contiguous bytes: the oldest writes become durable until there is.
    fn make_room(&mut self, len: usize) -> usize {
        let at = if self.next + len > self.arena.len() { 0 } else { self.next };
        // The ring's order is the writes' order, so what overlaps is at the front. After wrapping, so is what was skipped.
        let wrapped = at < self.next;
        let skipped = self.next;
        while let Some(&Unflushed { len: old_len, before, .. }) = self.writes.front() {
            let gone = match before {
                None => true,
                Some(b) => (b < at + len && at < b + old_len as usize) || (wrapped && b >= skipped),
            };
            if !gone {
                break;
            }
            self.writes.pop_front();
        }
        self.next = at + len;
        at
    }

    /// Everything written so far is durable.
    pub(super) fn flushed(&mut self) {
        self.writes.clear();
        self.next = 0;
    }

    /// Puts back what the power cut loses. Blocks of `block` bytes are never torn themselves.
    pub(super) fn power_cut(
        &mut self,
        media: &mut Media,
        cut: PowerCut,
        block: u64,
    ) -> io::Result<PowerCutReport> {
        let mut report = PowerCutReport::default();
        // Newest first. A block that a kept (or durable) write covers stays as it is, whatever lies before.
        let mut settled = Ranges::default();
        let writes: Vec<Unflushed> = self.writes.iter().rev().copied().collect();
        for w in writes {
            let Some(before) = w.before else {
                settled.add(w.offset, w.len);
                continue;
            };
            let blocks = w.len / block;
            let keep = self.choose(cut, blocks);
            let mut kept = 0;
            for i in 0..blocks {
                let at = w.offset + i * block;
                if keep.keeps(i, &mut self.random) {
                    kept += 1;
                    settled.add(at, block);
                } else if !settled.covers(at) {
                    media.write(at, &self.arena, before + (i * block) as usize, block as usize)?;
                }
            }
            match kept {
                0 => report.lost += 1,
                n if n == blocks => report.kept += 1,
                _ => report.torn += 1,
            }
        }
        self.flushed();
        self.enabled = true;
        media.sync()?;
        Ok(report)
    }

    fn choose(&mut self, cut: PowerCut, blocks: u64) -> Keep {
        match cut {
            PowerCut::LoseAll => Keep::None,
            PowerCut::KeepAll => Keep::All,
            PowerCut::Random => match self.random.next_u32() % 4 {
                0 => Keep::None,
                1 => Keep::All,
                2 => Keep::Below(u64::from(self.random.next_u32()) % (blocks + 1)),
                _ => Keep::Each,
            },
        }
    }
}

/// Which blocks of one write survive.
enum Keep {
    None,
    All,
    /// A prefix.
    Below(u64),
    /// Each by a coin.
    Each,
}

impl Keep {
    fn keeps(&self, block: u64, random: &mut Xoshiro256PlusPlus) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Below(n) => block < *n,
            Self::Each => random.next_u32() & 1 == 1,
        }
    }
}
