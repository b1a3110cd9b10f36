//! Who may use which blocks directly: leases by range, their recall, and blocks that must wait for their end.
//!
//! Leases live in memory only. After a restart the device generation is another one, and every lease of before is stale.

use std::collections::BTreeMap;

use crate::extents::Piece;
use crate::inode::Ino;

/// What a lease is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading; shared with other readers.
    Read,
    /// Reading and writing; nobody else touches the range.
    Write,
}

impl Access {
    /// Which leases are in its way; `None`: all.
    pub(crate) fn conflicts(self) -> Option<Self> {
        match self {
            Self::Read => Some(Self::Write),
            Self::Write => None,
        }
    }
}

/// A lease as its holders know it. Whoever knows it may use it: it can be handed to other processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    /// Its number, never used twice in a mount.
    pub id: u64,
    /// The device generation that it was given under.
    pub device_generation: u64,
}

/// A lease that is asked back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recall {
    /// The lease.
    pub lease: Lease,
    /// The file.
    pub ino: Ino,
    /// What is wanted back: file ranges in bytes (offset, length). The rest of the lease stays.
    pub ranges: Vec<(u64, u64)>,
    /// When the holder will be fenced, by the filesystem's clock.
    pub deadline: u64,
}

type Blocks = std::ops::Range<u64>;

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) lease: Lease,
    pub(crate) ino: Ino,
    pub(crate) access: Access,
    /// File blocks it covers, in order.
    pub(crate) ranges: Vec<Blocks>,
    /// Where those were when it was given.
    pub(crate) pieces: Vec<Piece>,
    /// How many hold it.
    pub(crate) holders: u32,
    /// It ended without its holders: it covers nothing any more, but what they may still touch is not reused.
    severed: bool,
    recalled: Vec<Blocks>,
    deadline: u64,
    told: bool,
}

fn overlap(a: &Blocks, b: &Blocks) -> bool {
    a.start < b.end && b.start < a.end
}

impl Entry {
    fn covers(&self, range: &Blocks) -> bool {
        self.ranges.iter().any(|r| overlap(r, range))
    }

    /// Whether the whole of `range` is in it.
    pub(crate) fn contains(&self, range: &Blocks) -> bool {
        self.ranges.iter().any(|r| r.start <= range.start && range.end <= r.end)
    }

    fn touches(&self, disk: u64, len: u64) -> bool {
        self.pieces.iter().any(|p| p.run.disk < disk + len && disk < p.run.disk + u64::from(p.run.len))
    }

    fn give_back(&mut self, range: &Blocks) {
        let cut = |r: &Blocks| [r.start..r.end.min(range.start), r.start.max(range.end)..r.end];
        self.ranges = self.ranges.iter().flat_map(cut).filter(|r| !r.is_empty()).collect();
        let kept = std::mem::take(&mut self.ranges);
        let pieces = std::mem::take(&mut self.pieces);
        self.pieces =
            kept.iter().flat_map(|r| pieces.iter().filter_map(|p| p.within(r.start, r.end))).collect();
        self.ranges = kept;
        let ranges = std::mem::take(&mut self.recalled);
        self.recalled = ranges.into_iter().filter(|r| self.covers(r)).collect();
    }
}

/// All leases of a mount.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    by_id: BTreeMap<u64, Entry>,
    by_ino: BTreeMap<(Ino, u64), ()>,
    next: u64,
    pub(crate) device_generation: u64,
    /// Freed blocks (inode, first, count), durably so, that a layout still covers.
    held: Vec<(Ino, u64, u64)>,
}

