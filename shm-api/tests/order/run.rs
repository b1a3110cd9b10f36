//! The server, everybody around it, and what the judge is told.

use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use extent_fs::{Filesystem, FormatOptions, MountOptions, NewInode};
use nvme_driver::OpenOptions;
use nvme_driver::clock::ManualClock;
use nvme_driver::controller::ControllerOptions;
use nvme_driver::emu::{EmulatedController, Fault, Rule, Target};
use nvme_driver::pmr::Pmr;
use p2p::refusal::Refusals;
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use rustix::process::{Pid, Signal, kill_process};
use shm_api::Placement;
use shm_api::client::{Client, ClientError, File, Mapped};
use shm_api::protocol::ErrorCode;
use shm_api::server::{Server, ServerOptions, WriteBack};

use crate::common::{Process, connect, skip, spawn, until};
use crate::history::{
    Entry, History, Kind, LOCATIONS, Location, OBJECTS, PLACES, RECORD, WINDOW, WINDOWS, now, record,
};
use crate::judge::{Reset, judge};
use crate::parties::open;

pub const GRACE: Duration = Duration::from_millis(5);
const PARTIES: usize = 4;
/// Operations that a storm goes on for when its time is over, but no longer than so.
const ENOUGH: usize = 12_000;
const LONGEST: Duration = Duration::from_secs(20);
const OBJECT: u64 = (WINDOWS * WINDOW) as u64;

#[derive(Clone, Copy)]
pub struct Size {
    pub lasts: Duration,
    pub resets: bool,
}

/// Arguments: socket, seed, whether the drive is reset, and where to note when that was.
pub fn serve(args: &[String]) {
    let seed: u64 = args[1].parse().unwrap();
    let resets = args[2] == "true";
    // The CMB has room for four windows, the host cache for ten; fifteen there are.
    // The drive's time goes on only while the driver waits for it: nobody waits for a timeout.
    let controller = ControllerOptions {
        io_timeout: Duration::from_millis(20),
        abort_timeout: Duration::from_millis(20),
        ..ControllerOptions::default()
    };
    let opening = OpenOptions { controller, clock: Arc::new(ManualClock::new()) };
    let device = nvme_driver::open(&"emu:ram?size=16M&cmb=64K&pmr=64K".parse().unwrap(), &opening).unwrap();
    let emulated = Arc::clone(device.emulated().unwrap());
    let pmr = Arc::new(Pmr::enable(device.controller().unwrap()).unwrap());
    let mut disk = device.disk().unwrap();
    extent_fs::format(&mut disk, &FormatOptions::default()).unwrap();
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    let (mut first, mut last) = (u64::MAX, 0);
    for path in ["/auto", "/host"] {
        let ino = fs.create(path, &NewInode::file()).unwrap();
        fs.write_at(ino, 0, &[1; OBJECT as usize]).unwrap();
        for extent in fs.query_blocks(ino, 0, OBJECT).unwrap() {
            (first, last) = (first.min(extent.lba), last.max(extent.lba + extent.blocks - 1));
        }
    }
    fs.sync_all().unwrap();
    let options = ServerOptions {
        window_size: WINDOW,
        grace: GRACE,
        host_cache: 10 * WINDOW as u64,
        refusals: Refusals::new(seed, 20),
        write_back: Some(WriteBack { after: 10_000_000, rate: 256 << 20 }),
        pmr: Some(pmr),
        ..ServerOptions::new(Path::new(&args[0]))
    };
    let server = Server::new(fs, options).unwrap();
    let stop = server.stop_handle();
    let over = Arc::new(AtomicBool::new(false));
    let watching = {
        let (emulated, over, path) = (Arc::clone(&emulated), Arc::clone(&over), PathBuf::from(&args[3]));
        let resets = resets.then_some(first..=last);
        std::thread::spawn(move || watch(&emulated, seed, resets, &over, &path))
    };
    let (calm, ending) = (Arc::clone(&over), Arc::clone(&emulated));
    std::thread::spawn(move || {
        // First the drive is to be well, so that everything gets there; then it is over.
        let mut lines = std::io::stdin().lock().lines();
        lines.next();
        calm.store(true, Ordering::SeqCst);
        let _ = watching.join();
        ending.faults().clear();
        println!("\ncalm");
        lines.next();
        stop.stop();
    });
    println!("\nready");
    server.run().unwrap();
}

/// Has the drive reset now and then, by commands on these blocks, and notes between which two moments each reset was. They are the files':
/// after an error elsewhere the filesystem takes no more changes.
fn watch(
    emulated: &EmulatedController,
    seed: u64,
    blocks: Option<RangeInclusive<u64>>,
    over: &AtomicBool,
    path: &Path,
) {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed ^ 0xbad);
    let (mut seen, mut last) = (emulated.counters().resets, now());
    let (mut notes, mut next) = (String::new(), last + 200_000_000);
    while !over.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_micros(100));
        let before = now();
        let resets = emulated.counters().resets;
        if resets != seen {
            notes += &format!("{last} {}\n", now());
            seen = resets;
        }
        last = before;
        if blocks.is_some() && before > next {
            // One of the next commands there ends in a reset: its completion names a command that nobody sent.
            let target = Target { queue: None, opcode: None, lba: blocks.clone() };
            let skip = random.next_u64() % 4;
            emulated.faults().inject(Rule { target, skip, times: 1, fault: Fault::WrongCid(1) });
            next = before + 20_000_000 + random.next_u64() % 100_000_000;
        }
    }
    std::fs::write(path, notes).unwrap();
}

