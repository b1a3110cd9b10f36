//! 4 KiB reads by our driver of a controller that is served over vfio-user, each on a core of its own.
//!
//! * `cargo bench -p cmbfs-benches --bench serve`: our emulated controller with a RAM namespace and with one that moves no
//!   data (null), at depths 1, 32 and 128
//! * `cargo bench -p cmbfs-benches --bench serve -- SOCKET`: only the driver, on whatever another process serves on SOCKET
//!
//! Rounds are interleaved and medians printed. Beside them, measured in the same rounds between and on the same cores: how
//! long a cache line takes to the other core and back, and how long a copy of 4 KiB takes.
//!
//! Both threads spin. On a machine that is busy otherwise: `chrt -f 1 cargo bench ...`.

use std::error::Error;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Instant;

use cmbfs_benches::quantile;
use cmbfs_benches::reads::{BLOCK, Reads};
use core_affinity::CoreId;
use nvme_driver::clock::SystemClock;
use nvme_driver::controller::{Controller, ControllerOptions};
use nvme_driver::emu::{Backing, Config, EmulatedController};
use nvme_driver::mem::Mapping;
use nvme_driver::vfio_user::VfioUserFunction;
use nvme_driver::vfio_user::server::Server;

type Fallible<T> = Result<T, Box<dyn Error>>;

const ROUNDS: usize = 21;
const DEPTHS: [usize; 3] = [1, 32, 128];
/// Bytes of the namespace: far more than the caches hold.
const SIZE: u64 = 256 << 20;

fn main() -> Fallible<()> {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let [ours, .., theirs] = cores[..] else { return Err("two cores are needed".into()) };
    if !core_affinity::set_for_current(ours) {
        return Err(format!("cannot run on core {}", ours.id).into());
    }
    let args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    match &args[..] {
        [] => both_sides(ours, theirs),
        [socket] => driver_alone(Path::new(socket)),
        _ => Err("usage: serve [SOCKET]".into()),
    }
}

fn both_sides(ours: CoreId, theirs: CoreId) -> Fallible<()> {
    let targets = [
        ("RAM namespace", EmulatedController::new(&config(Backing::Ram { bytes: SIZE }))?),
        ("null namespace", EmulatedController::new(&config(Backing::Null { bytes: SIZE }))?),
    ];
    for (_, controller) in &targets {
        served(controller, theirs, |reads| reads.fill(SIZE))?;
    }
    let mut rates = vec![Vec::new(); targets.len() * DEPTHS.len()];
    let (mut round_trips, mut copies) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        round_trips.push(round_trip(theirs));
        copies.push(copy()?);
        for (t, (_, controller)) in targets.iter().enumerate() {
            let got = served(controller, theirs, rounds_of)?;
            for (d, rate) in got.into_iter().enumerate() {
                rates[t * DEPTHS.len() + d].push(rate);
            }
        }
    }
    println!("4 KiB reads over vfio-user, driver on core {}, controller on core {}", ours.id, theirs.id);
    println!("medians of {ROUNDS} interleaved rounds");
    for (t, (name, _)) in targets.iter().enumerate() {
        for (d, depth) in DEPTHS.into_iter().enumerate() {
            print_rate(name, depth, &mut rates[t * DEPTHS.len() + d]);
        }
    }
    println!("a cache line to the other core and back: {:.0} ns", quantile(&mut round_trips, 0.5));
    println!("a copy of 4 KiB, all over {} MiB: {:.0} ns", SIZE >> 20, quantile(&mut copies, 0.5));
    Ok(())
}

fn driver_alone(socket: &Path) -> Fallible<()> {
    let mut reads = Reads::new(&connect(socket)?)?;
    let mut rates = vec![Vec::new(); DEPTHS.len()];
    for _ in 0..ROUNDS {
        for (d, rate) in rounds_of(&mut reads)?.into_iter().enumerate() {
            rates[d].push(rate);
        }
    }
    println!("4 KiB reads of {}, medians of {ROUNDS} rounds", socket.display());
    for (d, depth) in DEPTHS.into_iter().enumerate() {
        print_rate("served elsewhere", depth, &mut rates[d]);
    }
    Ok(())
}

