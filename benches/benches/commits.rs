//! Durable commits per second of 1 to 8 clients of one server, each of 8 bytes in a file of its own: one after the other, so that
//! each has a flush of its own, and all at once, when they share flushes.
//!
//! The drive is an image in the temporary folder: a flush is an fdatasync there. Rounds are interleaved; medians.

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cmbfs_benches::quantile;
use extent_fs::{Filesystem, FormatOptions, MountOptions, NewInode};
use nvme_driver::emu::EmulatedController;
use nvme_driver::spec::NvmOpcode;
use shm_api::client::{Client, OpenMode};
use shm_api::server::{Server, ServerOptions};

const CLIENTS: [u64; 4] = [1, 2, 4, 8];
const ROUNDS: usize = 7;
const ROUND: Duration = Duration::from_millis(300);

fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let url = format!("emu:{}?size=256M&cmb=16M", dir.path().join("disk.img").display());
    let device = nvme_driver::open(&url.parse()?, &nvme_driver::OpenOptions::default())?;
    let emulated = Arc::clone(device.emulated().ok_or("no emulated drive")?);
    // Of whoever runs it: anybody may make files there.
    let root = NewInode { mode: 0o1777, ..NewInode::directory() };
    extent_fs::format(&mut device.disk()?, &FormatOptions { root: Some(root), ..FormatOptions::default() })?;
    let fs = Filesystem::mount(device.disk()?, MountOptions::default())?;
    let server = Server::new(fs, ServerOptions::new(dir.path().join("s")))?;
    let (socket, stop) = (server.socket().to_owned(), server.stop_handle());
    let running = std::thread::spawn(move || server.run());
    let clients = (0..8).map(|_| Client::connect(&socket)).collect::<Result<Vec<_>, _>>()?;

    println!("clients  one by one  flushes each   at once  flushes each  ratio");
    for n in CLIENTS {
        let (mut alone, mut together) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        for _ in 0..ROUNDS {
            for (at_once, rates) in [(false, &mut alone), (true, &mut together)] {
                let (rate, flushes) = round(&clients[..n as usize], at_once, &emulated)?;
                rates[0].push(rate);
                rates[1].push(flushes);
            }
        }
        let [a, fa] = alone.map(|mut v| quantile(&mut v, 0.5));
        let [t, ft] = together.map(|mut v| quantile(&mut v, 0.5));
        println!("{n:>7} {a:>9.0}/s {fa:>13.2} {t:>8.0}/s {ft:>13.2} {:>6.2}", t / a);
    }
    drop(clients);
    stop.stop();
    running.join().map_err(|_| "the server panicked")??;
    Ok(())
}

/// Commits per second, and flushes per commit.
fn round(
    clients: &[Client],
    at_once: bool,
    emulated: &EmulatedController,
) -> Result<(f64, f64), Box<dyn Error>> {
    let (turn, over, commits) = (Mutex::new(()), AtomicBool::new(false), AtomicU64::new(0));
    let flushes = || emulated.counters().io_commands[NvmOpcode::Flush as usize];
    let (before, start) = (flushes(), Instant::now());
    std::thread::scope(|scope| {
        let workers: Vec<_> = clients
            .iter()
            .enumerate()
            .map(|(n, client)| {
                let (turn, over, commits) = (&turn, &over, &commits);
                scope.spawn(move || -> Result<(), shm_api::client::ClientError> {
                    let file = client.open(&format!("/f{n}"), OpenMode::create())?;
                    let mapped = file.map(0, 8)?;
                    while !over.load(Ordering::Relaxed) {
                        mapped.write_u64(0, commits.fetch_add(1, Ordering::Relaxed))?;
                        let _turn = (!at_once).then(|| turn.lock().unwrap_or_else(PoisonError::into_inner));
                        file.commit()?;
                    }
                    Ok(())
                })
            })
            .collect();
        std::thread::sleep(ROUND);
        over.store(true, Ordering::Relaxed);
        workers.into_iter().try_for_each(|w| w.join().map_err(|_| "a client panicked")?.map_err(Box::from))
    })
    .map_err(|e: Box<dyn Error>| e)?;
    let commits = commits.into_inner() as f64;
    Ok((commits / start.elapsed().as_secs_f64(), (flushes() - before) as f64 / commits))
}
