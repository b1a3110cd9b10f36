//! The handle to a controller.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::bringup::{Kept, State, bring_up};
use super::events::{self, Event};
use super::identity::{Identity, Namespace};
use super::queues::{self, CmbRoom};
use super::registers::Registers;
use super::{ControllerError, ControllerOptions, Env};
use crate::clock::Clock;
use crate::cmb::CmbStatus;
use crate::disk::ResetHook;
use crate::dma::DmaArena;
use crate::io_queue::IoQueue;
use crate::iova::IovaAllocator;
use crate::mem::PAGE;
use crate::pci::{PciError, PciFunction};
use crate::pmr;
use crate::queue::{QueuePair, RingMemory};

/// Class code and revision in config space (PCI local bus specification, 6.2.1). VFIO reads them from the function, where it makes others up.
const CLASS: u16 = 8;

/// One controller that has been brought up. Shared by its queues; shut down when the last handle is dropped.
#[derive(Debug)]
pub struct Controller {
    env: Env,
    identity: Identity,
    cmb: CmbStatus,
    /// Goes up with every reset: a queue that was made under another number is gone.
    epoch: AtomicU64,
    /// Whether somebody has the PMR.
    pmr_taken: AtomicBool,
    /// How often the PMR was off after a reset while somebody had it.
    pmr_interruptions: AtomicU64,
    control: Mutex<Control>,
}

#[derive(Debug)]
struct Control {
    kept: Kept,
    free_qids: BTreeSet<u16>,
    /// The PMR that somebody has.
    pmr: Option<pmr::Kept>,
    /// Why it was given up, if it was.
    dead: Option<String>,
    /// Who is told before a reset.
    reset_hooks: Vec<Weak<dyn Fn() + Send + Sync>>,
}

