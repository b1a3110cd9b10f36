//! Time and memory per file, extent and free run as their number grows, on a sparse device of 16 TiB.

use std::hint::black_box;

use extent_fs::{BLOCK, Falloc, Filesystem, FormatOptions, Ino, Kind, MountOptions, NewInode, format};

use crate::measure::{cpu, cpu_each, memory};
use crate::most;
use crate::ram::SparseRam;

pub type Fs = Filesystem<SparseRam>;

fn sizes() -> impl Iterator<Item = u64> {
    let most = most();
    [1_000u64, 10_000, 100_000, 1_000_000].into_iter().filter(move |&n| n <= most)
}

pub fn mounted(disk: SparseRam) -> Fs {
    Filesystem::mount(disk, MountOptions::default()).unwrap()
}

pub fn fresh() -> Fs {
    let mut disk = SparseRam::new(16 << 40);
    format(&mut disk, &FormatOptions::default()).unwrap();
    mounted(disk)
}

pub fn name(i: u64) -> Vec<u8> {
    format!("file-{i}").into_bytes()
}

/// Any of `n`, another for each `i`, in no order.
fn any(i: u64, n: u64) -> u64 {
    i.wrapping_mul(7_919) % n
}

/// A file of one block in `dir`.
pub fn small_file(fs: &mut Fs, dir: Ino, name: &[u8]) {
    let f = fs.create_at(dir, name, Kind::File, &NewInode::file()).unwrap();
    fs.fallocate(f, 0, BLOCK, Falloc::Extend).unwrap();
}

pub fn folders(fs: &mut Fs, files: u64) -> Vec<Ino> {
    let n = (files / 1000).max(1);
    (0..n).map(|d| fs.mkdir(format!("/{d}"), &NewInode::directory()).unwrap()).collect()
}

/// Makes `n` blocks of a file extents of their own: every other block of it.
pub fn comb(fs: &mut Fs, n: u64) -> Ino {
    let f = fs.create("/comb", &NewInode::file()).unwrap();
    for i in 0..n {
        fs.fallocate(f, i * 2 * BLOCK, BLOCK, Falloc::Extend).unwrap();
    }
    fs.sync_all().unwrap();
    f
}

/// Unmounts and mounts: milliseconds of the mount, and bytes of memory that the mounted filesystem takes.
fn mount_again(mut fs: Fs) -> (Fs, f64, u64) {
    fs.checkpoint_now().unwrap();
    let disk = fs.unmount().unwrap();
    let (before, begun) = (memory(), cpu());
    let fs = mounted(disk);
    ((fs), (cpu() - begun).as_secs_f64() * 1e3, memory().saturating_sub(before))
}

fn files() {
    println!("     files  create ns  lookup ns  append ns  rename ns  unlink ns  mount ms  bytes/file");
    for n in sizes() {
        let mut fs = fresh();
        let dirs = folders(&mut fs, n);
        let dir = |i: u64| dirs[(i % dirs.len() as u64) as usize];
        let create = cpu_each(n, |i| small_file(&mut fs, dir(i), &name(i)));
        let (mut fs, mount, bytes) = mount_again(fs);
        let lookup = cpu_each(n, |i| {
            let i = any(i, n);
            black_box(fs.lookup_at(dir(i), &name(i)).unwrap());
        });
        let some = n.min(100_000);
        let append = cpu_each(some, |i| {
            let i = any(i, n);
            let f = fs.lookup_at(dir(i), &name(i)).unwrap();
            fs.fallocate(f, BLOCK, BLOCK, Falloc::Extend).unwrap();
        });
        let other = |i| [&name(i)[..], b"-"].concat();
        let rename = cpu_each(some, |i| {
            let i = any(i, n);
            fs.rename_at(dir(i), &name(i), dir(i), &other(i)).unwrap();
        });
        let unlink = cpu_each(some, |i| {
            let i = any(i, n);
            fs.unlink_at(dir(i), &other(i)).unwrap();
        });
        println!(
            "{n:>10} {create:>10.0} {lookup:>10.0} {append:>10.0} {rename:>10.0} {unlink:>10.0} {mount:>9.1} {:>11}",
            bytes / n
        );
    }
}

fn extents() {
    println!("\n   extents  append ns   find ns  split ns   free ns  mount ms  bytes/extent   (one file)");
    for n in sizes() {
        let mut fs = fresh();
        let begun = cpu();
        let f = comb(&mut fs, n);
        let append = (cpu() - begun).as_nanos() as f64 / n as f64;
        let (mut fs, mount, bytes) = mount_again(fs);
        let find = cpu_each(n, |i| {
            black_box(fs.query_blocks(f, any(i, n) * 2 * BLOCK, BLOCK).unwrap());
        });
        let some = n.min(100_000);
        // Into the holes between them, each an extent of its own again: their blocks lie elsewhere.
        let split = cpu_each(some, |i| {
            fs.fallocate(f, (any(i, n) * 2 + 1) * BLOCK, BLOCK, Falloc::KeepSize).unwrap();
        });
        let free = cpu_each(some, |i| {
            fs.fallocate(f, any(i, n) * 2 * BLOCK, BLOCK, Falloc::PunchHole).unwrap();
        });
        println!(
            "{n:>10} {append:>10.0} {find:>9.0} {split:>9.0} {free:>9.0} {mount:>9.1} {:>13}",
            bytes / n
        );
    }
}

fn free_runs() {
    println!("\n free runs  allocate ns   free ns  mount ms  bytes/run   (free space in single blocks)");
    for n in sizes() {
        let mut fs = fresh();
        let f = fs.create("/f", &NewInode::file()).unwrap();
        fs.fallocate(f, 0, 2 * n * BLOCK, Falloc::Extend).unwrap();
        let before = memory();
        for i in 0..n {
            fs.fallocate(f, i * 2 * BLOCK, BLOCK, Falloc::PunchHole).unwrap();
        }
        fs.sync_all().unwrap();
        let bytes = memory().saturating_sub(before) / n;
        let (mut fs, mount, _) = mount_again(fs);
        let some = n.min(100_000);
        let allocate = cpu_each(some, |i| {
            fs.fallocate(f, any(i, n) * 2 * BLOCK, BLOCK, Falloc::KeepSize).unwrap();
        });
        let free = cpu_each(some, |i| {
            fs.fallocate(f, any(i, n) * 2 * BLOCK, BLOCK, Falloc::PunchHole).unwrap();
        });
        println!("{n:>10} {allocate:>12.0} {free:>9.0} {mount:>9.1} {bytes:>10}");
    }
}

pub fn run() {
    files();
    extents();
    free_runs();
}
