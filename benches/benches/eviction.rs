//! Who leaves when memory is short: hit ratios of `p2p::policy`'s S3-FIFO, of plain LRU, and of a well-kept crate with a policy of the
//! same family, on two synthetic traces and one recorded from a real program (`benches/traces/record`).
//!
//! `cargo bench -p cmbfs-benches --bench eviction`

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::time::Instant;

use p2p::policy::S3Fifo;
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

static SQLITE: &[u8] = include_bytes!("../traces/sqlite.trace");

/// A policy that holds a number of windows, all of one size.
trait Policy {
    /// Whether the window is in; if not, it comes in, and another leaves.
    fn access(&mut self, key: u64) -> bool;
}

struct Ours {
    policy: S3Fifo,
    inside: HashSet<u64>,
    capacity: usize,
}

impl Policy for Ours {
    fn access(&mut self, key: u64) -> bool {
        if self.inside.contains(&key) {
            self.policy.touch((0, key));
            return true;
        }
        while self.inside.len() >= self.capacity {
            let Some((_, leaves)) = self.policy.victim(|_| true) else { break };
            self.inside.remove(&leaves);
        }
        self.policy.insert((0, key), 1);
        self.inside.insert(key);
        false
    }
}

impl Policy for lru::LruCache<u64, ()> {
    fn access(&mut self, key: u64) -> bool {
        self.get(&key).is_some() || self.push(key, ()).is_some_and(|_| false)
    }
}

impl Policy for quick_cache::unsync::Cache<u64, ()> {
    fn access(&mut self, key: u64) -> bool {
        let hit = self.get(&key).is_some();
        if !hit {
            self.insert(key, ());
        }
        hit
    }
}

/// 20,000 windows asked for by Zipf's law (exponent 1), and after every 10,000 of those a scan of 5000 that nobody asks for again.
fn zipf_and_scans(random: &mut Xoshiro256PlusPlus) -> Vec<u64> {
    let mut trace = Vec::new();
    let mut scanned = 1 << 32;
    for n in 0..400_000u64 {
        let unit = (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        trace.push(20_000f64.powf(unit) as u64 - 1);
        if n % 10_000 == 9999 {
            trace.extend(scanned..scanned + 5000);
            scanned += 5000;
        }
    }
    trace
}

/// A loop over 3000 windows, and between its accesses two of a scan without end.
fn loop_under_a_scan(_: &mut Xoshiro256PlusPlus) -> Vec<u64> {
    (0..600_000u64).map(|n| if n % 3 == 0 { n / 3 % 3000 } else { (1 << 32) + n }).collect()
}

fn ratio(policy: &mut dyn Policy, trace: &[u64]) -> (f64, f64) {
    let begun = Instant::now();
    let hits = trace.iter().filter(|key| policy.access(**key)).count();
    let each = begun.elapsed().as_nanos() as f64 / trace.len() as f64;
    (hits as f64 / trace.len() as f64, each)
}

fn main() {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(5);
    let recorded = SQLITE.chunks_exact(2).map(|c| u64::from(u16::from_le_bytes([c[0], c[1]]))).collect();
    let traces = [
        ("zipf and scans", zipf_and_scans(&mut random), 20_000),
        ("loop under a scan", loop_under_a_scan(&mut random), 3000),
        ("sqlite, recorded", recorded, 5165),
    ];
    println!("hit ratios (ns per access)");
    println!("{:20} {:>9} {:>16} {:>16} {:>16}", "trace", "windows", "LRU", "S3-FIFO (ours)", "quick_cache");
    for (name, trace, hot) in &traces {
        for percent in [5, 10, 25, 50, 100] {
            let capacity: usize = hot * percent / 100;
            let mut lru = lru::LruCache::new(NonZeroUsize::new(capacity).unwrap_or(NonZeroUsize::MIN));
            let mut ours = Ours { policy: S3Fifo::new(capacity as u64), inside: HashSet::new(), capacity };
            let mut quick = quick_cache::unsync::Cache::new(capacity);
            let policies: [&mut dyn Policy; 3] = [&mut lru, &mut ours, &mut quick];
            let cells = policies.map(|p| {
                let (hits, each) = ratio(p, trace);
                format!("{:5.1} % ({each:4.0})", hits * 100.0)
            });
            println!("{name:20} {capacity:>9} {:>16} {:>16} {:>16}", cells[0], cells[1], cells[2]);
        }
    }
}
