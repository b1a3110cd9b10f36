//! The controller's state: registers, queues, namespace; what resets it.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, SealFlags, fallocate, fcntl_add_seals};
use rustix::io::Errno;

use super::admin::Admin;
use super::bus::{Bus, Place, Window};
use super::cache::{PowerCut, PowerCutReport};
use super::config::{Clock, CmbSupport, Config, EmuError};
use super::counters::Counters;
use super::data::{CmbUse, Pointers};
use super::faults::{Armed, Stuck};
use super::held::Held;
use super::msix::Msix;
use super::namespace::Namespace;
use super::pci_config::ConfigSpace;
use super::queue::{Cq, Sq};
use super::reads::Reads;
use super::registers::Registers;
use super::session::Session;
use super::step::FETCH;
use crate::mem::{Access, MapError, Mapping, PAGE};
use crate::spec::Command;
use crate::spec::regs::{Cc, Csts, DOORBELLS};

/// What a controller was made with and cannot change.
#[derive(Clone)]
pub(super) struct Fixed {
    pub(super) cmb: CmbSupport,
    pub(super) io_queues: u16,
    pub(super) max_queue_entries: u32,
    pub(super) mdts: u8,
    pub(super) sgls: bool,
    pub(super) ready_after: u32,
    pub(super) commands_per_step: u32,
    pub(super) serial: String,
    pub(super) volatile_cache: bool,
    pub(super) clock: Clock,
}

impl std::fmt::Debug for Fixed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fixed").field("serial", &self.serial).finish_non_exhaustive()
    }
}

/// Everything behind the lock.
#[derive(Debug)]
pub(super) struct State {
    pub(super) fixed: Fixed,
    pub(super) regs: Registers,
    pub(super) pci: ConfigSpace,
    pub(super) msix: Msix,
    pub(super) doorbells: Arc<Mapping>,
    pub(super) cmb: Option<Arc<Mapping>>,
    pub(super) pmr: Option<Arc<Mapping>>,
    /// The file behind the PMR, if it has one.
    pub(super) pmr_file: Option<File>,
    /// By queue identifier; 0 is the admin queue.
    pub(super) sqs: Vec<Option<Sq>>,
    pub(super) cqs: Vec<Option<Cq>>,
    /// Identifiers of the submission queues that exist, and whose turn it is.
    pub(super) active: Vec<u16>,
    pub(super) turn: usize,
    /// Completions that found their queue full, over all queues.
    pub(super) completions_waiting: u32,
    /// Completion queues that got entries since the last interrupts.
    pub(super) to_signal: Vec<u16>,
    pub(super) pointers: Pointers,
    pub(super) namespace: Namespace,
    pub(super) admin: Admin,
    pub(super) counters: Counters,
    /// Steps until CSTS.RDY follows CC.EN.
    pub(super) until_ready: Option<u32>,
    pub(super) removed: bool,
    /// Faults to inject, and the commands that were held back by them.
    pub(super) faults: Armed,
    pub(super) held: Vec<Held>,
    /// Reads of an image that are under way in this step.
    pub(super) reads: Reads,
    /// Steps so far.
    pub(super) steps: u64,
    /// The queue identifier whose doorbells an idle step looks at next.
    pub(super) next_scanned: u16,
    /// Entries of a submission queue, as fetched together.
    pub(super) fetched: Box<[Command; FETCH]>,
}

/// The doorbell page. It lies in its file where it lies in BAR0: a vfio-user client maps a BAR's areas at the BAR's own offsets.
fn doorbell_page() -> Result<Arc<Mapping>, MapError> {
    let whole = Mapping::memfd("cmbfs-emu-doorbells", DOORBELLS as usize + PAGE)?;
    let fail = |source| MapError { what: "the doorbell page".to_owned(), len: PAGE, source };
    let (fd, _) = whole.fd().ok_or_else(|| fail(std::io::ErrorKind::Unsupported.into()))?;
    Mapping::from_fd(fd.try_clone_to_owned().map_err(fail)?, DOORBELLS, PAGE, Access::ReadWrite)
}

/// The PMR's bytes in a file: theirs is what survives this process, and, from a barrier on, the machine.
fn open_pmr(path: &Path, bytes: u64) -> Result<(Arc<Mapping>, File), EmuError> {
    let fail = |what| move |source| EmuError::Image { path: path.to_owned(), what, source };
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(path).map_err(fail("open"))?;
    let has = file.metadata().map_err(fail("find its size"))?.len();
    if has == 0 {
        file.set_len(bytes).map_err(fail("set its size"))?;
    } else if has != bytes {
        return Err(EmuError::PmrSize { path: path.to_owned(), has, bytes });
    }
    let fd = file.try_clone().map_err(fail("map"))?.into();
    // As a BAR: should somebody cut the file, that is no SIGBUS here.
    Ok((Mapping::of_device(fd, 0, usize::try_from(bytes).unwrap_or(usize::MAX))?, file))
}

