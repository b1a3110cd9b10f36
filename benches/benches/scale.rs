//! Many windows and many clients: memory per window, and what a look-up costs, at 10^3 to 10^6 windows held by 10^3 clients.
//!
//! `cargo bench -p cmbfs-benches --bench scale`

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use cmbfs_benches::{Pattern, cmb_memory};
use nvme_driver::mem::{Access, Mapping};
use p2p::control::ControlPages;
use p2p::layout::CONTROL_SLOT;
use p2p::reader::Outcome;
use p2p::region::{Region, RegionKind, View};
use p2p::windows::{ClientId, Config, Hold, ObjectOptions, Scope, Want, Windows};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

const PAGE: usize = 4096;
const CLIENTS: usize = 1000;
/// Windows that have a place; the others are registered and held.
const RESIDENT: usize = 1000;
const LOOKUPS: usize = 20_000;

fn main() -> Fallible<()> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let most = rustix::process::Rlimit { current: limit.maximum, ..limit };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, most)?;
    println!(
        "{CLIENTS} clients, each window held for writing by one; {RESIDENT} windows have a place in the CMB"
    );
    println!(
        "{:>9} {:>14} {:>14} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "windows", "shared", "server", "hold", "range", "ensure", "revoke", "read"
    );
    for count in [1_000, 10_000, 100_000, 1_000_000] {
        scale(count)?;
    }
    shared_by_all()
}

/// Bytes of memory that belong to this process alone.
fn private_bytes() -> Fallible<u64> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup")?;
    let kib = |name: &str| -> u64 {
        let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_default();
        line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or_default()
    };
    Ok(kib("Anonymous:") * 1024)
}

/// Nanoseconds each, over windows that lie far apart.
fn each(windows: usize, mut look_up: impl FnMut(usize) -> Fallible<()>) -> Fallible<f64> {
    let begun = Instant::now();
    for n in 0..LOOKUPS {
        look_up(n.wrapping_mul(7919) % windows)?;
    }
    Ok(begun.elapsed().as_nanos() as f64 / LOOKUPS as f64)
}

fn scale(count: usize) -> Fallible<()> {
    let cmb = Mapping::memfd("bench-cmb", 2 * RESIDENT * PAGE)?;
    let mut drive = Pattern(Arc::clone(&cmb));
    let config = Config { slots: count as u32, dirty_words: 8192, settle: 0, ..Config::default() };
    let mut windows = Windows::new(Some(cmb_memory(&cmb)), config)?;
    windows.add_object(1, ObjectOptions { window_size: PAGE, ..ObjectOptions::default() })?;
    let clients = (0..CLIENTS).map(|_| Ok(windows.attach()?.0)).collect::<Fallible<Vec<ClientId>>>()?;
    let before = private_bytes()?;
    let holds = (0..count)
        .map(|n| Ok(windows.hold(clients[n % CLIENTS], 1, (n * PAGE) as u64, true)?))
        .collect::<Fallible<Vec<Hold>>>()?;
    // The holds are this benchmark's own.
    let server = private_bytes()?.saturating_sub(before).saturating_sub(size_of_val(holds.as_slice()) as u64);
    for hold in &holds[..RESIDENT] {
        windows.ensure(hold.handle.index, Want::Cmb, &mut drive, 0)?;
    }
    let hold = each(count, |n| {
        black_box(windows.hold(clients[n % CLIENTS], 1, (n * PAGE) as u64, true)?);
        Ok(windows.release(clients[n % CLIENTS], holds[n].handle.index)?)
    })?;
    let range = each(count, |n| {
        let at = (n * PAGE) as u64;
        black_box(windows.is_dirty(1, &(at..at + PAGE as u64)));
        Ok(())
    })?;
    let ensure = each(RESIDENT, |n| {
        windows.ensure(holds[n].handle.index, Want::Auto, &mut drive, 0)?;
        Ok(())
    })?;
    let len = windows.control().memory().len();
    let control = ControlPages::open(Mapping::from_fd(windows.control_fd()?, 0, len, Access::ReadOnly)?)?;
    let view = View { cmb: Some(Region::new(Arc::clone(&cmb), 0, RegionKind::Ordinary)), host: Vec::new() };
    let mut word = [0; 8];
    let read = each(RESIDENT, |n| match control.read(holds[n].handle, &view, 0, &mut word) {
        Outcome::Copied(_) => Ok(()),
        other => Err(format!("{other:?}").into()),
    })?;
    // There and back: two moves.
    let revoke = each(RESIDENT, |n| {
        let ticket = windows.revoke(&Scope::Window(holds[n].handle.index), &mut drive, 1)?;
        windows.poll(&mut drive, 1);
        black_box(windows.progress(ticket));
        windows.promote(holds[n].handle.index, &mut drive, 1);
        Ok(())
    })?;
    // One control slot, and one word of dirty bits for its one writer.
    let shared = CONTROL_SLOT + 8;
    println!(
        "{count:>9} {shared:>10} byte {:>10.0} byte {hold:>7.0} ns {range:>7.0} ns {ensure:>7.0} ns {revoke:>7.0} ns {read:>7.0} ns",
        server as f64 / count as f64
    );
    Ok(())
}

/// One window that all clients hold: what the last of them pays to hold it once more.
fn shared_by_all() -> Fallible<()> {
    let mut drive = Pattern(Mapping::memfd("bench-cmb", PAGE)?);
    let mut windows = Windows::new(None, Config { slots: 16, dirty_words: 64, ..Config::default() })?;
    windows.add_object(1, ObjectOptions { window_size: PAGE, ..ObjectOptions::default() })?;
    for clients in [1, 10, 100, 1000] {
        while windows.clients().count() < clients {
            let (id, _) = windows.attach()?;
            windows.hold(id, 1, 0, true)?;
        }
        let ids: Vec<ClientId> = windows.clients().map(|(id, _)| id).collect();
        let hold = windows.hold(ids[0], 1, 0, true)?;
        windows.ensure(hold.handle.index, Want::Auto, &mut drive, 0)?;
        let again = each(clients, |n| {
            windows.hold(ids[n], 1, 0, true)?;
            Ok(windows.release(ids[n], hold.handle.index)?)
        })?;
        println!(
            "one window held by {clients:>4} clients: {again:.0} ns to hold it once more and release it"
        );
    }
    Ok(())
}
