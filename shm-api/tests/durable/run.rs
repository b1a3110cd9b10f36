//! The rounds: a server, a storm on it, its death, and what is left.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use rustix::process::{Pid, Signal, kill_process};
use shm_api::client::{Client, ClientError};
use shm_api::protocol::ErrorCode;

use crate::board::{ALL_COUNTS, Board, CLIENTS, Count, Place, WINDOW, WINDOWS};
use crate::common::{Process, spawn};
use crate::drive::{Drive, GRACE};

/// A round that does not get on is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// A round that is to see so much, and is slow, ends all the same.
const LONGEST: Duration = Duration::from_secs(2);

/// What the rounds have come to.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    cuts: u64,
    lost_writes: u64,
    torn_writes: u64,
    lost_words: u64,
    killed_clients: u64,
    stopped_clients: u64,
}

struct Storm {
    seed: u64,
    random: Xoshiro256PlusPlus,
    socket: PathBuf,
    board_path: PathBuf,
    board: Board,
    drive: Drive,
    clients: Vec<Process>,
    incarnation: u64,
    sums: Sums,
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn signal(process: &Process, signal: Signal) {
    kill_process(Pid::from_child(&process.0), signal).unwrap();
}

/// So many rounds from one seed.
pub fn storm(seed: u64, rounds: u64) {
    println!("SEED={seed}");
    let ended = std::panic::catch_unwind(|| run(seed, rounds));
    if let Err(panic) = ended {
        eprintln!("the durable storm failed with SEED={seed}");
        std::panic::resume_unwind(panic);
    }
}

fn run(seed: u64, rounds: u64) {
    // In memory where that is to be had: a flush of the image is to cost nothing.
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let board_path = dir.path().join("board");
    let mut storm = Storm {
        seed,
        random: Xoshiro256PlusPlus::seed_from_u64(seed),
        socket: dir.path().join("s"),
        board: Board::create(&board_path),
        board_path,
        drive: Drive::new(dir.path(), seed),
        clients: Vec::new(),
        incarnation: 0,
        sums: Sums::default(),
    };
    storm.clients = (0..CLIENTS).map(|number| storm.start_client(number)).collect();
    for round in 0..rounds {
        storm.round(2 * round + 1);
    }
    storm.board.epoch().store(u64::MAX, Ordering::SeqCst);
    for client in &mut storm.clients {
        assert!(client.0.wait().unwrap().success(), "a client failed");
    }
    let count = |count| storm.board.count(count);
    println!(
        "{rounds} rounds, {:?}; {}",
        storm.sums,
        ALL_COUNTS.map(|c| format!("{c:?} {}", count(c))).join(", ")
    );
    assert!(count(Count::Commits) > 0 && count(Count::Gone) >= rounds, "nothing happened");
    assert!(storm.sums.lost_words > 0, "nothing was ever lost: it proves nothing");
}

impl Storm {
    fn below(&mut self, n: u64) -> u64 {
        self.random.next_u64() % n
    }

    fn start_client(&self, number: usize) -> Process {
        let numbers = [number as u64, self.incarnation, self.seed].map(|n| n.to_string());
        let args = [text(&self.socket), text(&self.board_path), &numbers[0], &numbers[1], &numbers[2]];
        let mut process = spawn("client", &args);
        wait_ready(&mut process);
        process
    }

    fn look_after_clients(&mut self) {
        for client in &mut self.clients {
            let ended = client.0.try_wait().unwrap();
            assert!(ended.is_none(), "a client ended: {ended:?}; its words are above");
        }
    }

