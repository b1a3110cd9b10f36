//! A client: reads everybody's windows, writes its own, commits, and has its peer do DMA.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use p2p::layout::Home;
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use shm_api::client::{Client, ClientError, File, Mapped, OpenMode, PathCounts, Peer};
use shm_api::protocol::ErrorCode;

use crate::board::{
    Board, Count, FILE, FILES, PEER_WINDOWS, PEERS, PER_FILE, WINDOW, WINDOWS, WORDS, bytes_of, version_of,
};
use crate::common::connect;
use crate::serve::GRACE;

/// Arguments: socket, board, number of the client, its incarnation, seed.
pub fn client(args: &[String]) {
    let number: usize = args[2].parse().unwrap();
    let incarnation: u64 = args[3].parse().unwrap();
    let seed: u64 = args[4].parse().unwrap();
    let client = connect(Path::new(&args[0]));
    let files: Vec<File> = (0..FILES)
        .map(|n| {
            let mode = if n == number { OpenMode::write() } else { OpenMode::read() };
            client.open(&format!("/data{n}"), mode).unwrap()
        })
        .collect();
    let peer = (number < PEERS).then(|| client.attach_peer(WINDOW as u64).unwrap());
    let mut worker = Worker {
        number,
        board: Board::open(Path::new(&args[1])),
        random: Xoshiro256PlusPlus::seed_from_u64(seed ^ (number as u64) << 32 ^ incarnation << 40),
        client,
        maps: (0..FILES).map(|_| None).collect(),
        files,
        peer,
        bytes: vec![0; WINDOW],
        least: Vec::new(),
        counted: PathCounts::default(),
    };
    if worker.board.has_losses() {
        // The previous incarnation may have died of being told.
        worker.take_back();
    }
    println!("\nready");
    let mut turns = 0u64;
    while !worker.board.is_stopped() {
        worker.turn();
        turns += 1;
        if turns.is_multiple_of(16) {
            // Two cores for seven processes: the server must get its share.
            std::thread::sleep(Duration::from_micros(300));
        }
        if turns.is_multiple_of(256) {
            worker.count_paths();
        }
    }
    worker.count_paths();
}

struct Worker {
    number: usize,
    board: Board,
    random: Xoshiro256PlusPlus,
    client: Client,
    files: Vec<File>,
    maps: Vec<Option<Mapped>>,
    peer: Option<Peer>,
    bytes: Vec<u8>,
    least: Vec<u64>,
    counted: PathCounts,
}

impl Worker {
    fn below(&mut self, n: usize) -> usize {
        (self.random.next_u64() % n as u64) as usize
    }

    fn turn(&mut self) {
        let done = match self.below(100) {
            0..56 => self.read(),
            56..80 => self.write(),
            80..84 => self.commit(),
            84..88 => self.borrow(),
            88..98 if self.peer.is_some() => self.peer_copies(),
            98 => {
                let file = self.below(FILES);
                self.maps[file] = None;
                Ok(())
            }
            _ => self.read(),
        };
        if let Err(error) = done {
            self.tolerate(&error);
        }
    }

    /// Errors that a bad drive and refusals may cause. Nothing was read or written then.
    fn tolerate(&self, error: &ClientError) {
        use ErrorCode::{DataLost, Device, NotResident, PeerFault, Unsupported};
        let count = match error {
            ClientError::Server(e) if e.code == PeerFault => Count::PeerFaults,
            ClientError::Server(e) if e.code == Unsupported => Count::PeerBounces,
            ClientError::Server(e) if e.code == DataLost && self.board.has_losses() => Count::Losses,
            ClientError::Server(e) if [Device, NotResident].contains(&e.code) => Count::DeviceErrors,
            other => panic!("client {}: {other}", self.number),
        };
        self.board.add(count, 1);
    }

    fn map(&mut self, file: usize) -> Result<(), ClientError> {
        if self.maps[file].is_none() {
            let own = file == self.number;
            let map = if own { self.files[file].map(0, FILE) } else { self.files[file].map_read(0, FILE) };
            self.maps[file] = Some(map?);
        }
        Ok(())
    }

    fn read(&mut self) -> Result<(), ClientError> {
        let window = self.below(WINDOWS);
        let words = 1 << self.below(12);
        let first = self.below(WORDS - words + 1);
        let (file, n) = (window / PER_FILE, window % PER_FILE);
        self.map(file)?;
        self.board.least(window, first, words, &mut self.least);
        let into = &mut self.bytes[..words * 8];
        let Some(map) = &self.maps[file] else { return Ok(()) };
        map.read((n * WINDOW + first * 8) as u64, into)?;
        self.board.verify(window, first, into, &self.least, "a reader");
        self.board.add(Count::Reads, 1);
        self.board.add(Count::Words, words as u64);
        Ok(())
    }

    /// One of its own windows, as a whole, in the next version.
    fn write(&mut self) -> Result<(), ClientError> {
        let taken = if self.number < PEERS { PEER_WINDOWS } else { 0 };
        let n = self.below(PER_FILE - taken);
        let mut sleepy = self.below(150) == 0;
        self.map(self.number)?;
        let Some(map) = &self.maps[self.number] else { return Ok(()) };
        let window = self.number * PER_FILE + n;
        let version = self.board.begin(window);
        let bytes = bytes_of(version, window);
        let mut slept = 0;
        map.write_section((n * WINDOW) as u64, |section| {
            section.write(0, &bytes[..WINDOW / 2])?;
            if std::mem::take(&mut sleepy) {
                // Longer than anybody waits for it.
                std::thread::sleep(GRACE * 3);
                slept += 1;
            }
            section.write(WINDOW / 2, &bytes[WINDOW / 2..])
        })?;
        self.board.published(window).store(version, Ordering::SeqCst);
        self.board.add(Count::Writes, 1);
        self.board.add(Count::Sleeps, slept);
        Ok(())
    }

