//! A seqlock read of 4 KiB through a window, against a plain memcpy of the same bytes and a `pread` of the same bytes from a
//! page-cached file. Interleaved rounds in one run; the median of the rounds' ratios is what counts.
//!
//! `cargo bench -p cmbfs-benches --bench window_read`
#![expect(unsafe_code, reason = "the plain memcpy that is compared with")]

use std::hint::black_box;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cmbfs_benches::{Pattern, cmb_memory};
use nvme_driver::mem::{Access, Mapping};
use p2p::control::ControlPages;
use p2p::layout::Home;
use p2p::reader::Outcome;
use p2p::region::{Region, RegionKind, View};
use p2p::windows::{Config, ObjectOptions, Want, Windows};

const PAGE: usize = 4096;
const ROUNDS: usize = 301;
const READS: usize = 4000;

fn time(mut each: impl FnMut(usize)) -> Duration {
    let begun = Instant::now();
    for i in 0..READS {
        each(i);
    }
    begun.elapsed()
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for pages in [1, 64, 4096] {
        compare(pages)?;
    }
    Ok(())
}

/// Reads go round `pages` windows of 4 KiB: 1 stays in the first-level cache, 64 in the second, 4096 (16 MiB) in none of a core's own.
fn compare(pages: usize) -> Result<(), Box<dyn std::error::Error>> {
    let size = pages * PAGE;
    let cmb = Mapping::memfd("bench-cmb", size)?;
    let memory = cmb_memory(&cmb);
    let mut drive = Pattern(Arc::clone(&cmb));
    let mut windows = Windows::new(Some(memory), Config { slots: pages as u32, ..Config::default() })?;
    windows.add_object(1, ObjectOptions { window_size: PAGE, ..ObjectOptions::default() })?;
    let (client, _region) = windows.attach()?;
    let mut handles = Vec::new();
    for n in 0..pages {
        let hold = windows.hold(client, 1, (n * PAGE) as u64, false)?;
        windows.ensure(hold.handle.index, Want::Cmb, &mut drive, 0)?;
        let at = windows.status(hold.handle.index).map_or(0, |s| s.at as usize);
        handles.push((hold.handle, at));
    }
    // As a client has them: read-only mappings of its own.
    let len = windows.control().memory().len();
    let control = ControlPages::open(Mapping::from_fd(windows.control_fd()?, 0, len, Access::ReadOnly)?)?;
    let fd = cmb.fd().ok_or("the CMB has no file")?.0.try_clone_to_owned()?;
    let mapped = Mapping::from_fd(fd, 0, size, Access::ReadOnly)?;
    let view =
        View { cmb: Some(Region::new(Arc::clone(&mapped), 0, RegionKind::Ordinary)), host: Vec::new() };

    let path = std::env::temp_dir().join(format!("cmbfs-bench-{}", std::process::id()));
    let mut file = std::fs::File::create_new(&path)?;
    let mut bytes = vec![0; size];
    mapped.read(0, &mut bytes)?;
    file.write_all(&bytes)?;
    let file = std::fs::File::open(&path)?;
    std::fs::remove_file(&path)?;

    let mut buffer = vec![0u8; PAGE];
    let (mut to_memcpy, mut to_pread) = (Vec::new(), Vec::new());
    let mut all = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        let plain = time(|i| {
            let src = black_box(mapped.as_ptr().wrapping_add(handles[i % pages].1));
            // SAFETY: 4 KiB inside the live mapping, into a buffer of 4 KiB; nobody writes it meanwhile.
            unsafe { std::ptr::copy_nonoverlapping(src, black_box(buffer.as_mut_ptr()), PAGE) };
        });
        let seqlock = time(|i| {
            let outcome = control.read(handles[i % pages].0, &view, 0, black_box(&mut buffer));
            assert!(outcome == Outcome::Copied(Home::Cmb));
        });
        let pread = time(|i| {
            let got = file.read_at(black_box(&mut buffer), handles[i % pages].1 as u64);
            assert!(got.is_ok_and(|n| n == PAGE));
        });
        let [plain, seqlock, pread] = [plain, seqlock, pread].map(|d| d.as_secs_f64() * 1e9 / READS as f64);
        to_memcpy.push(seqlock / plain);
        to_pread.push(seqlock / pread);
        for (list, value) in all.iter_mut().zip([plain, seqlock, pread]) {
            list.push(value);
        }
    }
    let [plain, seqlock, pread] = all.map(median);
    println!(
        "4 KiB over {pages:>4} windows: memcpy {plain:6.1} ns, seqlock {seqlock:6.1} ns, pread {pread:6.1} ns; seqlock/memcpy {:.3} (target 1.08), seqlock/pread {:.3} (target 0.4)",
        median(to_memcpy),
        median(to_pread),
    );
    Ok(())
}