/// A party and its history.
struct Party {
    process: Process,
    history: PathBuf,
}

struct Storm {
    seed: u64,
    dir: tempfile::TempDir,
    parties: Vec<Party>,
    /// Histories of parties that are dead, and when they were.
    dead: Vec<(PathBuf, u64)>,
    number: u64,
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn wait_for(word: &str, out: &mut impl BufRead) {
    let mut line = String::new();
    while line.trim() != word {
        line.clear();
        assert!(out.read_line(&mut line).unwrap() > 0, "the process ended too early");
    }
}

/// One storm and its verdict.
pub fn storm(seed: u64, size: Size) {
    println!("SEED={seed}, resets: {}", size.resets);
    let ended = std::panic::catch_unwind(|| run(seed, size));
    if let Err(panic) = ended {
        eprintln!("there is no order with SEED={seed}, resets: {}", size.resets);
        std::panic::resume_unwind(panic);
    }
}

fn run(seed: u64, size: Size) {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let mut storm = Storm { seed, dir, parties: Vec::new(), dead: Vec::new(), number: 0 };
    let (socket, resets) = (storm.path("s"), storm.path("resets"));
    let (seed_text, resets_text) = (seed.to_string(), size.resets.to_string());
    let mut server = spawn("serve", &[text(&socket), &seed_text, &resets_text, text(&resets)]);
    let mut out = BufReader::new(server.0.stdout.take().unwrap());
    wait_for("ready", &mut out);
    let mut eye = Eye::new(&socket, History::create(&storm.path("eye")));
    let begun = now();
    storm.parties = (0..PARTIES).map(|_| storm.start()).collect();
    let python = storm.start_python(&socket);
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed ^ 0x4e0);
    let until = Instant::now() + size.lasts;
    let mut harmed = [0; 2];
    while Instant::now() < until || !storm.has_done_enough() && Instant::now() < until + LONGEST {
        eye.revoke(&mut random);
        if random.next_u64().is_multiple_of(64) {
            storm.harm(&mut random, &mut harmed);
        }
        std::thread::sleep(Duration::from_micros(random.next_u64() % 400));
    }
    std::fs::write(storm.path("over"), "").unwrap();
    for party in &mut storm.parties {
        assert!(party.process.0.wait().unwrap().success(), "a party failed; its words are above");
    }
    let by_python = python.map(python_notes).unwrap_or_default();
    server.0.stdin.as_mut().unwrap().write_all(b"calm\n").unwrap();
    wait_for("calm", &mut out);
    eye.look_at_everything();
    let Eye { history, client, files, maps, .. } = eye;
    drop((maps, files, client));
    drop(server.0.stdin.take());
    assert!(server.0.wait().unwrap().success(), "the server failed");

    let end = now();
    let mut entries: Vec<Entry> = history.entries(end).collect();
    for party in &storm.parties {
        entries.extend(History::open(&party.history).entries(end));
    }
    for (history, death) in &storm.dead {
        entries.extend(History::open(history).entries(*death));
    }
    let resets: Vec<Reset> = std::fs::read_to_string(&resets)
        .unwrap()
        .lines()
        .map(|line| {
            let (from, to) = line.split_once(' ').unwrap();
            Reset { from: from.parse().unwrap(), to: to.parse().unwrap() }
        })
        .filter(|reset| reset.to > begun)
        .collect();
    let count = |kind| entries.iter().filter(|entry| entry.kind == kind).count();
    println!(
        "{} writes, {} reads and {} by Python, {} commits, {} resets, {harmed:?} stopped and killed",
        count(Kind::Write),
        count(Kind::Read),
        by_python.len(),
        count(Kind::Commit),
        resets.len()
    );
    assert!(count(Kind::Write) > 100 && count(Kind::Read) > 100, "nothing happened");
    assert_eq!(!resets.is_empty(), size.resets, "resets");
    entries.extend(by_python);
    judge(&entries, &resets);
}

impl Storm {
    fn has_done_enough(&self) -> bool {
        let alive = self.parties.iter().map(|party| &party.history);
        let all = alive.chain(self.dead.iter().map(|(history, _)| history));
        all.map(|history| History::open(history).len()).sum::<usize>() >= ENOUGH
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&mut self) -> Party {
        let number = self.number;
        self.number += 1;
        let history = self.path(&format!("history{number}"));
        History::create(&history);
        let (socket, over) = (self.path("s"), self.path("over"));
        let numbers = [number, self.seed].map(|n| n.to_string());
        let args = [text(&socket), text(&history), &numbers[0], &numbers[1], text(&over)];
        let mut process = spawn("party", &args);
        let mut out = BufReader::new(process.0.stdout.take().unwrap());
        wait_for("ready", &mut out);
        // What it says from here on goes nowhere, and must not fill a pipe.
        std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
        Party { process, history }
    }