impl State {
    pub(super) fn new(config: &Config) -> Result<Self, EmuError> {
        config.check()?;
        let queues = usize::from(config.io_queues) + 1;
        let memory = |name, size: u64| -> Result<Option<Arc<Mapping>>, EmuError> {
            if size == 0 {
                return Ok(None);
            }
            let memory = Mapping::device_memfd(name, usize::try_from(size).unwrap_or(usize::MAX))?;
            // Other processes are given it: none may add a seal that keeps the next one from mapping it.
            if let Some((fd, _)) = memory.fd() {
                let fail = |e: Errno| MapError {
                    what: format!("memfd {name}"),
                    len: memory.len(),
                    source: e.into(),
                };
                fcntl_add_seals(fd, SealFlags::SEAL).map_err(fail)?;
            }
            Ok(Some(memory))
        };
        let cmb_use = CmbUse {
            lists: config.cmb.lists,
            rds: config.cmb.read_data,
            wds: config.cmb.write_data,
            mixed: config.cmb.mixed_data,
        };
        let fixed = Fixed {
            cmb: config.cmb,
            io_queues: config.io_queues,
            max_queue_entries: config.max_queue_entries,
            mdts: config.mdts,
            sgls: config.sgls,
            ready_after: config.ready_after,
            commands_per_step: config.commands_per_step,
            serial: config.serial.clone(),
            volatile_cache: config.volatile_cache,
            clock: Arc::clone(&config.clock),
        };
        let namespace = Namespace::open(config)?;
        let (pmr, pmr_file) = match &config.pmr_file {
            Some(path) if config.pmr_size != 0 => {
                let (memory, file) = open_pmr(path, config.pmr_size)?;
                (Some(memory), Some(file))
            }
            _ => (memory("cmbfs-emu-pmr", config.pmr_size)?, None),
        };
        let vectors = config.io_queues + 1;
        Ok(Self {
            regs: Registers::new(config),
            pci: ConfigSpace::new(config.cmb_size, config.pmr_size, vectors),
            msix: Msix::new(vectors),
            doorbells: doorbell_page()?,
            cmb: memory("cmbfs-emu-cmb", config.cmb_size)?,
            pmr,
            pmr_file,
            sqs: (0..queues).map(|_| None).collect(),
            cqs: (0..queues).map(|_| None).collect(),
            active: Vec::with_capacity(queues),
            turn: 0,
            completions_waiting: 0,
            to_signal: Vec::with_capacity(queues),
            pointers: Pointers::new(cmb_use, config.sgls),
            admin: Admin::new(&fixed),
            namespace,
            counters: Counters::default(),
            until_ready: None,
            removed: false,
            faults: Armed::new(config.seed),
            held: Vec::new(),
            reads: Reads::default(),
            steps: 0,
            next_scanned: 0,
            fetched: Box::new([Command::default(); FETCH]),
            fixed,
        })
    }

