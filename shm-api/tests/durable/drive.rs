//! The drive: in the server's process or in this one, with a volatile write cache; its power, and what is on it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use extent_fs::{CheckOptions, Filesystem, FormatOptions, MountOptions, NewInode, check, format};
use nvme_driver::disk::Disk;
use nvme_driver::emu::{Backing, Config, EmulatedController, PowerCut};
use nvme_driver::vfio_user::server::Server as Served;
use nvme_driver::{Device, OpenOptions};
use p2p::refusal::Refusals;
use shm_api::server::{Server, ServerOptions, WriteBack};

use crate::board::{
    Board, CLIENTS, Field, NAMES, Name, Place, WINDOW, WINDOWS, bytes, name_path, named_object, named_words,
    word,
};

const SIZE: u64 = 8 << 20;
/// A quarter of the files.
const CMB: u64 = ((WINDOWS[0] + WINDOWS[1]) * CLIENTS / 4 * WINDOW) as u64;
/// Of 1000 placements.
const REFUSED: u16 = 20;
pub const GRACE: Duration = Duration::from_millis(10);

/// Arguments: socket, device, seed.
pub fn serve(args: &[String]) {
    let seed: u64 = args[2].parse().unwrap();
    let (_device, disk) = open(&args[1]);
    let fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    let options = ServerOptions {
        window_size: WINDOW,
        grace: GRACE,
        host_cache: 2 * CMB,
        refusals: Refusals::new(seed, REFUSED),
        // All the time, or only what commits and evictions write.
        write_back: seed.is_multiple_of(2).then_some(WriteBack { after: 10_000_000, rate: 256 << 20 }),
        ..ServerOptions::new(Path::new(&args[0]))
    };
    let server = Server::new(fs, options).unwrap();
    println!("\nready");
    server.run().unwrap();
}

fn open(url: &str) -> (Device, Box<dyn Disk>) {
    let device = nvme_driver::open(&url.parse().unwrap(), &OpenOptions::default()).unwrap();
    let disk = device.disk().unwrap();
    (device, disk)
}

/// A drive in this process, served over vfio-user.
struct Remote {
    controller: Arc<EmulatedController>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The drive of a storm.
pub struct Drive {
    dir: PathBuf,
    remote: Option<Remote>,
}

impl Drive {
    /// A new drive with the files on it.
    pub fn new(dir: &Path, seed: u64) -> Self {
        let remote = seed.is_multiple_of(2).then(|| {
            let config = Config {
                namespace: Backing::Ram { bytes: SIZE },
                lba_size: if seed.is_multiple_of(4) { 4096 } else { 512 },
                cmb_size: CMB,
                seed,
                ..Config::default()
            };
            let controller = EmulatedController::new(&config).unwrap();
            let served = Served::bind(&dir.join("cntrl"), controller.function()).unwrap();
            let stop = Arc::new(AtomicBool::new(false));
            let thread = {
                let stop = Arc::clone(&stop);
                std::thread::spawn(move || served.run(&stop).unwrap())
            };
            Remote { controller, stop, thread: Some(thread) }
        });
        let drive = Self { dir: dir.to_owned(), remote };
        let (_device, mut disk) = open(&drive.url(false));
        format(&mut disk, &FormatOptions::default()).unwrap();
        let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
        for place in Place::all() {
            let ino = fs.create(place.path(), &NewInode::file()).unwrap();
            if place.kind == 0 {
                fs.write_at(ino, 0, &bytes(1, place.number(), 0, place.words())).unwrap();
            }
        }
        fs.unmount().unwrap();
        drive
    }

    /// How to reach it. `lossy`: where it is in the server's process, that is killed with the drive's power.
    pub fn url(&self, lossy: bool) -> String {
        let dir = self.dir.display();
        if self.remote.is_some() {
            return format!("vfio-user:{dir}/cntrl");
        }
        format!("emu:{dir}/disk.img?size={SIZE}&cmb={CMB}&cache={}", if lossy { "lossy" } else { "on" })
    }

    /// Commands that a drive in this process has executed.
    pub fn commands(&self) -> Option<u64> {
        self.remote.as_ref().map(|remote| remote.controller.counters().io_total())
    }

