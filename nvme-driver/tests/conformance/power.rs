//! The volatile write cache and power cuts (Base 5.21.1.6 "Volatile Write Cache", NVM "Flush command", FUA).

use std::collections::HashMap;

use nvme_driver::emu::{Backing, Config, PowerCut};
use nvme_driver::spec::command::{DSM_AD, FUA};
use nvme_driver::spec::features::FEAT_VOLATILE_WRITE_CACHE;
use nvme_driver::spec::{Command, regs};

use crate::host::{Host, data, pattern, set_feature, small};

fn cached(seed: u64) -> Config {
    Config { volatile_cache: true, seed, ..small() }
}

/// Power off and on, and the host comes back.
fn cut(h: &mut Host, how: PowerCut) -> nvme_driver::emu::PowerCutReport {
    let report = h.controller.power_cut(how).unwrap();
    assert_eq!((h.r32(regs::CC), h.r32(regs::CSTS)), (0, 0));
    h.function.set_bus_master(true).unwrap();
    h.enable();
    h.create_pair(1, 64);
    report
}

fn write_fua(h: &mut Host, slba: u64, bytes: &[u8]) {
    let at = h.pages(bytes.len().div_ceil(4096));
    h.put(at, bytes);
    let cmd = data(Command::new(1, 1).with_blocks(slba, bytes.len() as u32 / 512), at, h, bytes.len());
    h.ok(1, Command { cdw12: cmd.cdw12 | FUA, ..cmd });
}

const FLUSH: Command = Command::new(0, 1);

#[test]
fn flushed_writes_survive_and_others_may_not() {
    let mut h = Host::with_queue_on(&cached(1));
    let (old, new) = (pattern(1, 4096), pattern(2, 4096));
    h.write_blocks(0, &old, 512);
    h.write_blocks(100, &old, 512);
    h.ok(1, FLUSH);
    h.write_blocks(0, &new, 512);
    assert_eq!(h.read_blocks(0, 8, 512), new, "the cache is read");
    let report = cut(&mut h, PowerCut::LoseAll);
    assert_eq!((report.lost, report.kept, report.torn), (1, 0, 0));
    assert_eq!(h.read_blocks(0, 8, 512), old);
    assert_eq!(h.read_blocks(100, 8, 512), old);
    h.write_blocks(0, &new, 512);
    assert_eq!(cut(&mut h, PowerCut::KeepAll).kept, 1);
    assert_eq!(h.read_blocks(0, 8, 512), new);
}

/// FUA makes this write durable, and nothing else.
#[test]
fn fua_orders_nothing_but_itself() {
    let mut h = Host::with_queue_on(&cached(1));
    let [a, b, c] = [pattern(1, 4096), pattern(2, 4096), pattern(3, 4096)];
    h.write_blocks(0, &a, 512);
    h.write_blocks(8, &a, 512);
    write_fua(&mut h, 8, &b);
    h.write_blocks(12, &c[..512], 512);
    cut(&mut h, PowerCut::LoseAll);
    assert_eq!(h.read_blocks(0, 8, 512), vec![0; 4096], "written before, not durable");
    assert_eq!(h.read_blocks(8, 8, 512), b, "durable, also where it was written again");
    // Write zeroes takes FUA as well.
    h.write_blocks(0, &a, 512);
    h.ok(1, FLUSH);
    let zero = Command::new(8, 1).with_blocks(0, 2);
    h.ok(1, Command { cdw12: zero.cdw12 | FUA, ..zero });
    h.ok(1, Command::new(8, 1).with_blocks(4, 2));
    cut(&mut h, PowerCut::LoseAll);
    let got = h.read_blocks(0, 8, 512);
    assert_eq!(got[..1024], [0; 1024]);
    assert_eq!(got[1024..], a[1024..]);
}

/// Disabling the cache flushes it; then every write is durable. It is on again after a power cycle.
#[test]
fn a_disabled_cache_holds_nothing() {
    let mut h = Host::with_queue_on(&cached(1));
    let (a, b) = (pattern(1, 4096), pattern(2, 4096));
    h.write_blocks(0, &a, 512);
    h.ok(0, set_feature(FEAT_VOLATILE_WRITE_CACHE, 0));
    h.write_blocks(8, &b, 512);
    cut(&mut h, PowerCut::LoseAll);
    assert_eq!(h.read_blocks(0, 8, 512), a);
    assert_eq!(h.read_blocks(8, 8, 512), b);
    h.write_blocks(0, &b, 512);
    cut(&mut h, PowerCut::LoseAll);
    assert_eq!(h.read_blocks(0, 8, 512), a);
}

/// Base 7.6.2: a normal shutdown flushes; a controller reset keeps the cache, an abrupt shutdown promises nothing.
#[test]
fn shutdown_and_reset() {
    for (shn, survives) in [(1, true), (2, false), (0, false)] {
        let mut h = Host::with_queue_on(&cached(1));
        let a = pattern(1, 4096);
        h.write_blocks(0, &a, 512);
        h.w32(regs::CC, Host::cc_enabled().with_shn(shn).into_bits());
        h.disable();
        cut(&mut h, PowerCut::LoseAll);
        assert_eq!(h.read_blocks(0, 8, 512) == a, survives, "SHN {shn}");
    }
    let mut h = Host::with_queue_on(&cached(1));
    h.write_blocks(0, &pattern(1, 4096), 512);
    h.disable();
    h.enable();
    h.create_pair(1, 8);
    assert_eq!(h.read_blocks(0, 8, 512), pattern(1, 4096));
    h.ok(1, FLUSH);
    cut(&mut h, PowerCut::LoseAll);
    assert_eq!(h.read_blocks(0, 8, 512), pattern(1, 4096));
}

