//! A raw host: registers, queues and doorbells driven by hand, as the specification has it, without our driver.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nvme_driver::emu::{Config, EmulatedController};
use nvme_driver::mem::{Mapping, PAGE};
use nvme_driver::pci::{DmaAccess, PciFunction};
use nvme_driver::spec::regs::{self, Aqa, Cc, Csts, cq_head_doorbell, sq_tail_doorbell};
use nvme_driver::spec::{AdminOpcode, Command, Completion, Status};

/// Where the host's memory is for the device.
pub(crate) const BASE: u64 = 0x10_0000;
/// Bytes of host memory.
pub(crate) const MEMORY: usize = 8 << 20;
/// Steps after which something that should have happened will not.
const PATIENCE: usize = 200;

/// One queue pair as the host keeps it.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    pub(crate) sq: u64,
    pub(crate) cq: u64,
    pub(crate) sq_entries: u32,
    pub(crate) cq_entries: u32,
    pub(crate) tail: u32,
    pub(crate) head: u32,
    pub(crate) phase: bool,
}

pub(crate) struct Host {
    pub(crate) controller: Arc<EmulatedController>,
    pub(crate) function: Arc<dyn PciFunction>,
    pub(crate) memory: Arc<Mapping>,
    pub(crate) doorbells: Arc<Mapping>,
    pub(crate) pairs: BTreeMap<u16, Pair>,
    next_page: u64,
    next_cid: u16,
}

impl Host {
    /// A host with memory mapped and bus mastering on; the controller is not enabled.
    pub(crate) fn new(config: &Config) -> Self {
        let controller = EmulatedController::new(config).unwrap();
        let function = controller.function();
        let memory = Mapping::anonymous(MEMORY).unwrap();
        function.dma_map(&memory, 0, MEMORY, BASE, DmaAccess::ReadWrite).unwrap();
        function.set_bus_master(true).unwrap();
        let doorbells = function.map_bar(0, regs::DOORBELLS, PAGE as u64).unwrap().unwrap();
        Self { controller, function, memory, doorbells, pairs: BTreeMap::new(), next_page: BASE, next_cid: 1 }
    }

    /// A small RAM drive, enabled.
    pub(crate) fn ready() -> Self {
        Self::ready_with(&small())
    }

    pub(crate) fn ready_with(config: &Config) -> Self {
        let mut host = Self::new(config);
        host.enable();
        host
    }

    /// A small RAM drive with I/O queue pair 1.
    pub(crate) fn with_queue() -> Self {
        Self::with_queue_on(&small())
    }

    pub(crate) fn with_queue_on(config: &Config) -> Self {
        let mut host = Self::ready_with(config);
        host.create_pair(1, 64);
        host
    }

    pub(crate) fn r32(&self, offset: u64) -> u32 {
        self.function.read32(0, offset).unwrap()
    }

    pub(crate) fn r64(&self, offset: u64) -> u64 {
        self.function.read64(0, offset).unwrap()
    }

    pub(crate) fn w32(&self, offset: u64, value: u32) {
        self.function.write32(0, offset, value).unwrap();
    }

    pub(crate) fn w64(&self, offset: u64, value: u64) {
        self.function.write64(0, offset, value).unwrap();
    }

    pub(crate) fn csts(&self) -> Csts {
        Csts::from_bits(self.r32(regs::CSTS))
    }

    pub(crate) fn step(&self, times: usize) {
        for _ in 0..times {
            self.controller.step();
        }
    }

    /// Fresh pages, zeroed; their address.
    pub(crate) fn pages(&mut self, n: usize) -> u64 {
        let at = self.next_page;
        self.next_page += (n * PAGE) as u64;
        assert!(self.next_page <= BASE + MEMORY as u64, "the test needs more host memory");
        self.memory.zero((at - BASE) as usize, n * PAGE).unwrap();
        at
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write((at - BASE) as usize, bytes).unwrap();
    }

