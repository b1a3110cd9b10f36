//! Who writes and who reads: processes with clients, and peers of theirs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use shm_api::client::{Client, ClientError, File, Mapped, OpenMode, Peer};
use shm_api::protocol::ErrorCode;

use crate::common::connect;
use crate::history::{
    Ending, History, Kind, LOCATIONS, Location, OBJECTS, RECORD, WINDOW, WINDOWS, now, record,
};
use crate::run::GRACE;

type Done = Result<(), ClientError>;

/// The objects, by number: files, raw memory, a peer's memory, the drive's.
pub fn open(client: &Client, object: usize) -> Result<File, ClientError> {
    match object {
        0 => client.open("/auto", OpenMode::write()),
        1 => client.open("/host", OpenMode::write()),
        2 => client.allocate_shared("scratch", 0),
        3 => client.peer_memory("gpu"),
        _ => client.pmr(),
    }
}

/// Arguments: socket, history, number of the party (no other had it), seed, file that ends it.
pub fn party(args: &[String]) {
    let number: u64 = args[2].parse().unwrap();
    let seed: u64 = args[3].parse().unwrap();
    let client = connect(Path::new(&args[0]));
    let files: Vec<File> = (0..OBJECTS).map(|object| open(&client, object).unwrap()).collect();
    let peer = match number % 3 {
        0 => Some(client.attach_peer(4096).unwrap()),
        1 => Some(client.attach_incoherent_peer(4096).unwrap()),
        _ => None,
    };
    let mut party = Party {
        number,
        stamps: 0,
        random: Xoshiro256PlusPlus::seed_from_u64(seed ^ number << 32),
        maps: files.iter().map(|_| None).collect(),
        files,
        peer,
        history: History::open(Path::new(&args[1])),
        over: PathBuf::from(&args[4]),
    };
    println!("\nready");
    party.work();
    drop(party);
    drop(client);
}

struct Party {
    number: u64,
    stamps: u64,
    random: Xoshiro256PlusPlus,
    files: Vec<File>,
    maps: Vec<Option<Mapped>>,
    peer: Option<Peer>,
    history: History,
    over: PathBuf,
}

impl Party {
    fn below(&mut self, n: usize) -> usize {
        (self.random.next_u64() % n as u64) as usize
    }

    fn work(&mut self) {
        for turn in 0u64.. {
            if self.history.is_full() || turn.is_multiple_of(16) && self.over.exists() {
                return;
            }
            if turn.is_multiple_of(8) {
                // The server must get its share of two cores.
                std::thread::sleep(Duration::from_micros(100));
            }
            if let Err(error) = self.turn() {
                self.tolerate(&error);
            }
        }
    }

    /// Refusals, and a drive that is reset.
    fn tolerate(&self, error: &ClientError) {
        use ErrorCode::{DataLost, Device, NotResident, PeerFault, Unsupported};
        let code = error.code();
        let known = [DataLost, Device, NotResident, PeerFault, Unsupported];
        assert!(code.is_some_and(|code| known.contains(&code)), "party {}: {error:?}", self.number);
    }

    fn turn(&mut self) -> Done {
        let at = Location(self.below(LOCATIONS));
        match self.below(100) {
            0..35 => self.write(at),
            35..65 => self.read(at),
            65..75 => self.borrow(at),
            75..80 => self.peer_write(at),
            80..85 => self.peer_read(at),
            85..90 => self.peer_dma(at),
            90..93 => self.commit(at),
            93 => {
                self.maps[at.object()] = None;
                Ok(())
            }
            _ => self.write(at),
        }
    }

    fn map(&mut self, at: Location) -> Done {
        let object = at.object();
        if self.maps[object].is_none() {
            self.maps[object] = Some(self.files[object].map(0, (WINDOWS * WINDOW) as u64)?);
        }
        Ok(())
    }

    fn stamp(&mut self) -> u64 {
        self.stamps += 1;
        self.number << 32 | self.stamps
    }

