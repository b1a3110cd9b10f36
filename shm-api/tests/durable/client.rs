//! A client over any number of servers: it changes its own files, reads everybody's, and connects again when a server is gone.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use shm_api::client::{Client, ClientError, File, Mapped, OpenMode, Peer};
use shm_api::protocol::ErrorCode;

use crate::board::{
    Board, Count, Field, NAMES, Name, Place, WINDOW, WINDOWS, WORDS, bytes, name_path, named_object,
    named_words,
};

type Done = Result<(), ClientError>;

/// Arguments: socket, board, number of the client, its incarnation, seed.
pub fn client(args: &[String]) {
    let number: usize = args[2].parse().unwrap();
    let incarnation: u64 = args[3].parse().unwrap();
    let seed: u64 = args[4].parse().unwrap();
    let board = Board::open(Path::new(&args[1]));
    let mut me = Me {
        number,
        socket: PathBuf::from(&args[0]),
        random: Xoshiro256PlusPlus::seed_from_u64(seed ^ (number as u64) << 32 ^ incarnation << 40),
        board,
        acknowledged_cuts: vec![0; WINDOWS[1] * WORDS],
    };
    println!("\nready");
    loop {
        let epoch = me.board.epoch().load(Ordering::SeqCst);
        if epoch == u64::MAX {
            return;
        }
        if epoch.is_multiple_of(2) || me.board.left(number).load(Ordering::SeqCst) == epoch {
            std::thread::sleep(Duration::from_micros(200));
            continue;
        }
        match me.serve_out(epoch) {
            Ok(()) => {}
            Err(ClientError::Gone(_) | ClientError::Connect { .. }) => me.board.add(Count::Gone, 1),
            Err(other) => panic!("client {number}: {other:?}"),
        }
        me.board.left(number).store(epoch, Ordering::SeqCst);
    }
}

struct Me {
    number: usize,
    socket: PathBuf,
    random: Xoshiro256PlusPlus,
    board: Board,
    /// Of each word of the file that is cut, the last cut that this server has answered.
    acknowledged_cuts: Vec<u64>,
}

/// Changes that were answered: the cut of each word, the state of each name.
struct Settled {
    cuts: Vec<u64>,
    names: Vec<u64>,
}

/// What a client has of one server.
struct Held {
    client: Client,
    files: Vec<File>,
    maps: Vec<Option<Mapped>>,
    peer: Option<Peer>,
}

impl Me {
    fn below(&mut self, n: usize) -> usize {
        (self.random.next_u64() % n as u64) as usize
    }

    fn mine(&self, kind: usize) -> Place {
        Place { client: self.number, kind }
    }

    /// Works with one server until it is gone, or the epoch is over.
    fn serve_out(&mut self, epoch: u64) -> Done {
        let client = Client::connect(&self.socket)?;
        // Those of another server may be undone.
        self.acknowledged_cuts.fill(0);
        let mut files = Vec::new();
        for place in Place::all() {
            let mode = if place.client == self.number { OpenMode::write() } else { OpenMode::read() };
            files.push(client.open(&place.path(), mode)?);
        }
        let peer = if self.number == 0 { Some(client.attach_peer(WINDOW as u64)?) } else { None };
        let maps = files.iter().map(|_| None).collect();
        let mut held = Held { client, files, maps, peer };
        let mut turns = 0u64;
        while self.board.epoch().load(Ordering::SeqCst) == epoch {
            let done = self.turn(&mut held);
            match done {
                Ok(()) => {}
                Err(ClientError::NoPlace { .. }) => self.board.add(Count::Refused, 1),
                Err(ClientError::Server(e))
                    if [ErrorCode::NotResident, ErrorCode::PeerFault, ErrorCode::Unsupported]
                        .contains(&e.code) =>
                {
                    self.board.add(Count::Refused, 1);
                }
                Err(other) => return Err(other),
            }
            self.board.worked(self.number).store(epoch, Ordering::SeqCst);
            turns += 1;
            self.board.add(Count::Turns, 1);
            if turns.is_multiple_of(8) {
                // The server must get its share of two cores.
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        Ok(())
    }

    fn turn(&mut self, held: &mut Held) -> Done {
        match self.below(100) {
            0..40 => self.write(held),
            40..62 => self.read(held),
            62..76 => self.commit(held),
            76..80 => self.cut(held),
            80..90 => self.change_name(held),
            90..94 if held.peer.is_some() => self.peer_writes(held),
            94 => {
                let file = self.below(held.maps.len());
                held.maps[file] = None;
                Ok(())
            }
            95 => self.sync(held),
            _ => self.write(held),
        }
    }

    fn map<'a>(&self, held: &'a mut Held, place: Place) -> Result<&'a Mapped, ClientError> {
        let (n, len) = (place.number(), (place.words() * 8) as u64);
        let map = match held.maps[n].take() {
            Some(map) => map,
            None if place.client == self.number => held.files[n].map(0, len)?,
            None => held.files[n].map_read(0, len)?,
        };
        Ok(held.maps[n].insert(map))
    }

