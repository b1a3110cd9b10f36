//! A file of four windows: made, and read from where it is.
#![allow(unreachable_pub, reason = "a room of two tests")]

use shm_api::client::{Client, File, Mapped, OpenMode};

use crate::WINDOW;

pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 4096 * 7) as u8).collect()
}

/// Makes one, committed.
pub fn four_windows(client: &Client, path: &str) -> File {
    let file = client.open(path, OpenMode::create()).unwrap();
    file.write_at(0, &pattern(4 * WINDOW)).unwrap();
    file.commit().unwrap();
    file
}

/// All of it mapped for reading.
pub fn map_four(file: &File) -> Mapped {
    file.map_read(0, 4 * WINDOW as u64).unwrap()
}

/// How many of the four windows are read from the CMB, all of them with the right bytes.
pub fn in_cmb(mapped: &Mapped) -> u64 {
    let mut got = vec![0; 4 * WINDOW];
    mapped.read(0, &mut got).unwrap();
    assert!(got == pattern(4 * WINDOW));
    mapped.paths().cmb_reads
}
