//! Which I/O virtual addresses a container accepts, and which of them are safe to use.
//!
//! The kernel names the ranges (`VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE`): reserved regions such as the MSI window are left out, and
//! the IOMMU's address width bounds them. Bridge windows and other devices' BARs are *not* left out by the kernel: an address there
//! may be routed to that device by a switch before the IOMMU ever sees it. So they are taken out here.

use std::ops::RangeInclusive;

const CAP_IOVA_RANGE: u16 = 1;
const INFO_CAPS: u32 = 1 << 1;
/// Refuse absurd chains.
const MAX_CAPS: usize = 64;

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at.checked_add(8)?)?.try_into().ok().map(u64::from_ne_bytes)
}

/// The IOVA ranges in a `vfio_iommu_type1_info` with its capability chain; `None` if the kernel names none (before 5.4) or the
/// chain is malformed.
pub(super) fn ranges_from_info(info: &[u8]) -> Option<Vec<RangeInclusive<u64>>> {
    if u32_at(info, 4)? & INFO_CAPS == 0 {
        return None;
    }
    let mut at = u32_at(info, 16)? as usize;
    for _ in 0..MAX_CAPS {
        if at == 0 {
            return None;
        }
        let head = u32_at(info, at)?;
        if head as u16 == CAP_IOVA_RANGE {
            let count = u32_at(info, at + 8)? as usize;
            let mut ranges = Vec::new();
            for i in 0..count {
                let from = at.checked_add(16)?.checked_add(i.checked_mul(16)?)?;
                let (start, end) = (u64_at(info, from)?, u64_at(info, from.checked_add(8)?)?);
                if start < end {
                    ranges.push(start..=end);
                }
            }
            return Some(ranges);
        }
        at = u32_at(info, at + 4)? as usize;
    }
    None
}

/// `ranges` without `holes`, what is left shrunk to whole 4 KiB pages, in ascending order.
pub(super) fn without(
    mut ranges: Vec<RangeInclusive<u64>>,
    holes: &[RangeInclusive<u64>],
) -> Vec<RangeInclusive<u64>> {
    for hole in holes {
        ranges = ranges
            .into_iter()
            .flat_map(|range| {
                let below = hole.start().checked_sub(1).map(|end| *range.start()..=end.min(*range.end()));
                let above = hole.end().checked_add(1).map(|start| start.max(*range.start())..=*range.end());
                [below, above]
            })
            .flatten()
            .filter(|range| range.start() < range.end())
            .collect();
    }
    let mut pages: Vec<_> = ranges
        .into_iter()
        .filter_map(|range| {
            let start = range.start().checked_add(0xfff)? & !0xfff;
            let end = match range.end().checked_add(1) {
                Some(end) => (end & !0xfff).checked_sub(1)?,
                None => u64::MAX,
            };
            (start < end).then_some(start..=end)
        })
        .collect();
    pages.sort_by_key(|range| *range.start());
    pages.dedup();
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(caps: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = vec![0u8; 24];
        bytes[4..8].copy_from_slice(&3u32.to_ne_bytes());
        bytes[16..20].copy_from_slice(&24u32.to_ne_bytes());
        for (i, (id, body)) in caps.iter().enumerate() {
            let next = if i + 1 == caps.len() { 0 } else { bytes.len() + 8 + body.len() };
            bytes.extend_from_slice(&id.to_ne_bytes());
            bytes.extend_from_slice(&1u16.to_ne_bytes());
            bytes.extend_from_slice(&(next as u32).to_ne_bytes());
            bytes.extend_from_slice(body);
        }
        bytes
    }

    fn range_body(claimed: u32, ranges: &[(u64, u64)]) -> Vec<u8> {
        let mut body = claimed.to_ne_bytes().to_vec();
        body.extend_from_slice(&[0; 4]);
        for (start, end) in ranges {
            body.extend_from_slice(&start.to_ne_bytes());
            body.extend_from_slice(&end.to_ne_bytes());
        }
        body
    }

    #[test]
    fn the_chain_is_walked_to_the_ranges() {
        let body = range_body(2, &[(0, 0xfedf_ffff), (0xfef0_0000, 0xffff_ffff_ffff)]);
        let got = ranges_from_info(&info(&[(3, vec![0; 8]), (1, body)])).unwrap();
        assert_eq!(got, [0..=0xfedf_ffff, 0xfef0_0000..=0xffff_ffff_ffff]);
    }

    #[test]
    fn malformed_chains_give_nothing_and_end() {
        assert_eq!(ranges_from_info(&[]), None);
        assert_eq!(ranges_from_info(&info(&[(1, range_body(9, &[(0, 1)]))])), None);
        let mut looping = info(&[(3, vec![0; 8])]);
        looping[28..32].copy_from_slice(&24u32.to_ne_bytes());
        assert_eq!(ranges_from_info(&looping), None);
        let mut outside = info(&[(3, vec![0; 8])]);
        outside[28..32].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(ranges_from_info(&outside), None);
    }

    #[test]
    fn holes_are_cut_out_in_whole_pages() {
        let all = vec![0..=0xff_ffff];
        assert_eq!(without(all.clone(), &[0x1800..=0x27ff]), [0..=0xfff, 0x3000..=0xff_ffff]);
        assert_eq!(without(all.clone(), &[0..=u64::MAX]), []);
        assert_eq!(without(all.clone(), &[0..=0xfff, 0xff_f000..=0xff_ffff]), [0x1000..=0xff_efff]);
        assert_eq!(without(all, &[0x100_0000..=0x200_0000]), [0..=0xff_ffff]);
        assert_eq!(without(vec![0x10..=u64::MAX], &[]), [0x1000..=u64::MAX]);
    }
}
