//! The book of leases that clients hold: who holds which, what is asked back, what each holder has given back.

use std::collections::BTreeMap;
use std::ops::Range;

use extent_fs::{Access, Lease, Recall};

pub(super) type Bytes = Range<u64>;

/// One connection that holds a lease.
#[derive(Clone, Debug)]
struct Holder {
    session: u32,
    pid: i32,
    /// What it has given back while others have not.
    back: Vec<Bytes>,
}

/// A lease that is out.
#[derive(Clone, Debug)]
pub(super) struct Out {
    pub(super) lease: Lease,
    pub(super) ino: u64,
    pub(super) access: Access,
    /// What it covers.
    pub(super) ranges: Vec<Bytes>,
    /// What is asked back of that.
    recalled: Vec<Bytes>,
    deadline: u64,
    /// It ended without its holders, whose blocks wait for them.
    pub(super) severed: bool,
    holders: Vec<Holder>,
}

/// All of them, and the ranges for which one is about to be given.
#[derive(Debug, Default)]
pub(super) struct Leases {
    by_id: BTreeMap<u64, Out>,
    coming: Vec<(u64, Bytes)>,
}

/// What a holder's going leads to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Returned {
    /// All holders have given these ranges back.
    Ranges(Vec<Bytes>),
    /// Nobody holds the lease any more.
    All,
}

/// What two lists of ranges have in common.
fn common(a: &[Bytes], b: &[Bytes]) -> Vec<Bytes> {
    let pairs = a.iter().flat_map(|a| b.iter().map(move |b| a.start.max(b.start)..a.end.min(b.end)));
    pairs.filter(|r| !r.is_empty()).collect()
}

/// What is left of `ranges` without `gone`.
fn without(ranges: &[Bytes], gone: &Bytes) -> Vec<Bytes> {
    let cut = |r: &Bytes| [r.start..r.end.min(gone.start), r.start.max(gone.end)..r.end];
    ranges.iter().flat_map(cut).filter(|r| !r.is_empty()).collect()
}

impl Leases {
    /// Whether no lease is out, nor about to be.
    pub(super) fn is_idle(&self) -> bool {
        self.by_id.is_empty() && self.coming.is_empty()
    }

    /// Whether something is asked back.
    pub(super) fn is_recalling(&self) -> bool {
        self.by_id.values().any(|o| !o.recalled.is_empty())
    }

    /// Whether a lease on a file is out, or about to be.
    pub(super) fn has_file(&self, ino: u64) -> bool {
        self.by_id.values().any(|o| o.ino == ino) || self.coming.iter().any(|c| c.0 == ino)
    }

    /// A lease on a range is about to be given: no window may come there meanwhile.
    pub(super) fn expect(&mut self, ino: u64, bytes: &Bytes) {
        self.coming.push((ino, bytes.clone()));
    }

    /// It was given, or not.
    pub(super) fn expected(&mut self, ino: u64, bytes: &Bytes) {
        if let Some(at) = self.coming.iter().position(|c| c.0 == ino && c.1 == *bytes) {
            self.coming.swap_remove(at);
        }
    }

    /// Whether a lease on this range is about to be given.
    pub(super) fn is_expected(&self, ino: u64, bytes: &Bytes) -> bool {
        self.coming.iter().any(|c| c.0 == ino && c.1.start < bytes.end && bytes.start < c.1.end)
    }

    pub(super) fn add(&mut self, lease: Lease, ino: u64, access: Access, bytes: Bytes) {
        let (ranges, recalled, holders) = (vec![bytes], Vec::new(), Vec::new());
        let out = Out { lease, ino, access, ranges, recalled, deadline: 0, severed: false, holders };
        self.by_id.insert(lease.id, out);
    }

    /// One more connection holds a lease. False: there is none with this number.
    pub(super) fn join(&mut self, id: u64, session: u32, pid: i32) -> bool {
        let Some(out) = self.by_id.get_mut(&id).filter(|o| !o.severed) else { return false };
        if !out.holders.iter().any(|h| h.session == session) {
            out.holders.push(Holder { session, pid, back: Vec::new() });
        }
        true
    }

    pub(super) fn get(&self, id: u64) -> Option<&Out> {
        self.by_id.get(&id)
    }

    /// The lease, if this connection holds it.
    pub(super) fn held_by(&self, id: u64, session: u32) -> Option<&Out> {
        self.by_id.get(&id).filter(|o| o.holders.iter().any(|h| h.session == session))
    }

    /// The leases that a connection holds.
    pub(super) fn of(&self, session: u32) -> Vec<u64> {
        let held = self.by_id.iter().filter(|(_, o)| o.holders.iter().any(|h| h.session == session));
        held.map(|(id, _)| *id).collect()
    }

    /// A holder gives part of a lease back.
    pub(super) fn give_back(&mut self, id: u64, session: u32, bytes: Bytes) -> Returned {
        if let Some(out) = self.by_id.get_mut(&id)
            && let Some(holder) = out.holders.iter_mut().find(|h| h.session == session)
        {
            holder.back = without(&holder.back, &bytes);
            holder.back.push(bytes);
        }
        self.returned(id)
    }

