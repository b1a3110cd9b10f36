//! One file, every operation on it at random, against a byte string (after the idea of fsx). `CMBFS_SEED` reproduces a
//! run, `CMBFS_FSX_OPS` makes it longer.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]

mod common;

use common::ops::pattern;
use common::ram::RamDisk;
use common::{Dice, env};
use extent_fs::*;
use nvme_driver::disk::Disk;

const MAX: u64 = 300_000;

struct Fsx {
    fs: Filesystem<RamDisk>,
    ino: Ino,
    want: Vec<u8>,
    placement: u8,
    log: Vec<String>,
}

impl Fsx {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        let end = at + bytes.len();
        self.want.resize(self.want.len().max(end), 0);
        self.want[at..end].copy_from_slice(bytes);
    }

    fn verify(&mut self, at: usize, len: usize) {
        let mut got = vec![0xaa; len];
        let n = self.fs.read_at(self.ino, at as u64, &mut got).unwrap();
        let want = self.want.get(at..self.want.len().min(at + len)).unwrap_or_default();
        if got[..n] != *want {
            let bad = (0..n.min(want.len())).find(|&i| got[i] != want[i]);
            panic!(
                "byte {:?} of {at}+{len} differs, {n} bytes read\n{}",
                bad.map(|b| b + at),
                self.log.join("\n")
            );
        }
    }

    fn direct(&mut self, at: usize, bytes: &[u8]) {
        let first = at / 4096 * 4096;
        let end = (at + bytes.len()).next_multiple_of(4096);
        let size = self.want.len().max(at + bytes.len());
        self.put(at, bytes);
        let layout = self.fs.map_blocks(self.ino, at as u64, bytes.len() as u64, Access::Write).unwrap();
        let mut blocks = self.want[first..size.min(end)].to_vec();
        blocks.resize(end - first, 0xbb);
        for e in &layout.extents {
            let from = e.file_offset as usize - first;
            self.fs.disk_mut().write(e.lba, &blocks[from..from + e.bytes() as usize]).unwrap();
        }
        self.fs.commit_blocks(layout.lease, &layout.extents, Some((at + bytes.len()) as u64)).unwrap();
        self.fs.release(layout.lease).unwrap();
    }

    fn step(&mut self, dice: &mut Dice) {
        let at = dice.below(MAX) as usize;
        let len = match dice.below(3) {
            0 => 1 + dice.below(600),
            1 => 1 + dice.below(20_000),
            _ => 4096 * (1 + dice.below(8)),
        } as usize;
        let at = if dice.one_in(3) { at / 4096 * 4096 } else { at };
        let what = dice.below(13);
        self.log.push(format!("{what} {at} {len}"));
        let (at64, len64) = (at as u64, len as u64);
        match what {
            0..=3 => {
                let bytes = pattern(dice.next() >> 22, len);
                self.fs.write_at(self.ino, at64, &bytes).unwrap();
                self.put(at, &bytes);
            }
            4 => {
                self.fs.truncate(self.ino, at64).unwrap();
                self.want.resize(at, 0);
            }
            5 => {
                self.fs.fallocate(self.ino, at64, len64, Falloc::PunchHole).unwrap();
                let end = self.want.len().min(at + len);
                if at < end {
                    self.want[at..end].fill(0);
                }
            }
            6 => {
                self.fs.fallocate(self.ino, at64, len64, Falloc::Extend).unwrap();
                self.want.resize(self.want.len().max(at + len), 0);
            }
            7 => self.fs.fallocate(self.ino, at64, len64, Falloc::KeepSize).unwrap(),
            8 => {
                let bytes = pattern(dice.next() >> 22, len);
                self.direct(at, &bytes);
            }
            9 => self.fs.sync(self.ino).unwrap(),
            10 if dice.one_in(10) => self.fs.checkpoint_now().unwrap(),
            11 if dice.one_in(4) => {
                self.fs.sync_all().unwrap();
                let disk = self.fs.disk().clone();
                self.fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
            }
            12 => {
                self.placement = dice.below(u64::from(PLACEMENT_MAX) + 1) as u8;
                let set = SetAttr { placement: Some(self.placement), ..SetAttr::default() };
                self.fs.set_attr(self.ino, &set).unwrap();
            }
            _ => self.verify(at, len),
        }
        let stat = self.fs.stat(self.ino).unwrap();
        let want = (self.want.len() as u64, self.placement);
        assert_eq!((stat.size, stat.placement), want, "{}", self.log.join("\n"));
    }
}

#[test]
fn one_file_against_a_byte_string() {
    let seed = env("CMBFS_SEED", 1);
    println!("CMBFS_SEED={seed}");
    for lba in [512, 4096] {
        let mut dice = Dice::new(seed);
        let mut disk = RamDisk::with_lba(4 << 20, lba);
        format(&mut disk, &FormatOptions { log_bytes: Some(128 << 10), ..Default::default() }).unwrap();
        let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
        let ino = fs.create("/f", &NewInode::file()).unwrap();
        let mut fsx =
            Fsx { fs, ino, want: Vec::new(), placement: 0, log: vec![format!("CMBFS_SEED={seed}")] };
        for i in 0..env("CMBFS_FSX_OPS", 3000) {
            fsx.step(&mut dice);
            if i % 50 == 0 {
                fsx.verify(0, MAX as usize + 40_000);
                assert!(fsx.fs.verify().is_empty(), "{:?}\n{}", fsx.fs.verify(), fsx.log.join("\n"));
            }
        }
    }
}
