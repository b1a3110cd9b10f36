//! One change, one sync, one thread: ours and the kernel's, in the same loop.
//!
//! What each step asks to be durable before the next one begins:
//! * create: the file's 4 KiB, its size and its name (kernel: fsync of the new file, which ext4 and xfs make cover its name)
//! * rename, unlink: the change of the folder (kernel: fsync of the folder)

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use extent_fs::{Filesystem, FormatOptions, Ino, Kind, MountOptions, NewInode, format, probe};
use nvme_driver::file_disk::FileDisk;

use crate::measure::median;

/// Files in the folder at most.
const FILES: u64 = 200;
const DATA: [u8; 4096] = [7; 4096];

trait Target {
    fn create(&mut self, i: u64);
    fn rename(&mut self, i: u64);
    fn unlink(&mut self, i: u64);
}

/// Creates, renames and removes files until `seconds` have passed three times; prints how many of each in a second, and how
/// many it were if all took as long as the median one: what others do to the disk meanwhile is not in that.
fn drive(target: &mut impl Target, seconds: f64) {
    let mut times: [Vec<f64>; 3] = Default::default();
    let begun = Instant::now();
    while begun.elapsed().as_secs_f64() < 3.0 * seconds {
        for (step, times) in times.iter_mut().enumerate() {
            for i in 0..FILES {
                let begun = Instant::now();
                match step {
                    0 => target.create(i),
                    1 => target.rename(i),
                    _ => target.unlink(i),
                }
                times.push(begun.elapsed().as_secs_f64());
            }
        }
    }
    for each in [|t: &Vec<f64>| t.iter().sum::<f64>() / t.len() as f64, |t: &Vec<f64>| median(t.clone())] {
        print!("{} ", times.each_ref().map(|t| format!("{:.0}", 1.0 / each(t))).join(" "));
    }
    println!();
}

struct Ours {
    fs: Filesystem<FileDisk>,
    dir: Ino,
    names: Vec<[Vec<u8>; 2]>,
}

impl Target for Ours {
    fn create(&mut self, i: u64) {
        let [name, _] = &self.names[i as usize];
        let file = self.fs.create_at(self.dir, name, Kind::File, &NewInode::file()).unwrap();
        self.fs.write_at(file, 0, &DATA).unwrap();
        self.fs.sync(file).unwrap();
    }
    fn rename(&mut self, i: u64) {
        let [old, new] = &self.names[i as usize];
        self.fs.rename_at(self.dir, old, self.dir, new).unwrap();
        self.fs.sync(self.dir).unwrap();
    }
    fn unlink(&mut self, i: u64) {
        let [_, name] = &self.names[i as usize];
        self.fs.unlink_at(self.dir, name).unwrap();
        self.fs.sync(self.dir).unwrap();
    }
}

/// On the image in `image`, which is formatted if it is not yet.
pub fn ours(image: &Path, seconds: f64) {
    let mut disk = FileDisk::open(image).unwrap();
    if !probe(&mut disk).unwrap() {
        format(&mut disk, &FormatOptions::default()).unwrap();
    }
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    let dir = fs.lookup("/d").or_else(|_| fs.mkdir("/d", &NewInode::directory())).unwrap();
    fs.sync_all().unwrap();
    let names = (0..FILES).map(|i| [format!("f{i}"), format!("g{i}")].map(String::into_bytes)).collect();
    let mut ours = Ours { fs, dir, names };
    drive(&mut ours, seconds);
    ours.fs.unmount().unwrap();
}

struct Kernel {
    folder: File,
    names: Vec<[PathBuf; 2]>,
}

impl Target for Kernel {
    fn create(&mut self, i: u64) {
        let [name, _] = &self.names[i as usize];
        let mut file = File::create_new(name).unwrap();
        file.write_all(&DATA).unwrap();
        file.sync_all().unwrap();
    }
    fn rename(&mut self, i: u64) {
        let [old, new] = &self.names[i as usize];
        std::fs::rename(old, new).unwrap();
        self.folder.sync_all().unwrap();
    }
    fn unlink(&mut self, i: u64) {
        let [_, name] = &self.names[i as usize];
        std::fs::remove_file(name).unwrap();
        self.folder.sync_all().unwrap();
    }
}

/// In a folder `d` of `dir`.
pub fn kernel(dir: &Path, seconds: f64) {
    let dir = dir.join("d");
    std::fs::create_dir_all(&dir).unwrap();
    let folder = File::open(&dir).unwrap();
    folder.sync_all().unwrap();
    let names = (0..FILES).map(|i| [dir.join(format!("f{i}")), dir.join(format!("g{i}"))]).collect();
    drive(&mut Kernel { folder, names }, seconds);
}
