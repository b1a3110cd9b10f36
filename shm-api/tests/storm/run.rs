//! The storm itself: processes, the revoker, stops and kills, and the sums at the end.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ChildStdout;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use rustix::process::{Pid, Signal, kill_process};
use shm_api::client::{Client, ClientError, File, Mapped, OpenMode, Status};
use shm_api::protocol::ErrorCode;

use crate::board::{ALL_COUNTS, Board, Count, FILES, PER_FILE, POISON, WINDOW, WINDOWS, WORDS};
use crate::common::{Process, connect, spawn, until};
use crate::serve::GRACE;

/// How much has to have happened. A storm ends when all of it has, and not before its time.
#[derive(Clone, Copy)]
pub struct Size {
    /// The drive is so bad that it is reset, and loses what was not committed.
    resets: bool,
    seconds: u64,
    revocations: u64,
    poisonings: u64,
    reads: u64,
    writes: u64,
    peer_copies: u64,
    /// Borrows that became snapshots while they were held; where the drive is reset, that may have been emptied.
    snapshots: u64,
    faults: u64,
    stops: u64,
    kills: u64,
}

impl Size {
    pub const SHORT: Self = Self {
        resets: false,
        seconds: 0,
        revocations: 300,
        poisonings: 10,
        reads: 1000,
        writes: 200,
        peer_copies: 20,
        snapshots: 5,
        faults: 10,
        stops: 4,
        kills: 2,
    };
    pub const TEN_SECONDS: Self = Self {
        resets: false,
        seconds: 10,
        revocations: 2000,
        poisonings: 60,
        reads: 6000,
        writes: 1500,
        peer_copies: 150,
        snapshots: 40,
        faults: 60,
        stops: 20,
        kills: 6,
    };
    pub const MINUTE: Self = Self {
        resets: false,
        seconds: 60,
        revocations: 12_000,
        poisonings: 360,
        reads: 36_000,
        writes: 9000,
        peer_copies: 900,
        snapshots: 240,
        faults: 360,
        stops: 120,
        kills: 36,
    };
    /// The same with a drive that is reset, for so many seconds.
    pub fn with_resets(self, seconds: u64) -> Self {
        Self { resets: true, seconds, ..self }
    }

    /// A storm that does not get there is stuck.
    const PATIENCE: u32 = 12;
}

/// What was done to the clients.
#[derive(Clone, Copy, Debug, Default)]
struct Harm {
    stops: u64,
    kills: u64,
}

/// What the revoker has done.
#[derive(Clone, Copy, Debug, Default)]
struct Revoked {
    calls: u64,
    windows: u64,
    fenced: u64,
    quarantined: u64,
    poisonings: u64,
    refused: u64,
}

