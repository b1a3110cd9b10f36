//! A peer copies a window: its own DMA from the CMB, against the bounce path through host memory. Interleaved rounds in one run.
//!
//! `cargo bench -p cmbfs-benches --bench peer_copy`

use std::sync::Arc;
use std::time::Instant;

use cmbfs_benches::{Pattern, cmb_memory, median};
use nvme_driver::mem::Mapping;
use p2p::counters::Path;
use p2p::peer::EmulatedEngine;
use p2p::windows::{Config, ObjectOptions, PeerPath, Want, Windows};

const ROUNDS: usize = 101;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("{:>9} {:>14} {:>14} {:>7}", "window", "peer's DMA", "bounce", "ratio");
    for size in [4 << 10, 64 << 10, 256 << 10, 1 << 20] {
        compare(size)?;
    }
    Ok(())
}

fn compare(size: usize) -> Result<(), Box<dyn std::error::Error>> {
    let cmb = Mapping::memfd("bench-cmb", size)?;
    let mut drive = Pattern(Arc::clone(&cmb));
    let mut windows = Windows::new(Some(cmb_memory(&cmb)), Config { slots: 4, ..Config::default() })?;
    windows.add_object(1, ObjectOptions { window_size: size, ..ObjectOptions::default() })?;
    let (client, _region) = windows.attach()?;
    let hold = windows.hold(client, 1, 0, false)?;
    windows.ensure(hold.handle.index, Want::Cmb, &mut drive, 0)?;
    let engine = EmulatedEngine::new("dma0", size)?;
    let peer = windows.register_peer(Box::new(engine.clone()));
    let PeerPath::Direct(mapped) = windows.map_peer(peer, hold.handle.index, false, &mut drive, 0)? else {
        return Err("the peer cannot reach the window".into());
    };
    let copies = ((64 << 20) / size).clamp(16, 2048);
    let mut host = vec![0; size];
    let (mut direct, mut bounced, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        for _ in 0..copies {
            engine.copy(mapped.iova, 0, size, false)?;
        }
        let by_peer = begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        for _ in 0..copies {
            windows.read_through(1, 0..size as u64, &mut host, &mut drive)?;
            engine.local().write(0, &host)?;
        }
        let by_host = begun.elapsed().as_secs_f64();
        let gigabytes = (copies * size) as f64 / 1e9;
        direct.push(gigabytes / by_peer);
        bounced.push(gigabytes / by_host);
        ratios.push(by_host / by_peer);
    }
    let moved = engine.domain().counters().bytes_read;
    if moved < (ROUNDS * copies * size) as u64 || windows.counters().path(Path::Bounce).bytes == 0 {
        return Err("the copies did not take the paths that they should".into());
    }
    println!(
        "{:>6} KiB {:>9.2} GB/s {:>9.2} GB/s {:>6.2}x",
        size >> 10,
        median(direct),
        median(bounced),
        median(ratios)
    );
    Ok(())
}
