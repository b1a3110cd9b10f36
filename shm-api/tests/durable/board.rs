//! The model, in memory that all processes share: what each word of each file may be.
//!
//! Changes are numbered per client, and each client alone changes its files. A change of a word either gives it its number, or cuts it
//! away: then it is zero. Of each word the board knows the last change that is durable for sure, the last that was begun, the last that
//! every reader must see, and the last cut.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nvme_driver::mem::{Access, Mapping};

pub const CLIENTS: usize = 3;
pub const WINDOW: usize = 16 * 1024;
pub const WORDS: usize = WINDOW / 8;
/// A client's files: one that keeps its length, and one that is cut.
pub const KINDS: usize = 2;
pub const WINDOWS: [usize; KINDS] = [14, 4];
pub const FILES: usize = CLIENTS * KINDS;
/// Names of a client that come and go.
pub const NAMES: usize = 4;
/// Most words of a file under such a name.
pub const MOST: usize = 6 * 1024;

const FILE_WORDS: usize = WINDOWS[0] * WORDS;
const COUNTS: usize = 256;
const NAMED: usize = 1024;
const FIELDS: usize = 4096;
const FIELD: usize = FILES * FILE_WORDS * 8;
const LEN: usize = FIELDS + 4 * FIELD;

/// A file that stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub client: usize,
    pub kind: usize,
}

impl Place {
    pub fn all() -> impl Iterator<Item = Self> {
        (0..FILES).map(|n| Self { client: n / KINDS, kind: n % KINDS })
    }

    pub fn number(self) -> usize {
        self.client * KINDS + self.kind
    }

    pub fn words(self) -> usize {
        WINDOWS[self.kind] * WORDS
    }

    pub fn path(self) -> String {
        format!("/{}{}", ["data", "cut"][self.kind], self.client)
    }
}

/// A word of an object after a change. Files under names that come and go are objects behind the others.
pub fn word(change: u64, object: usize, index: usize) -> u64 {
    change << 32 | (object as u64) << 16 | index as u64
}

pub fn bytes(change: u64, object: usize, first: usize, words: usize) -> Vec<u8> {
    (first..first + words).flat_map(|index| word(change, object, index).to_le_bytes()).collect()
}

/// The object of what is under a name that comes and goes.
pub fn named_object(client: usize, name: usize) -> usize {
    FILES + client * NAMES + name
}

pub fn name_path(client: usize, name: usize) -> String {
    format!("/n{client}{name}")
}