impl Controller {
    /// Brings a controller up, whatever state it is in.
    pub fn new(
        function: Arc<dyn PciFunction>,
        options: ControllerOptions,
        clock: Arc<dyn Clock>,
    ) -> Result<Arc<Self>, ControllerError> {
        let iova = Arc::new(IovaAllocator::new(function.iova_ranges()));
        let arena = DmaArena::new(Arc::clone(&function), Arc::clone(&iova));
        let env = Env { registers: Registers { function }, clock, arena, iova, options };
        let mut kept = Kept::default();
        let identity = match bring_up(&env, &mut kept) {
            Ok(identity) => identity,
            Err(e) => {
                // It may have been enabled: nothing may be left that writes to the memory that goes away now.
                quiesce(&env);
                return Err(e);
            }
        };
        let cmb = kept.cmb.clone().unwrap_or(CmbStatus::Absent("it was not looked for".to_owned()));
        let control = Control {
            kept,
            free_qids: (1..=identity.io_queues).collect(),
            pmr: None,
            dead: None,
            reset_hooks: Vec::new(),
        };
        Ok(Arc::new(Self {
            env,
            identity,
            cmb,
            epoch: AtomicU64::new(0),
            pmr_taken: AtomicBool::new(false),
            pmr_interruptions: AtomicU64::new(0),
            control: Mutex::new(control),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The name to use in messages.
    pub fn name(&self) -> &str {
        self.env.name()
    }

    /// The PCI function under it.
    pub fn function(&self) -> &Arc<dyn PciFunction> {
        &self.env.registers.function
    }

    /// What it said about itself when it was brought up.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The first namespace that this driver can use; the error says why there is none.
    pub fn namespace(&self) -> Result<&Namespace, ControllerError> {
        let namespaces = &self.identity.namespaces;
        namespaces.iter().find(|n| n.unusable.is_none()).ok_or_else(|| {
            let what = match namespaces.first() {
                Some(n) => format!("namespace {}: {}", n.nsid, n.unusable.as_deref().unwrap_or("unusable")),
                None => "a controller without an active namespace".to_owned(),
            };
            ControllerError::Unsupported { name: self.name().to_owned(), what }
        })
    }

    /// Its CMB, or why there is none.
    pub fn cmb(&self) -> &CmbStatus {
        &self.cmb
    }

    /// Whether the caller may have the PMR now; then it is theirs until [`give_pmr`](Self::give_pmr).
    pub(crate) fn take_pmr(&self) -> bool {
        !self.pmr_taken.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn give_pmr(&self) {
        self.pmr_taken.store(false, Ordering::Release);
    }

    /// What is turned on again after a reset that turned it off.
    pub(crate) fn keep_pmr(&self, kept: Option<pmr::Kept>) {
        self.lock().pmr = kept;
    }

    pub(crate) fn pmr_interruptions(&self) -> u64 {
        self.pmr_interruptions.load(Ordering::Acquire)
    }

    /// Its DMA memory.
    pub fn arena(&self) -> &DmaArena {
        &self.env.arena
    }

    /// Its I/O virtual addresses: whoever maps more for this function takes them here.
    pub fn iova(&self) -> &Arc<IovaAllocator> {
        &self.env.iova
    }

    /// The clock its deadlines go by.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.env.clock
    }

    /// How it is run.
    pub fn options(&self) -> &ControllerOptions {
        &self.env.options
    }

    /// Has `hook` called before each reset, for as long as its owner keeps it. It must not use the controller.
    pub(crate) fn on_reset(&self, hook: &ResetHook) {
        self.lock().reset_hooks.push(Arc::downgrade(hook));
    }

    /// How often it has been reset.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// The longest transfer of one command in bytes: MDTS and [`ControllerOptions::max_transfer`], whichever is less.
    pub fn max_transfer(&self) -> usize {
        let asked = (self.env.options.max_transfer & !(PAGE - 1)).max(PAGE);
        self.identity.max_transfer().map_or(asked, |mdts| mdts.min(asked))
    }

    /// Creates an I/O queue pair.
    pub fn create_queue(self: &Arc<Self>) -> Result<IoQueue, ControllerError> {
        let cap = self.identity.cap;
        let most = u32::from(cap.mqes()) + 1;
        let wanted = u32::from(self.env.options.queue_entries).min(most).max(2);
        // Rounded down to a power of two; at most 32,768, so it fits.
        let entries = 1u16 << wanted.ilog2().min(15);
        let mut control = self.lock();
        control.alive(self.name())?;
        let Some(qid) = control.free_qids.pop_first() else {
            let (name, granted) = (self.name().to_owned(), self.identity.io_queues);
            return Err(ControllerError::NoQueues { name, granted });
        };
        let made = self.make_queue(&mut control, qid, entries);
        if made.is_err() {
            control.free_qids.insert(qid);
        }
        Ok(IoQueue::new(Arc::clone(self), made?, self.epoch()))
    }

    fn make_queue(
        &self,
        control: &mut Control,
        qid: u16,
        entries: u16,
    ) -> Result<QueuePair, ControllerError> {
        let (env, cap) = (&self.env, self.identity.cap);
        let doorbells = control.kept.doorbells.as_ref();
        let max_transfer = self.max_transfer();
        let memory = self.cmb_queue_memory(qid, entries, max_transfer);
        let pair = queues::build(env, cap, doorbells, qid, entries, max_transfer, memory)?;
        let layout = pair.layout();
        control.admin(env)?.create_queues(env, layout)?;
        Ok(pair)
    }

    /// Room in the CMB's queue area for the submission queue and perhaps the PRP lists of `qid`: the same size for each
    /// queue, in order. Host memory is used for what does not fit.
    fn cmb_queue_memory(&self, qid: u16, entries: u16, max_transfer: usize) -> CmbRoom {
        let none = CmbRoom::default();
        let Some(cmb) = self.cmb.cmb() else { return none };
        let Some((mapping, address)) = &cmb.queues else { return none };
        let lists = if self.env.options.cmb_prp_lists && cmb.cmbsz.lists() {
            queues::list_bytes(entries, max_transfer)
        } else {
            0
        };
        let sq = (usize::from(entries) * 64).next_multiple_of(PAGE);
        let offset = sq.saturating_add(lists).saturating_mul(usize::from(qid) - 1);
        let part = |offset: usize, len: usize| {
            let fits = len > 0 && offset.checked_add(len).is_some_and(|end| end <= mapping.len());
            fits.then(|| RingMemory::cmb(Arc::clone(mapping), *address, offset, len))
        };
        let room =
            CmbRoom { submission_queue: part(offset, sq), lists: part(offset.saturating_add(sq), lists) };
        // Without CDPCILS a command and its lists lie both in the CMB or both outside.
        let apart = room.submission_queue.is_some() != room.lists.is_some();
        if apart && !cmb.cmbloc.cdpcils() { none } else { room }
    }

    /// Deletes a queue that is given up. After a reset there is nothing to delete. A controller that refuses is
    /// reset: it must not use the queue's memory any more.
    pub(crate) fn delete_queue(&self, qid: u16, epoch: u64) -> Result<(), ControllerError> {
        let mut control = self.lock();
        let gone = self.epoch() != epoch || control.dead.is_some();
        let deleted = if gone { Ok(()) } else { control.admin(&self.env)?.delete_queues(&self.env, qid) };
        drop(control);
        if let Err(e) = &deleted {
            tracing::warn!("{}: deleting queue {qid}: {e}", self.name());
            self.reset(epoch)?;
        }
        self.lock().free_qids.insert(qid);
        Ok(())
    }

    /// Creates the queue again that `pair` was before a reset. The pair has been restarted.
    pub(crate) fn recreate_queue(&self, pair: &QueuePair) -> Result<u64, ControllerError> {
        let mut control = self.lock();
        control.alive(self.name())?;
        control.admin(&self.env)?.create_queues(&self.env, pair.layout())?;
        Ok(self.epoch())
    }

    /// What the controller reported since the last call: health warnings, changed namespaces, errors. Never blocks for
    /// an event to come. Each one is reported once.
    pub fn events(&self) -> Result<Vec<Event>, ControllerError> {
        let mut control = self.lock();
        control.alive(self.name())?;
        events::take(&self.env, control.admin(&self.env)?)
    }

    /// Asks the controller to give up one command; says whether it did (a completion with status "Command Abort
    /// Requested" follows then).
    pub fn abort(&self, qid: u16, cid: u16) -> Result<bool, ControllerError> {
        let mut control = self.lock();
        control.alive(self.name())?;
        control.admin(&self.env)?.abort(&self.env, qid, cid)
    }

    /// Whether the controller still runs: an error if it is gone ([`PciError::Removed`]), has failed (CSTS.CFS) or was given up.
    pub fn check(&self) -> Result<(), ControllerError> {
        let control = self.lock();
        control.alive(self.name())?;
        self.present(&control)?;
        drop(control);
        if self.env.registers.csts()?.cfs() {
            return Err(ControllerError::Fatal { name: self.name().to_owned(), state: State::Ready });
        }
        Ok(())
    }

    /// Why it cannot be used any more, if that is known: see [`Disk::failure`](crate::disk::Disk::failure).
    pub(crate) fn failure(&self) -> Option<String> {
        let gone =
            || self.function().is_gone().then(|| PciError::Removed(self.name().to_owned()).to_string());
        // Whoever holds the lock now, in a reset, will say how it went.
        self.control.try_lock().ok()?.dead.clone().or_else(gone)
    }

    /// An error if an access to its mapped memory found nobody there ([`Mapping::is_lost`](crate::mem::Mapping::is_lost)), or config space
    /// reads as ones: what registers read as where no device answers is up to the platform (ones; in QEMU zeros).
    fn present(&self, control: &Control) -> Result<(), ControllerError> {
        let cmb = self.cmb.cmb();
        let queues = cmb.and_then(|cmb| cmb.queues.as_ref()).map(|(memory, _)| memory);
        let mut mapped = control.kept.doorbells.iter().chain(cmb.map(|cmb| &cmb.data.memory)).chain(queues);
        let gone =
            mapped.any(|memory| memory.is_lost()) || self.function().config_read(CLASS, 4)? == u32::MAX;
        if gone {
            return Err(PciError::Removed(self.name().to_owned()).into());
        }
        Ok(())
    }

    /// Resets the controller and brings it up again, unless that has happened since `epoch`. All queues are gone
    /// after it; their owners create them again ([`IoQueue::recover`]). If it fails the controller is dead: bus
    /// mastering is turned off, and every later call says so.
    pub fn reset(&self, epoch: u64) -> Result<(), ControllerError> {
        let mut control = self.lock();
        control.alive(self.name())?;
        if self.epoch() != epoch {
            return Ok(());
        }
        tracing::warn!("{}: resetting the controller", self.name());
        control.reset_hooks.retain(|hook| hook.upgrade().inspect(|hook| hook()).is_some());
        let result = bring_up(&self.env, &mut control.kept).and_then(|now| self.same(&now));
        // Whatever came of that: without its memory it is gone.
        let result = self.present(&control).and(result);
        // One that stays off does not keep the rest from going on: the next barrier says so.
        if let (Ok(()), Some(kept)) = (&result, control.pmr) {
            let interrupted = || {
                self.pmr_interruptions.fetch_add(1, Ordering::AcqRel);
            };
            if let Err(e) = pmr::resume(self, kept, interrupted) {
                tracing::error!("{e}");
            }
        }
        if let Err(e) = &result {
            control.dead = Some(e.to_string());
            quiesce(&self.env);
        }
        self.epoch.fetch_add(1, Ordering::AcqRel);
        result
    }

    /// Whether the controller is the one it was: a namespace that changed or went away must not be written to.
    fn same(&self, now: &Identity) -> Result<(), ControllerError> {
        let changed = |what: String| Err(ControllerError::Changed { name: self.name().to_owned(), what });
        if now.serial() != self.identity.serial() || now.model() != self.identity.model() {
            return changed("the serial or model number".to_owned());
        }
        if now.io_queues < self.identity.io_queues {
            return changed("the number of I/O queues".to_owned());
        }
        if now.max_transfer() != self.identity.max_transfer() || now.write_cache != self.identity.write_cache
        {
            return changed("the transfer size or the write cache".to_owned());
        }
        for was in &self.identity.namespaces {
            let is = now.namespaces.iter().find(|n| n.nsid == was.nsid);
            if is.is_none_or(|is| {
                (is.blocks, is.block_size, &is.unusable, is.data.nguid)
                    != (was.blocks, was.block_size, &was.unusable, was.data.nguid)
            }) {
                return changed(format!("namespace {}", was.nsid));
            }
        }
        Ok(())
    }

    /// Shuts down in order (CC.SHN), so that a volatile cache is written out, then disables the controller. Called on drop.
    pub fn shutdown(&self) -> Result<(), ControllerError> {
        let mut control = self.lock();
        if control.dead.is_some() {
            return Ok(());
        }
        control.dead = Some("it was shut down".to_owned());
        let regs = &self.env.registers;
        let result = (|| {
            regs.set_cc(regs.cc()?.with_shn(1))?;
            // RTD3E, in microseconds, is how long a normal shutdown may take; 0 says nothing.
            let limit =
                Duration::from_micros(u64::from(self.identity.controller.rtd3e)).max(Duration::from_secs(5));
            wait(&self.env, State::Ready, limit, || Ok(regs.csts()?.shst() == 2))
        })();
        quiesce(&self.env);
        result
    }
}

impl Control {
    fn alive(&self, name: &str) -> Result<(), ControllerError> {
        match &self.dead {
            None => Ok(()),
            Some(reason) => Err(ControllerError::Dead { name: name.to_owned(), reason: reason.clone() }),
        }
    }

    fn admin(&mut self, env: &Env) -> Result<&mut super::admin::AdminQueue, ControllerError> {
        let down =
            || ControllerError::AdminQueueDown { name: env.name().to_owned(), command: "an admin command" };
        self.kept.admin.as_mut().ok_or_else(down)
    }
}

fn wait(
    env: &Env,
    state: State,
    limit: Duration,
    mut over: impl FnMut() -> Result<bool, ControllerError>,
) -> Result<(), ControllerError> {
    let start = env.clock.now();
    while !over()? {
        let waited = env.clock.now().saturating_sub(start);
        if waited >= limit {
            return Err(ControllerError::Stuck { name: env.name().to_owned(), state, waited });
        }
        env.registers.function.step();
        env.clock.pause(Duration::from_micros(100));
    }
    Ok(())
}

/// Makes sure that the controller reaches no host memory any more: disabled, or else cut off from the bus.
fn quiesce(env: &Env) {
    let regs = &env.registers;
    let disabled = (|| {
        let units = u32::from(regs.cap()?.to()).max(1);
        regs.set_cc(regs.cc()?.with_en(false).with_shn(0))?;
        wait(env, State::WaitDisabled, Duration::from_millis(500) * units, || Ok(!regs.csts()?.rdy()))
    })();
    if let Err(e) = disabled {
        tracing::debug!("{}: cannot disable: {e}", env.name());
        if let Err(e) = regs.function.set_bus_master(false) {
            tracing::debug!("{}: cannot turn bus mastering off: {e}", env.name());
        }
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if let Err(e) = self.shutdown() {
            tracing::warn!("shutdown: {e}");
        }
    }
}