    /// A holder gives all of a lease back, or is gone.
    pub(super) fn leave(&mut self, id: u64, session: u32) -> Returned {
        if let Some(out) = self.by_id.get_mut(&id) {
            out.holders.retain(|h| h.session != session);
        }
        self.returned(id)
    }

    /// What of a lease all its holders have given back.
    fn returned(&self, id: u64) -> Returned {
        let Some(out) = self.by_id.get(&id) else { return Returned::Ranges(Vec::new()) };
        if out.holders.is_empty() {
            return Returned::All;
        }
        let all = out.holders.iter().fold(out.ranges.clone(), |all, h| common(&all, &h.back));
        Returned::Ranges(all)
    }

    /// These bytes are not covered any more. What the lease covers now; nothing: it is over.
    pub(super) fn cut(&mut self, id: u64, gone: &[Bytes]) -> Vec<Bytes> {
        let Some(out) = self.by_id.get_mut(&id) else { return Vec::new() };
        for r in gone {
            out.ranges = without(&out.ranges, r);
            out.recalled = without(&out.recalled, r);
        }
        out.ranges.clone()
    }

    pub(super) fn remove(&mut self, id: u64) -> Option<Out> {
        self.by_id.remove(&id)
    }

    /// The right is over, the holders are still there.
    pub(super) fn sever(&mut self, id: u64) {
        if let Some(out) = self.by_id.get_mut(&id) {
            out.severed = true;
            out.ranges.clear();
            out.recalled.clear();
        }
    }

    /// Notes what is asked back; returns the connections to tell.
    pub(super) fn recall(&mut self, recall: &Recall) -> Vec<u32> {
        let Some(out) = self.by_id.get_mut(&recall.lease.id) else { return Vec::new() };
        out.deadline = recall.deadline;
        out.recalled = recall.ranges.iter().map(|(offset, len)| *offset..offset + len).collect();
        out.holders.iter().map(|h| h.session).collect()
    }

    /// The processes that hold a lease.
    pub(super) fn holders(&self, id: u64) -> Vec<i32> {
        self.by_id.get(&id).map_or_else(Vec::new, |o| o.holders.iter().map(|h| h.pid).collect())
    }

    /// What is asked back of a connection and not given back yet, with the deadline.
    pub(super) fn recalls(&self, session: u32) -> impl Iterator<Item = (Lease, Bytes, u64)> + '_ {
        self.by_id.values().flat_map(move |out| {
            let holder = out.holders.iter().find(|h| h.session == session);
            let open = holder.map_or_else(Vec::new, |h| {
                h.back.iter().fold(out.recalled.clone(), |open, back| without(&open, back))
            });
            open.into_iter().map(|r| (out.lease, r, out.deadline))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Lease = Lease { id: 7, device_generation: 1 };

    fn one(range: Bytes) -> Vec<Bytes> {
        std::iter::once(range).collect()
    }

    fn book() -> Leases {
        let mut leases = Leases::default();
        leases.add(LEASE, 5, Access::Write, 0..100);
        assert!(leases.join(7, 1, 11) && leases.join(7, 2, 22) && !leases.join(8, 1, 11));
        leases
    }

    #[test]
    fn what_all_holders_gave_back_is_back() {
        let mut leases = book();
        assert_eq!(leases.give_back(7, 1, 10..40), Returned::Ranges(vec![]));
        assert_eq!(leases.give_back(7, 2, 30..60), Returned::Ranges(one(30..40)));
        assert_eq!(leases.cut(7, &one(30..40)), [0..30, 40..100]);
        assert_eq!(leases.give_back(7, 1, 0..100), Returned::Ranges(one(40..60)));
        assert_eq!(leases.leave(7, 2), Returned::Ranges(vec![0..30, 40..100]));
        assert_eq!(leases.leave(7, 1), Returned::All);
    }

    #[test]
    fn each_holder_is_asked_for_what_it_has_not_given_back() {
        let mut leases = book();
        let recall = Recall { lease: LEASE, ino: 5, ranges: vec![(0, 20), (50, 10)], deadline: 9 };
        assert_eq!(leases.recall(&recall), [1, 2]);
        let _ = leases.give_back(7, 1, 10..55);
        let open = |session| leases.recalls(session).map(|(_, r, _)| r).collect::<Vec<_>>();
        assert_eq!(open(1), [0..10, 55..60]);
        assert_eq!(open(2), [0..20, 50..60]);
        assert!(open(3).is_empty() && leases.is_recalling());
    }

    #[test]
    fn a_range_is_expected_until_it_was_given() {
        let mut leases = Leases::default();
        leases.expect(5, &(10..20));
        leases.expect(5, &(10..20));
        leases.expected(5, &(10..20));
        assert!(leases.is_expected(5, &(19..30)) && !leases.is_expected(5, &(20..30)) && leases.has_file(5));
        leases.expected(5, &(10..20));
        assert!(leases.is_idle());
    }
}
