//! The handle to an emulated controller.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::cache::{PowerCut, PowerCutReport};
use super::config::{Backing, Config, EmuError};
use super::counters::Counters;
use super::faults::Faults;
use super::iommu::Domain;
use super::state::State;
use super::thread::{self, ControllerThread};
use crate::mem::Mapping;
use crate::pci::PciFunction;

/// An emulated NVMe controller. It makes progress when it is stepped: by [`step`](Self::step), by the driver through
/// [`PciFunction::step`], or by a thread of its own ([`spawn`](Self::spawn)).
///
/// As any PCI function it comes up with bus mastering off: until it is set, no command is fetched.
#[derive(Debug)]
pub struct EmulatedController {
    pub(super) name: String,
    state: Mutex<State>,
    pub(super) domain: Arc<Domain>,
    /// Threads that want the state and are not the controller's own.
    waiters: AtomicU32,
    /// Whether a thread steps the controller.
    pub(super) has_thread: AtomicBool,
}

impl EmulatedController {
    /// Makes a controller, with an IOMMU domain of its own in which nothing is mapped.
    pub fn new(config: &Config) -> Result<Arc<Self>, EmuError> {
        let name = match &config.namespace {
            Backing::Ram { .. } => "emu:ram".to_owned(),
            Backing::Null { .. } => "emu:null".to_owned(),
            Backing::File { path, .. } => format!("emu:{}", path.display()),
        };
        Ok(Arc::new(Self {
            state: Mutex::new(State::new(config)?),
            domain: Domain::new(&name),
            waiters: AtomicU32::new(0),
            has_thread: AtomicBool::new(false),
            name,
        }))
    }

    /// The controller as a PCI function.
    pub fn function(self: &Arc<Self>) -> Arc<dyn PciFunction> {
        Arc::clone(self) as Arc<dyn PciFunction>
    }

    /// The IOMMU domain it lives behind.
    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    /// The state, for a register access or the like: the controller's thread steps aside.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.waiters.fetch_add(1, Ordering::Relaxed);
        let guard = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiters.fetch_sub(1, Ordering::Relaxed);
        guard
    }

    pub(super) fn is_waited_for(&self) -> bool {
        self.waiters.load(Ordering::Relaxed) != 0
    }

    /// Makes progress: looks at doorbells, executes up to [`Config::commands_per_step`] commands, completes them, sends
    /// interrupts. Says whether there was anything to do. One run of calls and one seed give one result.
    pub fn step(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let bus = state.bus(self.domain.session());
        state.step(&bus)
    }

    /// Steps the controller on a thread of its own, pinned to CPU `core` if one is given, until the handle is dropped.
    pub fn spawn(self: &Arc<Self>, core: Option<usize>) -> std::io::Result<ControllerThread> {
        thread::spawn(self, core)
    }

    /// What the controller did so far.
    pub fn counters(&self) -> Counters {
        self.lock().counters.clone()
    }

    /// Faults to inject.
    pub fn faults(&self) -> Faults<'_> {
        Faults { controller: self }
    }

    /// The Controller Memory Buffer, if there is one: shared memory with a file descriptor, so that it can be handed to
    /// other processes.
    pub fn cmb(&self) -> Option<Arc<Mapping>> {
        self.lock().cmb.clone()
    }

    /// Cuts the power and turns it on again: the volatile cache loses what `cut` says, the controller is as after
    /// power-on (disabled, bus mastering off), the CMB is zeros. DMA mappings survive: they are the IOMMU's.
    pub fn power_cut(&self, cut: PowerCut) -> std::io::Result<PowerCutReport> {
        self.lock().power_cut(cut)
    }
}
