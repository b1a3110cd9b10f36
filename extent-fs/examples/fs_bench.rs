//! Measures the filesystem; `benches/fs_vs_kernel` compares it with ext4 and xfs by means of this program.
//!
//! ```text
//! fs_bench scale                     files and extents from 10^3 to 10^6: time per operation, mount, memory
//! fs_bench read                      4 KiB reads and writes through the filesystem and raw, on a RAM disk
//! fs_bench sync-loop FILE SECONDS    create + write 4 KiB + fsync, rename, unlink, on an image in FILE: loops per second
//! fs_bench kernel-loop DIR SECONDS   the same through the kernel's filesystem that DIR is on
//! ```
#![expect(unsafe_code, reason = "a global allocator that counts")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a benchmark that fails has nothing to say")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use extent_fs::{BLOCK, Falloc, Filesystem, FormatOptions, MountOptions, NewInode, ROOT, format};
use nvme_driver::disk::{Disk, DiskError, Geometry};
use nvme_driver::file_disk::FileDisk;

/// A disk in memory of which only pieces that were written exist.
struct SparseRam {
    geometry: Geometry,
    pieces: Vec<Option<Box<[u8]>>>,
}

const PIECE: usize = 1 << 20;

impl SparseRam {
    fn new(bytes: u64) -> Self {
        let geometry = Geometry {
            block_size: 512,
            blocks: bytes / 512,
            max_transfer: PIECE,
            volatile_cache: true,
            can_deallocate: false,
        };
        Self { geometry, pieces: (0..bytes / PIECE as u64).map(|_| None).collect() }
    }

    fn each(&mut self, lba: u64, len: usize, mut f: impl FnMut(&mut Option<Box<[u8]>>, usize, usize, usize)) {
        let mut at = lba as usize * 512;
        let mut done = 0;
        while done < len {
            let n = (len - done).min(PIECE - at % PIECE);
            f(&mut self.pieces[at / PIECE], at % PIECE, done, n);
            at += n;
            done += n;
        }
    }
}

impl Disk for SparseRam {
    fn name(&self) -> &str {
        "ram"
    }
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }
    fn read(&mut self, lba: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.each(lba, into.len(), |piece, at, done, n| match piece {
            Some(p) => into[done..done + n].copy_from_slice(&p[at..at + n]),
            None => into[done..done + n].fill(0),
        });
        Ok(())
    }
    fn write(&mut self, lba: u64, from: &[u8]) -> Result<(), DiskError> {
        self.each(lba, from.len(), |piece, at, done, n| {
            let p = piece.get_or_insert_with(|| vec![0; PIECE].into());
            p[at..at + n].copy_from_slice(&from[done..done + n]);
        });
        Ok(())
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
    fn write_zeroes(&mut self, lba: u64, blocks: u64) -> Result<(), DiskError> {
        self.write(lba, &vec![0; blocks as usize * 512])
    }
    fn deallocate(&mut self, _lba: u64, _blocks: u64) -> Result<(), DiskError> {
        Ok(())
    }
}

/// The system's allocator, counting what is in use.
struct Counting;

static IN_USE: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: as our caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: as our caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Bytes allocated now, without what the allocator itself adds.
fn memory() -> u64 {
    IN_USE.load(Ordering::Relaxed)
}

fn per(time: Duration, n: u64) -> f64 {
    time.as_nanos() as f64 / n as f64
}

fn mounted(disk: SparseRam) -> Filesystem<SparseRam> {
    Filesystem::mount(disk, MountOptions::default()).unwrap()
}

/// Processor time of this thread so far: what others do on the machine does not count.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap())
}

fn sizes() -> impl Iterator<Item = u64> {
    let most = std::env::var("FS_BENCH_MOST").map_or(1_000_000, |v| v.parse().unwrap());
    [1_000u64, 10_000, 100_000, 1_000_000].into_iter().filter(move |&n| n <= most)
}

