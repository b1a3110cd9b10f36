//! From power-on, or from any state a failure left behind, to ready: one state at a time.
//!
//! Each wait has a deadline from the controller's own word (CAP.TO, CRTO), each command the admin deadline. A reset
//! goes through the same states.

use std::sync::Arc;
use std::time::Duration;

use super::admin::AdminQueue;
use super::identity::{Identity, Namespace};
use super::{ControllerError, Env, queues};
use crate::cmb::{self, CmbStatus};
use crate::mem::{Mapping, PAGE};
use crate::spec::identify::IdentifyController;
use crate::spec::regs::{self, Cap, Cc, Version};

/// Where a controller is on its way to ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Read CAP and VS; turn bus mastering on.
    Check,
    /// It is enabled but not ready yet: clearing CC.EN then is undefined, so wait for CSTS.RDY first.
    WaitReadyToDisable,
    /// Clear CC.EN.
    Disable,
    /// Wait for CSTS.RDY to clear.
    WaitDisabled,
    /// It did not become disabled: reset the function, once.
    ResetFunction,
    /// Find and enable the CMB.
    EnableCmb,
    /// Program AQA, ASQ and ACQ.
    AdminQueue,
    /// Set CC.EN.
    Enable,
    /// Wait for CSTS.RDY.
    WaitReady,
    /// Identify Controller.
    IdentifyController,
    /// Identify the active namespaces.
    IdentifyNamespaces,
    /// Set Features: Number of Queues.
    NumberOfQueues,
    /// Get Features: Volatile Write Cache.
    WriteCache,
    /// Set Features: Asynchronous Event Configuration; ask for the first event.
    WatchEvents,
    /// Usable.
    Ready,
}

/// OAES bit 8: Namespace Attribute Notices supported.
const OAES_NAMESPACE: u32 = 1 << 8;

/// How often a waiting state looks at the registers.
const POLL: Duration = Duration::from_micros(100);

/// What outlives a reset.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    pub(crate) admin: Option<AdminQueue>,
    pub(crate) cmb: Option<CmbStatus>,
    pub(crate) doorbells: Option<Arc<Mapping>>,
}

struct Bringup<'a> {
    env: &'a Env,
    kept: &'a mut Kept,
    state: State,
    entered: Duration,
    ready_timeout: Duration,
    function_was_reset: bool,
    cap: Cap,
    version: Version,
    controller: Option<Box<IdentifyController>>,
    namespaces: Vec<Namespace>,
    io_queues: u16,
    write_cache: bool,
}

/// Runs the machine to [`State::Ready`].
pub(crate) fn bring_up(env: &Env, kept: &mut Kept) -> Result<Identity, ControllerError> {
    let mut machine = Bringup {
        env,
        kept,
        state: State::Check,
        entered: env.clock.now(),
        ready_timeout: Duration::ZERO,
        function_was_reset: false,
        cap: Cap::new(),
        version: Version::new(),
        controller: None,
        namespaces: Vec::new(),
        io_queues: 0,
        write_cache: false,
    };
    while machine.state != State::Ready {
        let stepped = machine.step().map_err(|e| match e {
            ControllerError::Fatal { name, .. } => ControllerError::Fatal { name, state: machine.state },
            other => other,
        });
        match stepped? {
            Some(next) => {
                tracing::trace!("{}: {:?} -> {next:?}", env.name(), machine.state);
                (machine.state, machine.entered) = (next, env.clock.now());
            }
            None => {
                // An emulated device makes progress here, a real one by itself.
                env.registers.function.step();
                env.clock.pause(POLL);
            }
        }
    }
    let Some(controller) = machine.controller else { return Err(machine.unsupported("no Identify data")) };
    Ok(Identity {
        cap: machine.cap,
        version: machine.version,
        controller,
        namespaces: machine.namespaces,
        io_queues: machine.io_queues,
        write_cache: machine.write_cache,
    })
}