struct Storm {
    seed: u64,
    size: Size,
    socket: PathBuf,
    board_path: PathBuf,
    board: Board,
    /// A process ended that should not have.
    failed: AtomicBool,
    over: AtomicBool,
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn wait_ready(process: &mut Process) -> BufReader<ChildStdout> {
    let mut out = BufReader::new(process.0.stdout.take().unwrap());
    let mut line = String::new();
    while line.trim() != "ready" {
        line.clear();
        assert!(out.read_line(&mut line).unwrap() > 0, "the process ended too early");
    }
    out
}

fn signal(process: &Process, signal: Signal) {
    kill_process(Pid::from_child(&process.0), signal).unwrap();
}

impl Storm {
    /// Starts a client; waits until it works.
    fn start(&self, number: usize, incarnation: u64) -> (Process, BufReader<ChildStdout>) {
        let numbers = [number as u64, incarnation, self.seed].map(|n| n.to_string());
        let args = [text(&self.socket), text(&self.board_path), &numbers[0], &numbers[1], &numbers[2]];
        let mut process = spawn("client", &args);
        let out = wait_ready(&mut process);
        (process, out)
    }

    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed) && !self.failed.load(Ordering::Relaxed)
    }

    /// Stops and kills clients until it is over; then has all of them end by themselves.
    fn harm(&self, harm: &std::sync::Mutex<Harm>) {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(self.seed ^ 0xdead);
        let mut clients: Vec<_> = (0..FILES).map(|n| self.start(n, 0)).collect();
        let mut incarnation = 0;
        while self.goes_on() {
            let number = (random.next_u64() % FILES as u64) as usize;
            let up_to = |most: Duration, random: &mut Xoshiro256PlusPlus| {
                Duration::from_nanos(random.next_u64() % most.as_nanos() as u64)
            };
            std::thread::sleep(up_to(GRACE * 4, &mut random));
            let ended = clients.iter_mut().find_map(|(process, _)| process.0.try_wait().unwrap());
            if let Some(status) = ended {
                eprintln!("a client ended: {status}");
                self.failed.store(true, Ordering::SeqCst);
                break;
            }
            signal(&clients[number].0, Signal::STOP);
            std::thread::sleep(up_to(GRACE * 3, &mut random));
            if random.next_u64().is_multiple_of(4) {
                clients[number].0.0.kill().unwrap();
                clients[number].0.0.wait().unwrap();
                incarnation += 1;
                clients[number] = self.start(number, incarnation);
                harm.lock().unwrap().kills += 1;
            } else {
                signal(&clients[number].0, Signal::CONT);
                harm.lock().unwrap().stops += 1;
            }
        }
        self.board.stop();
        for (mut process, _out) in clients {
            if !process.0.wait().unwrap().success() {
                self.failed.store(true, Ordering::SeqCst);
            }
        }
    }

    /// Revokes at full speed until enough has happened.
    fn revoke(&self, harm: &std::sync::Mutex<Harm>) -> Revoked {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(self.seed ^ 0x4e0);
        let client = connect(&self.socket);
        let mut eye = Eye::open(&client);
        let mut done = Revoked::default();
        let started = Instant::now();
        let size = self.size;
        while self.goes_on() {
            let window = (random.next_u64() % WINDOWS as u64) as usize;
            let report = match random.next_u64() % 16 {
                0 => client.revoke_all(),
                1 | 2 => client.revoke(&format!("/data{}", window / PER_FILE)),
                3 => {
                    eye.poison(&client, &mut done);
                    continue;
                }
                4 | 5 => {
                    // Back to the CMB, as far as there is room and nothing is refused.
                    tolerate(eye.windows[window].prefer_cmb(), &mut done);
                    continue;
                }
                _ => eye.files[window / PER_FILE].revoke_window((window % PER_FILE * WINDOW) as u64),
            };
            if let Some(report) = tolerate(report, &mut done) {
                done.windows += report.windows;
                done.fenced += report.fenced;
                done.quarantined += report.quarantined_pages;
            }
            done.calls += 1;
            if done.calls.is_multiple_of(64) {
                let harm = *harm.lock().unwrap();
                let peers = [Count::PeerReads, Count::PeerWrites].map(|c| self.board.get(c));
                let enough = started.elapsed().as_secs() >= size.seconds
                    && done.windows >= size.revocations
                    && done.poisonings >= size.poisonings
                    && self.board.get(Count::Reads) >= size.reads
                    && self.board.get(Count::Writes) >= size.writes
                    && peers.iter().all(|n| *n >= size.peer_copies)
                    && [Count::Snapshots, Count::LostBorrows].iter().map(|c| self.board.get(*c)).sum::<u64>()
                        >= size.snapshots
                    && harm.stops >= size.stops
                    && harm.kills >= size.kills;
                if enough {
                    break;
                }
                let patience = Duration::from_secs(size.seconds.max(10)) * Size::PATIENCE;
                assert!(started.elapsed() < patience, "stuck: {done:?}, {harm:?}, {}", self.counts());
            }
        }
        done
    }

    fn counts(&self) -> String {
        ALL_COUNTS.map(|c| format!("{c:?} {}", self.board.get(c))).join(", ")
    }

    /// The drive must hold what was published and what was seen.
    fn verify_drive(&self, image: &[u8]) {
        let mut least = Vec::new();
        for (window, bytes) in image.chunks_exact(WINDOW).enumerate() {
            self.board.least(window, 0, WORDS, &mut least);
            self.board.verify(window, 0, bytes, &least, "the drive");
        }
    }
}

/// What the revoker has mapped.
struct Eye {
    files: Vec<File>,
    /// One mapping for each window.
    windows: Vec<Mapped>,
    poison: [Mapped; 2],
    bytes: Vec<u8>,
}

impl Eye {
    fn open(client: &Client) -> Self {
        let files: Vec<File> =
            (0..FILES).map(|n| client.open(&format!("/data{n}"), OpenMode::read()).unwrap()).collect();
        let map = |w: usize| files[w / PER_FILE].map_read((w % PER_FILE * WINDOW) as u64, WINDOW as u64);
        let windows = (0..WINDOWS).map(|w| map(w).unwrap()).collect();
        let poison = client.open("/poison", OpenMode::read()).unwrap();
        let poison = [0, WINDOW as u64].map(|at| poison.map_read(at, WINDOW as u64).unwrap());
        Self { files, windows, poison, bytes: vec![0; WINDOW] }
    }