fn config(namespace: Backing) -> Config {
    Config { namespace, lba_size: 4096, ..Config::default() }
}

fn connect(socket: &Path) -> Fallible<Arc<Controller>> {
    let function = VfioUserFunction::connect(socket)?;
    Ok(Controller::new(function, ControllerOptions::default(), Arc::new(SystemClock::new()))?)
}

/// Reads per second at each depth; long enough for 20 ms or so each, whatever the rate.
fn rounds_of(reads: &mut Reads) -> Fallible<Vec<f64>> {
    let mut out = Vec::new();
    for depth in DEPTHS {
        let rate = reads.rate(depth, 1000)?;
        out.push(reads.rate(depth, (rate / 50.0) as u64 + 100)?);
    }
    Ok(out)
}

/// Serves `controller` on a thread of its own on `core` while `f` reads.
fn served<T>(
    controller: &Arc<EmulatedController>,
    core: CoreId,
    f: impl FnOnce(&mut Reads) -> Fallible<T>,
) -> Fallible<T> {
    let socket = std::env::temp_dir().join(format!("cmbfs-bench-serve-{}", std::process::id()));
    let server = Server::bind(&socket, controller.function())?;
    let stop = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            if !core_affinity::set_for_current(core) {
                return Err(format!("cannot run on core {}", core.id));
            }
            server.run(&stop).map_err(|e| e.to_string())
        });
        let got = connect(&socket).and_then(|controller| f(&mut Reads::new(&controller)?));
        stop.store(true, Ordering::Relaxed);
        serving.join().map_err(|_| "the server panicked")??;
        got
    })
}

/// Nanoseconds that a cache line takes to the other core and back.
fn round_trip(core: CoreId) -> f64 {
    const TRIPS: u32 = 20_000;
    #[repr(align(128))]
    struct Line(AtomicU32);
    let line = Line(AtomicU32::new(0));
    // A thread starts on its parent's core: nobody spins before it has left.
    let ready = Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            core_affinity::set_for_current(core);
            ready.wait();
            for n in 0..TRIPS {
                while line.0.load(Ordering::Acquire) != 2 * n + 1 {
                    std::hint::spin_loop();
                }
                line.0.store(2 * n + 2, Ordering::Release);
            }
        });
        ready.wait();
        let start = Instant::now();
        for n in 0..TRIPS {
            line.0.store(2 * n + 1, Ordering::Release);
            while line.0.load(Ordering::Acquire) != 2 * n + 2 {
                std::hint::spin_loop();
            }
        }
        start.elapsed().as_nanos() as f64 / f64::from(TRIPS)
    })
}

/// Nanoseconds for a copy of 4 KiB from some place of a large memory into one of 128 blocks.
fn copy() -> Fallible<f64> {
    const COPIES: u64 = 20_000;
    static LARGE: std::sync::OnceLock<Arc<Mapping>> = std::sync::OnceLock::new();
    let large = match LARGE.get() {
        Some(large) => large,
        None => {
            let large = Mapping::anonymous(SIZE as usize)?;
            for at in (0..SIZE as usize).step_by(BLOCK) {
                large.write(at, &[1; BLOCK])?;
            }
            LARGE.get_or_init(|| large)
        }
    };
    let small = Mapping::anonymous(128 * BLOCK)?;
    let start = Instant::now();
    for n in 0..COPIES {
        let from = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 & (SIZE / BLOCK as u64 - 1);
        large.copy_to(from as usize * BLOCK, &small, (n % 128) as usize * BLOCK, BLOCK)?;
    }
    Ok(start.elapsed().as_nanos() as f64 / COPIES as f64)
}

fn print_rate(name: &str, depth: usize, rates: &mut [f64]) {
    let [low, rate, high] = [0.25, 0.5, 0.75].map(|q| quantile(rates, q));
    println!(
        "  {name:16} depth {depth:>3}: {rate:>9.0} reads/s, {:>6.0} ns each (quartiles {low:.0} to {high:.0})",
        1e9 / rate
    );
}