    /// Borrows a window in place and holds on to it, over revocations if there are any.
    fn borrow(&mut self) -> Result<(), ClientError> {
        let window = self.below(WINDOWS);
        let (file, n) = (window / PER_FILE, window % PER_FILE);
        // Mostly a moment; sometimes until it has become a snapshot, and sometimes longer than anybody waits for it.
        let (patience, hold) = match self.below(8) {
            0 => (GRACE * 4, GRACE * 3),
            1..4 => (GRACE * 2, GRACE / 8),
            _ => (Duration::ZERO, Duration::ZERO),
        };
        self.map(file)?;
        self.board.least(window, 0, WORDS, &mut self.least);
        let Some(map) = &self.maps[file] else { return Ok(()) };
        let (board, least, bytes) = (&self.board, &self.least, &mut self.bytes);
        map.borrow((n * WINDOW) as u64, |borrow| {
            borrow.bytes().read(0, bytes).unwrap();
            if borrow.is_current() {
                board.verify(window, 0, bytes, least, "a borrower");
            }
            board.add(Count::Borrows, 1);
            let until = Instant::now() + patience;
            while borrow.is_current() && Instant::now() < until && !board.is_stopped() {
                std::thread::sleep(Duration::from_micros(200));
            }
            if borrow.is_current() {
                return;
            }
            if board.has_losses() && borrow.home() == Home::Cmb {
                // The CMB may have been emptied. What was lent must be there all the same, for nobody else, as long as the borrow lasts.
                for _ in 0..2 {
                    borrow.bytes().read(0, bytes).unwrap();
                    board.check_left(window, bytes, least, "what a reset left of a borrow");
                    std::thread::sleep(hold);
                }
                board.add(Count::LostBorrows, 1);
                return;
            }
            // From here on it is a snapshot. A writer that was fenced may store there, but nothing that it has been told is written.
            let published = board.published(window).load(Ordering::SeqCst);
            borrow.bytes().read(0, bytes).unwrap();
            board.check(window, 0, bytes, least, "a snapshot");
            std::thread::sleep(hold);
            let mut later = vec![0; WINDOW];
            borrow.bytes().read(0, &mut later).unwrap();
            board.check(window, 0, &later, least, "a snapshot, later");
            for (index, (old, new)) in bytes.chunks_exact(8).zip(later.chunks_exact(8)).enumerate() {
                let (was, is) = (version_of(old), version_of(new));
                assert!(
                    old == new || is > published && is > was,
                    "word {index} of a snapshot of window {window} went from version {was} to {is}; {published} was published"
                );
            }
            board.add(Count::Snapshots, 1);
            board.add(Count::LongSnapshots, u64::from(hold > GRACE));
            board.add(Count::LateStores, u64::from(*bytes != later));
        })
    }

    fn commit(&mut self) -> Result<(), ClientError> {
        let own = self.number * PER_FILE..(self.number + 1) * PER_FILE;
        let published: Vec<u64> =
            own.clone().map(|w| self.board.published(w).load(Ordering::SeqCst)).collect();
        let done = self.files[self.number].commit();
        if matches!(&done, Err(ClientError::Server(e)) if e.code == ErrorCode::DataLost) {
            self.take_back();
        }
        done?;
        for (window, version) in own.zip(published) {
            self.board.committed(window).store(version, Ordering::SeqCst);
        }
        self.board.add(Count::Commits, 1);
        Ok(())
    }

    /// What was published since the last commit is gone, as far as anybody knows.
    fn take_back(&self) {
        for window in self.number * PER_FILE..(self.number + 1) * PER_FILE {
            let version = self.board.committed(window).load(Ordering::SeqCst);
            self.board.published(window).store(version, Ordering::SeqCst);
        }
    }

    /// The peer writes one of its windows, or reads any.
    fn peer_copies(&mut self) -> Result<(), ClientError> {
        let write = self.below(2) == 0;
        let window = if write {
            self.number * PER_FILE + PER_FILE - 1 - self.below(PEER_WINDOWS)
        } else {
            self.below(WINDOWS)
        };
        let (file, n) = (window / PER_FILE, window % PER_FILE);
        self.map(file)?;
        let Some(peer) = &self.peer else { return Ok(()) };
        let reach = peer.map(&self.files[file], (n * WINDOW) as u64, write)?;
        for _ in 0..3 {
            // The window may be taken back in between: then the DMA faults.
            if write {
                let version = self.board.begin(window);
                peer.local().write(0, &bytes_of(version, window)).unwrap();
                peer.dma_write(reach.iova, 0, WINDOW as u64)?;
                self.board.published(window).store(version, Ordering::SeqCst);
                self.board.add(Count::PeerWrites, 1);
            } else {
                self.board.least(window, 0, WORDS, &mut self.least);
                peer.dma_read(reach.iova, 0, WINDOW as u64)?;
                peer.local().read(0, &mut self.bytes).unwrap();
                self.board.verify(window, 0, &self.bytes, &self.least, "a peer");
                self.board.add(Count::PeerReads, 1);
            }
        }
        Ok(())
    }

    fn count_paths(&mut self) {
        self.maps.iter_mut().for_each(|map| *map = None);
        let now = self.client.paths();
        let before = std::mem::replace(&mut self.counted, now);
        self.board.add(Count::CmbReads, now.cmb_reads - before.cmb_reads);
        self.board.add(Count::HostReads, now.host_reads - before.host_reads);
        self.board.add(Count::SentReads, now.sent_reads - before.sent_reads);
        self.board.add(Count::Fenced, now.fenced - before.fenced);
    }
}
