//! How long a revocation takes: from the call until a spinning reader in another process has read at the new place, beside the
//! kernel's own revocation, the break of a file lease between two processes: of a window that comes back to pages that the host cache
//! kept for it, and of one that has none there. And many windows at once.
//!
//! `cargo bench -p cmbfs-benches --bench revoke`
#![expect(unsafe_code, reason = "fcntl leases and signals")]

use std::error::Error;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use cmbfs_benches::{Pattern, cmb_memory, quantile};
use nvme_driver::mem::{Access, Mapping};
use p2p::control::{ClientRegion, ControlPages, WindowHandle};
use p2p::layout::Home;
use p2p::reader::Outcome;
use p2p::region::{Region, RegionKind, View};
use p2p::windows::{Config, ObjectOptions, Progress, Scope, Want, Windows};
use p2p::writer::{Slots, WriteHandle};

type Fallible<T> = Result<T, Box<dyn Error>>;

const PAGE: usize = 4096;
const ROUNDS: usize = 500;
const PARTS: usize = 4;

fn main() -> Fallible<()> {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("reader") => return reader(&args[2..]),
        Some("lease") => return lease_holder(&args[2..]),
        _ => {}
    }
    // In turns, so that all of them have the same machine.
    let kinds = [
        ("clean", false, true),
        ("dirty", true, true),
        ("clean, first", false, false),
        ("dirty, first", true, false),
    ];
    let (mut ours, mut kernel) = (kinds.map(|_| Vec::new()), Vec::new());
    for _ in 0..PARTS {
        for ((_, dirty, again), times) in kinds.iter().zip(&mut ours) {
            times.extend(one_window(*dirty, *again)?);
        }
        kernel.extend(lease_breaks()?);
    }
    let kernel = report("kernel lease break", kernel, None);
    for ((name, ..), times) in kinds.iter().zip(ours) {
        report(&format!("revoke, {name}"), times, Some(kernel));
    }
    for count in [1, 10, 100, 1000, 10_000, 100_000] {
        many(count)?;
    }
    Ok(())
}

/// Prints p50 and p99, and how often they go into the kernel's; returns them.
fn report(name: &str, mut times: Vec<f64>, kernel: Option<(f64, f64)>) -> (f64, f64) {
    let (p50, p99) = (quantile(&mut times, 0.5), quantile(&mut times, 0.99));
    let faster = kernel
        .map(|(k50, k99)| format!("; kernel / this: {:.1}x at p50, {:.1}x at p99", k50 / p50, k99 / p99))
        .unwrap_or_default();
    println!("{name:20} p50 {p50:7.1} us, p99 {p99:8.1} us ({} rounds){faster}", times.len());
    (p50, p99)
}

fn start(args: &[String]) -> Fallible<Child> {
    Ok(Command::new(std::env::current_exe()?).args(args).spawn()?)
}

fn borrowed_fd(pid: &str, fd: &str, write: bool) -> Fallible<OwnedFd> {
    Ok(File::options().read(true).write(write).open(format!("/proc/{pid}/fd/{fd}"))?.into())
}

/// The reader process: reads the window for ever, and says where it read in a word shared with the parent.
fn reader(args: &[String]) -> Fallible<()> {
    let [pid, control, cmb, host, word, len, index, incarnation] = args else {
        return Err("arguments".into());
    };
    let control = Mapping::from_fd(borrowed_fd(pid, control, false)?, 0, len.parse()?, Access::ReadOnly)?;
    let control = ControlPages::open(control)?;
    let map = |fd: &str| -> Fallible<Region> {
        let memory = Mapping::from_fd(borrowed_fd(pid, fd, false)?, 0, PAGE, Access::ReadOnly)?;
        Ok(Region::new(memory, 0, RegionKind::Ordinary))
    };
    let view = View { cmb: Some(map(cmb)?), host: vec![map(host)?] };
    let word = Mapping::from_fd(borrowed_fd(pid, word, true)?, 0, PAGE, Access::ReadWrite)?;
    let handle = WindowHandle { index: index.parse()?, incarnation: incarnation.parse()?, len: PAGE as u64 };
    let mut buffer = vec![0; PAGE];
    loop {
        let home = match control.read(handle, &view, 0, &mut buffer) {
            Outcome::Copied(Home::Cmb) => 1,
            Outcome::Copied(Home::Host) => 2,
            Outcome::ServerGone => return Ok(()),
            _ => 3,
        };
        word.u64_at(0)?.store(home, Ordering::Release);
    }
}