    /// Some words of one window, often few, sometimes all.
    fn range(&mut self, place: Place) -> (usize, usize) {
        let window = self.below(WINDOWS[place.kind]);
        let words = 1 << self.below(12);
        (window * WORDS + self.below(WORDS - words + 1), words)
    }

    fn write(&mut self, held: &mut Held) -> Done {
        let kind = usize::from(self.below(4) == 0);
        let place = self.mine(kind);
        let (first, words) = self.range(place);
        // A mapping for writing makes the file as long as it is: before the words are written.
        self.map(held, place)?;
        let change = self.begin(place, first, words);
        let bytes = bytes(change, place.number(), first, words);
        self.map(held, place)?.write((first * 8) as u64, &bytes)?;
        self.publish(place, first, words, change);
        self.board.add(Count::Writes, 1);
        Ok(())
    }

    fn begin(&self, place: Place, first: usize, words: usize) -> u64 {
        let change = self.board.next_change(self.number);
        (first..first + words).for_each(|index| self.board.set(place, index, Field::Begun, change));
        change
    }

    fn publish(&self, place: Place, first: usize, words: usize, change: u64) {
        (first..first + words).for_each(|index| self.board.set(place, index, Field::Published, change));
    }

    fn peer_writes(&mut self, held: &mut Held) -> Done {
        let place = self.mine(0);
        let window = self.below(WINDOWS[0]);
        self.map(held, place)?;
        let Some(peer) = &held.peer else { return Ok(()) };
        let reach = peer.map(&held.files[place.number()], (window * WINDOW) as u64, true)?;
        for _ in 0..2 {
            let change = self.begin(place, window * WORDS, WORDS);
            peer.local().write(0, &bytes(change, place.number(), window * WORDS, WORDS)).unwrap();
            peer.dma_write(reach.iova, 0, WINDOW as u64)?;
            self.publish(place, window * WORDS, WORDS, change);
            self.board.add(Count::PeerWrites, 1);
        }
        Ok(())
    }

    fn read(&mut self, held: &mut Held) -> Done {
        let place = Place::all().nth(self.below(held.files.len())).unwrap();
        let (first, words) = self.range(place);
        self.map(held, place)?;
        let mut least = Vec::new();
        self.board.least(place, first, words, &mut least);
        let mut found = vec![0; words * 8];
        self.map(held, place)?.read((first * 8) as u64, &mut found)?;
        self.board.verify(place, first, &found, &least, "a reader");
        self.board.add(Count::Reads, 1);
        Ok(())
    }

    /// All of a file, or a range of it.
    fn commit(&mut self, held: &mut Held) -> Done {
        let kind = usize::from(self.below(4) == 0);
        let place = self.mine(kind);
        let whole = self.below(3) == 0;
        let (first, words) = if whole { (0, place.words()) } else { self.range(place) };
        let mut published = Vec::new();
        self.board.least(place, first, words, &mut published);
        let before = self.settled();
        let file = &held.files[place.number()];
        if whole {
            file.commit()?
        } else {
            file.commit_range((first * 8) as u64, (words * 8) as u64, 0)?
        };
        for (nth, change) in published.into_iter().enumerate() {
            self.board.field(place, first + nth, Field::Durable).fetch_max(change, Ordering::SeqCst);
        }
        self.is_durable(&before);
        self.board.add(Count::Commits, 1);
        Ok(())
    }

