//! I/O virtual addresses for mappings that come and go: each one is used again as late as possible, so that a stale address faults
//! instead of hitting the next mapping.

use std::sync::Arc;

use nvme_driver::iova::IovaAllocator;
use nvme_driver::mem::PAGE;

/// What is asked for at most, and at least: an IOMMU of 39 bits has half a TiB in all.
const SPAN: (u64, u64) = (1 << 40, 1 << 30);

/// A stretch of addresses that is gone through from end to end before any comes round again.
#[derive(Debug)]
pub(super) struct Addresses {
    allocator: Arc<IovaAllocator>,
    base: u64,
    /// 0 if there was none to be had.
    span: u64,
    cursor: u64,
}

impl Addresses {
    /// Takes a long stretch for itself; given back when dropped.
    pub(super) fn reserve(allocator: &Arc<IovaAllocator>) -> Self {
        let mut span = SPAN.0;
        let base = loop {
            // Not more than a quarter of what is free: others need addresses too.
            match allocator.take(span, 2 << 20) {
                Ok(base) if span <= SPAN.1 || allocator.free_bytes() >= 3 * span => break base,
                Ok(base) => give(allocator, base, span),
                Err(_) if span <= SPAN.1 => break 0,
                Err(_) => {}
            }
            span /= 2;
        };
        let span = if base == 0 { 0 } else { span };
        Self { allocator: Arc::clone(allocator), base, span, cursor: 0 }
    }

    /// The next `len` free bytes, with a page between them and what was taken before. `in_use` says where a mapping ends that
    /// touches a range, if one does.
    pub(super) fn next(&mut self, len: u64, in_use: impl Fn(u64, u64) -> Option<u64>) -> Option<u64> {
        let page = PAGE as u64;
        let len = len.checked_next_multiple_of(page)?;
        let mut wrapped = false;
        loop {
            if self.cursor.checked_add(len)? > self.span {
                if wrapped {
                    return None;
                }
                (wrapped, self.cursor) = (true, 0);
                if len > self.span {
                    return None;
                }
            }
            let at = self.base + self.cursor;
            match in_use(at, at + len) {
                Some(end) => self.cursor = (end - self.base).checked_next_multiple_of(page)? + page,
                None => {
                    self.cursor += len + page;
                    return Some(at);
                }
            }
        }
    }
}

fn give(allocator: &IovaAllocator, base: u64, span: u64) {
    if let Err(e) = allocator.give(base, span) {
        tracing::error!("returning I/O virtual addresses: {e}");
    }
}

impl Drop for Addresses {
    fn drop(&mut self) {
        if self.span > 0 {
            give(&self.allocator, self.base, self.span);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn allocator(bits: u32) -> Arc<IovaAllocator> {
        Arc::new(IovaAllocator::new([0..=0xfedf_ffff, 0xfef0_0000..=(1 << bits) - 1]))
    }

    #[test]
    fn narrow_and_wide_address_spaces_leave_room_for_others() {
        for bits in [34, 39, 48] {
            let all = allocator(bits);
            let free = all.free_bytes();
            let a = Addresses::reserve(&all);
            assert!(a.span >= SPAN.1 && all.free_bytes() >= free / 2, "{bits} bits: {:#x}", a.span);
            drop(a);
            assert_eq!(all.free_bytes(), free);
        }
        let none = Arc::new(IovaAllocator::new([0..=64 * MIB]));
        assert_eq!(Addresses::reserve(&none).next(4096, |_, _| None), None);
    }

    #[test]
    fn an_address_comes_round_as_late_as_possible_and_never_while_in_use() {
        let all = allocator(34);
        let mut a = Addresses::reserve(&all);
        let len = 200 * MIB;
        let mut live: BTreeMap<u64, u64> = BTreeMap::new();
        let mut order = Vec::new();
        for round in 0..100 {
            let in_use = |at: u64, end: u64| {
                live.range(..end).next_back().filter(|(s, l)| *s + **l > at).map(|(s, l)| s + l)
            };
            let at = a.next(len, in_use).unwrap();
            assert!(live.iter().all(|(s, l)| at + len <= *s || s + l <= at), "{at:#x} is in use");
            live.insert(at, len);
            order.push(at);
            // The first one stays for good; of the others only the last.
            if round > 1 {
                live.remove(&order[round - 1]);
            }
        }
        let fits = (a.span / (len + 4096)) as usize;
        let first: std::collections::BTreeSet<u64> = order[..fits].iter().copied().collect();
        assert_eq!(first.len(), fits, "one of the first {fits} addresses came round early");
    }
}