/// How many words what is under a name has in a state.
pub fn named_words(client: usize, name: usize, state: u64) -> usize {
    let mixed = (state * 31 + (client * NAMES + name) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    1 + (mixed >> 40) as usize % MOST
}

/// One of the numbers that the board has for each word.
#[derive(Clone, Copy, Debug)]
pub enum Field {
    Durable,
    Begun,
    Published,
    Cut,
}

/// The same for names: in an even state there is none, and each odd state has bytes of its own.
#[derive(Clone, Copy, Debug)]
pub enum Name {
    Durable,
    Begun,
    /// All bytes of the states up to this one are durable.
    Whole,
    /// As it is now.
    Now,
}

#[derive(Clone, Copy, Debug)]
pub enum Count {
    Turns,
    Writes,
    Reads,
    Commits,
    Cuts,
    Names,
    PeerWrites,
    Gone,
    Refused,
    Revocations,
}

pub const ALL_COUNTS: [Count; 10] = [
    Count::Turns,
    Count::Writes,
    Count::Reads,
    Count::Commits,
    Count::Cuts,
    Count::Names,
    Count::PeerWrites,
    Count::Gone,
    Count::Refused,
    Count::Revocations,
];

#[derive(Clone)]
pub struct Board {
    memory: Arc<Mapping>,
}

impl Board {
    pub fn create(path: &Path) -> Self {
        std::fs::File::create(path).unwrap().set_len(LEN as u64).unwrap();
        let board = Self::open(path);
        for place in Place::all() {
            for index in 0..place.words() {
                // Change 1: the words are there, or the file has been cut to nothing.
                for field in [Field::Durable, Field::Begun, Field::Published] {
                    board.set(place, index, field, 1);
                }
                board.set(place, index, Field::Cut, place.kind as u64);
            }
        }
        (0..CLIENTS).for_each(|client| board.changes(client).store(1, Ordering::SeqCst));
        board
    }

    pub fn open(path: &Path) -> Self {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        Self { memory: Mapping::from_fd(OwnedFd::from(file), 0, LEN, Access::ReadWrite).unwrap() }
    }

    fn at(&self, at: usize) -> &AtomicU64 {
        self.memory.u64_at(at).unwrap()
    }

    /// Odd while a server is there. `u64::MAX`: it is over.
    pub fn epoch(&self) -> &AtomicU64 {
        self.at(0)
    }

    /// The last epoch in which a client does nothing any more.
    pub fn left(&self, client: usize) -> &AtomicU64 {
        self.at(64 + client * 8)
    }

    /// The last epoch in which a client has done something.
    pub fn worked(&self, client: usize) -> &AtomicU64 {
        self.at(96 + client * 8)
    }

    /// Changes of a client so far.
    pub fn changes(&self, client: usize) -> &AtomicU64 {
        self.at(128 + client * 8)
    }

    pub fn next_change(&self, client: usize) -> u64 {
        self.changes(client).fetch_add(1, Ordering::SeqCst) + 1
    }

    pub fn add(&self, count: Count, n: u64) {
        self.at(COUNTS + count as usize * 8).fetch_add(n, Ordering::Relaxed);
    }

    pub fn count(&self, count: Count) -> u64 {
        self.at(COUNTS + count as usize * 8).load(Ordering::Relaxed)
    }

    pub fn name(&self, client: usize, name: usize, field: Name) -> &AtomicU64 {
        self.at(NAMED + ((client * NAMES + name) * 4 + field as usize) * 8)
    }

    pub fn field(&self, place: Place, index: usize, field: Field) -> &AtomicU64 {
        self.at(FIELDS + field as usize * FIELD + (place.number() * FILE_WORDS + index) * 8)
    }

    pub fn get(&self, place: Place, index: usize, field: Field) -> u64 {
        self.field(place, index, field).load(Ordering::SeqCst)
    }

    pub fn set(&self, place: Place, index: usize, field: Field, value: u64) {
        self.field(place, index, field).store(value, Ordering::SeqCst);
    }

    /// The change that a word is of, if that is one from `least` on that was begun.
    pub fn change_of(&self, place: Place, index: usize, found: u64, least: u64) -> Result<u64, String> {
        let (most, cut) = (self.get(place, index, Field::Begun), self.get(place, index, Field::Cut));
        if found == 0 {
            let text = format!("zero, but the last cut was change {cut}, and at least {least} must be there");
            return if cut >= least { Ok(cut) } else { Err(text) };
        }
        let change = found >> 32;
        if found != word(change, place.number(), index) {
            return Err(format!("{found:#x}, which was never there"));
        }
        if (least..=most).contains(&change) {
            return Ok(change);
        }
        Err(format!("of change {change}, not of {least} to {most} (last cut: {cut})"))
    }

    /// What must be found at the least by who reads these words from now on.
    pub fn least(&self, place: Place, first: usize, words: usize, least: &mut Vec<u64>) {
        least.clear();
        least.extend((first..first + words).map(|index| self.get(place, index, Field::Published)));
    }

    /// Demands it of what was read.
    pub fn verify(&self, place: Place, first: usize, found: &[u8], least: &[u64], who: &str) {
        for ((nth, found), least) in found.chunks_exact(8).enumerate().zip(least) {
            let found = u64::from_le_bytes(found.try_into().unwrap());
            if let Err(why) = self.change_of(place, first + nth, found, *least) {
                panic!("{who}: word {} of {}: {why}", first + nth, place.path());
            }
        }
    }
}
