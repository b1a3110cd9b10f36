//! Random registers, doorbells, config space and commands against the emulated controller: it neither panics nor hangs,
//! and a reset always brings it back.
//!
//! See `tape` for how long, from which seed, and how to repeat one.
#![cfg(test)]
mod tape;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nvme_driver::emu::{
    Backing, CmbSupport, Config, Counters, EmulatedController, Fault, PowerCut, Rule, Stuck, Target,
};
use nvme_driver::mem::{Mapping, PAGE};
use nvme_driver::pci::{DmaAccess, PciFunction};
use nvme_driver::spec::{Command, Status, regs};
use tape::{Feature, Tape, campaign};

const BASE: u64 = 0x10_0000;
const PAGES: u64 = 64;
const CBA: u64 = 0x8000_0000;
const ROUNDS: u64 = 60;
const ACTIONS: u64 = 400;

struct Fuzz<'a> {
    tape: &'a mut Tape,
    /// Statuses of completions by queue and opcode of the command before, and whatever else happened.
    reached: HashSet<Feature>,
    controller: Arc<EmulatedController>,
    function: Arc<dyn PciFunction>,
    memory: Arc<Mapping>,
    doorbells: Arc<Mapping>,
    /// Tails as the host would keep them.
    tails: [u32; 5],
}

impl<'a> Fuzz<'a> {
    fn new(tape: &'a mut Tape) -> Self {
        let (seed, media) = (tape.below(1 << 20), tape.below(16));
        let mut flag = || tape.below(4) != 0;
        let cmb = CmbSupport {
            submission_queues: flag(),
            completion_queues: flag(),
            lists: flag(),
            read_data: flag(),
            write_data: flag(),
            mixed_data: flag(),
        };
        let image = tempfile::tempdir().unwrap();
        let namespace = match media {
            0 => Backing::File { path: image.path().join("disk.img"), create: Some(1 << 20) },
            1 => Backing::Null { bytes: 1 << 20 },
            _ => Backing::Ram { bytes: 1 << 20 },
        };
        let config = Config {
            namespace,
            lba_size: if flag() { 512 } else { 4096 },
            cmb_size: if flag() { 16 * PAGE as u64 } else { 0 },
            pmr_size: if flag() { 0 } else { 8192 },
            volatile_cache: flag(),
            cache_bytes: 1 << 20,
            sgls: flag(),
            cmb,
            io_queues: 4,
            max_queue_entries: 64,
            seed,
            ..Config::default()
        };
        let controller = EmulatedController::new(&config).unwrap();
        let function = controller.function();
        let memory = Mapping::anonymous(PAGES as usize * PAGE).unwrap();
        let doorbells = function.map_bar(0, regs::DOORBELLS, PAGE as u64).unwrap().unwrap();
        Self { tape, reached: HashSet::new(), controller, function, memory, doorbells, tails: [0; 5] }
    }

    fn below(&mut self, n: u64) -> u64 {
        self.tape.below(n)
    }

    fn one_of(&mut self, list: &[u64]) -> u64 {
        list[self.below(list.len() as u64) as usize]
    }

