//! What one process did, in a file that outlives it: an entry before an operation, its end afterwards.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nvme_driver::mem::{Access, Mapping};

/// Objects, windows of each, and places in each window.
pub const OBJECTS: usize = 5;
pub const WINDOWS: usize = 3;
pub const PLACES: usize = 6;
pub const WINDOW: usize = 16 * 1024;
pub const LOCATIONS: usize = OBJECTS * WINDOWS * PLACES;
/// Words of a record.
pub const WORDS: usize = 8;
pub const RECORD: usize = WORDS * 8;

const ENTRY: usize = 96;
const ENTRIES: usize = 150_000;
const FIRST: usize = 4096;

/// What clocks of two processors may be apart, and what a processor does ahead of reading its own, in nanoseconds.
const MARGIN: u64 = 200;

/// Nanoseconds of the clock that all processes share.
pub fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A place for one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location(pub usize);

impl Location {
    pub fn object(self) -> usize {
        self.0 / (WINDOWS * PLACES)
    }

    /// Where its window begins in the object.
    pub fn window(self) -> usize {
        self.0 / PLACES % WINDOWS * WINDOW
    }

    /// Where it is in its window: some share a page.
    pub fn within(self) -> usize {
        [0, 64, 4032, 4096, 9984, 16320][self.0 % PLACES]
    }
}

/// One word of a record that was stamped: different for each write, place and word.
pub fn word(stamp: u64, at: Location, index: usize) -> u64 {
    stamp << 16 | (at.0 as u64) << 3 | index as u64
}

pub fn record(stamp: u64, at: Location) -> [u8; RECORD] {
    let mut bytes = [0; RECORD];
    for (index, bytes) in bytes.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&word(stamp, at, index).to_le_bytes());
    }
    bytes
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Write = 1,
    Read,
    /// A commit of an object, at its first location.
    Commit,
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It did not.
    Open = 0,
    Done,
    /// A write that may have done all, some or nothing of it.
    Refused,
}

#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub kind: Kind,
    pub at: Location,
    pub start: u64,
    pub end: u64,
    pub ending: Ending,
    /// What was read, or written.
    pub words: [u64; WORDS],
}

impl Entry {
    /// A read, by whoever notes it elsewhere.
    pub fn read(at: Location, start: u64, end: u64, bytes: &[u8]) -> Self {
        let mut words = [0; WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().unwrap());
        }
        let (start, end) = (start - MARGIN, end + MARGIN);
        Self { kind: Kind::Read, at, start, end, ending: Ending::Done, words }
    }
}

/// The notes of one process.
pub struct History {
    memory: Arc<Mapping>,
}

impl History {
    pub fn create(path: &Path) -> Self {
        std::fs::File::create(path).unwrap().set_len((FIRST + ENTRIES * ENTRY) as u64).unwrap();
        Self::open(path)
    }

    pub fn open(path: &Path) -> Self {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let len = FIRST + ENTRIES * ENTRY;
        Self { memory: Mapping::from_fd(OwnedFd::from(file), 0, len, Access::ReadWrite).unwrap() }
    }

    fn set(&self, at: usize, value: u64) {
        self.memory.u64_at(at).unwrap().store(value, Ordering::SeqCst);
    }

    fn get(&self, at: usize) -> u64 {
        self.memory.u64_at(at).unwrap().load(Ordering::SeqCst)
    }

    pub fn len(&self) -> usize {
        self.get(0) as usize
    }

    pub fn is_full(&self) -> bool {
        self.len() + 64 > ENTRIES
    }

    /// An operation is about to begin. Its number.
    pub fn begin(&self, kind: Kind, at: Location, words: [u64; WORDS]) -> usize {
        let number = self.len();
        let base = FIRST + number * ENTRY;
        self.set(base, kind as u64 | (at.0 as u64) << 8);
        self.set(base + 16, 0);
        self.set(base + 24, Ending::Open as u64);
        words.iter().enumerate().for_each(|(n, word)| self.set(base + 32 + n * 8, *word));
        self.set(base + 8, now() - MARGIN);
        self.set(0, number as u64 + 1);
        number
    }

    /// A write with this stamp is about to begin.
    pub fn begin_write(&self, at: Location, stamp: u64) -> usize {
        self.begin(Kind::Write, at, std::array::from_fn(|index| word(stamp, at, index)))
    }

    pub fn end(&self, number: usize, ending: Ending) {
        let base = FIRST + number * ENTRY;
        self.set(base + 16, now() + MARGIN);
        self.set(base + 24, ending as u64);
    }

    /// A read that began at `start` has ended now.
    pub fn read(&self, at: Location, start: u64, bytes: &[u8]) {
        let read = Entry::read(at, start, now(), bytes);
        let number = self.begin(Kind::Read, at, read.words);
        let base = FIRST + number * ENTRY;
        self.set(base + 8, read.start);
        self.set(base + 16, read.end);
        self.set(base + 24, Ending::Done as u64);
    }

    /// All of it. What had not ended when the process did, ended with that: at `death`.
    pub fn entries(&self, death: u64) -> impl Iterator<Item = Entry> + '_ {
        (0..self.len()).map(move |number| {
            let base = FIRST + number * ENTRY;
            let head = self.get(base);
            let kind = match head & 0xff {
                1 => Kind::Write,
                2 => Kind::Read,
                3 => Kind::Commit,
                other => panic!("an entry of kind {other}"),
            };
            let (end, ending) = match self.get(base + 24) {
                0 => (death, Ending::Open),
                1 => (self.get(base + 16), Ending::Done),
                _ => (self.get(base + 16), Ending::Refused),
            };
            let words = std::array::from_fn(|n| self.get(base + 32 + n * 8));
            Entry { kind, at: Location((head >> 8) as usize), start: self.get(base + 8), end, ending, words }
        })
    }
}