    fn write(&mut self, at: Location) -> Done {
        self.map(at)?;
        let (mut slow, half) = (self.below(30) == 0, self.below(8) * 8);
        let Self { number, stamps, history, maps, .. } = self;
        let Some(map) = &maps[at.object()] else { return Ok(()) };
        // Each attempt has a stamp of its own: one that was fenced may have happened, and be written over before the next.
        let mut attempt = None;
        let done = map.write_section(at.window() as u64, |section| {
            if let Some(refused) = attempt.take() {
                history.end(refused, Ending::Refused);
            }
            *stamps += 1;
            let stamp = *number << 32 | *stamps;
            attempt = Some(history.begin_write(at, stamp));
            let bytes = record(stamp, at);
            section.write(at.within(), &bytes[..half])?;
            if std::mem::take(&mut slow) {
                std::thread::sleep(GRACE * 2);
            }
            section.write(at.within() + half, &bytes[half..])
        });
        if let Some(attempt) = attempt {
            history.end(attempt, if done.is_ok() { Ending::Done } else { Ending::Refused });
        }
        done
    }

    fn read(&mut self, at: Location) -> Done {
        self.map(at)?;
        let Some(map) = &self.maps[at.object()] else { return Ok(()) };
        let mut bytes = [0; RECORD];
        let start = now();
        map.read((at.window() + at.within()) as u64, &mut bytes)?;
        self.history.read(at, start, &bytes);
        Ok(())
    }

    /// Again and again for as long as it is no snapshot.
    fn borrow(&mut self, at: Location) -> Done {
        self.map(at)?;
        let (looks, long) = (1 + self.below(4), self.below(20) == 0);
        let Some(map) = &self.maps[at.object()] else { return Ok(()) };
        let history = &self.history;
        map.borrow(at.window() as u64, |borrow| {
            for _ in 0..looks {
                let mut bytes = [0; RECORD];
                let start = now();
                borrow.bytes().read(at.within(), &mut bytes).unwrap();
                if !borrow.is_current() {
                    break;
                }
                history.read(at, start, &bytes);
                if long {
                    std::thread::sleep(GRACE / 4);
                }
            }
        })
    }

    fn commit(&mut self, at: Location) -> Done {
        let object = at.object();
        if object == 2 {
            // Raw memory is nowhere to be committed to.
            return Ok(());
        }
        let first = Location(LOCATIONS / OBJECTS * object);
        let commit = self.history.begin(Kind::Commit, first, [0; 8]);
        let done = self.files[object].commit();
        self.history.end(commit, if done.is_ok() { Ending::Done } else { Ending::Refused });
        done.map(drop)
    }

    /// What a peer has, by its DMA or through host memory.
    fn peer_write(&mut self, at: Location) -> Done {
        self.map(at)?;
        let stamp = self.stamp();
        let Some(peer) = &self.peer else { return Ok(()) };
        peer.local().write(0, &record(stamp, at)).unwrap();
        let write = self.history.begin_write(at, stamp);
        let offset = (at.window() + at.within()) as u64;
        let done = peer.write(&self.files[at.object()], offset, 0, RECORD as u64);
        self.history.end(write, if done.is_ok() { Ending::Done } else { Ending::Refused });
        done.map(drop)
    }

    fn peer_read(&mut self, at: Location) -> Done {
        self.map(at)?;
        let Some(peer) = &self.peer else { return Ok(()) };
        let start = now();
        let offset = (at.window() + at.within()) as u64;
        peer.read(&self.files[at.object()], offset, 0, RECORD as u64)?;
        let mut bytes = [0; RECORD];
        peer.local().read(0, &mut bytes).unwrap();
        self.history.read(at, start, &bytes);
        Ok(())
    }

    /// Its own DMA to a window that is mapped for it, until that is taken back.
    fn peer_dma(&mut self, at: Location) -> Done {
        let write = self.number.is_multiple_of(3) && self.below(2) == 0;
        self.map(at)?;
        let stamps = [self.stamp(), self.stamp(), self.stamp()];
        let Some(peer) = &self.peer else { return Ok(()) };
        let reach = peer.map(&self.files[at.object()], at.window() as u64, write)?;
        let iova = reach.iova + at.within() as u64;
        for stamp in stamps {
            if write {
                peer.local().write(64, &record(stamp, at)).unwrap();
                let write = self.history.begin_write(at, stamp);
                let done = peer.dma_write(iova, 64, RECORD as u64);
                self.history.end(write, if done.is_ok() { Ending::Done } else { Ending::Refused });
                done?;
            }
            let start = now();
            peer.dma_read(iova, 0, RECORD as u64)?;
            let mut bytes = [0; RECORD];
            peer.local().read(0, &mut bytes).unwrap();
            self.history.read(at, start, &bytes);
        }
        Ok(())
    }
}