fn scale() {
    println!("     files  create ns  lookup ns  append ns  unlink ns  mount ms  bytes/file");
    for n in sizes() {
        let mut disk = SparseRam::new(16 << 40);
        format(&mut disk, &FormatOptions::default()).unwrap();
        let mut fs = mounted(disk);
        let dirs = (n / 1000).max(1);
        let dirs: Vec<_> =
            (0..dirs).map(|d| fs.mkdir(format!("/{d}"), &NewInode::directory()).unwrap()).collect();
        let name = |i: u64| format!("file-{i}").into_bytes();
        let dir = |i: u64| dirs[(i % dirs.len() as u64) as usize];
        let begun = cpu();
        for i in 0..n {
            let f = fs.create_at(dir(i), &name(i), extent_fs::Kind::File, &NewInode::file()).unwrap();
            fs.fallocate(f, 0, 4096, Falloc::Extend).unwrap();
        }
        fs.sync_all().unwrap();
        let create = per(cpu() - begun, n);
        fs.checkpoint_now().unwrap();
        let disk = fs.unmount().unwrap();
        let before = memory();
        let begun = cpu();
        let mut fs = mounted(disk);
        let mount = (cpu() - begun).as_secs_f64() * 1e3;
        let bytes = memory().saturating_sub(before) / n;
        let begun = cpu();
        for i in 0..n {
            let i = i.wrapping_mul(7_919) % n;
            black_box(fs.lookup_at(dir(i), &name(i)).unwrap());
        }
        let lookup = per(cpu() - begun, n);
        let some = n.min(100_000);
        let begun = cpu();
        for i in 0..some {
            let f = fs.lookup_at(dir(i), &name(i)).unwrap();
            fs.fallocate(f, 4096, 4096, Falloc::Extend).unwrap();
        }
        fs.sync_all().unwrap();
        let append = per(cpu() - begun, some);
        let begun = cpu();
        for i in 0..some {
            fs.unlink_at(dir(i), &name(i)).unwrap();
        }
        fs.sync_all().unwrap();
        let unlink = per(cpu() - begun, some);
        println!(
            "{n:>10} {create:>10.0} {lookup:>10.0} {append:>10.0} {unlink:>10.0} {mount:>9.1} {bytes:>11}"
        );
    }
    println!("\n   extents    add ns   find ns   free ns  mount ms  bytes/extent   (one file)");
    for n in sizes() {
        let mut disk = SparseRam::new(16 << 40);
        format(&mut disk, &FormatOptions::default()).unwrap();
        let mut fs = mounted(disk);
        let f = fs.create("/f", &NewInode::file()).unwrap();
        let begun = cpu();
        for i in 0..n {
            fs.fallocate(f, i * 2 * BLOCK, BLOCK, Falloc::Extend).unwrap();
        }
        fs.sync_all().unwrap();
        let add = per(cpu() - begun, n);
        let begun = cpu();
        for i in 0..n {
            let at = i.wrapping_mul(7_919) % n * 2 * BLOCK;
            black_box(fs.query_blocks(f, at, BLOCK).unwrap());
        }
        let find = per(cpu() - begun, n);
        fs.checkpoint_now().unwrap();
        let disk = fs.unmount().unwrap();
        let before = memory();
        let begun = cpu();
        let mut fs = mounted(disk);
        let mount = (cpu() - begun).as_secs_f64() * 1e3;
        let bytes = memory().saturating_sub(before) / n;
        let some = n.min(100_000);
        let begun = cpu();
        for i in 0..some {
            // Every second one, so that the free space is in as many pieces.
            fs.fallocate(f, i * 4 % (n * 2) * BLOCK, BLOCK, Falloc::PunchHole).unwrap();
        }
        fs.sync_all().unwrap();
        let free = per(cpu() - begun, some);
        println!("{n:>10} {add:>9.0} {find:>9.0} {free:>9.0} {mount:>9.1} {bytes:>13}");
    }
}

