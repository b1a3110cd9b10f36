//! A CMB of 1 MiB under a working set of 10 GiB, beside the same reads with no CMB at all: both with the same host cache, the same
//! visits in the same order, round by round in one run. The median of the rounds' ratios is what counts.
//!
//! `cargo bench -p cmbfs-benches --bench small_cmb`

use std::sync::Arc;
use std::time::{Duration, Instant};

use cmbfs_benches::cmb_memory;
use nvme_driver::mem::{Access, Mapping};
use p2p::backing::{Backing, BackingError};
use p2p::control::ControlPages;
use p2p::counters::Path;
use p2p::reader::Outcome;
use p2p::region::{Region, RegionKind, View};
use p2p::windows::{Config, Hold, ObjectOptions, Want, Windows};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

const PAGE: usize = 4096;
const WINDOW: usize = 64 << 10;
const CMB: usize = 1 << 20;
const WORKING_SET: u64 = 10 << 30;
const WINDOWS: u64 = WORKING_SET / WINDOW as u64;
const HOST: u64 = 256 << 20;
const ROUNDS: usize = 41;
const VISITS: usize = 4000;

/// A drive whose reads cost one copy, wherever they go.
struct Drive {
    cmb: Arc<Mapping>,
    block: Vec<u8>,
    reads: u64,
}

impl Backing for Drive {
    fn read_to_cmb(&mut self, _: u64, _: u64, at: usize, len: usize) -> Result<(), BackingError> {
        self.reads += 1;
        let from = self.block.get(..len).unwrap_or_default();
        self.cmb.write(at, from).map_err(|e| BackingError::Unsupported(e.to_string()))
    }
    fn read_to_host(&mut self, _: u64, _: u64, into: &mut [u8]) -> Result<(), BackingError> {
        self.reads += 1;
        into.copy_from_slice(self.block.get(..into.len()).unwrap_or_default());
        Ok(())
    }
    fn write_from_cmb(&mut self, _: u64, _: u64, _: usize, _: usize) -> Result<(), BackingError> {
        Ok(())
    }
    fn write_from_host(&mut self, _: u64, _: u64, _: &[u8]) -> Result<(), BackingError> {
        Ok(())
    }
}

struct Side {
    windows: Windows,
    drive: Drive,
    control: ControlPages,
    view: View,
    holds: Vec<Hold>,
    now: u64,
}

impl Side {
    fn new(with_cmb: bool) -> Fallible<Self> {
        let cmb = Mapping::memfd("bench-cmb", CMB)?;
        let config = Config { slots: WINDOWS as u32, host_limit: HOST, ..Config::default() };
        let mut windows = Windows::new(with_cmb.then(|| cmb_memory(&cmb)), config)?;
        windows.add_object(1, ObjectOptions { window_size: WINDOW, ..ObjectOptions::default() })?;
        let (client, _region) = windows.attach()?;
        let holds: Result<_, _> =
            (0..WINDOWS).map(|n| windows.hold(client, 1, n * WINDOW as u64, false)).collect();
        let len = windows.control().memory().len();
        let control = Mapping::from_fd(windows.control_fd()?, 0, len, Access::ReadOnly)?;
        let host = Mapping::from_fd(windows.host_fd(1, false)?, 0, WORKING_SET as usize, Access::ReadOnly)?;
        let view = View {
            cmb: Some(Region::new(Arc::clone(&cmb), 0, RegionKind::Ordinary)),
            host: vec![Region::new(host, 0, RegionKind::Ordinary)],
        };
        let drive = Drive { cmb, block: vec![7; WINDOW], reads: 0 };
        Ok(Self { windows, drive, control: ControlPages::open(control)?, view, holds: holds?, now: 0 })
    }

    /// Goes to the windows named and reads all of each.
    fn visit(&mut self, windows: &[u64]) -> Fallible<Duration> {
        let begun = Instant::now();
        let mut buffer = vec![0; PAGE];
        for n in windows {
            let handle = self.holds[*n as usize].handle;
            for page in 0..WINDOW / PAGE {
                while !matches!(
                    self.control.read(handle, &self.view, page * PAGE, &mut buffer),
                    Outcome::Copied(_)
                ) {
                    self.windows.ensure(handle.index, Want::Auto, &mut self.drive, self.now)?;
                    self.now += 1000;
                    self.windows.poll(&mut self.drive, self.now);
                }
                assert!(buffer[0] == 7 && buffer[PAGE - 1] == 7);
            }
        }
        Ok(begun.elapsed())
    }
}

fn main() -> Fallible<()> {
    let (mut with, mut without) = (Side::new(true)?, Side::new(false)?);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        // The fourth power: an eighth of the visits go to some forty windows, half of them to a sixteenth of all.
        let visits: Vec<u64> = (0..VISITS).map(|_| (random().powi(4) * WINDOWS as f64) as u64).collect();
        let (a, b) = if round % 2 == 0 {
            let a = with.visit(&visits)?;
            (a, without.visit(&visits)?)
        } else {
            let b = without.visit(&visits)?;
            (with.visit(&visits)?, b)
        };
        // The first rounds fill the caches.
        if round >= 5 {
            ratios.push(b.as_secs_f64() / a.as_secs_f64());
        }
    }
    ratios.sort_by(f64::total_cmp);
    let counters = with.windows.counters();
    println!(
        "CMB of 1 MiB under 10 GiB: {:.3} of the throughput without a CMB (median of {} rounds; {:.3} to {:.3}); {:.3} of its reads of the drive; {} windows went out of the CMB, {} MiB through the host cache",
        ratios[ratios.len() / 2],
        ratios.len(),
        ratios[0],
        ratios[ratios.len() - 1],
        with.drive.reads as f64 / without.drive.reads as f64,
        counters.evicted,
        counters.path(Path::HostCache).bytes >> 20,
    );
    Ok(())
}
