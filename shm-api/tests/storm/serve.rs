//! The server, and a drive with something wrong in one command out of a few.

use std::io::BufRead;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use extent_fs::{Filesystem, FormatOptions, MountOptions, NewInode};
use nvme_driver::clock::ManualClock;
use nvme_driver::controller::ControllerOptions;
use nvme_driver::emu::{EmulatedController, Fault, Rule, Target};
use nvme_driver::spec::Status;
use p2p::refusal::Refusals;
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use shm_api::server::{Server, ServerOptions};

use crate::board::{FILE, FILES, PER_FILE, POISON, WINDOW, WORKING_SET, bytes_of};
use crate::common::{format, own};

/// Of 1000 placements.
const REFUSED: u16 = 60;
/// Commands from one fault to the next, on average.
const FAULT_EVERY: u64 = 12;
pub const GRACE: Duration = Duration::from_millis(10);

/// Arguments: socket, seed, where to put what is on the drive in the end, and whether the drive may be so bad that it is reset.
pub fn serve(args: &[String]) {
    let seed: u64 = args[1].parse().unwrap();
    let resets = args[3] == "true";
    let url = format!("emu:ram?size=32M&cmb={}K", WORKING_SET / 4 / 1024);
    // The drive's time goes on only while the driver waits for it: nobody waits for a timeout.
    let controller = ControllerOptions {
        io_timeout: Duration::from_millis(20),
        abort_timeout: Duration::from_millis(20),
        ..ControllerOptions::default()
    };
    let options = nvme_driver::OpenOptions { controller, clock: Arc::new(ManualClock::new()) };
    let device = nvme_driver::open(&url.parse().unwrap(), &options).unwrap();
    let mut disk = device.disk().unwrap();
    format(&mut disk, FormatOptions::default());
    let mut fs = Filesystem::mount(disk, MountOptions::default()).unwrap();
    let (mut first, mut last) = (u64::MAX, 0);
    for file in 0..FILES {
        let ino = fs.create(format!("/data{file}"), &own(NewInode::file())).unwrap();
        for window in 0..PER_FILE {
            fs.write_at(ino, (window * WINDOW) as u64, &bytes_of(0, file * PER_FILE + window)).unwrap();
        }
        for extent in fs.query_blocks(ino, 0, FILE).unwrap() {
            (first, last) = (first.min(extent.lba), last.max(extent.lba + extent.blocks - 1));
        }
    }
    let ino = fs.create("/poison", &own(NewInode::file())).unwrap();
    fs.write_at(ino, 0, &POISON.to_le_bytes().repeat(2 * WINDOW / 8)).unwrap();
    fs.sync_all().unwrap();

    let options = ServerOptions {
        window_size: WINDOW,
        grace: GRACE,
        host_cache: WORKING_SET as u64 / 2,
        refusals: Refusals::new(seed, REFUSED),
        ..ServerOptions::new(Path::new(&args[0]))
    };
    let server = Server::new(fs, options).unwrap();
    let stop = server.stop_handle();
    let emulated = Arc::clone(device.emulated().unwrap());
    let calm = Arc::new(AtomicBool::new(false));
    let faults = {
        let (emulated, calm) = (Arc::clone(&emulated), Arc::clone(&calm));
        std::thread::spawn(move || bad_drive(&emulated, first..=last, (seed, resets), &calm))
    };
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            match line.unwrap().as_str() {
                "calm" => calm.store(true, Ordering::SeqCst),
                _ => stop.stop(),
            }
        }
    });
    println!("\nready");
    server.run().unwrap();
    faults.join().unwrap();
    println!("\ncounts {} {}", emulated.counters().injected, emulated.counters().resets);

    let mut fs = Filesystem::mount(device.disk().unwrap(), MountOptions::default()).unwrap();
    let mut image = vec![0; WORKING_SET];
    for (file, bytes) in image.chunks_exact_mut(FILE as usize).enumerate() {
        let ino = fs.lookup(format!("/data{file}")).unwrap();
        assert_eq!(fs.read_at(ino, 0, bytes).unwrap(), bytes.len());
    }
    std::fs::write(&args[2], image).unwrap();
}

/// Has a fault wait for a command on the files' blocks, again and again. The filesystem's own blocks are left alone: it takes no
/// more changes after an error there, and the storm would be over.
fn bad_drive(
    emulated: &EmulatedController,
    blocks: RangeInclusive<u64>,
    (seed, resets): (u64, bool),
    calm: &AtomicBool,
) {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed ^ 0xbad);
    let commands = || emulated.counters().io_commands.iter().sum::<u64>();
    let mut next = commands();
    while !calm.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(1));
        if commands() < next {
            continue;
        }
        let (fault, times) = match random.next_u64() % if resets { 12 } else { 8 } {
            // Aborted and sent again; three times in a row, and the driver gives up.
            0 | 1 => (Fault::Stall, 1),
            2 => (Fault::Stall, 3),
            // Late: within its time, and so late that it is aborted before.
            3 => (Fault::Delay { steps: 1 + random.next_u32() % 4 }, 2),
            4 => (Fault::Delay { steps: 5000 }, 1),
            5 => (Fault::Status(Status::COMMAND_INTERRUPTED), 1),
            6 => (Fault::Status(Status::UNRECOVERED_READ_ERROR.with_dnr()), 1),
            7 => (Fault::Status(Status::WRITE_FAULT.with_dnr()), 2),
            // Done, and not answered, or twice: the controller is reset. Three times in a row, and the driver gives up.
            8 | 9 => (Fault::Lose, 1),
            10 => (Fault::Lose, 3),
            _ => (Fault::Duplicate, 1),
        };
        let target = Target { queue: None, opcode: None, lba: Some(blocks.clone()) };
        emulated.faults().inject(Rule { target, skip: random.next_u64() % 4, times, fault });
        next = commands() + 1 + random.next_u64() % (2 * FAULT_EVERY);
    }
    emulated.faults().clear();
}