    /// Takes its power, if it is in this process. Says how many writes were lost, and how many were torn.
    pub fn cut(&self, random: u64) -> (u64, u64) {
        let Some(remote) = &self.remote else { return (0, 0) };
        let how = match random % 8 {
            0 => PowerCut::LoseAll,
            1 => PowerCut::KeepAll,
            _ => PowerCut::Random,
        };
        let report = remote.controller.power_cut(how).unwrap();
        (report.lost, report.torn)
    }

    /// Checks the drive, and that everything on it is something that may be there. From then on it is that. `cut`: and will be after the
    /// next cut; otherwise some of it is in the drive's cache yet. Says how many words were not of the last change that was begun.
    pub fn verify(&self, board: &Board, cut: bool) -> u64 {
        // As a server would find it; nothing is written.
        let (_device, mut disk) = open(&self.url(true));
        let report = check(&mut disk, &CheckOptions::default()).unwrap();
        assert!(report.is_clean(), "{report:?}");
        let options = MountOptions { read_only: true, ..MountOptions::default() };
        let mut fs = Filesystem::mount(disk, options).unwrap();
        let mut lost = 0;
        for place in Place::all() {
            let ino = fs.lookup(place.path()).unwrap();
            let mut found = vec![0; place.words() * 8];
            fs.read_at(ino, 0, &mut found).unwrap();
            for (index, found) in found.chunks_exact(8).enumerate() {
                let found = u64::from_le_bytes(found.try_into().unwrap());
                let durable = board.get(place, index, Field::Durable);
                let change = board
                    .change_of(place, index, found, durable)
                    .unwrap_or_else(|why| panic!("the drive: word {index} of {}: {why}", place.path()));
                lost += u64::from(board.get(place, index, Field::Begun) != change);
                board.set(place, index, Field::Begun, change);
                board.set(place, index, Field::Published, change);
                let last_cut = board.get(place, index, Field::Cut);
                if last_cut > change {
                    // It is no more; an earlier one may be.
                    board.set(place, index, Field::Cut, if cut { 0 } else { change });
                }
                if cut {
                    board.set(place, index, Field::Durable, change);
                }
            }
        }
        for client in 0..CLIENTS {
            (0..NAMES).for_each(|name| verify_name(&mut fs, board, (client, name), cut));
        }
        lost
    }
}

/// What is under a name that comes and goes: nothing or one of the states between the last that is durable for sure and the last that was begun.
fn verify_name(fs: &mut Filesystem<Box<dyn Disk>>, board: &Board, (client, name): (usize, usize), cut: bool) {
    let path = name_path(client, name);
    let [durable, begun, whole] = [Name::Durable, Name::Begun, Name::Whole]
        .map(|field| board.name(client, name, field).load(Ordering::SeqCst));
    let between = durable..=begun;
    let now = match fs.lookup(&path) {
        // Of all states without it, the last.
        Err(_) => between.rev().find(|state| state % 2 == 0),
        Ok(ino) => {
            let size = fs.stat(ino).unwrap().size;
            let mut found = vec![0; size as usize];
            fs.read_at(ino, 0, &mut found).unwrap();
            between.rev().filter(|state| state % 2 == 1).find(|&state| {
                let words = named_words(client, name, state);
                let object = named_object(client, name);
                let is = |(index, found): (usize, &[u8])| {
                    let found = u64::from_le_bytes(found.try_into().unwrap());
                    found == word(state, object, index) || state > whole && found == 0
                };
                let len = found.len();
                (len == words * 8 || state > whole && len <= words * 8)
                    && found.chunks_exact(8).enumerate().all(is)
            })
        }
    };
    let Some(now) = now else {
        panic!("the drive: {path} is in no state from {durable} to {begun} (whole up to {whole})");
    };
    // A state that was to come, and did not, may come again.
    board.name(client, name, Name::Whole).store(whole.min(now), Ordering::SeqCst);
    board.name(client, name, Name::Now).store(now, Ordering::SeqCst);
    board.name(client, name, Name::Begun).store(now, Ordering::SeqCst);
    if cut {
        board.name(client, name, Name::Durable).store(now, Ordering::SeqCst);
    }
}
