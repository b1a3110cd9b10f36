//! A controller whose registers lie and whose memory writes are random: the driver may fail, with typed errors and in
//! bounded time, but it neither panics nor hangs.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]
mod tape;
mod wrap;

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nvme_driver::clock::{Clock, ManualClock};
use nvme_driver::controller::{Controller, ControllerOptions};
use nvme_driver::disk::Disk;
use nvme_driver::emu::{Backing, Config, EmulatedController};
use nvme_driver::mem::Mapping;
use nvme_driver::nvme_disk::NvmeDisk;
use nvme_driver::pci::PciFunction;
use nvme_driver::spec::{AdminOpcode, Command, regs};
use tape::{Feature, Tape, campaign};
use wrap::{Hands, Wrapped};

/// The noise between an emulated controller and the driver.
struct Noise {
    tape: Arc<Mutex<Tape>>,
    /// One register read in so many lies; one step in so many writes to host memory. 0: never.
    registers: u64,
    memory: u64,
    /// Register reads and steps until the next time.
    until: [u64; 2],
    /// Memory, its length and its IOVA.
    mapped: Vec<(Arc<Mapping>, usize, u64)>,
}

/// Entries of the I/O queue: as many as a disk has commands in flight, and room.
const ENTRIES: u64 = 64;

impl Noise {
    fn new(tape: Arc<Mutex<Tape>>) -> Self {
        let kind = tape.lock().unwrap().below(6);
        let (registers, memory) = [(0, 4), (40, 0), (400, 20), (15, 100), (5, 5), (0, 400)][kind as usize];
        let mut new = Self { tape, registers, memory, until: [0; 2], mapped: Vec::new() };
        new.until = [new.next(registers), new.next(memory)];
        new
    }

    /// How long nothing happens where something happens one in `one_in` times. Nothing more, once the tape is over.
    fn next(&mut self, one_in: u64) -> u64 {
        let mut tape = self.tape.lock().unwrap();
        if one_in == 0 || tape.is_over() { u64::MAX } else { tape.below(2 * one_in) }
    }

    fn hits(&mut self, which: usize) -> bool {
        let hit = self.until[which] == 0;
        self.until[which] = if hit {
            self.next([self.registers, self.memory][which])
        } else {
            self.until[which] - u64::from(self.until[which] != u64::MAX)
        };
        hit
    }

    /// A register value: random, all ones, zero, or with one bit flipped.
    fn bend(&mut self, value: u64) -> u64 {
        if !self.hits(0) {
            return value;
        }
        let mut tape = self.tape.lock().unwrap();
        match tape.below(5) {
            0 => u64::MAX,
            1 => 0,
            2 => tape.any(),
            _ => value ^ 1 << tape.below(64),
        }
    }

    /// Writes 16 bytes that look a little like a completion where the driver looks for one, or a little further on.
    fn scribble(&mut self, inner: &dyn PciFunction) {
        let mut tape = self.tape.lock().unwrap();
        let qid = u16::from(tape.below(8) != 0);
        let doorbells = inner.map_bar(0, regs::DOORBELLS, 4096).unwrap().unwrap();
        let doorbell = (regs::cq_head_doorbell(qid, 0) - regs::DOORBELLS) as usize;
        let head = u64::from(doorbells.u32_at(doorbell).unwrap().load(Ordering::Relaxed));
        let Some(queue) = self.completion_queue(inner, qid) else { return };
        let low = tape.any();
        // Small sqhd, sqid and cid; mostly success.
        let mask = if tape.below(8) > 2 { 0x0001_003f_0001_000f } else { 0x0003_ffff_0001_ffff };
        let high = tape.any() & mask;
        // The driver may be an eighth of the queue ahead of what its doorbell says.
        let at = queue + (head + tape.below(ENTRIES / 8 + 4)) % ENTRIES * 16;
        for (at, word) in [(at, low), (at + 8, high)] {
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
        if noise.hits(1) {
            noise.scribble(inner);
        }
    }
}

/// What the calls came to.
#[derive(Default)]
struct Log {
    good: u32,
    bad: u32,
    reached: HashSet<Feature>,
}

impl Log {
    /// One call: whether it succeeded, and if not, the two outermost kinds of its error.
    fn note<T, E: std::fmt::Debug>(&mut self, call: u32, result: &Result<T, E>) {
        let Err(e) = result else {
            self.good += 1;
            self.reached.insert([call, 0, 0]);
            return;
        };
        self.bad += 1;
        let text = format!("{e:?}");
        let words = text.split(|c: char| !c.is_ascii_alphanumeric());
        let kinds = words.filter(|word| word.starts_with(|c: char| c.is_ascii_uppercase())).take(2);
        let hash = kinds
            .flat_map(str::bytes)
            .fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        self.reached.insert([call, 1, hash]);
    }
}

/// Opens a disk and uses it.
fn run(tape: &Arc<Mutex<Tape>>) -> Log {
    let config = Config {
        namespace: Backing::Ram { bytes: 4 << 20 },
        lba_size: 4096,
        cmb_size: 1 << 20,
        mdts: 3,
        ..Config::default()
    };
    let emulated = EmulatedController::new(&config).unwrap();
    let hands = Mutex::new(Noise::new(Arc::clone(tape)));
    let function = Arc::new(Wrapped { inner: emulated.function(), hands });
    let clock = Arc::new(ManualClock::new());
    let options = ControllerOptions {
        io_timeout: Duration::from_millis(100),
        abort_timeout: Duration::from_millis(20),
        admin_timeout: Duration::from_millis(100),
        queue_entries: ENTRIES as u16,
        ..ControllerOptions::default()
    };
    let mut log = Log::default();
    let opened = Controller::new(function, options, Arc::clone(&clock) as Arc<dyn Clock>);
    log.note(0, &opened);
    if let Ok(controller) = opened {
        let disk = NvmeDisk::new(&controller);
        log.note(1, &disk);
        if let Ok(mut disk) = disk {
            let mut buffer = vec![0; 64 * 4096];
            for round in 0..20 {
                log.note(2, &disk.read(round, &mut buffer));
                log.note(3, &disk.write(round, &buffer[..4096]));
                log.note(4, &disk.flush());
                log.note(5, &disk.read_to_cmb(round, 0, 64 * 4096));
            }
            let r = disk.recoveries();
            for (i, n) in (100..).zip([r.aborts, r.replays, r.resets, r.resets_elsewhere, r.protocol_errors])
            {
                log.reached.insert([i, (n + 1).ilog2(), 0]);
            }
        }
    }
    // CAP.TO may say 127.5 s, CRTO 9 h, RTD3E more than an hour; all of it in injected time.
    assert!(clock.now() < Duration::from_secs(400_000), "{:?}", clock.now());
    log
}

/// Gives the tape back to the campaign, also when the run fails.
struct Lent<'a>(&'a mut Tape, Arc<Mutex<Tape>>);

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        *self.0 = self.1.lock().unwrap_or_else(PoisonError::into_inner).clone();
    }
}

#[test]
fn random_registers_and_completions_neither_panic_nor_hang_the_driver() {
    let (mut good, mut bad) = (0, 0);
    let rounds = campaign(
        "driver",
        60,
        25,
        || false,
        |tape| {
            let shared = Arc::new(Mutex::new(tape.clone()));
            let _lent = Lent(tape, Arc::clone(&shared));
            let log = run(&shared);
            (good, bad) = (good + log.good, bad + log.bad);
            log.reached
        },
    );
    println!("{rounds} controllers: {good} calls succeeded, {bad} failed");
    assert!(rounds == 1 || good > 100 && bad > 100, "{good} calls succeeded, {bad} failed");
}