fn read() {
    const SIZE: u64 = 64 << 20;
    let mut disk = SparseRam::new(1 << 30);
    format(&mut disk, &FormatOptions::default()).unwrap();
    let mut fs = mounted(disk);
    let f = fs.create("/f", &NewInode::file()).unwrap();
    let mib = vec![7; 1 << 20];
    for i in 0..SIZE >> 20 {
        fs.write_at(f, i << 20, &mib).unwrap();
    }
    fs.sync_all().unwrap();
    let lba = fs.query_blocks(f, 0, SIZE).unwrap()[0].lba;
    println!("                 raw ns    fs ns   ratio  (medians of 15 interleaved pairs)");
    for (name, len, write) in [
        ("read 4 KiB", 4096, false),
        ("write 4 KiB", 4096, true),
        ("read 1 MiB", 1 << 20, false),
        ("write 1 MiB", 1 << 20, true),
    ] {
        let n = (128u64 << 20) / len as u64 * if len == 4096 { 4 } else { 1 };
        let mut buffer = vec![1; len];
        let (mut raw, mut ours) = (Vec::new(), Vec::new());
        for _ in 0..15 {
            let place = |i: u64| i.wrapping_mul(7_919) % (SIZE / len as u64) * len as u64;
            let begun = Instant::now();
            for i in 0..n {
                let at = lba + place(i) / 512;
                if write { fs.disk_mut().write(at, &buffer) } else { fs.disk_mut().read(at, &mut buffer) }
                    .unwrap();
            }
            raw.push(per(begun.elapsed(), n));
            let begun = Instant::now();
            for i in 0..n {
                if write {
                    fs.write_at(f, place(i), &buffer).unwrap();
                } else {
                    black_box(fs.read_at(f, place(i), &mut buffer).unwrap());
                }
            }
            ours.push(per(begun.elapsed(), n));
        }
        let (raw, ours) = (median(raw), median(ours));
        println!("{name:>12} {raw:>10.0} {ours:>8.0} {:>7.3}", ours / raw);
    }
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

fn rate(seconds: f64, mut once: impl FnMut(u64)) -> f64 {
    let begun = Instant::now();
    let mut n = 0;
    while begun.elapsed().as_secs_f64() < seconds {
        once(n);
        n += 1;
    }
    n as f64 / begun.elapsed().as_secs_f64()
}

fn sync_loop(image: &Path, seconds: f64) {
    std::fs::File::create(image).unwrap().set_len(1 << 30).unwrap();
    let mut disk = FileDisk::open(image).unwrap();
    format(&mut disk, &FormatOptions::default()).unwrap();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    let data = [7; 4096];
    let name = |i: u64| format!("f{}", i % 1000).into_bytes();
    let file = |fs: &mut Filesystem<FileDisk>, i: u64| {
        let _ = fs.unlink_at(ROOT, &name(i));
        let f = fs.create_at(ROOT, &name(i), extent_fs::Kind::File, &NewInode::file()).unwrap();
        fs.write_at(f, 0, &data).unwrap();
        fs.sync(f).unwrap();
    };
    let create = rate(seconds, |i| file(&mut fs, i));
    for i in 0..1000 {
        file(&mut fs, i);
    }
    let rename = rate(seconds, |i| {
        fs.rename_at(ROOT, &name(i), ROOT, b"other").unwrap();
        fs.rename_at(ROOT, b"other", ROOT, &name(i)).unwrap();
        fs.sync_all().unwrap();
    });
    let unlink = rate(seconds, |i| {
        fs.unlink_at(ROOT, &name(i)).unwrap();
        fs.create_at(ROOT, &name(i), extent_fs::Kind::File, &NewInode::file()).unwrap();
        fs.sync_all().unwrap();
    });
    println!("{create:.0} {rename:.0} {unlink:.0}");
    fs.unmount().unwrap();
}

fn kernel_loop(dir: &Path, seconds: f64) {
    let data = [7; 4096];
    let folder = std::fs::File::open(dir).unwrap();
    let name = |i: u64| dir.join(format!("f{}", i % 1000));
    let other = dir.join("other");
    let file = |i: u64| {
        let _ = std::fs::remove_file(name(i));
        let mut f = std::fs::File::create(name(i)).unwrap();
        f.write_all(&data).unwrap();
        f.sync_all().unwrap();
    };
    let create = rate(seconds, file);
    for i in 0..1000 {
        file(i);
    }
    let rename = rate(seconds, |i| {
        std::fs::rename(name(i), &other).unwrap();
        std::fs::rename(&other, name(i)).unwrap();
        folder.sync_all().unwrap();
    });
    let unlink = rate(seconds, |i| {
        std::fs::remove_file(name(i)).unwrap();
        std::fs::File::create(name(i)).unwrap().write_at(b"", 0).unwrap();
        folder.sync_all().unwrap();
    });
    println!("{create:.0} {rename:.0} {unlink:.0}");
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["scale"] => scale(),
        ["read"] => read(),
        ["sync-loop", file, seconds] => sync_loop(Path::new(file), seconds.parse().unwrap()),
        ["kernel-loop", dir, seconds] => kernel_loop(Path::new(dir), seconds.parse().unwrap()),
        _ => panic!("fs_bench scale | read | sync-loop FILE SECONDS | kernel-loop DIR SECONDS"),
    }
}