    /// A number of the kind that finds bugs.
    fn number(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(8),
            1 => u64::MAX - self.below(8),
            2 => 1 << self.below(64),
            3 => (1 << self.below(64)) - 1,
            4 => self.below(1 << 16),
            _ => self.tape.any(),
        }
    }

    /// An address, mostly one that exists.
    fn address(&mut self) -> u64 {
        let page = PAGE as u64;
        let at = match self.below(8) {
            0 => self.number(),
            1 => CBA + self.below(17) * page,
            _ => BASE + self.below(PAGES + 1) * page,
        };
        match self.below(4) {
            0 => at.wrapping_add(self.below(page)),
            1 => at.wrapping_add(self.below(page / 8) * 8),
            _ => at,
        }
    }

    /// The state a driver would have made: admin queue at page 0 and 1, I/O queues at 2 to 9.
    fn bring_up(&mut self) {
        let f = Arc::clone(&self.function);
        self.controller.faults().clear();
        f.set_bus_master(true).unwrap();
        let _ = f.dma_map(&self.memory, 0, self.memory.len(), BASE, DmaAccess::ReadWrite);
        f.write32(0, regs::CC, 0).unwrap();
        f.write64(0, regs::CMBMSC, CBA | 3).unwrap();
        f.write32(0, regs::AQA, 0x003f_003f).unwrap();
        f.write64(0, regs::ASQ, BASE).unwrap();
        f.write64(0, regs::ACQ, BASE + PAGE as u64).unwrap();
        f.write32(0, regs::CC, 0x0046_0001).unwrap();
        for _ in 0..10 {
            self.controller.step();
        }
        assert_eq!(f.read32(0, regs::CSTS).unwrap(), 1, "a reset brings it back");
        self.tails = [0; 5];
        for qid in 1..=4u64 {
            let at = BASE + qid * 2 * PAGE as u64;
            let size = qid as u32 | 31 << 16;
            let cq = Command { prp1: at + PAGE as u64, cdw10: size, cdw11: 1, ..Command::new(5, 0) };
            self.submit(0, cq);
            let sq = Command { prp1: at, cdw10: size, cdw11: 1 | (qid as u32) << 16, ..Command::new(1, 0) };
            self.submit(0, sq);
        }
    }

    fn submit(&mut self, qid: usize, cmd: Command) {
        let entries = if qid == 0 { 64 } else { 32 };
        let slot = qid * 2 * PAGE + self.tails[qid] as usize * 64;
        self.memory.write(slot, bytemuck::bytes_of(&cmd)).unwrap();
        self.tails[qid] = (self.tails[qid] + 1) % entries;
        self.doorbells.u32_at(qid * 8).unwrap().store(self.tails[qid], Ordering::Release);
        self.controller.step();
        self.note_completion(qid, &cmd);
        // Consume whatever may be there.
        if self.below(8) != 0 {
            let head = self.tails[qid];
            self.doorbells.u32_at(qid * 8 + 4).unwrap().store(head, Ordering::Release);
        }
    }

    /// Notes what the command's completion says, if it is where it is without anything gone wrong.
    fn note_completion(&mut self, qid: usize, cmd: &Command) {
        let entries = if qid == 0 { 64 } else { 32 };
        let slot = (self.tails[qid] + entries - 1) % entries;
        let at = (qid * 2 + 1) * PAGE + slot as usize * 16;
        let word = |at| self.memory.u32_at(at).unwrap().load(Ordering::Acquire);
        let (sq, last) = (word(at + 8) >> 16, word(at + 12));
        let status = Status::from_field((last >> 17) as u16);
        if (sq as usize, last as u16) == (qid, cmd.cid()) && status.name().is_some() {
            let opcode = if cmd.opcode() <= 0x18 { cmd.opcode() } else { 0xff };
            self.reached.insert([u32::from(qid != 0), opcode.into(), u32::from(status.field() & 0x7ff)]);
        }
    }

    /// A command that is mostly well-formed.
    fn command(&mut self, admin: bool) -> Command {
        let known: &[u64] =
            if admin { &[0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 0x18, 0x80] } else { &[0, 1, 2, 4, 5, 8, 9, 0xc] };
        let op = if self.below(16) == 0 { self.tape.below(256) as u8 } else { self.one_of(known) as u8 };
        let mut cmd = Command::new(op, if self.below(8) == 0 { self.number() as u32 } else { 1 });
        cmd.cdw0 |= (self.below(64) as u32) << 16;
        if self.below(8) == 0 {
            cmd.cdw0 |= (self.below(4) as u32) << 14;
        }
        (cmd.prp1, cmd.prp2) = (self.address(), self.address());
        if self.below(4) == 0 {
            // As an SGL descriptor.
            cmd.prp2 = self.below(8192) | self.one_of(&[0, 2, 3, 5]) << 60;
        }
        for field in [&mut cmd.cdw10, &mut cmd.cdw11, &mut cmd.cdw12, &mut cmd.cdw13, &mut cmd.cdw14] {
            *field = 0;
        }
        match (admin, self.below(3)) {
            (_, 0) => {
                cmd.cdw10 = self.number() as u32;
                cmd.cdw11 = self.number() as u32;
                cmd.cdw12 = self.number() as u32;
                cmd.cdw13 = self.number() as u32;
            }
            (false, _) => cmd = cmd.with_blocks(self.below(2048), 1 + self.below(64) as u32),
            (true, _) => {
                cmd.cdw10 = self.below(0x16) as u32 | (self.below(130) as u32) << 16;
                cmd.cdw11 = self.below(4) as u32 | (self.below(6) as u32) << 16;
            }
        }
        cmd
    }

    fn act(&mut self) {
        let f = Arc::clone(&self.function);
        match self.below(100) {
            0..40 => {
                let qid = 1 + self.below(4) as usize;
                let cmd = self.command(false);
                self.submit(qid, cmd);
            }
            40..60 => {
                let cmd = self.command(true);
                self.submit(0, cmd);
            }
            60..70 => {
                // Memory under the controller's feet: lists, queues, data.
                let at = self.below(PAGES * PAGE as u64 - 64) & !7;
                let words: Vec<u8> = (0..8).flat_map(|_| self.address().to_le_bytes()).collect();
                self.memory.write(at as usize, &words).unwrap();
            }
            70..76 => {
                let at = self.below(1024) as usize * 4;
                let value = self.number() as u32;
                self.doorbells.u32_at(at).unwrap().store(value, Ordering::Release);
            }
            76..82 => {
                let (bar, at, value) = (self.below(6) as u8, self.below(0x2000) & !3, self.number());
                let _ = f.write32(bar, at, value as u32);
                let _ = f.read32(bar, at);
                let _ = f.write64(bar, at, value);
                let _ = f.read64(bar, at);
            }
            82..85 => {
                let named = [0x14u64, 0x1c, 0x24, 0x28, 0x30, 0x50, 0xe04, 0xe14, 0x20, 0x0c, 0x10];
                let (at, value) = (self.one_of(&named), self.number());
                f.write32(0, at, value as u32).unwrap();
            }
            85..88 => {
                let (at, size) = (self.below(256) as u16, self.one_of(&[1, 2, 4]) as u8);
                let value = self.number() as u32;
                let _ = f.config_write(at, size, value);
                let _ = f.config_read(at, size);
            }
            88..90 => {
                let part = 16 * PAGE;
                let _ = f.dma_unmap(BASE, self.memory.len());
                for i in 0..4u64 {
                    let access =
                        [DmaAccess::Read, DmaAccess::Write, DmaAccess::ReadWrite][self.below(3) as usize];
                    if self.below(4) != 0 {
                        let at = i as usize * part;
                        f.dma_map(&self.memory, at, part, BASE + at as u64, access).unwrap();
                    }
                }
                self.controller.step();
                for i in 0..4u64 {
                    let _ = f.dma_unmap(BASE + i * part as u64, part);
                }
                f.dma_map(&self.memory, 0, self.memory.len(), BASE, DmaAccess::ReadWrite).unwrap();
            }
            90..93 => {
                let faults = [
                    Fault::Stall,
                    Fault::Delay { steps: 7 },
                    Fault::Garbage,
                    Fault::Duplicate,
                    Fault::WrongCid(3),
                    Fault::WrongPhase,
                    Fault::Lose,
                    Fault::Lie,
                    Fault::Status(Status::INTERNAL_ERROR),
                    Fault::Fatal,
                ];
                let fault = faults[self.below(10) as usize];
                let queue = Some(self.below(5) as u16);
                self.controller.faults().inject(Rule::once(Target { queue, ..Target::default() }, fault));
            }
            93 => {
                let cut = [PowerCut::LoseAll, PowerCut::KeepAll, PowerCut::Random][self.below(3) as usize];
                self.controller.power_cut(cut).unwrap();
                self.bring_up();
            }
            94 => {
                f.reset().unwrap();
                self.bring_up();
            }
            95 => self.controller.faults().set_stuck(Some(Stuck::Enabling)),
            96 => {
                let attached = self.below(2) == 0;
                self.controller.faults().set_namespace_attached(attached);
            }
            _ => {
                for _ in 0..self.below(40) {
                    self.controller.step();
                }
                if self.below(4) == 0 {
                    self.bring_up();
                }
            }
        }
        self.controller.step();
    }

    fn run(tape: &'a mut Tape) -> (Counters, HashSet<Feature>) {
        let mut fuzz = Self::new(tape);
        fuzz.bring_up();
        for _ in 0..ACTIONS {
            if fuzz.tape.is_over() {
                break;
            }
            fuzz.act();
        }
        fuzz.function.reset().unwrap();
        fuzz.bring_up();
        fuzz.controller.faults().remove();
        for _ in 0..20 {
            fuzz.act_after_removal();
        }
        (fuzz.controller.counters(), fuzz.reached)
    }

    fn act_after_removal(&mut self) {
        let f = Arc::clone(&self.function);
        let cmd = self.command(false);
        self.submit(1, cmd);
        let (at, value) = (self.below(0x2000) & !3, self.number());
        f.write32(0, at, value as u32).unwrap();
        assert_eq!(f.read32(0, at).unwrap(), u32::MAX);
    }
}

#[test]
fn random_registers_and_commands() {
    let (mut moved, mut succeeded, mut failed) = ([0; 4], 0, 0);
    let rounds = campaign(
        "emulated",
        ROUNDS,
        100,
        || false,
        |tape| {
            let (c, mut reached) = Fuzz::run(tape);
            let bytes = [c.drive_to_cmb, c.cmb_to_drive, c.drive_to_host, c.host_to_drive];
            for (i, (sum, n)) in (100..).zip(moved.iter_mut().zip(bytes)) {
                *sum += n;
                reached.insert([i, u32::from(n > 0), 0]);
            }
            failed += c.errors;
            succeeded += c.io_total() + c.admin_commands.iter().sum::<u64>() - c.errors;
            reached
        },
    );
    println!("{rounds} rounds: {succeeded} commands succeeded, {failed} failed, {moved:?} bytes");
    // Not so random that nothing works.
    assert!(rounds == 1 || moved.iter().all(|n| *n > 0) && succeeded > failed / 10);
}