    fn wait(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let started = Instant::now();
        while !done(self) {
            self.look_after_clients();
            assert!(started.elapsed() < PATIENCE, "never: {what}");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn round(&mut self, epoch: u64) {
        let cut = self.below(2) == 0;
        let (url, seed) = (self.drive.url(cut), self.random.next_u64().to_string());
        let mut server = spawn("serve", &[text(&self.socket), &url, &seed]);
        wait_ready(&mut server);
        self.board.epoch().store(epoch, Ordering::SeqCst);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (board, socket, over_now) = (self.board.clone(), self.socket.clone(), &over);
            let seed = self.seed ^ epoch << 32;
            let revoking = scope.spawn(move || revoke(&socket, &board, seed, over_now));
            let done =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.harm(&mut server, epoch, cut)));
            over.store(true, Ordering::SeqCst);
            drop(server);
            revoking.join().unwrap();
            if let Err(panic) = done {
                std::panic::resume_unwind(panic);
            }
        });
        self.wait("all clients know that the server is gone", |storm| {
            (0..CLIENTS).all(|client| storm.board.left(client).load(Ordering::SeqCst) == epoch)
        });
        self.sums.lost_words += self.drive.verify(&self.board, cut);
    }

    /// Lets the storm go on for a while, harms clients, and kills the server.
    fn harm(&mut self, server: &mut Process, epoch: u64, cut: bool) {
        self.wait("every client works", |storm| {
            (0..CLIENTS).all(|client| storm.board.worked(client).load(Ordering::SeqCst) == epoch)
        });
        let mut stopped = None;
        if self.below(3) == 0 {
            let victim = self.below(CLIENTS as u64) as usize;
            signal(&self.clients[victim], Signal::STOP);
            stopped = Some(victim);
            self.sums.stopped_clients += 1;
            let most = GRACE.as_micros() as u64 * 3;
            let pause = self.below(most);
            std::thread::sleep(Duration::from_micros(pause));
            if self.below(2) == 0 {
                signal(&self.clients[victim], Signal::CONT);
                stopped = None;
            }
        }
        self.wait_for_the_moment();
        server.0.kill().unwrap();
        let status = server.0.wait().unwrap();
        if cut {
            // The drive may not even have noticed yet, and do what the server has asked for last.
            self.cut();
        }
        assert!(status.code().is_none(), "the server ended by itself: {status}");
        self.board.epoch().store(epoch + 1, Ordering::SeqCst);
        if let Some(victim) = stopped {
            signal(&self.clients[victim], Signal::CONT);
        }
        if self.below(4) == 0 {
            let victim = self.below(CLIENTS as u64) as usize;
            self.clients[victim].0.kill().unwrap();
            self.clients[victim].0.wait().unwrap();
            self.board.left(victim).store(epoch, Ordering::SeqCst);
            self.incarnation += 1;
            self.clients[victim] = self.start_client(victim);
            self.sums.killed_clients += 1;
        }
    }

    fn cut(&mut self) {
        let how = self.random.next_u64();
        let (lost, torn) = self.drive.cut(how);
        self.sums.cuts += 1;
        self.sums.lost_writes += lost;
        self.sums.torn_writes += torn;
    }

    /// After so many turns of the clients, or of the drive's commands where it can be asked; and some moments later.
    fn wait_for_the_moment(&mut self) {
        let (turns, commands, later) = (self.below(300), 1 + self.below(400), self.below(2000));
        let by_commands = self.below(2) == 0;
        let from = (self.board.count(Count::Turns), self.drive.commands());
        let started = Instant::now();
        let reached = |storm: &Self| match (storm.drive.commands(), from.1) {
            (Some(now), Some(before)) if by_commands => now >= before + commands,
            _ => storm.board.count(Count::Turns) >= from.0 + turns,
        };
        while !reached(self) && started.elapsed() < LONGEST {
            std::thread::sleep(Duration::from_micros(50));
        }
        std::thread::sleep(Duration::from_micros(later));
    }
}

fn wait_ready(process: &mut Process) {
    let mut out = BufReader::new(process.0.stdout.take().unwrap());
    let mut line = String::new();
    while line.trim() != "ready" {
        line.clear();
        assert!(out.read_line(&mut line).unwrap() > 0, "the process ended too early");
    }
    // What it says from here on goes nowhere, and must not fill a pipe.
    std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
}

/// Takes windows back until the server is gone.
fn revoke(socket: &Path, board: &Board, seed: u64, over: &AtomicBool) {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed ^ 0x4e0);
    let gone = |e: &ClientError| matches!(e, ClientError::Gone(_) | ClientError::Connect { .. });
    let client = match Client::connect(socket) {
        Ok(client) => client,
        Err(e) if gone(&e) => return,
        Err(e) => panic!("the revoker: {e:?}"),
    };
    while !over.load(Ordering::Relaxed) {
        let place = Place::all().nth((random.next_u64() % 6) as usize).unwrap();
        let offset = (random.next_u64() % WINDOWS[place.kind] as u64) * WINDOW as u64;
        let done = match random.next_u64() % 8 {
            0 => client.revoke_all(),
            1 => client.revoke(&place.path()),
            _ => client.revoke_range(&place.path(), offset, WINDOW as u64),
        };
        match done {
            Ok(_) => board.add(Count::Revocations, 1),
            Err(e) if gone(&e) => return,
            Err(ClientError::Server(e)) if e.code == ErrorCode::NotResident => {}
            Err(e) => panic!("the revoker: {e:?}"),
        }
        std::thread::sleep(Duration::from_micros(random.next_u64() % 500));
    }
}
