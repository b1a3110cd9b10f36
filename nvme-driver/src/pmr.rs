//! The Persistent Memory Region as raw memory that keeps its bytes (Base Specification, "Persistent Memory Region").
//!
//! [`Pmr::enable`] turns it on, timed by PMRCAP.PMRTO; [`Pmr::write`] stores, and [`Pmr::barrier`] returns when everything that
//! was stored before is persistent. Commands may use it as data memory at [`Pmr::bus_address`]; what a command wrote there is
//! persistent after a barrier that follows its completion.
//!
//! The region is the whole BAR that PMRCAP.BIR names. It is enabled apart from the controller, and a controller reset
//! leaves it alone. What goes deeper turns it off: a reset of the subsystem, of the bus, of the function on some. So whoever resets the
//! controller looks whether it is still on, and turns it on again where it was; a barrier that finds it off resets the controller, for
//! which everybody is told before. Its bytes are there as they were persistent. What was stored since the last barrier may not be, and
//! the next barrier says so, once: [`PmrError::Interrupted`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::controller::{Controller, ControllerError};
use crate::mem::{Mapping, OutOfRange, PAGE};
use crate::pci::{PciError, PciFunction};
use crate::spec::regs::{self, Pmrcap, Pmrctl, Pmrsts};
use crate::vfio::device_memory;

/// Aligned to this on the bus, so that peers can map it with large pages.
const CBA_ALIGN: u64 = 2 << 20;
/// PMRMSCL: Controller Memory Space Enable.
const CMSE: u32 = 1 << 1;
/// PMRCAP.PMRWBM: a read of the PMR is a barrier.
const BARRIER_BY_MEMORY: u8 = 1;
/// PMRCAP.PMRWBM: a read of PMRSTS is a barrier.
const BARRIER_BY_STATUS: u8 = 2;
/// Time between two looks at PMRSTS.
const POLL: Duration = Duration::from_micros(100);

/// A PMR could not be enabled or used.
#[derive(Debug, thiserror::Error)]
pub enum PmrError {
    /// There is none, or none that can be used.
    #[error("{name} has no usable PMR: {reason}")]
    Absent {
        /// The controller.
        name: String,
        /// Why.
        reason: String,
    },
    /// Another [`Pmr`] of this controller is alive.
    #[error("the PMR of {0} is enabled already; drop that handle first")]
    InUse(String),
    /// It did not become ready (or not ready) in the time PMRCAP.PMRTO names, or is not ready any more, and a reset did not help.
    #[error("{name}: the PMR is{} ready after {} ms", if *.enabled { " not" } else { " still" }, .waited.as_millis())]
    NotReady {
        /// The controller.
        name: String,
        /// Whether it was being waited for to become ready.
        enabled: bool,
        /// For how long; zero if it had been ready before.
        waited: Duration,
    },
    /// PMRSTS.ERR or PMRSTS.HSTS: bytes stored since the last barrier may not be persistent.
    #[error("{name}: the PMR reports {what}; what was written since the last barrier may be lost")]
    Failed {
        /// The controller.
        name: String,
        /// What it reports.
        what: String,
    },
    /// It was off since the last barrier, by a reset of more than the controller, and is on again. What was stored in between, and before it
    /// since that barrier, may be lost.
    #[error("{0}: the PMR was turned off by a reset; what was written since the last barrier may be lost")]
    Interrupted(String),
    /// It is off, and the controller could not be reset, which would have turned it on.
    #[error("the PMR is off: {0}")]
    Reset(Box<ControllerError>),
    /// The function failed or is gone.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// Outside the region.
    #[error(transparent)]
    Memory(#[from] OutOfRange),
}

/// How the region is (PMRSTS.HSTS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// As it should be.
    Normal,
    /// It works, but what it held before was lost when it was enabled ("Restore Error").
    ContentLost,
    /// It can be read only.
    ReadOnly,
    /// It works, but may not keep its bytes ("Unreliable"), or reports a reserved value.
    Unreliable,
}

