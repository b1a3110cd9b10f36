//! Fuzzing by tape: a run draws its numbers from a tape, which is random or recorded; so any run can be kept as a small file, repeated,
//! mutated and made shorter.
//!
//! A campaign replays the corpus (`tests/corpus/NAME`) first, then goes on with random tapes and with mutations of those that reached
//! something new. What a run reached is a set of features that the test names itself (a command and its outcome, a kind of error).
//!
//! * `CMBFS_SEED`: the first seed; a campaign is a function of it and of the corpus
//! * `CMBFS_FUZZ_SECONDS`: how long to go on; without it, a fixed handful of rounds
//! * `CMBFS_FUZZ_INPUT`: a file with a tape: only that one is run
//! * `CMBFS_FUZZ_KEEP`: at the end, the corpus becomes the shortest tapes that reach all that was reached
#![allow(dead_code, reason = "each test uses some of it")]
use std::collections::HashSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

/// Tapes in a corpus at most: those that reach most come first.
const MOST: usize = 64;

/// Something that a run reached.
pub(crate) type Feature = [u32; 3];

/// A line of numbers: recorded ones, then random ones if there is a seed.
#[derive(Clone, Debug)]
pub(crate) struct Tape {
    draws: Vec<u64>,
    at: usize,
    rng: Option<Xoshiro256PlusPlus>,
}

impl Tape {
    pub(crate) fn random(seed: u64) -> Self {
        Self { draws: Vec::new(), at: 0, rng: Some(Xoshiro256PlusPlus::seed_from_u64(seed)) }
    }

    pub(crate) fn recorded(draws: Vec<u64>) -> Self {
        Self { draws, at: 0, rng: None }
    }

    /// Whether only zeros would follow.
    pub(crate) fn is_over(&self) -> bool {
        self.rng.is_none() && self.at >= self.draws.len()
    }

    /// A number below `n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.draw(|random| random % n) % n
    }

    /// Any number.
    pub(crate) fn any(&mut self) -> u64 {
        self.draw(|random| random)
    }

    fn draw(&mut self, limit: impl Fn(u64) -> u64) -> u64 {
        if self.at == self.draws.len() {
            let Some(rng) = &mut self.rng else { return 0 };
            self.draws.push(limit(rng.next_u64()));
        }
        self.at += 1;
        self.draws[self.at - 1]
    }

    /// Numbers in 7-bit groups, low ones first, the last with bit 7 clear.
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &draw in &self.draws[..self.at] {
            let mut rest = draw;
            while rest >= 0x80 {
                bytes.push(rest as u8 | 0x80);
                rest >>= 7;
            }
            bytes.push(rest as u8);
        }
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let (mut draws, mut draw, mut shift) = (Vec::new(), 0u64, 0);
        for byte in bytes {
            draw |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            shift += 7;
            if byte & 0x80 == 0 {
                draws.push(draw);
                (draw, shift) = (0, 0);
            }
        }
        Self::recorded(draws)
    }
}

/// A tape and what it reached.
struct Member {
    draws: Vec<u64>,
    features: HashSet<Feature>,
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

fn corpus_folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name)
}

/// Runs a campaign of `rounds` rounds (or as long as `CMBFS_FUZZ_SECONDS` says, or until `enough`). The corpus alone must reach
/// `floor` features: a corpus that no longer fits the test is noticed. Gives back the rounds.
pub(crate) fn campaign(
    name: &str,
    rounds: u64,
    floor: usize,
    enough: impl Fn() -> bool,
    mut run: impl FnMut(&mut Tape) -> HashSet<Feature>,
) -> u64 {
    if let Some(path) = std::env::var_os("CMBFS_FUZZ_INPUT") {
        let features = run(&mut Tape::from_bytes(&fs::read(&path).unwrap()));
        println!("{name}: {} features", features.len());
        return 1;
    }
    let seed = setting("CMBFS_SEED").unwrap_or(1);
    let limit = setting("CMBFS_FUZZ_SECONDS").map(|s| (Instant::now(), Duration::from_secs(s)));
    let mut files: Vec<_> =
        fs::read_dir(corpus_folder(name)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut pool: Vec<Member> = Vec::new();
    let mut reached: HashSet<Feature> = HashSet::new();
    for path in &files {
        let mut tape = Tape::from_bytes(&fs::read(path).unwrap());
        let features = guarded(name, &format!("{}", path.display()), &mut tape, &mut run);
        reached.extend(&features);
        pool.push(Member { draws: tape.draws, features });
    }
    println!("{name}: {} tapes in the corpus reach {} features", files.len(), reached.len());
    let keep = std::env::var_os("CMBFS_FUZZ_KEEP").is_some();
    assert!(keep || reached.len() >= floor, "the corpus no longer fits: CMBFS_FUZZ_KEEP=1 makes a new one");
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut round = 0;
    while limit.map_or(round < rounds, |(start, length)| start.elapsed() < length) && !enough() {
        let mut tape = match pool.len() {
            0 => Tape::random(seed.wrapping_add(round)),
            _ if round % 2 == 0 => Tape::random(seed.wrapping_add(round)),
            n => Tape::recorded(mutated(&pool, rng.next_u64() as usize % n, &mut rng)),
        };
        let features = guarded(name, &format!("seed {seed}, round {round}"), &mut tape, &mut run);
        if features.difference(&reached).next().is_some() {
            reached.extend(&features);
            pool.push(Member { draws: tape.draws[..tape.at.min(tape.draws.len())].to_vec(), features });
        }
        round += 1;
    }
    println!("{name}: {round} rounds from seed {seed} on, {} features", reached.len());
    if keep {
        write_corpus(name, pool, &mut run);
    }
    round
}

/// Runs a tape; if that fails, keeps it and says how to repeat it.
fn guarded(
    name: &str,
    what: &str,
    tape: &mut Tape,
    run: &mut impl FnMut(&mut Tape) -> HashSet<Feature>,
) -> HashSet<Feature> {
    catch_unwind(AssertUnwindSafe(|| run(tape))).unwrap_or_else(|panic| {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}"));
        fs::write(&path, tape.to_bytes()).unwrap();
        eprintln!("failed with {what}: CMBFS_FUZZ_INPUT={} repeats it", path.display());
        resume_unwind(panic)
    })
}

