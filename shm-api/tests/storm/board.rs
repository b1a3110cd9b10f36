//! The model, in memory that all processes of a storm share.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nvme_driver::mem::{Access, Mapping};

pub const WINDOW: usize = 16 * 1024;
pub const WORDS: usize = WINDOW / 8;
/// One for each client, which alone writes it, but for the windows of its peer.
pub const FILES: usize = 4;
pub const PER_FILE: usize = 16;
pub const WINDOWS: usize = FILES * PER_FILE;
pub const FILE: u64 = (PER_FILE * WINDOW) as u64;
pub const WORKING_SET: usize = WINDOWS * WINDOW;
/// The last windows of the first two files are written by a peer.
pub const PEERS: usize = 2;
pub const PEER_WINDOWS: usize = 3;
/// Every word of the windows that fill freed pages.
pub const POISON: u64 = 0xdead_beef_0bad_f00d;

const COUNTS: usize = 64;
const PER_WINDOW: usize = 4096;
const SEEN: usize = PER_WINDOW + WINDOWS * 128;
const LEN: usize = SEEN + WORKING_SET;

/// A word of a window: poison is none.
pub fn word(version: u64, window: usize, index: usize) -> u64 {
    version << 24 | (window as u64) << 12 | index as u64
}

/// The version that a word says it is of.
pub fn version_of(word: &[u8]) -> u64 {
    u64::from_le_bytes(word.try_into().unwrap()) >> 24
}

/// All words of a window in one version.
pub fn bytes_of(version: u64, window: usize) -> Vec<u8> {
    (0..WORDS).flat_map(|index| word(version, window, index).to_le_bytes()).collect()
}

/// What is counted, over all incarnations of all clients.
#[derive(Clone, Copy, Debug)]
pub enum Count {
    Reads,
    Words,
    Writes,
    Sleeps,
    Commits,
    PeerReads,
    PeerWrites,
    PeerFaults,
    PeerBounces,
    DeviceErrors,
    Losses,
    CmbReads,
    HostReads,
    SentReads,
    Fenced,
    Borrows,
    /// Borrows whose window was taken back while they were held.
    Snapshots,
    /// The same, held for longer than anybody waits.
    LongSnapshots,
    /// Snapshots that a fenced writer stored to, late.
    LateStores,
    /// Borrows of the CMB that were taken back where the drive is reset: it may have emptied them.
    LostBorrows,
}

pub const ALL_COUNTS: [Count; 20] = [
    Count::Reads,
    Count::Words,
    Count::Writes,
    Count::Sleeps,
    Count::Commits,
    Count::PeerReads,
    Count::PeerWrites,
    Count::PeerFaults,
    Count::PeerBounces,
    Count::DeviceErrors,
    Count::Losses,
    Count::CmbReads,
    Count::HostReads,
    Count::SentReads,
    Count::Fenced,
    Count::Borrows,
    Count::Snapshots,
    Count::LongSnapshots,
    Count::LateStores,
    Count::LostBorrows,
];

pub struct Board {
    memory: Arc<Mapping>,
}

impl Board {
    pub fn create(path: &Path) -> Self {
        std::fs::File::create(path).unwrap().set_len(LEN as u64).unwrap();
        Self::open(path)
    }

    pub fn open(path: &Path) -> Self {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        Self { memory: Mapping::from_fd(OwnedFd::from(file), 0, LEN, Access::ReadWrite).unwrap() }
    }

    fn at(&self, at: usize) -> &AtomicU64 {
        self.memory.u64_at(at).unwrap()
    }

    pub fn stop(&self) {
        self.at(0).store(1, Ordering::SeqCst);
    }

    /// From now on the drive may be reset, and with its CMB lose what was not committed.
    pub fn expect_losses(&self) {
        self.at(8).store(1, Ordering::SeqCst);
    }

    pub fn has_losses(&self) -> bool {
        self.at(8).load(Ordering::Relaxed) != 0
    }

    pub fn is_stopped(&self) -> bool {
        self.at(0).load(Ordering::Relaxed) != 0
    }

    pub fn add(&self, count: Count, n: u64) {
        self.at(COUNTS + count as usize * 8).fetch_add(n, Ordering::Relaxed);
    }

    pub fn get(&self, count: Count) -> u64 {
        self.at(COUNTS + count as usize * 8).load(Ordering::Relaxed)
    }

    /// The highest version of a window that somebody began to write.
    pub fn begun(&self, window: usize) -> &AtomicU64 {
        self.at(PER_WINDOW + window * 128)
    }

    /// The highest version that was written as a whole, and not fenced.
    pub fn published(&self, window: usize) -> &AtomicU64 {
        self.at(PER_WINDOW + window * 128 + 64)
    }

    /// The highest version that a commit has made durable.
    pub fn committed(&self, window: usize) -> &AtomicU64 {
        self.at(PER_WINDOW + window * 128 + 32)
    }

    /// Begins the next version. Each window has one writer.
    pub fn begin(&self, window: usize) -> u64 {
        let version = self.begun(window).load(Ordering::SeqCst) + 1;
        self.begun(window).store(version, Ordering::SeqCst);
        version
    }

    /// The highest version of one word that anybody has read.
    fn seen(&self, window: usize, index: usize) -> &AtomicU64 {
        self.at(SEEN + window * WINDOW + index * 8)
    }

    /// What a read of these words that begins now must find at least.
    pub fn least(&self, window: usize, first: usize, words: usize, least: &mut Vec<u64>) {
        least.clear();
        if self.has_losses() {
            least.resize(words, self.committed(window).load(Ordering::SeqCst));
            return;
        }
        let published = self.published(window).load(Ordering::SeqCst);
        let seen = (first..first + words).map(|index| self.seen(window, index).load(Ordering::Acquire));
        least.extend(seen.map(|seen| seen.max(published)));
    }

    /// Demands it of what was read, and of whoever reads these words from now on.
    pub fn verify(&self, window: usize, first: usize, bytes: &[u8], least: &[u64], who: &str) {
        self.check(window, first, bytes, least, who);
        for ((nth, chunk), &least) in bytes.chunks_exact(8).enumerate().zip(least) {
            let version = version_of(chunk);
            if version > least {
                self.seen(window, first + nth).fetch_max(version, Ordering::AcqRel);
            }
        }
    }

    /// Demands it of what was read, where others may read something older later: what a fenced writer stores into a snapshot is lost.
    pub fn check(&self, window: usize, first: usize, bytes: &[u8], least: &[u64], who: &str) {
        let most = self.begun(window).load(Ordering::SeqCst);
        for ((nth, chunk), &least) in bytes.chunks_exact(8).enumerate().zip(least) {
            let index = first + nth;
            let got = u64::from_le_bytes(chunk.try_into().unwrap());
            let version = version_of(chunk);
            assert_eq!(
                got,
                word(version, window, index),
                "{who}: word {index} of window {window} was never in this file: {got:#x}"
            );
            assert!(
                version >= least,
                "{who}: word {index} of window {window} is stale or lost: {version}, at least {least}"
            );
            assert!(version <= most, "{who}: word {index} of window {window} is {version}, at most {most}");
        }
    }

    /// Demands it of what is left of a whole window in a CMB that may have been emptied: word by word it may be gone, and it is no other's.
    pub fn check_left(&self, window: usize, bytes: &[u8], least: &[u64], who: &str) {
        for (index, (word, least)) in bytes.chunks_exact(8).zip(least).enumerate() {
            if word != [0; 8] {
                self.check(window, index, word, std::slice::from_ref(least), who);
            }
        }
    }
}