    /// What was answered so far of cuts and names.
    fn settled(&self) -> Settled {
        let names = (0..NAMES).map(|name| self.state(name)).collect();
        Settled { cuts: self.acknowledged_cuts.clone(), names }
    }

    /// With whatever is made durable, all of that is.
    fn is_durable(&self, settled: &Settled) {
        for (index, cut) in settled.cuts.iter().enumerate() {
            self.board.field(self.mine(1), index, Field::Durable).fetch_max(*cut, Ordering::SeqCst);
        }
        for (name, state) in settled.names.iter().enumerate() {
            self.board.name(self.number, name, Name::Durable).fetch_max(*state, Ordering::SeqCst);
        }
    }

    fn sync(&self, held: &Held) -> Done {
        let before = self.settled();
        held.client.sync()?;
        self.is_durable(&before);
        Ok(())
    }

    /// Cuts the file somewhere, and makes it long again.
    fn cut(&mut self, held: &mut Held) -> Done {
        let place = self.mine(1);
        let keep = match self.below(3) {
            0 => 0,
            1 => self.below(place.words() / 512) * 512,
            _ => self.below(place.words()),
        };
        let change = self.board.next_change(self.number);
        let gone = keep..place.words();
        for index in gone.clone() {
            self.board.set(place, index, Field::Cut, change);
            self.board.set(place, index, Field::Begun, change);
        }
        held.files[place.number()].truncate((keep * 8) as u64)?;
        for index in gone {
            self.board.set(place, index, Field::Published, change);
            self.acknowledged_cuts[index] = change;
        }
        held.maps[place.number()] = None;
        self.map(held, place)?;
        self.board.add(Count::Cuts, 1);
        Ok(())
    }

    fn state(&self, name: usize) -> u64 {
        self.board.name(self.number, name, Name::Now).load(Ordering::SeqCst)
    }

    fn begin_name(&self, name: usize, state: u64) {
        self.board.name(self.number, name, Name::Begun).store(state, Ordering::SeqCst);
    }

    fn name_is(&self, name: usize, state: u64) {
        self.board.name(self.number, name, Name::Now).store(state, Ordering::SeqCst);
    }

    /// Makes, replaces or removes what is under a name.
    fn change_name(&mut self, held: &Held) -> Done {
        let name = self.below(NAMES);
        let (path, state) = (name_path(self.number, name), self.state(name));
        let whole = self.board.name(self.number, name, Name::Whole).load(Ordering::SeqCst) >= state;
        self.board.add(Count::Names, 1);
        if state.is_multiple_of(2) {
            self.begin_name(name, state + 1);
            let file = held.client.open(&path, OpenMode::create().exclusive())?;
            self.name_is(name, state + 1);
            self.fill(&file, name, state + 1)?;
            // Most are committed, and that goes for the name as well.
            if self.below(4) > 0 {
                let before = self.settled();
                file.commit()?;
                self.board.name(self.number, name, Name::Whole).store(state + 1, Ordering::SeqCst);
                self.is_durable(&before);
            }
            return Ok(());
        }
        if whole && self.below(2) == 0 {
            let beside = format!("{path}-new");
            let file = held.client.open(&beside, OpenMode::create().truncate())?;
            self.fill(&file, name, state + 2)?;
            file.commit()?;
            self.board.name(self.number, name, Name::Whole).store(state + 2, Ordering::SeqCst);
            self.begin_name(name, state + 2);
            held.client.rename(&beside, &path)?;
            self.name_is(name, state + 2);
            return Ok(());
        }
        self.begin_name(name, state + 1);
        held.client.unlink(&path)?;
        self.name_is(name, state + 1);
        if self.below(3) == 0 { self.sync(held) } else { Ok(()) }
    }

    fn fill(&self, file: &File, name: usize, state: u64) -> Done {
        let words = named_words(self.number, name, state);
        file.write_at(0, &bytes(state, named_object(self.number, name), 0, words))
    }
}