    /// Fills pages that were freed a moment ago with poison, and demands that it stays there.
    fn poison(&mut self, client: &Client, done: &mut Revoked) {
        for poison in &self.poison {
            if tolerate(poison.prefer_cmb(), done).is_none() {
                continue;
            }
            for _ in 0..3 {
                if tolerate(poison.read(0, &mut self.bytes), done).is_some() {
                    let whole = self.bytes.chunks_exact(8).all(|w| w == POISON.to_le_bytes());
                    assert!(whole, "something landed in pages that were freed");
                }
                std::thread::yield_now();
            }
            done.poisonings += u64::from(poison.paths().cmb_reads > 0);
        }
        tolerate(client.revoke("/poison"), done);
    }
}

/// What the drive and the refusals may cause; the revoker goes on.
fn tolerate<T>(result: Result<T, ClientError>, done: &mut Revoked) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(ClientError::Server(e)) if [ErrorCode::Device, ErrorCode::NotResident].contains(&e.code) => {
            done.refused += 1;
            None
        }
        Err(other) => panic!("the revoker: {other}"),
    }
}

/// One storm.
pub fn storm(seed: u64, size: Size) {
    println!("SEED={seed}");
    let ended = std::panic::catch_unwind(|| run(seed, size));
    if let Err(panic) = ended {
        eprintln!("the storm failed with SEED={seed}");
        std::panic::resume_unwind(panic);
    }
}

fn run(seed: u64, size: Size) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (socket, board_path, image_path) = (path("s"), path("board"), path("image"));
    let board = Board::create(&board_path);
    if size.resets {
        board.expect_losses();
    }
    let (seed_text, resets) = (seed.to_string(), size.resets.to_string());
    let mut server = spawn("serve", &[text(&socket), &seed_text, text(&image_path), &resets]);
    let mut out = wait_ready(&mut server);
    let mut stdin = server.0.stdin.take().unwrap();
    let storm = Storm {
        seed,
        size,
        socket,
        board_path,
        board,
        failed: AtomicBool::new(false),
        over: AtomicBool::new(false),
    };
    let harm = std::sync::Mutex::new(Harm::default());
    let started = Instant::now();
    let done = std::thread::scope(|scope| {
        let harming = scope.spawn(|| storm.harm(&harm));
        let revoking = scope.spawn(|| storm.revoke(&harm));
        let done = revoking.join();
        storm.over.store(true, Ordering::SeqCst);
        let harmed = harming.join();
        harmed.unwrap();
        done.unwrap()
    });
    assert!(!storm.failed.load(Ordering::SeqCst), "a client failed; its words are above");
    let lasted = started.elapsed();

    // Everybody is gone. With the drive well again, all pages come back, and everything gets to the drive.
    stdin.write_all(b"calm\n").unwrap();
    let client = connect(&storm.socket);
    until("pages in quarantine come back", || client.status().unwrap().cmb_quarantined == 0);
    let status = client.status().unwrap();
    for n in 0..FILES {
        let file = client.open(&format!("/data{n}"), OpenMode::write()).unwrap();
        until("everything can be committed", || file.commit().is_ok());
    }
    drop(client);
    stdin.write_all(b"stop\n").unwrap();
    let mut sums = String::new();
    out.read_to_string(&mut sums).unwrap();
    assert!(server.0.wait().unwrap().success(), "the server failed: {sums}");
    let sums: Vec<u64> = sums
        .lines()
        .find_map(|l| l.strip_prefix("counts "))
        .unwrap()
        .split(' ')
        .map(|n| n.parse().unwrap())
        .collect();
    storm.verify_drive(&std::fs::read(&image_path).unwrap());
    report(&storm, lasted, &done, *harm.lock().unwrap(), &status, &sums);
}

fn report(storm: &Storm, lasted: Duration, done: &Revoked, harm: Harm, status: &Status, sums: &[u64]) {
    println!(
        "{lasted:?}: {done:?}; {harm:?}; faults {}, controller resets {}; died {}; {}",
        sums[0],
        sums[1],
        status.died,
        storm.counts()
    );
    for line in &status.paths {
        println!("  {} ({}): {} of {} bytes", line.path, line.reason, line.count, line.bytes);
    }
    let count = |c| storm.board.get(c);
    assert!(sums[0] >= storm.size.faults, "only {} faults", sums[0]);
    assert!(count(Count::CmbReads) > 0 && count(Count::HostReads) > 0, "both homes served readers");
    // A client that is killed while it is being answered may count as one that does not take its answers.
    assert!(status.expelled <= harm.kills, "{} expelled", status.expelled);
    assert_eq!(sums[1] > 0, storm.size.resets, "{} resets", sums[1]);
}