impl Leases {
    pub(crate) fn new(device_generation: u64) -> Self {
        Self { device_generation, ..Self::default() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    fn ids(&self, ino: Ino) -> impl Iterator<Item = u64> {
        self.by_ino.range((ino, 0)..=(ino, u64::MAX)).map(|(k, ())| k.1)
    }

    /// Begins to recall what is in the way of `access` to a range (`None`: whatever the access). Returns one such lease.
    pub(crate) fn recall(
        &mut self,
        ino: Ino,
        range: Blocks,
        only: Option<Access>,
        deadline: u64,
    ) -> Option<u64> {
        let ids: Vec<u64> = self.ids(ino).collect();
        let mut first = None;
        for id in ids {
            let Some(e) = self.by_id.get_mut(&id) else { continue };
            if !e.covers(&range) || only.is_some_and(|a| a != e.access) {
                continue;
            }
            first = first.or(Some(id));
            for r in &e.ranges {
                let wanted = r.start.max(range.start)..r.end.min(range.end);
                let known = e.recalled.iter().any(|k| k.start <= wanted.start && wanted.end <= k.end);
                if wanted.is_empty() || known {
                    continue;
                }
                if e.recalled.is_empty() {
                    e.deadline = deadline;
                }
                e.recalled.push(wanted);
                e.told = false;
            }
        }
        first
    }

    pub(crate) fn grant(&mut self, ino: Ino, access: Access, range: Blocks, pieces: Vec<Piece>) -> Lease {
        self.next += 1;
        let lease = Lease { id: self.next, device_generation: self.device_generation };
        let entry = Entry {
            lease,
            ino,
            access,
            ranges: vec![range],
            pieces,
            holders: 1,
            severed: false,
            recalled: Vec::new(),
            deadline: 0,
            told: false,
        };
        self.by_id.insert(lease.id, entry);
        self.by_ino.insert((ino, lease.id), ());
        lease
    }

    /// The lease, if it may be used.
    pub(crate) fn get(&mut self, lease: Lease) -> Result<&mut Entry, String> {
        match self.known(lease)? {
            e if e.severed => Err("its holder did not answer a recall in time".to_owned()),
            e => Ok(e),
        }
    }

    /// The lease, if it may be used or at least given back.
    pub(crate) fn known(&mut self, lease: Lease) -> Result<&mut Entry, String> {
        if lease.device_generation != self.device_generation {
            return Err(format!(
                "it was given under device generation {}, now it is {}",
                lease.device_generation, self.device_generation
            ));
        }
        self.by_id.get_mut(&lease.id).ok_or_else(|| "it was released or fenced".to_owned())
    }

    /// Part of a lease is given back; all of it ends the lease. Returns blocks that nobody waits for any more.
    pub(crate) fn give_back(&mut self, id: u64, range: &Blocks) -> Vec<(u64, u64)> {
        let Some(e) = self.by_id.get_mut(&id) else { return Vec::new() };
        let ino = e.ino;
        e.give_back(range);
        if e.ranges.is_empty() {
            self.by_id.remove(&id);
            self.by_ino.remove(&(ino, id));
        }
        self.unhold(ino)
    }

    /// Ends the right; what it covered stays out of use until it is given back.
    pub(crate) fn sever(&mut self, id: u64) {
        if let Some(e) = self.by_id.get_mut(&id) {
            e.severed = true;
            e.ranges.clear();
            e.recalled.clear();
        }
    }

    /// Ends every lease: nobody can reach the device by one any more. Returns the blocks that waited.
    pub(crate) fn end_all(&mut self) -> Vec<(u64, u64)> {
        self.by_id.clear();
        self.by_ino.clear();
        std::mem::take(&mut self.held).into_iter().map(|h| (h.1, h.2)).collect()
    }

    fn unhold(&mut self, ino: Ino) -> Vec<(u64, u64)> {
        let mut out = Vec::new();
        let held = std::mem::take(&mut self.held);
        for h in held {
            if h.0 == ino && !self.touches(h) {
                out.push((h.1, h.2));
            } else {
                self.held.push(h);
            }
        }
        out
    }

    fn touches(&self, (ino, disk, len): (Ino, u64, u64)) -> bool {
        self.ids(ino).filter_map(|id| self.by_id.get(&id)).any(|e| e.touches(disk, len))
    }

    /// Freed blocks, durably so. Returns whether they may be used again at once; otherwise they wait here.
    pub(crate) fn may_reuse(&mut self, ino: Ino, disk: u64, len: u64) -> bool {
        if !self.covers(ino, disk, len) {
            return true;
        }
        self.held.push((ino, disk, len));
        false
    }

    /// Whether a layout is out of any of these blocks.
    pub(crate) fn covers(&self, ino: Ino, disk: u64, len: u64) -> bool {
        !self.by_id.is_empty() && self.touches((ino, disk, len))
    }

    /// Freed blocks that a layout still covers (first, count).
    pub(crate) fn held(&self) -> impl Iterator<Item = (u64, u64)> {
        self.held.iter().map(|h| (h.1, h.2))
    }

    /// Recalls that nobody was told about yet.
    pub(crate) fn news(&mut self) -> Vec<Recall> {
        let mut out = Vec::new();
        for e in self.by_id.values_mut().filter(|e| !e.recalled.is_empty() && !e.told) {
            e.told = true;
            out.push(describe(e));
        }
        out
    }

    /// Leases whose holders did not answer in time.
    pub(crate) fn overdue(&self, now: u64) -> Vec<Recall> {
        let late = self.by_id.values().filter(|e| !e.recalled.is_empty() && e.deadline <= now);
        late.map(describe).collect()
    }

    /// When the next lease becomes overdue.
    pub(crate) fn next_deadline(&self) -> Option<u64> {
        self.by_id.values().filter(|e| !e.recalled.is_empty()).map(|e| e.deadline).min()
    }
}

fn describe(e: &Entry) -> Recall {
    use crate::io::BLOCK;
    let bytes = |r: &Blocks| (r.start.saturating_mul(BLOCK), (r.end - r.start).saturating_mul(BLOCK));
    Recall {
        lease: e.lease,
        ino: e.ino,
        ranges: e.recalled.iter().map(bytes).collect(),
        deadline: e.deadline,
    }
}