/// An enabled PMR. Disabled when dropped; it keeps its bytes.
#[derive(Debug)]
pub struct Pmr {
    controller: Arc<Controller>,
    cap: Pmrcap,
    memory: Arc<Mapping>,
    bus_address: Option<u64>,
    /// When it was enabled.
    health: Health,
    /// [`Controller::pmr_interruptions`] as of the last barrier.
    interruptions: AtomicU64,
}

/// What is needed to turn an enabled region on again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kept {
    cap: Pmrcap,
    bus_address: Option<u64>,
}

/// After a reset of `controller`: turns its region on again, as it was, if that turned it off. `interrupted` is called first then, before
/// anybody can find it on.
pub(crate) fn resume(
    controller: &Controller,
    kept: Kept,
    interrupted: impl FnOnce(),
) -> Result<(), PmrError> {
    let registers = Registers { controller, cap: kept.cap };
    let on = Pmrctl::from(registers.function().read32(0, regs::PMRCTL)?).en() && !registers.status()?.nrdy();
    if on {
        return Ok(());
    }
    interrupted();
    tracing::warn!("{}: the PMR is off after a reset; turning it on again", controller.name());
    registers.function().write32(0, regs::PMRMSCL, 0)?;
    let status = registers.set_enabled(true)?;
    if status.err() != 0 {
        let what = format!("error {:#x}", status.err());
        return Err(PmrError::Failed { name: registers.name(), what });
    }
    match kept.bus_address {
        Some(address) if !registers.program(address)? => {
            let what = format!("that its bus address {address:#x} is refused");
            Err(PmrError::Failed { name: registers.name(), what })
        }
        _ => Ok(()),
    }
}

/// The controller's PMR registers.
struct Registers<'a> {
    controller: &'a Controller,
    cap: Pmrcap,
}