/// Revokes a window again and again. `again`: it was in the host cache before it was in the CMB, and comes back to the pages that it left
/// there. Else it comes straight from the drive each time, so that each revocation is its first.
fn one_window(dirty: bool, again: bool) -> Fallible<Vec<f64>> {
    let cmb = Mapping::memfd("bench-cmb", PAGE)?;
    let mut drive = Pattern(Arc::clone(&cmb));
    let config = Config { slots: 16, settle: 0, ..Config::default() };
    let mut windows = Windows::new(Some(cmb_memory(&cmb)), config)?;
    windows.add_object(1, ObjectOptions { window_size: PAGE, ..ObjectOptions::default() })?;
    let (client, region) = windows.attach()?;
    let hold = windows.hold(client, 1, 0, true)?;
    windows.ensure(hold.handle.index, Want::Cmb, &mut drive, 0)?;
    let (control, host) = (windows.control_fd()?, windows.host_fd(1, false)?);
    let word = Mapping::memfd("bench-word", PAGE)?;
    let fd = |m: &Mapping| m.fd().map_or(-1, |(fd, _)| fd.as_raw_fd()).to_string();
    let mut child = start(&[
        "reader".to_owned(),
        std::process::id().to_string(),
        control.as_raw_fd().to_string(),
        fd(&cmb),
        host.as_raw_fd().to_string(),
        fd(&word),
        windows.control().memory().len().to_string(),
        hold.handle.index.to_string(),
        hold.handle.incarnation.to_string(),
    ])?;
    let wait = |home: u64| -> Fallible<()> {
        while word.u64_at(0)?.load(Ordering::Acquire) != home {
            std::hint::spin_loop();
        }
        Ok(())
    };
    let slots = Slots::new(ClientRegion::open(Arc::clone(region.memory()))?);
    let view = View { cmb: Some(Region::new(Arc::clone(&cmb), 0, RegionKind::Ordinary)), host: Vec::new() };
    let writing = WriteHandle { window: hold.handle, dirty_word: hold.dirty_word.unwrap_or(0) };
    let pages = windows.control().clone();
    let clock = Instant::now();
    let now = || clock.elapsed().as_nanos() as u64;
    let mut times = Vec::new();
    for _ in 0..=ROUNDS {
        wait(1)?;
        if dirty {
            let mut slot = slots.take().ok_or("no slot")?;
            let mut section = slot.write(&pages, writing, &view).map_err(|e| format!("{e:?}"))?;
            section.write(0, &[7; 64])?;
            let _ = section.finish();
        }
        let begun = Instant::now();
        let ticket = windows.revoke(&Scope::Window(hold.handle.index), &mut drive, now())?;
        wait(2)?;
        times.push(begun.elapsed().as_secs_f64() * 1e6);
        while !matches!(windows.progress(ticket), Some(Progress::Done(_))) {
            windows.poll(&mut drive, now());
        }
        if again {
            windows.promote(hold.handle.index, &mut drive, now());
        } else {
            let ticket = windows.evict(&Scope::Window(hold.handle.index), &mut drive, now())?;
            while !matches!(windows.progress(ticket), Some(Progress::Done(_))) {
                windows.poll(&mut drive, now());
            }
            windows.ensure(hold.handle.index, Want::Cmb, &mut drive, now())?;
        }
    }
    drop(windows);
    child.wait()?;
    // The very first one is a first one in either case.
    times.remove(0);
    Ok(times)
}

/// The lease holder: takes a read lease again and again, and gives it up when the kernel signals that somebody wants to write.
fn lease_holder(args: &[String]) -> Fallible<()> {
    let [pid, word, path] = args else { return Err("arguments".into()) };
    let word = Mapping::from_fd(borrowed_fd(pid, word, true)?, 0, PAGE, Access::ReadWrite)?;
    let held = word.u64_at(0)?;
    let file = File::open(path)?;
    let fd = file.as_raw_fd();
    // SAFETY: plain system calls on a descriptor and a signal set that are ours.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGIO);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        loop {
            if libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) == 0 {
                held.store(1, Ordering::Release);
                libc::sigwaitinfo(&raw const set, std::ptr::null_mut());
                libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK);
            } else {
                // The other one has it open still, and may need this very core to close it.
                libc::sched_yield();
            }
        }
    }
}

fn lease_breaks() -> Fallible<Vec<f64>> {
    let path = std::env::temp_dir().join(format!("cmbfs-lease-{}", std::process::id()));
    std::fs::write(&path, [0; PAGE])?;
    let path_text = path.to_string_lossy().into_owned();
    let word = Mapping::memfd("bench-word", PAGE)?;
    let fd = word.fd().map_or(-1, |(fd, _)| fd.as_raw_fd()).to_string();
    let mut child = start(&["lease".to_owned(), std::process::id().to_string(), fd, path_text])?;
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        while word.u64_at(0)?.swap(0, Ordering::AcqRel) == 0 {
            std::hint::spin_loop();
        }
        let begun = Instant::now();
        drop(File::options().write(true).open(&path)?);
        times.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    child.kill()?;
    child.wait()?;
    std::fs::remove_file(&path)?;
    Ok(times)
}

/// Seconds that this thread has run.
fn processor_time() -> f64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}

/// `count` windows of 4 KiB at once: the announcement, and until the last has moved.
fn many(count: usize) -> Fallible<()> {
    let cmb = Mapping::memfd("bench-cmb", count * PAGE)?;
    let mut drive = Pattern(Arc::clone(&cmb));
    let config = Config { slots: count as u32, settle: u64::MAX, ..Config::default() };
    let mut windows = Windows::new(Some(cmb_memory(&cmb)), config)?;
    windows.add_object(1, ObjectOptions { window_size: PAGE, ..ObjectOptions::default() })?;
    let (client, _region) = windows.attach()?;
    for n in 0..count {
        let hold = windows.hold(client, 1, (n * PAGE) as u64, false)?;
        windows.ensure(hold.handle.index, Want::Cmb, &mut drive, 0)?;
    }
    let (begun, worked) = (Instant::now(), processor_time());
    let ticket = windows.revoke(&Scope::Everything, &mut drive, 1)?;
    let announced = begun.elapsed();
    let mut polls = 0;
    while !matches!(windows.progress(ticket), Some(Progress::Done(_))) {
        windows.poll(&mut drive, 1);
        polls += 1;
    }
    let (done, worked) = (begun.elapsed(), processor_time() - worked);
    println!(
        "{count:>6} windows: announced in {:7.1} us, all moved in {:9.1} us ({:.2} us of processor per window, {polls} polls)",
        announced.as_secs_f64() * 1e6,
        done.as_secs_f64() * 1e6,
        worked * 1e6 / count as f64
    );
    Ok(())
}