/// A controller without a cache never loses a completed write.
#[test]
fn no_cache_no_loss() {
    let mut h = Host::with_queue();
    h.write_blocks(0, &pattern(1, 4096), 512);
    assert_eq!(cut(&mut h, PowerCut::LoseAll), nvme_driver::emu::PowerCutReport::default());
    assert_eq!(h.read_blocks(0, 8, 512), pattern(1, 4096));
}

/// A small random number generator, so that the test's choices are its own.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Random writes, flushes, FUA, zeroes and deallocations, then a random power cut: each block holds a version written
/// since it was last durable, or that one; and over many runs, writes are lost, torn and reordered.
#[test]
fn random_power_cuts_leave_only_versions_that_were_there() {
    const BLOCKS: u64 = 64;
    let (mut torn, mut reordered) = (0, 0);
    for seed in 1..=120 {
        let mut rng = Rng(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed));
        let file = tempfile::tempdir().unwrap();
        let path = file.path().join("disk.img");
        let namespace = match seed % 8 {
            0 | 1 => Backing::File { path, create: Some(BLOCKS * 512) },
            _ => Backing::Ram { bytes: BLOCKS * 512 },
        };
        let mut h = Host::with_queue_on(&Config {
            namespace,
            cache_bytes: 1 << 20,
            lose_on_kill: seed % 8 == 1,
            ..cached(seed)
        });
        // Per block, versions by number that it may hold; the last one is what it holds now. Version 0 is zeros.
        let mut versions: HashMap<u64, Vec<u64>> = (0..BLOCKS).map(|b| (b, vec![0])).collect();
        let mut writes = Vec::new();
        for version in 1..=40u64 {
            let (first, n) = (rng.below(BLOCKS), 1 + rng.below(8));
            let n = n.min(BLOCKS - first);
            let kind = rng.below(10);
            let blocks = first..first + n;
            let bytes: Vec<u8> = blocks.clone().flat_map(|b| pattern(version << 8 | b, 512)).collect();
            match kind {
                0 => {
                    h.ok(1, FLUSH);
                    versions.values_mut().for_each(|v| *v = vec![v[v.len() - 1]]);
                    writes.clear();
                }
                1 => {
                    write_fua(&mut h, first, &bytes);
                    blocks.for_each(|b| _ = versions.insert(b, vec![version]));
                }
                2 => {
                    let at = h.pages(1);
                    h.put_u64s(at, &[n << 32, first]);
                    h.ok(1, Command { prp1: at, cdw11: DSM_AD, ..Command::new(9, 1) });
                    blocks.for_each(|b| versions.get_mut(&b).unwrap().push(0));
                }
                _ => {
                    h.write_blocks(first, &bytes, 512);
                    blocks.clone().for_each(|b| versions.get_mut(&b).unwrap().push(version));
                    writes.push((version, blocks));
                }
            }
        }
        torn += cut(&mut h, PowerCut::Random).torn;
        let got = h.read_blocks(0, BLOCKS as u32, 512);
        let mut held = HashMap::new();
        for (block, bytes) in got.chunks(512).enumerate() {
            let block = block as u64;
            let version = u64::from_le_bytes(bytes[..8].try_into().unwrap()) >> 32 >> 8;
            let expect = if version == 0 { vec![0; 512] } else { pattern(version << 8 | block, 512) };
            assert_eq!(bytes, expect, "seed {seed}: block {block} is torn itself");
            let allowed = &versions[&block];
            assert!(
                allowed.contains(&version),
                "seed {seed}: block {block} holds {version}, not of {allowed:?}"
            );
            held.insert(block, version);
        }
        // A write that is there as a whole, after one of which nothing is (both not overwritten later): reordered.
        let whole = |(v, blocks): &(u64, std::ops::Range<u64>)| blocks.clone().all(|b| held[&b] == *v);
        let gone = |(v, blocks): &(u64, std::ops::Range<u64>)| blocks.clone().all(|b| held[&b] < *v);
        let first_gone = writes.iter().position(gone);
        reordered += usize::from(first_gone.is_some_and(|g| writes[g..].iter().any(whole)));
    }
    assert!(torn > 20 && reordered > 20, "torn {torn}, reordered {reordered}: the cut is too kind");
}

/// The cache is bounded: what does not fit is durable, oldest first.
#[test]
fn a_full_cache_makes_the_oldest_durable() {
    let config = Config { namespace: Backing::Ram { bytes: 4 << 20 }, cache_bytes: 1 << 20, ..cached(7) };
    let mut h = Host::with_queue_on(&config);
    let at = h.pages(128);
    let list = h.pages(1);
    h.put_u64s(list, &(1..128).map(|i| at + i * 4096).collect::<Vec<_>>());
    // Three and a half times as much as fits, in pieces of 512 KiB.
    for i in 0..7u64 {
        h.put(at, &pattern(i + 1, 512 << 10));
        h.ok(1, Command { prp1: at, prp2: list, ..Command::new(1, 1).with_blocks(i * 1024, 1024) });
    }
    let report = cut(&mut h, PowerCut::LoseAll);
    assert_eq!(report.lost, 2);
    for i in 0..7u64 {
        let got = h.read_blocks(i * 1024, 8, 512);
        let expect = if i < 5 { pattern(i + 1, 4096) } else { vec![0; 4096] };
        assert_eq!(got, expect, "piece {i}");
    }
}