impl Registers<'_> {
    fn function(&self) -> &dyn PciFunction {
        self.controller.function().as_ref()
    }

    fn name(&self) -> String {
        self.controller.name().to_owned()
    }

    fn status(&self) -> Result<Pmrsts, PmrError> {
        match self.function().read32(0, regs::PMRSTS)? {
            u32::MAX => Err(PciError::Removed(self.name()).into()),
            status => Ok(status.into()),
        }
    }

    /// PMRCAP.PMRTO in PMRCAP.PMRTU units; some say 0 and mean "at once".
    fn timeout(&self) -> Duration {
        let unit = if self.cap.pmrtu() == 1 { Duration::from_secs(60) } else { Duration::from_millis(500) };
        unit * u32::from(self.cap.pmrto()).max(1)
    }

    /// Sets PMRCTL.EN and waits until the region is ready, or not ready any more.
    fn set_enabled(&self, enabled: bool) -> Result<Pmrsts, PmrError> {
        self.function().write32(0, regs::PMRCTL, Pmrctl::new().with_en(enabled).into())?;
        let clock = self.controller.clock();
        let start = clock.now();
        loop {
            let status = self.status()?;
            if status.nrdy() != enabled {
                return Ok(status);
            }
            let waited = clock.now().saturating_sub(start);
            if waited >= self.timeout() {
                return Err(PmrError::NotReady { name: self.name(), enabled, waited });
            }
            self.function().step();
            clock.pause(POLL);
        }
    }

    /// Off, as far as the controller answers; for the way out.
    fn off(&self, iova: Option<(u64, u64)>) {
        let function = self.function();
        let off = function
            .write32(0, regs::PMRMSCL, 0)
            .and_then(|()| function.write32(0, regs::PMRCTL, Pmrctl::new().into()));
        if let Err(e) = off {
            tracing::debug!("{}: disabling the PMR: {e}", self.controller.name());
        }
        if let Some((address, len)) = iova
            && let Err(e) = self.controller.iova().give(address, len)
        {
            tracing::error!("{}: {e}", self.controller.name());
        }
    }

    /// Has the controller answer to the region's bytes at an address of its own on the bus. `None` if it cannot.
    fn decode(&self, size: u64) -> Result<Option<u64>, PmrError> {
        if !self.cap.cmss() {
            return Ok(None);
        }
        let address = match self.controller.iova().take(size, CBA_ALIGN) {
            Ok(address) => address,
            Err(e) => {
                tracing::warn!("{}: no bus address for the PMR: {e}", self.controller.name());
                return Ok(None);
            }
        };
        match self.program(address) {
            Ok(true) => Ok(Some(address)),
            other => {
                self.function().write32(0, regs::PMRMSCL, 0)?;
                if let Err(e) = self.controller.iova().give(address, size) {
                    tracing::error!("{}: {e}", self.controller.name());
                }
                tracing::warn!("{}: the PMR's bus address {address:#x} is refused", self.controller.name());
                other.map(|_| None)
            }
        }
    }

    /// Sets the address. Says whether it is taken.
    fn program(&self, address: u64) -> Result<bool, PmrError> {
        // The half with CMSE last: it is what makes the address count.
        self.function().write32(0, regs::PMRMSCU, (address >> 32) as u32)?;
        self.function().write32(0, regs::PMRMSCL, address as u32 | CMSE)?;
        Ok(!self.status()?.cbai())
    }

    fn enable(&self) -> Result<(Arc<Mapping>, Option<u64>, Health), PmrError> {
        let absent = |reason: String| PmrError::Absent { name: self.name(), reason };
        let bar = self.cap.bir();
        if !(2..=5).contains(&bar) {
            return Err(absent(format!("PMRCAP.BIR names BAR {bar}")));
        }
        let size = self.function().bar(bar)?.size & !(PAGE as u64 - 1);
        if size == 0 {
            return Err(absent(format!("its BAR {bar} has less than 4 KiB")));
        }
        if self.cap.pmrwbm() & (BARRIER_BY_MEMORY | BARRIER_BY_STATUS) == 0 {
            return Err(absent("it names no way to make writes persistent (PMRCAP.PMRWBM)".to_owned()));
        }
        // Whoever had it before may have left it on, at an address of their own.
        self.function().write32(0, regs::PMRMSCL, 0)?;
        self.set_enabled(false)?;
        let status = self.set_enabled(true)?;
        if status.err() != 0 {
            return Err(PmrError::Failed { name: self.name(), what: format!("error {:#x}", status.err()) });
        }
        let memory = self.function().map_bar(bar, 0, size)?;
        let memory = memory.ok_or_else(|| absent(format!("its BAR {bar} cannot be mapped")))?;
        Ok((memory, self.decode(size)?, health(status)))
    }
}

fn health(status: Pmrsts) -> Health {
    match status.hsts() {
        0 => Health::Normal,
        1 => Health::ContentLost,
        2 => Health::ReadOnly,
        _ => Health::Unreliable,
    }
}

impl Pmr {
    /// Enables the controller's PMR: waits for it at most as long as PMRCAP.PMRTO says, twice.
    pub fn enable(controller: &Arc<Controller>) -> Result<Self, PmrError> {
        let name = || controller.name().to_owned();
        if !controller.identity().cap.pmrs() {
            return Err(PmrError::Absent { name: name(), reason: "CAP.PMRS is 0".to_owned() });
        }
        if !controller.take_pmr() {
            return Err(PmrError::InUse(name()));
        }
        let enable = || {
            let cap = match controller.function().read32(0, regs::PMRCAP)? {
                u32::MAX => return Err(PciError::Removed(name()).into()),
                cap => Pmrcap::from(cap),
            };
            let registers = Registers { controller, cap };
            let (memory, bus_address, health) = registers.enable().inspect_err(|_| registers.off(None))?;
            controller.keep_pmr(Some(Kept { cap, bus_address }));
            let interruptions = AtomicU64::new(controller.pmr_interruptions());
            Ok(Self { controller: Arc::clone(controller), cap, memory, bus_address, health, interruptions })
        };
        enable().inspect_err(|_| controller.give_pmr())
    }

