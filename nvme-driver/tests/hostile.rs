//! A controller whose registers lie and whose memory writes are random: the driver may fail, with typed errors and in
//! bounded time, but it neither panics nor hangs.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]
mod wrap;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nvme_driver::clock::{Clock, ManualClock};
use nvme_driver::controller::{Controller, ControllerOptions};
use nvme_driver::disk::Disk;
use nvme_driver::emu::{Backing, Config, EmulatedController};
use nvme_driver::mem::Mapping;
use nvme_driver::nvme_disk::NvmeDisk;
use nvme_driver::pci::PciFunction;
use nvme_driver::spec::{AdminOpcode, Command, regs};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use wrap::{Hands, Wrapped};

/// The noise between an emulated controller and the driver.
struct Noise {
    rng: Xoshiro256PlusPlus,
    /// One register read in so many lies; one step in so many writes to host memory. 0: never.
    registers: u32,
    memory: u32,
    /// Memory, its length and its IOVA.
    mapped: Vec<(Arc<Mapping>, usize, u64)>,
}

impl Noise {
    fn hits(&mut self, one_in: u32) -> bool {
        one_in > 0 && self.rng.next_u32().is_multiple_of(one_in)
    }

    /// A register value: random, all ones, zero, or with one bit flipped.
    fn bend(&mut self, value: u64) -> u64 {
        if !self.hits(self.registers) {
            return value;
        }
        match self.rng.next_u32() % 5 {
            0 => u64::MAX,
            1 => 0,
            2 => self.rng.next_u64(),
            _ => value ^ 1 << (self.rng.next_u32() % 64),
        }
    }

    /// Writes 16 bytes that look a little like a completion where the driver looks for one, or a little further on.
    fn scribble(&mut self, inner: &dyn PciFunction) {
        let qid = u16::from(!self.rng.next_u32().is_multiple_of(8));
        let doorbells = inner.map_bar(0, regs::DOORBELLS, 4096).unwrap().unwrap();
        let doorbell = (regs::cq_head_doorbell(qid, 0) - regs::DOORBELLS) as usize;
        let head = u64::from(doorbells.u32_at(doorbell).unwrap().load(Ordering::Relaxed));
        let Some(queue) = self.completion_queue(inner, qid) else { return };
        let random = self.rng.next_u64();
        // Small sqhd, sqid and cid; mostly success.
        let mask = if random % 8 > 2 { 0x0001_003f_0001_000f } else { 0x0003_ffff_0001_ffff };
        let high = self.rng.next_u64() & mask;
        let at = queue + (head + random / 8 % 4) % 256 * 16;
        for (at, word) in [(at, random), (at + 8, high)] {
            if let Some((memory, offset)) = self.find(at) {
                memory.u64_at(offset).unwrap().store(word, Ordering::Relaxed);
            }
        }
    }

    fn find(&self, iova: u64) -> Option<(&Mapping, usize)> {
        self.mapped.iter().find_map(|(memory, len, at)| {
            let offset = iova.checked_sub(*at)? as usize;
            (offset < *len).then_some((&**memory, offset))
        })
    }

    /// The bus address of a completion queue: the I/O queue's from the command that created it, which is still in the
    /// admin submission queue.
    fn completion_queue(&self, inner: &dyn PciFunction, qid: u16) -> Option<u64> {
        if qid == 0 {
            return inner.read64(0, regs::ACQ).ok();
        }
        let asq = inner.read64(0, regs::ASQ).ok()?;
        (0..32).find_map(|i| {
            let mut bytes = [0; 64];
            let (memory, offset) = self.find(asq + i * 64)?;
            memory.read(offset, &mut bytes).ok()?;
            let command: Command = bytemuck::pod_read_unaligned(&bytes);
            (command.opcode() == AdminOpcode::CreateIoCq as u8).then_some(command.prp1)
        })
    }
}

impl Hands for Mutex<Noise> {
    fn register(&self, _offset: u64, value: u64) -> u64 {
        self.lock().unwrap().bend(value)
    }
    fn map(&self, memory: &Arc<Mapping>, len: usize, iova: u64) -> Result<(), String> {
        self.lock().unwrap().mapped.push((Arc::clone(memory), len, iova));
        Ok(())
    }
    fn stepped(&self, inner: &dyn PciFunction) {
        let mut noise = self.lock().unwrap();
        let one_in = noise.memory;
        if noise.hits(one_in) {
            noise.scribble(inner);
        }
    }
}

/// Opens a disk and uses it; counts calls that succeeded and that failed.
fn run(seed: u64, registers: u32, memory: u32) -> (u32, u32) {
    let config = Config {
        namespace: Backing::Ram { bytes: 4 << 20 },
        lba_size: 4096,
        cmb_size: 1 << 20,
        mdts: 3,
        seed,
        ..Config::default()
    };
    let emulated = EmulatedController::new(&config).unwrap();
    let rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let noise = Mutex::new(Noise { rng, registers, memory, mapped: Vec::new() });
    let function = Arc::new(Wrapped { inner: emulated.function(), hands: noise });
    let clock = Arc::new(ManualClock::new());
    let options = ControllerOptions {
        io_timeout: Duration::from_millis(100),
        abort_timeout: Duration::from_millis(20),
        admin_timeout: Duration::from_millis(100),
        ..ControllerOptions::default()
    };
    let (mut good, mut bad) = (0, 0);
    let mut tally = |ok: bool| if ok { good += 1 } else { bad += 1 };
    let opened = Controller::new(function, options, Arc::clone(&clock) as Arc<dyn Clock>);
    tally(opened.is_ok());
    if let Ok(controller) = opened {
        let disk = NvmeDisk::new(&controller);
        tally(disk.is_ok());
        if let Ok(mut disk) = disk {
            let mut buffer = vec![0; 64 * 4096];
            for round in 0..20 {
                tally(disk.read(round, &mut buffer).is_ok());
                tally(disk.write(round, &buffer[..4096]).is_ok());
                tally(disk.flush().is_ok());
                tally(disk.read_to_cmb(round, 0, 64 * 4096).is_ok());
            }
        }
    }
    // CAP.TO may say 127.5 s, CRTO 9 h, RTD3E more than an hour; all of it in injected time.
    assert!(clock.now() < Duration::from_secs(400_000), "seed {seed}: {:?}", clock.now());
    (good, bad)
}

/// `CMBFS_FUZZ_SECONDS`: how long to go on with new seeds; without it, a fixed handful. `CMBFS_SEED`: the first one.
#[test]
fn random_registers_and_completions_neither_panic_nor_hang_the_driver() {
    let number = |name| std::env::var(name).ok().and_then(|s| s.parse::<u64>().ok());
    let (seconds, first) = (number("CMBFS_FUZZ_SECONDS"), number("CMBFS_SEED").unwrap_or(0));
    let start = std::time::Instant::now();
    let (mut good, mut bad) = (0, 0);
    for seed in first.. {
        match seconds {
            Some(s) if start.elapsed() >= Duration::from_secs(s) => {
                println!("{} controllers: {good} calls succeeded, {bad} failed", seed - first);
                break;
            }
            None if seed - first == 60 => break,
            _ => {}
        }
        let (registers, memory) = [(0, 4), (40, 0), (400, 20), (15, 100)][seed as usize % 4];
        let Ok((g, b)) = std::panic::catch_unwind(|| run(seed, registers, memory)) else {
            panic!("failed with CMBFS_SEED={seed}");
        };
        (good, bad) = (good + g, bad + b);
    }
    assert!(good > 100 && bad > 100, "{good} calls succeeded, {bad} failed");
}