    fn start_python(&self, socket: &Path) -> Option<(Child, BufReader<std::process::ChildStdout>)> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let started = Command::new("python3")
            .arg(here.join("tests/order/reader.py"))
            .args([&here.join("python"), socket])
            .arg(self.seed.to_string())
            .arg(self.path("over"))
            .args([WINDOWS, PLACES, WINDOW].map(|n| n.to_string()))
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = started else {
            skip("order", "this machine has no python3");
            return None;
        };
        let mut out = BufReader::new(child.stdout.take().unwrap());
        wait_for("ready", &mut out);
        Some((child, out))
    }

    /// Stops a party for a while, or kills it.
    fn harm(&mut self, random: &mut Xoshiro256PlusPlus, harmed: &mut [u64; 2]) {
        let victim = (random.next_u64() % PARTIES as u64) as usize;
        let pid = Pid::from_child(&self.parties[victim].process.0);
        let ended = self.parties[victim].process.0.try_wait().unwrap();
        assert!(ended.is_none_or(|status| status.success()), "a party ended: {ended:?}");
        if ended.is_some() {
            return;
        }
        kill_process(pid, Signal::STOP).unwrap();
        std::thread::sleep(Duration::from_micros(random.next_u64() % (GRACE.as_micros() as u64 * 3)));
        if random.next_u64().is_multiple_of(4) {
            let new = self.start();
            let mut old = std::mem::replace(&mut self.parties[victim], new);
            old.process.0.kill().unwrap();
            old.process.0.wait().unwrap();
            self.dead.push((old.history, now()));
            harmed[1] += 1;
        } else {
            kill_process(pid, Signal::CONT).unwrap();
            harmed[0] += 1;
        }
    }
}

fn python_notes((mut child, mut out): (Child, BufReader<std::process::ChildStdout>)) -> Vec<Entry> {
    let mut text = String::new();
    out.read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success(), "the reader in Python failed");
    let mut lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.pop(), Some("over"));
    let entry = |line: &str| {
        let fields: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| fields[at].parse::<u64>().unwrap();
        let bytes: Vec<u8> =
            (0..RECORD).map(|at| u8::from_str_radix(&fields[3][2 * at..2 * at + 2], 16).unwrap()).collect();
        Entry::read(Location(number(0) as usize), number(1), number(2), &bytes)
    };
    lines.into_iter().map(entry).collect()
}

/// The revoker, who also writes the first records and reads the last.
struct Eye {
    client: Client,
    files: Vec<File>,
    maps: Vec<Mapped>,
    history: History,
}

impl Eye {
    fn new(socket: &Path, history: History) -> Self {
        let client = connect(socket);
        client.set_placement("/host", Placement::Host).unwrap();
        let _raw = client.allocate_shared("scratch", OBJECT).unwrap();
        let peer = client.attach_peer(OBJECT).unwrap();
        let _exported = peer.export("gpu").unwrap();
        let files: Vec<File> = (0..OBJECTS).map(|object| open(&client, object).unwrap()).collect();
        let maps: Vec<Mapped> = files.iter().map(|file| file.map(0, OBJECT).unwrap()).collect();
        for at in (0..LOCATIONS).map(Location) {
            maps[at.object()].write((at.window() + at.within()) as u64, &record(0, at)).unwrap();
        }
        for object in [0, 1, 3, 4] {
            files[object].commit().unwrap();
        }
        Self { client, files, maps, history }
    }

    /// Takes some windows back, or wants them in the CMB.
    fn revoke(&mut self, random: &mut Xoshiro256PlusPlus) {
        let object = (random.next_u64() % OBJECTS as u64) as usize;
        let window = random.next_u64() % WINDOWS as u64 * WINDOW as u64;
        let done = match random.next_u64() % 16 {
            0 => self.client.revoke_all().map(drop),
            1 => self.client.revoke("/auto").map(drop),
            2..7 => self.maps[object].prefer_cmb(),
            _ => self.files[object].revoke_window(window).map(drop),
        };
        if let Err(e) = done {
            let known = [ErrorCode::Device, ErrorCode::NotResident, ErrorCode::DataLost];
            assert!(e.code().is_some_and(|code| known.contains(&code)), "the revoker: {e:?}");
        }
    }

    /// In the end, where it is, and where it is afterwards.
    fn look_at_everything(&mut self) {
        for object in [0, 1] {
            // What resets took is told once.
            until("everything can be committed", || self.files[object].commit().is_ok());
        }
        for _ in 0..2 {
            for at in (0..LOCATIONS).map(Location) {
                let mut bytes = [0; RECORD];
                let start = now();
                let read = self.maps[at.object()].read((at.window() + at.within()) as u64, &mut bytes);
                match read {
                    Ok(()) => self.history.read(at, start, &bytes),
                    Err(ClientError::Server(_)) => {}
                    Err(e) => panic!("{e:?}"),
                }
            }
            let _ = self.client.revoke_all();
        }
    }
}