impl Bringup<'_> {
    fn unsupported(&self, what: impl Into<String>) -> ControllerError {
        ControllerError::Unsupported { name: self.env.name().to_owned(), what: what.into() }
    }

    /// How long the current state has lasted, if that is too long.
    fn overdue(&self) -> Option<ControllerError> {
        let waited = self.env.clock.now().saturating_sub(self.entered);
        (waited >= self.ready_timeout).then(|| ControllerError::Stuck {
            name: self.env.name().to_owned(),
            state: self.state,
            waited,
        })
    }

    fn admin(&mut self) -> Result<&mut AdminQueue, ControllerError> {
        let name = self.env.name();
        let down =
            || ControllerError::AdminQueueDown { name: name.to_owned(), command: "a bring-up command" };
        self.kept.admin.as_mut().ok_or_else(down)
    }

    /// Does what the state is for. The next state, or `None` to look again later.
    fn step(&mut self) -> Result<Option<State>, ControllerError> {
        let (env, regs) = (self.env, &self.env.registers);
        Ok(Some(match self.state {
            State::Check => self.check()?,
            State::WaitReadyToDisable => {
                let csts = regs.csts()?;
                if !csts.rdy() && !csts.cfs() && self.overdue().is_none() {
                    return Ok(None);
                }
                State::Disable
            }
            State::Disable => {
                regs.set_cc(regs.cc()?.with_en(false).with_shn(0))?;
                State::WaitDisabled
            }
            State::WaitDisabled => {
                let csts = regs.csts()?;
                if !csts.rdy() && csts.cfs() && !self.function_was_reset {
                    // It failed while it was disabled: disabling it again is no reset.
                    State::ResetFunction
                } else if !csts.rdy() {
                    State::EnableCmb
                } else {
                    match self.overdue() {
                        None => return Ok(None),
                        Some(_) if !self.function_was_reset => State::ResetFunction,
                        Some(stuck) => return Err(stuck),
                    }
                }
            }
            State::ResetFunction => {
                tracing::warn!(
                    "{}: still ready or failed after CC.EN was cleared; resetting the function",
                    env.name()
                );
                self.function_was_reset = true;
                regs.function.reset()?;
                regs.function.set_bus_master(true)?;
                State::Disable
            }
            State::EnableCmb => {
                self.enable_cmb()?;
                State::AdminQueue
            }
            State::AdminQueue => {
                match &mut self.kept.admin {
                    Some(admin) => admin.restart()?,
                    none => {
                        self.kept.doorbells = queues::map_doorbells(env, self.cap, env.options.io_queues)?;
                        *none = Some(AdminQueue::new(env, self.cap, self.kept.doorbells.as_ref())?);
                    }
                }
                let (aqa, asq, acq) = self.admin()?.registers();
                regs.set_admin_queues(aqa, asq, acq)?;
                State::Enable
            }
            State::Enable => {
                // CSS 0: NVM command set; 6: all command sets the controller supports, among them NVM.
                let css = if self.cap.css() & 1 != 0 { 0 } else { 6 };
                let cc = Cc::new().with_css(css).with_iosqes(6).with_iocqes(4).with_en(true);
                regs.set_cc(cc)?;
                State::WaitReady
            }
            State::WaitReady => {
                let csts = regs.csts()?;
                if csts.cfs() {
                    return Err(ControllerError::Fatal { name: env.name().to_owned(), state: self.state });
                }
                if !csts.rdy() {
                    return self.overdue().map_or(Ok(None), Err);
                }
                State::IdentifyController
            }
            State::IdentifyController => {
                let data = self.admin()?.identify_controller(env)?;
                if data.sqes & 0xf > 6 || data.cqes & 0xf > 4 {
                    return Err(self.unsupported("queue entries larger than 64 and 16 bytes"));
                }
                self.controller = Some(data);
                State::IdentifyNamespaces
            }
            State::IdentifyNamespaces => {
                for nsid in self.admin()?.active_namespaces(env)? {
                    let data = self.admin()?.identify_namespace(env, nsid)?;
                    self.namespaces.push(Namespace::new(nsid, data));
                }
                State::NumberOfQueues
            }
            State::NumberOfQueues => {
                self.io_queues = self.admin()?.number_of_queues(env, env.options.io_queues)?;
                State::WriteCache
            }
            State::WriteCache => {
                let present = self.controller.as_ref().is_some_and(|c| c.vwc & 1 == 1);
                self.write_cache = present && self.admin()?.write_cache_enabled(env)?;
                State::WatchEvents
            }
            State::WatchEvents => {
                let notices = self.controller.as_ref().is_some_and(|c| c.oaes & OAES_NAMESPACE != 0);
                match self.admin()?.configure_events(env, notices) {
                    // A controller that does not let itself be configured reports what it reports.
                    Err(ControllerError::Command { status, .. }) => {
                        tracing::debug!("{}: asynchronous event configuration: {status}", env.name());
                    }
                    other => other?,
                }
                self.admin()?.watch_events()?;
                State::Ready
            }
            State::Ready => State::Ready,
        }))
    }

    fn check(&mut self) -> Result<State, ControllerError> {
        let regs = &self.env.registers;
        self.cap = regs.cap()?;
        self.version = regs.version()?;
        if self.cap.css() & 0b100_0001 == 0 {
            return Err(self.unsupported("a controller without the NVM command set"));
        }
        if self.cap.mpsmin() != 0 {
            return Err(
                self.unsupported(format!("a smallest memory page of {} bytes", PAGE << self.cap.mpsmin()))
            );
        }
        // CAP.TO is in 500 ms units. Where CAP.CRMS says so, CRTO has the same in more bits; some say 0 and mean "at once".
        let mut units = u32::from(self.cap.to());
        if self.cap.crms() & 1 != 0 {
            units = units.max(regs.crto()? & 0xffff);
        }
        self.ready_timeout = Duration::from_millis(500) * units.max(1);
        regs.function.set_bus_master(true)?;
        let (cc, csts) = (regs.cc()?, regs.csts()?);
        Ok(if cc.en() && !csts.rdy() && !csts.cfs() { State::WaitReadyToDisable } else { State::Disable })
    }

    fn enable_cmb(&mut self) -> Result<(), ControllerError> {
        let function = self.env.registers.function.as_ref();
        match &self.kept.cmb {
            None => {
                if self.cap.pmrs() {
                    // Whoever had it before and was killed left it decoded, at an address that may be the one of our DMA memory now.
                    // It keeps its bytes.
                    function.write32(0, regs::PMRMSCL, 0)?;
                }
                let status =
                    cmb::enable(function, self.cap, &self.env.iova, self.env.options.cmb_queue_bytes)?;
                if let CmbStatus::Absent(reason) = &status {
                    tracing::debug!("{}: no CMB: {reason}", self.env.name());
                }
                self.kept.cmb = Some(status);
            }
            Some(CmbStatus::Absent(_)) => {}
            Some(CmbStatus::Enabled(cmb)) => {
                if !cmb::reenable(function, cmb)? {
                    let (name, what) = (self.env.name().to_owned(), "the CMB".to_owned());
                    return Err(ControllerError::Changed { name, what });
                }
            }
        }
        Ok(())
    }
}
