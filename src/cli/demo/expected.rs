//! The bytes that must be there: the original's, and after the demo's write what that changed.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::sample::Checksum;
use crate::cli::failure::Failure;

/// An original file, with pieces of it written over.
pub(super) struct Expected<'a> {
    pub(super) original: &'a File,
    pub(super) size: u64,
    /// Where, and the new bytes.
    pub(super) changes: Vec<(u64, Vec<u8>)>,
}

impl Expected<'_> {
    /// The bytes from `at` on.
    pub(super) fn read(&self, at: u64, into: &mut [u8]) -> Result<(), Failure> {
        let mut filled = 0;
        while filled < into.len() {
            match self.original.read_at(&mut into[filled..], at + filled as u64)? {
                0 => break,
                n => filled += n,
            }
        }
        into[filled..].fill(0);
        let end = at + into.len() as u64;
        for (start, bytes) in &self.changes {
            let (from, to) = (at.max(*start), end.min(start + bytes.len() as u64));
            if from < to {
                let piece = &bytes[(from - start) as usize..(to - start) as usize];
                into[(from - at) as usize..(to - at) as usize].copy_from_slice(piece);
            }
        }
        Ok(())
    }

    /// Its checksum.
    pub(super) fn checksum(&self) -> Result<String, Failure> {
        let mut sum = Checksum::new();
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        while at < self.size {
            let n = (self.size - at).min(buffer.len() as u64) as usize;
            self.read(at, &mut buffer[..n])?;
            sum.add(&buffer[..n]);
            at += n as u64;
        }
        Ok(sum.hex())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_lie_over_the_original_and_behind_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"0123456789").unwrap();
        let original = File::open(&path).unwrap();
        let changes = vec![(2, b"ab".to_vec()), (10, b"xyz".to_vec())];
        let expected = Expected { original: &original, size: 13, changes };
        let mut all = [0; 13];
        expected.read(0, &mut all).unwrap();
        assert_eq!(&all, b"01ab456789xyz");
        let mut part = [0; 9];
        expected.read(3, &mut part).unwrap();
        assert_eq!(&part, b"b456789xy");
    }
}
