//! Reads and writes through the filesystem against the raw driver on the same device, the same blocks, in turns.

use std::hint::black_box;
use std::time::Instant;

use extent_fs::{Filesystem, FormatOptions, Ino, MountOptions, NewInode, format};
use nvme_driver::disk::Disk;
use nvme_driver::{OpenOptions, open};

use crate::measure::{median, percentile};

const SIZE: u64 = 64 << 20;
/// Pairs of slices, one of each kind: at most, and at least even when that takes longer than `SECONDS`.
const PAIRS: std::ops::Range<usize> = 15..301;
/// Seconds for one row of the table.
const SECONDS: f64 = 4.0;
/// Seconds that one slice takes, about: so short that most are not interrupted by others on the machine.
const SLICE: f64 = 0.002;

struct Bench<D: Disk> {
    fs: Filesystem<D>,
    file: Ino,
    /// Where the file's only extent is.
    lba: u64,
    lba_size: u64,
    buffer: Vec<u8>,
}

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    len: usize,
    write: bool,
    random: bool,
}

impl<D: Disk> Bench<D> {
    fn once(&mut self, case: &Case, raw: bool, i: u64) {
        let places = SIZE / case.len as u64;
        let at = (if case.random { i.wrapping_mul(7_919) } else { i }) % places * case.len as u64;
        let buffer = &mut self.buffer[..case.len];
        let lba = self.lba + at / self.lba_size;
        match (raw, case.write) {
            (true, false) => self.fs.disk_mut().read(lba, buffer).unwrap(),
            (true, true) => self.fs.disk_mut().write(lba, buffer).unwrap(),
            (false, false) => assert_eq!(self.fs.read_at(self.file, at, buffer).unwrap(), buffer.len()),
            (false, true) => self.fs.write_at(self.file, at, buffer).unwrap(),
        }
        black_box(&self.buffer);
    }

    /// Nanoseconds for each of `n`.
    fn slice(&mut self, case: &Case, raw: bool, from: u64, n: u64) -> f64 {
        let begun = Instant::now();
        for i in from..from + n {
            self.once(case, raw, i);
        }
        begun.elapsed().as_nanos() as f64 / n as f64
    }
}

/// On the device that `url` names; what is there is lost.
pub fn run(url: &str) {
    let device = open(&url.parse().unwrap(), &OpenOptions::default()).unwrap();
    // A drive works while its driver waits; it is not the caller who does the drive's work.
    let _thread = device.emulated().map(|e| e.spawn(None).unwrap());
    let mut disk = device.disk().unwrap();
    format(&mut disk, &FormatOptions::default()).unwrap();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    let file = fs.create("/f", &NewInode::file()).unwrap();
    let mib = vec![7; 1 << 20];
    for at in (0..SIZE).step_by(mib.len()) {
        fs.write_at(file, at, &mib).unwrap();
    }
    fs.sync_all().unwrap();
    fs.sync_all().unwrap();
    let extents = fs.query_blocks(file, 0, SIZE).unwrap();
    assert_eq!(extents.len(), 1, "a fresh device has room for the file in one piece");
    let lba_size = u64::from(fs.disk().geometry().block_size);
    let mut bench = Bench { fs, file, lba: extents[0].lba, lba_size, buffer: mib };
    println!("{url}");
    println!("{:24}{:^31}{:^31}", "", "median", "fastest tenth: nobody in between");
    let columns = format!("{:>11}{:>11}{:>9}", "raw ns", "fs ns", "ratio");
    println!("{:24}{columns}{columns}{:>8}", "", "pairs");
    let case = |name, len, write, random| Case { name, len, write, random };
    for case in [
        case("sequential read 4 KiB", 4096, false, false),
        case("random read 4 KiB", 4096, false, true),
        case("sequential write 4 KiB", 4096, true, false),
        case("random write 4 KiB", 4096, true, true),
        case("sequential read 1 MiB", 1 << 20, false, false),
        case("random read 1 MiB", 1 << 20, false, true),
        case("sequential write 1 MiB", 1 << 20, true, false),
        case("random write 1 MiB", 1 << 20, true, true),
    ] {
        let n = (SLICE * 1e9 / bench.slice(&case, true, 0, 32)).clamp(2.0, 1e6) as u64;
        let (mut raws, mut ours, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        let begun = Instant::now();
        for pair in 0..PAIRS.end as u64 {
            if ratios.len() >= PAIRS.start && begun.elapsed().as_secs_f64() > SECONDS {
                break;
            }
            // Who begins alternates, so that neither always finds the caches as the other left them.
            let first = pair % 2 == 0;
            let a = bench.slice(&case, first, pair * n, n);
            let b = bench.slice(&case, !first, pair * n, n);
            let (raw, fs) = if first { (a, b) } else { (b, a) };
            raws.push(raw);
            ours.push(fs);
            ratios.push(fs / raw);
        }
        let (pairs, ratio) = (ratios.len(), median(ratios));
        for v in [&mut raws, &mut ours] {
            v.sort_by(f64::total_cmp);
        }
        let at = |percent| (percentile(&raws, percent), percentile(&ours, percent));
        let ((raw, fs), (best_raw, best_fs)) = (at(50.0), at(10.0));
        print!("{:24}{raw:>11.0}{fs:>11.0}{ratio:>9.3}", case.name);
        println!("{best_raw:>11.0}{best_fs:>11.0}{:>9.3}{pairs:>8}", best_fs / best_raw);
    }
}