    /// The bus as it is decoded now.
    pub(super) fn bus<'a>(&self, iommu: Session<'a>) -> Bus<'a> {
        let window = |place, base: Option<u64>, memory: &Option<Arc<Mapping>>| {
            let (base, memory) = (base?, memory.as_ref()?);
            Some(Window { place, base, memory: Arc::clone(memory) })
        };
        Bus::new(
            iommu,
            [
                window(Place::Cmb, self.regs.cmb_base(), &self.cmb),
                window(Place::Pmr, self.regs.pmr_base(), &self.pmr),
            ],
        )
    }

    /// CC was written (Base Specification, "Controller Configuration").
    pub(super) fn write_cc(&mut self, value: u32) {
        let old = self.regs.cc;
        let mut new = Cc::from_bits(value & Registers::CC_WRITABLE);
        if old.en() && new.en() {
            // These may only change while the controller is disabled.
            new = new.with_mps(old.mps()).with_ams(old.ams()).with_css(old.css());
        }
        self.regs.cc = new;
        if old.en() && !new.en() {
            self.controller_reset();
        }
        if !old.en() && new.en() {
            self.enable();
        }
        if new.shn() != 0 && old.shn() != new.shn() {
            self.shut_down(new.shn() == 1);
        }
    }

    /// CC.EN went from 0 to 1.
    fn enable(&mut self) {
        // A shutdown while disabled is over.
        self.regs.csts.set_shst(0);
        if !self.regs.configuration_is_valid() {
            tracing::debug!(cc = ?self.regs.cc, "configuration not supported: fatal status");
            self.fatal();
            return;
        }
        self.until_ready = Some(self.fixed.ready_after);
        self.become_ready();
    }

    /// Counts down to CSTS.RDY.
    pub(super) fn become_ready(&mut self) -> bool {
        match self.until_ready {
            None => false,
            _ if self.faults.stuck == Some(Stuck::Enabling) => false,
            Some(0) => {
                self.until_ready = None;
                self.start();
                true
            }
            Some(n) => {
                self.until_ready = Some(n - 1);
                false
            }
        }
    }

    /// The admin queues come up, and with them the controller.
    fn start(&mut self) {
        let regs = &self.regs;
        let (asqs, acqs) = (u32::from(regs.aqa.asqs()) + 1, u32::from(regs.aqa.acqs()) + 1);
        self.pointers.set_page_size(regs.page_size());
        self.clear_doorbells();
        self.sqs[0] = Some(Sq::new(regs.asq, asqs, 0));
        let mut cq = Cq::new(regs.acq, acqs, Some(0));
        cq.users = 1;
        self.cqs[0] = Some(cq);
        self.active.push(0);
        self.regs.csts.set_rdy(true);
    }

    fn clear_doorbells(&self) {
        if let Err(e) = self.doorbells.zero(0, PAGE) {
            tracing::error!("doorbell page: {e}");
        }
    }

    /// The controller cannot go on (CSTS.CFS); only a reset helps.
    pub(super) fn fatal(&mut self) {
        self.regs.csts.set_cfs(true);
    }

    /// CC.SHN was set.
    fn shut_down(&mut self, normal: bool) {
        // An abrupt shutdown promises nothing about the volatile cache.
        if normal && let Err(e) = self.namespace.flush() {
            tracing::error!("flush at shutdown: {e}");
        }
        let stuck = self.faults.stuck == Some(Stuck::ShuttingDown);
        self.regs.csts.set_shst(if stuck { 1 } else { 2 });
    }

    /// CC.EN went from 1 to 0 (Base Specification, "Controller Level Reset"): queues and commands are gone, registers
    /// other than AQA, ASQ, ACQ, CMBMSC and those of the PMR are as after power-on.
    fn controller_reset(&mut self) {
        self.counters.resets += 1;
        self.forget_work();
        self.lose_cmb();
        let cc = self.regs.cc;
        let stuck = self.faults.stuck == Some(Stuck::Disabling);
        self.regs.csts = Csts::new().with_rdy(stuck).with_nssro(self.regs.csts.nssro());
        self.regs.int_mask = 0;
        // The other fields of CC stay as the host wrote them with EN = 0.
        self.regs.cc = cc;
    }

    /// Nothing promises that the CMB keeps its contents across a reset, so here it never does.
    fn lose_cmb(&self) {
        let Some(cmb) = &self.cmb else { return };
        let punched = cmb.fd().map(|(fd, offset)| {
            fallocate(fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, cmb.len() as u64)
        });
        if !matches!(punched, Some(Ok(())))
            && let Err(e) = cmb.zero(0, cmb.len())
        {
            tracing::error!("CMB: {e}");
        }
    }

    pub(super) fn forget_work(&mut self) {
        self.until_ready = None;
        self.sqs.fill_with(|| None);
        self.cqs.fill_with(|| None);
        self.active.clear();
        self.turn = 0;
        self.completions_waiting = 0;
        self.to_signal.clear();
        self.held.clear();
        self.clear_doorbells();
        self.admin.reset(&self.fixed);
    }

    /// A function-level reset: all registers but CMBMSC, and config space.
    pub(super) fn function_reset(&mut self) {
        self.counters.resets += 1;
        self.forget_work();
        self.lose_cmb();
        self.regs.function_reset();
        self.pci.reset();
        self.msix.reset();
    }

    /// Power went and came back: nothing volatile is left.
    pub(super) fn power_on(&mut self) {
        self.function_reset();
        self.regs.power_on();
    }

    /// See [`EmulatedController::power_cut`](super::EmulatedController::power_cut).
    pub(super) fn power_cut(&mut self, cut: PowerCut) -> std::io::Result<PowerCutReport> {
        let block = self.namespace.block_size();
        let report = match &mut self.namespace.cache {
            Some(cache) => cache.power_cut(&mut self.namespace.media, cut, block)?,
            None => PowerCutReport::default(),
        };
        self.power_on();
        Ok(report)
    }

    /// Whether commands are executed.
    pub(super) fn is_running(&self) -> bool {
        let csts = self.regs.csts;
        csts.rdy()
            && self.regs.cc.en()
            && !csts.cfs()
            && csts.shst() == 0
            && self.pci.bus_master()
            && !self.removed
    }
}