    pub(crate) fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read((at - BASE) as usize, &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn put_u64s(&self, at: u64, words: &[u64]) {
        for (i, w) in words.iter().enumerate() {
            self.put(at + 8 * i as u64, &w.to_le_bytes());
        }
    }

    /// CC as a host sets it: 64- and 16-byte entries, 4 KiB pages, enabled.
    pub(crate) fn cc_enabled() -> Cc {
        Cc::new().with_en(true).with_iosqes(6).with_iocqes(4)
    }

    /// AQA, ASQ and ACQ for an admin queue pair.
    pub(crate) fn set_admin_queue(&mut self, sq_entries: u32, cq_entries: u32) {
        let (sq, cq) = (self.pages(4), self.pages(4));
        let aqa = Aqa::new().with_asqs((sq_entries - 1) as u16).with_acqs((cq_entries - 1) as u16);
        self.w32(regs::AQA, aqa.into_bits());
        self.w64(regs::ASQ, sq);
        self.w64(regs::ACQ, cq);
        let pair = Pair { sq, cq, sq_entries, cq_entries, tail: 0, head: 0, phase: true };
        self.pairs.insert(0, pair);
    }

    /// Brings the controller up with an admin queue of 32 entries.
    pub(crate) fn enable(&mut self) {
        self.pairs.clear();
        self.set_admin_queue(32, 32);
        self.w32(regs::CC, Self::cc_enabled().into_bits());
        self.wait_ready();
    }

    pub(crate) fn wait_ready(&self) {
        for _ in 0..PATIENCE {
            if self.csts().rdy() {
                return;
            }
            self.controller.step();
        }
        panic!("CSTS.RDY did not come: {:?}", self.csts());
    }

    /// CC.EN to 0.
    pub(crate) fn disable(&self) {
        self.w32(regs::CC, Self::cc_enabled().with_en(false).into_bits());
    }

    /// Writes a tail doorbell through the mapped page.
    pub(crate) fn ring_tail(&self, qid: u16, value: u32) {
        self.ring(sq_tail_doorbell(qid, 0), value);
    }

    pub(crate) fn ring_head(&self, qid: u16, value: u32) {
        self.ring(cq_head_doorbell(qid, 0), value);
    }

    pub(crate) fn ring(&self, offset: u64, value: u32) {
        let at = (offset - regs::DOORBELLS) as usize;
        self.doorbells.u32_at(at).unwrap().store(value, Ordering::Release);
    }

    /// The next command identifier.
    pub(crate) fn cid(&mut self) -> u16 {
        self.next_cid = self.next_cid % 60_000 + 1;
        self.next_cid
    }

    /// Puts a command into the submission queue, with a fresh identifier; the doorbell is not rung.
    pub(crate) fn place(&mut self, qid: u16, cmd: Command) -> u16 {
        let cid = self.cid();
        self.place_with_cid(qid, cmd.with_cid(cid));
        cid
    }

    pub(crate) fn place_with_cid(&mut self, qid: u16, cmd: Command) {
        let pair = self.pairs.get_mut(&qid).unwrap();
        let at = pair.sq + 64 * u64::from(pair.tail);
        pair.tail = (pair.tail + 1) % pair.sq_entries;
        self.put(at, bytemuck::bytes_of(&cmd));
    }

    pub(crate) fn ring_queue(&self, qid: u16) {
        self.ring_tail(qid, self.pairs[&qid].tail);
    }

    /// Places a command and rings the doorbell.
    pub(crate) fn submit(&mut self, qid: u16, cmd: Command) -> u16 {
        let cid = self.place(qid, cmd);
        self.ring_queue(qid);
        cid
    }

    /// The next completion if it is there, without telling the controller that it was consumed.
    pub(crate) fn peek(&mut self, qid: u16) -> Option<Completion> {
        let pair = &self.pairs[&qid];
        let at = pair.cq + 16 * u64::from(pair.head);
        let entry: Completion = bytemuck::pod_read_unaligned(&self.get(at, 16));
        if entry.phase() != pair.phase {
            return None;
        }
        let pair = self.pairs.get_mut(&qid).unwrap();
        pair.head += 1;
        if pair.head == pair.cq_entries {
            pair.head = 0;
            pair.phase = !pair.phase;
        }
        Some(entry)
    }

    /// The next completion if it is there, consumed.
    pub(crate) fn reap(&mut self, qid: u16) -> Option<Completion> {
        let entry = self.peek(qid)?;
        self.ring_head(qid, self.pairs[&qid].head);
        Some(entry)
    }

    /// Steps until there is a completion.
    pub(crate) fn wait(&mut self, qid: u16) -> Completion {
        for _ in 0..PATIENCE {
            if let Some(entry) = self.reap(qid) {
                return entry;
            }
            self.controller.step();
        }
        panic!("no completion on queue {qid}; status {:?}", self.csts());
    }

    /// Steps for a while; there must be no completion.
    pub(crate) fn expect_silence(&mut self, qid: u16) {
        for _ in 0..PATIENCE {
            self.controller.step();
            assert_eq!(self.reap(qid), None);
        }
    }

    /// Runs one command to its end.
    pub(crate) fn run(&mut self, qid: u16, cmd: Command) -> Completion {
        let cid = self.submit(qid, cmd);
        let done = self.wait(qid);
        assert_eq!((done.cid, done.sqid), (cid, qid));
        done
    }

    pub(crate) fn status(&mut self, qid: u16, cmd: Command) -> Status {
        self.run(qid, cmd).status()
    }

    /// Runs one command that must succeed; its dword 0.
    pub(crate) fn ok(&mut self, qid: u16, cmd: Command) -> u32 {
        let done = self.run(qid, cmd);
        assert!(done.status().is_success(), "{cmd:?}: {}", done.status());
        done.dw0
    }

    /// Runs one command that must fail with `status`.
    #[track_caller]
    pub(crate) fn fails(&mut self, qid: u16, cmd: Command, status: Status) {
        let got = self.status(qid, cmd);
        assert!(got.is(status), "expected {status}, got {got} for {cmd:?}");
    }

    /// Creates completion and submission queue `qid` in host memory.
    pub(crate) fn create_pair(&mut self, qid: u16, entries: u32) {
        let sq = self.pages((entries as usize * 64).div_ceil(PAGE));
        let cq = self.pages((entries as usize * 16).div_ceil(PAGE));
        self.create_pair_at(qid, sq, entries, cq, entries);
    }

    pub(crate) fn create_pair_at(&mut self, qid: u16, sq: u64, sq_entries: u32, cq: u64, cq_entries: u32) {
        self.ok(0, create_cq(qid, cq, cq_entries));
        self.ok(0, create_sq(qid, sq, sq_entries, qid));
        let pair = Pair { sq, cq, sq_entries, cq_entries, tail: 0, head: 0, phase: true };
        self.pairs.insert(qid, pair);
    }

    /// Reads blocks of namespace 1 through queue 1 into fresh pages.
    pub(crate) fn read_blocks(&mut self, slba: u64, blocks: u32, block_size: usize) -> Vec<u8> {
        let len = blocks as usize * block_size;
        let at = self.pages(len.div_ceil(PAGE));
        let cmd = data(Command::new(0x02, 1).with_blocks(slba, blocks), at, self, len);
        self.ok(1, cmd);
        self.get(at, len)
    }

    /// Writes blocks of namespace 1 through queue 1.
    pub(crate) fn write_blocks(&mut self, slba: u64, bytes: &[u8], block_size: usize) {
        let at = self.pages(bytes.len().div_ceil(PAGE));
        self.put(at, bytes);
        let blocks = (bytes.len() / block_size) as u32;
        let cmd = data(Command::new(0x01, 1).with_blocks(slba, blocks), at, self, bytes.len());
        self.ok(1, cmd);
    }
}

/// A 4 MiB RAM drive of 512-byte blocks without a cache.
pub(crate) fn small() -> Config {
    Config {
        namespace: nvme_driver::emu::Backing::Ram { bytes: 4 << 20 },
        volatile_cache: false,
        ..Config::default()
    }
}

/// The same with a 1 MiB CMB.
pub(crate) fn with_cmb() -> Config {
    Config { cmb_size: 1 << 20, ..small() }
}

/// Points a command at `len` contiguous bytes at `at`, page-aligned, with a PRP list where one is needed.
pub(crate) fn data(cmd: Command, at: u64, host: &mut Host, len: usize) -> Command {
    let pages = len.div_ceil(PAGE);
    let prp2 = match pages {
        0 | 1 => 0,
        2 => at + PAGE as u64,
        n => {
            let list = host.pages(1);
            assert!(n - 1 <= 512);
            let entries: Vec<u64> = (1..n).map(|i| at + (i * PAGE) as u64).collect();
            host.put_u64s(list, &entries);
            list
        }
    };
    Command { prp1: at, prp2, ..cmd }
}

pub(crate) fn admin(op: AdminOpcode) -> Command {
    Command::new(op as u8, 0)
}

pub(crate) fn create_cq(qid: u16, at: u64, entries: u32) -> Command {
    Command {
        prp1: at,
        cdw10: u32::from(qid) | (entries - 1) << 16,
        cdw11: 1,
        ..admin(AdminOpcode::CreateIoCq)
    }
}

pub(crate) fn create_sq(qid: u16, at: u64, entries: u32, cqid: u16) -> Command {
    Command {
        prp1: at,
        cdw10: u32::from(qid) | (entries - 1) << 16,
        cdw11: 1 | u32::from(cqid) << 16,
        ..admin(AdminOpcode::CreateIoSq)
    }
}

pub(crate) fn delete(op: AdminOpcode, qid: u16) -> Command {
    Command { cdw10: u32::from(qid), ..admin(op) }
}

pub(crate) fn identify(cns: u8, nsid: u32, at: u64) -> Command {
    Command { prp1: at, cdw10: u32::from(cns), ..Command::new(AdminOpcode::Identify as u8, nsid) }
}

pub(crate) fn set_feature(fid: u8, value: u32) -> Command {
    Command { cdw10: u32::from(fid), cdw11: value, ..admin(AdminOpcode::SetFeatures) }
}

pub(crate) fn get_feature(fid: u8) -> Command {
    Command { cdw10: u32::from(fid), ..admin(AdminOpcode::GetFeatures) }
}

/// `bytes` bytes of log page `lid` into `at`.
pub(crate) fn get_log(lid: u8, at: u64, bytes: u32) -> Command {
    Command {
        prp1: at,
        cdw10: u32::from(lid) | (bytes / 4 - 1) << 16,
        ..Command::new(AdminOpcode::GetLogPage as u8, 0xffff_ffff)
    }
}

/// Bytes that say where they are.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64 / 8).flat_map(|i| (seed << 32 | i).to_le_bytes()).collect()
}