    fn registers(&self) -> Registers<'_> {
        Registers { controller: &self.controller, cap: self.cap }
    }

    /// Its size in bytes.
    pub fn size(&self) -> usize {
        self.memory.len()
    }

    /// Its bytes. What others do to them is theirs; [`read`](Self::read) and [`write`](Self::write) use accesses that a real BAR takes.
    pub fn memory(&self) -> &Arc<Mapping> {
        &self.memory
    }

    /// Whether it is behind a bus: aligned accesses of at most 8 bytes, as [`read`](Self::read) and [`write`](Self::write) make them.
    pub fn is_device_memory(&self) -> bool {
        self.controller.function().bars_are_device_memory()
    }

    /// Where commands of this controller find it; `None` if the controller cannot answer to it (PMRCAP.CMSS, PMRSTS.CBAI).
    pub fn bus_address(&self) -> Option<u64> {
        self.bus_address
    }

    /// Whether read commands may put data there (PMRCAP.RDS).
    pub fn takes_read_data(&self) -> bool {
        self.cap.rds()
    }

    /// Whether write commands may take data from there (PMRCAP.WDS).
    pub fn gives_write_data(&self) -> bool {
        self.cap.wds()
    }

    /// How it was when it was enabled: whether what it held before is still there.
    pub fn health(&self) -> Health {
        self.health
    }

    /// Copies bytes out, from `offset`.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), PmrError> {
        if self.is_device_memory() {
            device_memory::read(&self.memory, offset, into)?;
        } else {
            self.memory.read(offset, into)?;
        }
        Ok(())
    }

    /// Stores bytes at `offset`. Not persistent before a [`barrier`](Self::barrier).
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), PmrError> {
        if self.is_device_memory() {
            device_memory::write(&self.memory, offset, from)?;
        } else {
            self.memory.write(offset, from)?;
        }
        Ok(())
    }

    /// Returns when everything that this thread stored before is persistent (PMRCAP.PMRWBM says how to find out), and the
    /// region is well; an error means that what was stored since the last barrier may not be. A region that is off is turned on again, by
    /// a reset of the controller.
    pub fn barrier(&self) -> Result<(), PmrError> {
        let epoch = self.controller.epoch();
        if self.cap.pmrwbm() & BARRIER_BY_STATUS == 0 {
            device_memory::flush(&self.memory, 0)?;
        } else {
            std::sync::atomic::fence(Ordering::SeqCst);
        }
        // A barrier itself where the controller says so, and the only way to learn of failures.
        let mut status = self.registers().status()?;
        if status.nrdy() {
            // Behind our back. So whatever did that has reset more, and those who read here are to be told as in any reset.
            self.controller.reset(epoch).map_err(|e| PmrError::Reset(Box::new(e)))?;
            status = self.registers().status()?;
        }
        // After the look at the status: if it was found on again, it was counted before.
        let interruptions = self.controller.pmr_interruptions();
        let failed = |what: String| Err(PmrError::Failed { name: self.controller.name().to_owned(), what });
        match (status.nrdy(), status.err(), health(status)) {
            (true, ..) => {
                let name = self.controller.name().to_owned();
                Err(PmrError::NotReady { name, enabled: true, waited: Duration::ZERO })
            }
            (_, error @ 1.., _) => failed(format!("error {error:#x}")),
            // Said once: by the swap, whoever else asks at the same time.
            _ if self.interruptions.swap(interruptions, Ordering::AcqRel) != interruptions => {
                Err(PmrError::Interrupted(self.controller.name().to_owned()))
            }
            (_, _, Health::ReadOnly) => failed("that it is read-only".to_owned()),
            (_, _, Health::Unreliable) => failed("that it is unreliable".to_owned()),
            // That what it held before was lost is no news, and does not concern what was stored since.
            (_, _, Health::Normal | Health::ContentLost) => Ok(()),
        }
    }
}

impl Drop for Pmr {
    fn drop(&mut self) {
        self.controller.keep_pmr(None);
        self.registers().off(self.bus_address.map(|address| (address, self.memory.len() as u64)));
        self.controller.give_pmr();
    }
}
