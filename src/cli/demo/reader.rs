//! A client process of the demo: reads the file through the server's windows and compares every byte with the original.
//!
//! It is told what to do line by line on standard input, and answers with a line of JSON each:
//! `all` reads everything once; `watch` reads random pages until the next line comes; `pause` ends that.

use std::fs::File as LocalFile;
use std::io::{BufRead, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use clap::Args;
use cmbfs::{Client, File, Mapped, OpenMode, PathCounts};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::latency::{Latencies, Summary};
use super::sample::Checksum;
use crate::cli::failure::Failure;

/// How much of the file is watched: enough to cross many windows, small enough to keep in memory for comparing.
pub(super) const WATCHED: u64 = 16 << 20;
/// How much is read at a time where everything is read.
const PIECE: u64 = 1 << 20;
/// How much is mapped at a time.
const MAPPED: u64 = 32 << 20;
/// What one watched read reads.
const PAGE: u64 = 4096;

#[derive(Args, Debug)]
pub(super) struct Reader {
    #[arg(long)]
    socket: PathBuf,
    /// The path inside the filesystem
    #[arg(long)]
    path: String,
    /// The file that it must be equal to
    #[arg(long)]
    original: PathBuf,
    #[arg(long)]
    seed: u64,
}

/// What reading the whole file gave.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Whole {
    pub(super) bytes: u64,
    pub(super) sha256: String,
    /// Bytes that differ from the original.
    pub(super) wrong: u64,
    pub(super) paths: Paths,
}

/// What watching gave.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Watched {
    pub(super) latency: Summary,
    pub(super) wrong: u64,
    pub(super) paths: Paths,
}

/// The paths that bytes took, as the client library counts them.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Paths {
    pub(super) cmb_bytes: u64,
    pub(super) host_bytes: u64,
}

impl Paths {
    fn since(before: PathCounts, now: PathCounts) -> Self {
        Self {
            cmb_bytes: now.cmb_read_bytes - before.cmb_read_bytes,
            host_bytes: now.host_read_bytes - before.host_read_bytes,
        }
    }

    fn add(&mut self, counts: PathCounts) {
        let more = Self::since(PathCounts::default(), counts);
        self.cmb_bytes += more.cmb_bytes;
        self.host_bytes += more.host_bytes;
    }
}

impl Reader {
    pub(super) fn run(self) -> Result<(), Failure> {
        let client = Client::connect(&self.socket)?;
        let file = client.open(&self.path, OpenMode::read())?;
        let original = LocalFile::open(&self.original)?;
        let size = original.metadata()?.len();
        let mut expected = vec![0; size.min(WATCHED) as usize];
        original.read_exact_at(&mut expected, 0)?;
        let mapped = file.map_read(0, expected.len() as u64)?;
        let mut watch = Watch { mapped, expected, random: Xoshiro256PlusPlus::seed_from_u64(self.seed) };

        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in std::io::stdin().lock().lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        answer(&"ready")?;
        while let Ok(line) = lines.recv() {
            match line.as_str() {
                "all" => answer(&whole(&file, &original, size)?)?,
                "watch" => watch.until_told(&lines)?,
                _ => return Err(Failure::new(format!("told {line:?}, which means nothing"))),
            }
        }
        Ok(())
    }
}

fn answer<T: Serialize>(what: &T) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, what)?;
    writeln!(out)?;
    Ok(out.flush()?)
}

/// How many bytes differ.
pub(super) fn differing(a: &[u8], b: &[u8]) -> u64 {
    // Equal slices are the rule, and comparing them whole is far faster than byte by byte.
    if a == b { 0 } else { a.iter().zip(b).filter(|(a, b)| a != b).count() as u64 }
}

fn whole(file: &File, original: &LocalFile, size: u64) -> Result<Whole, Failure> {
    if file.size()? != size {
        return Err(Failure::damaged(format!("the file has {} bytes instead of {size}", file.size()?)));
    }
    let mut sum = Checksum::new();
    let (mut got, mut expected) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
    let (mut at, mut wrong, mut paths) = (0, 0, Paths::default());
    while at < size {
        let mapped = file.map_read(at, MAPPED.min(size - at))?;
        let mut inside = 0;
        while inside < mapped.len() {
            let n = PIECE.min(mapped.len() - inside) as usize;
            mapped.read(inside, &mut got[..n])?;
            original.read_exact_at(&mut expected[..n], at + inside)?;
            sum.add(&got[..n]);
            wrong += differing(&got[..n], &expected[..n]);
            inside += n as u64;
        }
        at += mapped.len();
        paths.add(mapped.paths());
    }
    Ok(Whole { bytes: size, sha256: sum.hex(), wrong, paths })
}

struct Watch {
    mapped: Mapped,
    expected: Vec<u8>,
    random: Xoshiro256PlusPlus,
}

impl Watch {
    /// Reads random pages; every `watch` answers with what was seen since the last one, `pause` too and ends it.
    fn until_told(&mut self, lines: &Receiver<String>) -> Result<(), Failure> {
        loop {
            let mut latencies = Latencies::new()?;
            let (before, mut wrong) = (self.mapped.paths(), 0);
            let pause = loop {
                match lines.try_recv() {
                    Ok(line) => break line != "watch",
                    Err(TryRecvError::Disconnected) => return Ok(()),
                    Err(TryRecvError::Empty) => {}
                }
                for _ in 0..64 {
                    wrong += self.read_one(&mut latencies)?;
                }
                // More processes than cores: without a pause each would be stopped in the middle of its reads.
                std::thread::sleep(Duration::from_micros(50));
            };
            let paths = Paths::since(before, self.mapped.paths());
            answer(&Watched { latency: latencies.summary(), wrong, paths })?;
            if pause {
                return Ok(());
            }
        }
    }

    fn read_one(&mut self, latencies: &mut Latencies) -> Result<u64, Failure> {
        let size = self.expected.len() as u64;
        if size == 0 {
            return Ok(0);
        }
        let at = self.random.next_u64() % size.div_ceil(PAGE) * PAGE;
        let n = PAGE.min(size - at) as usize;
        let mut page = [0; PAGE as usize];
        let start = Instant::now();
        self.mapped.read(at, &mut page[..n])?;
        latencies.add(start.elapsed());
        Ok(differing(&page[..n], &self.expected[at as usize..at as usize + n]))
    }
}
