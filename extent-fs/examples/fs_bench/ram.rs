//! A disk in memory, as large as one likes: only pieces that were written exist.

use std::collections::HashMap;

use nvme_driver::disk::{Disk, DiskError, Geometry};

const PIECE: usize = 1 << 20;

pub struct SparseRam {
    geometry: Geometry,
    pieces: HashMap<usize, Box<[u8]>>,
    /// Calls of `write`, and those of them for the first block.
    pub writes: u64,
    pub first_block: u64,
}

impl SparseRam {
    pub fn new(bytes: u64) -> Self {
        let geometry = Geometry {
            block_size: 512,
            blocks: bytes / 512,
            max_transfer: PIECE,
            volatile_cache: true,
            can_deallocate: false,
        };
        Self { geometry, pieces: HashMap::new(), writes: 0, first_block: 0 }
    }
}

/// What lies at `lba` in each piece: (piece, where in it, where in the transfer, how much).
fn parts(lba: u64, len: usize) -> impl Iterator<Item = (usize, usize, usize, usize)> {
    let start = lba as usize * 512;
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = start + done;
        let n = (len - done).min(PIECE - at % PIECE);
        done += n;
        (n > 0).then_some((at / PIECE, at % PIECE, done - n, n))
    })
}

impl Disk for SparseRam {
    fn name(&self) -> &str {
        "ram"
    }
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }
    fn read(&mut self, lba: u64, into: &mut [u8]) -> Result<(), DiskError> {
        for (piece, at, done, n) in parts(lba, into.len()) {
            match self.pieces.get(&piece) {
                Some(p) => into[done..done + n].copy_from_slice(&p[at..at + n]),
                None => into[done..done + n].fill(0),
            }
        }
        Ok(())
    }
    fn write(&mut self, lba: u64, from: &[u8]) -> Result<(), DiskError> {
        self.writes += 1;
        self.first_block += u64::from(lba == 0);
        for (piece, at, done, n) in parts(lba, from.len()) {
            let p = self.pieces.entry(piece).or_insert_with(|| vec![0; PIECE].into());
            p[at..at + n].copy_from_slice(&from[done..done + n]);
        }
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
