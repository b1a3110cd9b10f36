//! The 4 KiB path, for callgrind: the same block again and again, through the filesystem and raw.

use std::hint::black_box;

use extent_fs::{Filesystem, FormatOptions, Ino, MountOptions, NewInode, format};
use nvme_driver::disk::Disk;

use crate::ram::SparseRam;

/// How often each is called.
const N: u64 = 10_000;
const SIZE: u64 = 16 << 20;

type Fs = Filesystem<SparseRam>;

fn at(i: u64) -> u64 {
    i.wrapping_mul(7_919) % (SIZE / 4096) * 4096
}

#[inline(never)]
fn counted_raw_read(fs: &mut Fs, lba: u64, buffer: &mut [u8]) {
    for i in 0..N {
        fs.disk_mut().read(lba + at(i) / 512, black_box(&mut *buffer)).unwrap();
    }
}

#[inline(never)]
fn counted_raw_write(fs: &mut Fs, lba: u64, buffer: &[u8]) {
    for i in 0..N {
        fs.disk_mut().write(lba + at(i) / 512, black_box(buffer)).unwrap();
    }
}

#[inline(never)]
fn counted_fs_read(fs: &mut Fs, file: Ino, buffer: &mut [u8]) {
    for i in 0..N {
        fs.read_at(file, at(i), black_box(&mut *buffer)).unwrap();
    }
}

#[inline(never)]
fn counted_fs_write(fs: &mut Fs, file: Ino, buffer: &[u8]) {
    for i in 0..N {
        fs.write_at(file, at(i), black_box(buffer)).unwrap();
    }
}

#[inline(never)]
fn counted_rename(fs: &mut Fs, dir: Ino, old: &[u8], new: &[u8]) {
    fs.rename_at(dir, old, dir, new).unwrap();
    fs.sync_all().unwrap();
}

#[inline(never)]
fn counted_unlink(fs: &mut Fs, dir: Ino, name: &[u8]) {
    fs.unlink_at(dir, name).unwrap();
    fs.sync_all().unwrap();
}

#[inline(never)]
fn counted_create(fs: &mut Fs, dir: Ino, name: &[u8], data: &[u8]) {
    let f = fs.create_at(dir, name, extent_fs::Kind::File, &NewInode::file()).unwrap();
    fs.write_at(f, 0, data).unwrap();
    fs.sync_all().unwrap();
}

pub fn run() {
    let mut disk = SparseRam::new(1 << 30);
    format(&mut disk, &FormatOptions::default()).unwrap();
    // A clock of its own: what the system's costs is the system's.
    let options = MountOptions { clock: Box::new(|| 1), ..MountOptions::default() };
    let mut fs = Filesystem::mount(disk, options).unwrap();
    let file = fs.create("/f", &NewInode::file()).unwrap();
    let mut buffer = vec![7; SIZE as usize];
    fs.write_at(file, 0, &buffer).unwrap();
    // Others, so that the file is not found at once.
    for i in 0..1000 {
        let other = fs.create(format!("/other-{i}"), &NewInode::file()).unwrap();
        fs.write_at(other, 0, &buffer[..4096]).unwrap();
    }
    fs.sync_all().unwrap();
    fs.checkpoint_now().unwrap();
    let lba = fs.query_blocks(file, 0, SIZE).unwrap()[0].lba;
    let buffer = &mut buffer[..4096];
    counted_raw_read(&mut fs, lba, buffer);
    counted_raw_write(&mut fs, lba, buffer);
    counted_fs_read(&mut fs, file, buffer);
    counted_fs_write(&mut fs, file, buffer);
    let dir = fs.mkdir("/d", &NewInode::directory()).unwrap();
    for _ in 0..N / 200 {
        for i in 0..200 {
            counted_create(&mut fs, dir, format!("f{i}").as_bytes(), buffer);
        }
        for i in 0..200 {
            counted_rename(&mut fs, dir, format!("f{i}").as_bytes(), format!("g{i}").as_bytes());
        }
        for i in 0..200 {
            counted_unlink(&mut fs, dir, format!("g{i}").as_bytes());
        }
    }
}
