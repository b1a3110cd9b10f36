//! What readers feel of a storm: latencies of reads while windows are revoked and brought back at full speed, against the same threads while
//! the revoker is idle. Interleaved rounds in one run.
//!
//! `cargo bench -p cmbfs-benches --bench readers`

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cmbfs_benches::{Pattern, cmb_memory, quantile};
use nvme_driver::mem::{Access, Mapping};
use p2p::control::{ControlPages, WindowHandle};
use p2p::reader::Outcome;
use p2p::region::{Region, RegionKind, View};
use p2p::windows::{Config, ObjectOptions, Scope, Want, Windows};

const PAGE: usize = 4096;
const WINDOWS: usize = 16;
const ROUNDS: u64 = 40;
const ROUND: Duration = Duration::from_millis(100);

struct Reader {
    control: ControlPages,
    view: View,
    handles: Vec<WindowHandle>,
}

/// Nanoseconds per read of one window, in rounds without (0) and with (1) a storm.
fn read(reader: &Reader, round: &AtomicU64, over: &AtomicBool) -> [Vec<u32>; 2] {
    let mut times = [Vec::new(), Vec::new()];
    let mut bytes = vec![0; PAGE];
    let mut n = 0usize;
    while !over.load(Ordering::Relaxed) {
        let storm = round.load(Ordering::Relaxed) as usize % 2;
        n = n.wrapping_add(7);
        let begun = Instant::now();
        // Whatever comes in between is part of it.
        while !matches!(
            reader.control.read(reader.handles[n % WINDOWS], &reader.view, 0, &mut bytes),
            Outcome::Copied(_) | Outcome::ServerGone
        ) {
            std::hint::spin_loop();
        }
        times[storm].push(u32::try_from(begun.elapsed().as_nanos()).unwrap_or(u32::MAX));
    }
    times
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cores = std::thread::available_parallelism()?.get();
    let cmb = Mapping::memfd("bench-cmb", WINDOWS * PAGE)?;
    let mut drive = Pattern(Arc::clone(&cmb));
    let config = Config { slots: 64, settle: 0, ..Config::default() };
    let mut windows = Windows::new(Some(cmb_memory(&cmb)), config)?;
    windows.add_object(1, ObjectOptions { window_size: PAGE, ..ObjectOptions::default() })?;
    let readers = (0..cores.saturating_sub(1).max(1))
        .map(|_| -> Result<Reader, Box<dyn std::error::Error>> {
            let (client, _region) = windows.attach()?;
            let mut handles = Vec::new();
            for n in 0..WINDOWS {
                let hold = windows.hold(client, 1, (n * PAGE) as u64, false)?;
                windows.ensure(hold.handle.index, Want::Cmb, &mut drive, 0)?;
                handles.push(hold.handle);
            }
            let len = windows.control().memory().len();
            let control = Mapping::from_fd(windows.control_fd()?, 0, len, Access::ReadOnly)?;
            let host = Mapping::from_fd(windows.host_fd(1, false)?, 0, WINDOWS * PAGE, Access::ReadOnly)?;
            let view = View {
                cmb: Some(Region::new(Arc::clone(&cmb), 0, RegionKind::Ordinary)),
                host: vec![Region::new(host, 0, RegionKind::Ordinary)],
            };
            Ok(Reader { control: ControlPages::open(control)?, view, handles })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let indices: Vec<u32> = readers[0].handles.iter().map(|h| h.index).collect();
    let (round, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let clock = Instant::now();
    let mut moves = 0;
    let times = std::thread::scope(|scope| {
        let threads: Vec<_> = readers.iter().map(|r| scope.spawn(|| read(r, &round, &over))).collect();
        for n in 0..ROUNDS {
            round.store(n, Ordering::Relaxed);
            let begun = Instant::now();
            if n % 2 == 0 {
                std::thread::sleep(ROUND);
                continue;
            }
            let before = windows.counters().moves;
            'storm: loop {
                for &index in &indices {
                    let now = clock.elapsed().as_nanos() as u64;
                    if windows.revoke(&Scope::Window(index), &mut drive, now).is_err() {
                        break 'storm;
                    }
                    windows.poll(&mut drive, now);
                    windows.promote(index, &mut drive, now);
                }
                if begun.elapsed() >= ROUND {
                    break;
                }
            }
            moves += windows.counters().moves - before;
        }
        over.store(true, Ordering::Relaxed);
        threads.into_iter().filter_map(|t| t.join().ok()).collect::<Vec<_>>()
    });
    let [mut idle, mut storm] = [Vec::new(), Vec::new()];
    for [a, b] in times {
        idle.extend(a.into_iter().map(f64::from));
        storm.extend(b.into_iter().map(f64::from));
    }
    let seconds = ROUND.as_secs_f64() * (ROUNDS / 2) as f64;
    println!(
        "{} readers of 4 KiB, {WINDOWS} windows, {:.0} moves per second in the storm; reads: {} idle, {} in the storm",
        readers.len(),
        moves as f64 / seconds,
        idle.len(),
        storm.len()
    );
    println!("{:>8} {:>12} {:>12} {:>7}", "", "idle", "storm", "ratio");
    for (name, q) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)] {
        let (a, b) = (quantile(&mut idle, q), quantile(&mut storm, q));
        println!("{name:>8} {a:>9.0} ns {b:>9.0} ns {:>6.2}x", b / a);
    }
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
    let (a, b) = (mean(&idle), mean(&storm));
    println!("{:>8} {a:>9.0} ns {b:>9.0} ns {:>6.2}x", "mean", b / a);
    Ok(())
}
