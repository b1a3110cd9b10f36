//! The file that the demo makes when it is given none, and checksums.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

/// Size of the file that the demo makes: a little more than 16 MiB, so that its last page is not full.
pub(super) const SAMPLE_BYTES: u64 = (16 << 20) + 1234;

/// Writes `bytes` bytes that are different from page to page and the same in every run.
pub(super) fn make(path: &Path, bytes: u64) -> io::Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    let mut written = 0;
    let mut line = String::new();
    while written < bytes {
        line.clear();
        // Writing to a String cannot fail.
        let _ = writeln!(line, "cmbfs demo, byte {written:>12}: {:016x}", mix(written));
        let n = (bytes - written).min(line.len() as u64);
        out.write_all(&line.as_bytes()[..n as usize])?;
        written += n;
    }
    out.flush()
}

/// SplitMix64's finaliser: cheap, and no two lines of the sample are alike.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// SHA-256, fed piece by piece.
pub(super) struct Checksum(Sha256);

impl Checksum {
    pub(super) fn new() -> Self {
        Self(Sha256::new())
    }

    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// As hexadecimal digits.
    pub(super) fn hex(self) -> String {
        self.0.finalize().iter().fold(String::with_capacity(64), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }
}