/// A few changes to one of the pool's tapes.
fn mutated(pool: &[Member], which: usize, rng: &mut Xoshiro256PlusPlus) -> Vec<u64> {
    let mut draws = pool[which].draws.clone();
    let mut below = |n: usize| rng.next_u64() as usize % n.max(1);
    for _ in 0..=below(8) {
        if draws.is_empty() {
            break;
        }
        let at = below(draws.len());
        let len = 1 + below(16.min(draws.len() - at));
        match below(5) {
            0 => draws[at] = below(usize::MAX) as u64,
            1 => draws[at] = below(64) as u64,
            2 => drop(draws.drain(at..at + len)),
            3 => {
                let again = draws[at..at + len].to_vec();
                draws.splice(at..at, again);
            }
            _ => {
                let other = &pool[below(pool.len())].draws;
                let from = below(other.len());
                draws.truncate(at);
                draws.extend_from_slice(&other[from..]);
            }
        }
    }
    draws
}

/// The shortest tapes that together reach everything, each without what it can do without.
fn write_corpus(name: &str, mut pool: Vec<Member>, run: &mut impl FnMut(&mut Tape) -> HashSet<Feature>) {
    // Whichever adds most is next; each keeps what it alone adds.
    let mut reached: HashSet<Feature> = HashSet::new();
    let mut kept = Vec::new();
    while kept.len() < MOST
        && let Some(best) = (0..pool.len()).max_by_key(|&i| pool[i].features.difference(&reached).count())
    {
        let Member { draws, features } = pool.swap_remove(best);
        let own: HashSet<_> = features.difference(&reached).copied().collect();
        if own.is_empty() {
            break;
        }
        reached.extend(&own);
        kept.push(shortened(draws, &own, run));
    }
    let folder = corpus_folder(name);
    fs::remove_dir_all(&folder).unwrap();
    fs::create_dir_all(&folder).unwrap();
    for (i, draws) in kept.iter().enumerate() {
        let mut tape = Tape::recorded(draws.clone());
        tape.at = draws.len();
        fs::write(folder.join(format!("{i:03}")), tape.to_bytes()).unwrap();
    }
    println!("{name}: {} tapes kept, {} features", kept.len(), reached.len());
}

/// Cuts the end off, then takes pieces out, long ones first, as long as the tape still reaches `own`.
fn shortened(
    mut draws: Vec<u64>,
    own: &HashSet<Feature>,
    run: &mut impl FnMut(&mut Tape) -> HashSet<Feature>,
) -> Vec<u64> {
    let (mut too_short, mut enough) = (0, draws.len());
    while enough - too_short > 1 {
        let middle = too_short + (enough - too_short) / 2;
        let reaches = run(&mut Tape::recorded(draws[..middle].to_vec())).is_superset(own);
        *(if reaches { &mut enough } else { &mut too_short }) = middle;
    }
    draws.truncate(enough);
    let mut len = draws.len() / 2;
    let mut tries = 100;
    while len > 0 && tries > 0 {
        let mut at = 0;
        while at < draws.len() && tries > 0 {
            tries -= 1;
            let mut fewer = draws.clone();
            fewer.drain(at..(at + len).min(draws.len()));
            if run(&mut Tape::recorded(fewer.clone())).is_superset(own) {
                draws = fewer;
            } else {
                at += len;
            }
        }
        len /= 2;
    }
    draws
}
