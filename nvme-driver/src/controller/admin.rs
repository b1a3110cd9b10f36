//! The admin queue: one command at a time, each with a deadline.

use std::sync::Arc;
use std::time::Duration;

use bytemuck::Pod;

use super::bringup::State;
use super::queues::{self, CmbRoom};
use super::{ControllerError, Env};
use crate::dma::DmaBuffer;
use crate::mem::{Mapping, PAGE};
use crate::queue::{Data, Layout, QueuePair};
use crate::spec::command::{AdminOpcode, Command};
use crate::spec::features::{CNS_ACTIVE_NAMESPACES, CNS_CONTROLLER, CNS_NAMESPACE};
use crate::spec::features::{FEAT_ASYNC_EVENT, FEAT_NUMBER_OF_QUEUES, FEAT_VOLATILE_WRITE_CACHE};
use crate::spec::identify::{IdentifyController, IdentifyNamespace};
use crate::spec::regs::{Aqa, Cap};

/// Entries of the admin queues: far below the 4,096 that AQA can say, and more than are ever in flight.
const ENTRIES: u16 = 32;

/// How often a wait looks at CSTS, so that a controller that failed or is gone is noticed long before its commands are late.
const HEALTH: Duration = Duration::from_secs(1);

/// The token of Asynchronous Event Requests; other commands count up from 0.
const EVENT: u64 = u64::MAX;

#[derive(Debug)]
pub(crate) struct AdminQueue {
    pair: QueuePair,
    /// Data of the command in flight.
    buffer: DmaBuffer,
    next_token: u64,
    /// Dword 0 of an Asynchronous Event Request that completed while something else was waited for.
    event: Option<u32>,
    /// A command timed out or the protocol was broken: the buffer may still be written to.
    failed: bool,
}

impl AdminQueue {
    pub(crate) fn new(
        env: &Env,
        cap: Cap,
        doorbells: Option<&Arc<Mapping>>,
    ) -> Result<Self, ControllerError> {
        Ok(Self {
            pair: queues::build(env, cap, doorbells, 0, ENTRIES, PAGE, CmbRoom::default())?,
            buffer: env.arena.alloc(PAGE)?,
            next_token: 0,
            event: None,
            failed: false,
        })
    }

    /// As new: the controller is disabled.
    pub(crate) fn restart(&mut self) -> Result<(), ControllerError> {
        (self.failed, self.event) = (false, None);
        Ok(self.pair.restart(|_| ())?)
    }

    /// AQA, ASQ, ACQ.
    pub(crate) fn registers(&self) -> (Aqa, u64, u64) {
        let Layout { entries, sq_address, cq_address, .. } = self.pair.layout();
        (Aqa::new().with_asqs(entries - 1).with_acqs(entries - 1), sq_address, cq_address)
    }

    /// Sends a command and waits for it; `data`: with a 4 KiB buffer. Returns dword 0 of the completion.
    fn execute(
        &mut self,
        env: &Env,
        name: &'static str,
        command: Command,
        data: bool,
    ) -> Result<u32, ControllerError> {
        if self.failed {
            return Err(ControllerError::AdminQueueDown { name: env.name().to_owned(), command: name });
        }
        let token = self.next_token;
        self.next_token += 1;
        let data = data.then(|| Data { address: self.buffer.bus_address(), len: PAGE });
        self.pair.submit(command, data, token)?;
        self.pair.ring();
        let start = env.clock.now();
        let mut looked = start;
        loop {
            let mut done = None;
            let reaped = self.pair.reap(1, |d| done = Some(d));
            if let Err(source) = reaped {
                self.failed = true;
                return Err(ControllerError::Protocol { name: env.name().to_owned(), source });
            }
            match done {
                Some(d) if d.token == token && d.status.is_success() => return Ok(d.result),
                Some(d) if d.token == token => {
                    let (device, status) = (env.name().to_owned(), d.status);
                    return Err(ControllerError::Command { name: device, command: name, status });
                }
                Some(d) if d.token == EVENT && d.status.is_success() => self.event = Some(d.result),
                _ => {}
            }
            let now = env.clock.now();
            let waited = now.saturating_sub(start);
            let overdue = waited >= env.options.admin_timeout;
            if overdue || now.saturating_sub(looked) >= HEALTH {
                looked = now;
                let device = || env.name().to_owned();
                let over = match env.registers.csts() {
                    Err(gone) => Some(gone),
                    Ok(csts) if csts.cfs() => {
                        Some(ControllerError::Fatal { name: device(), state: State::Ready })
                    }
                    Ok(_) if overdue => {
                        Some(ControllerError::CommandTimeout { name: device(), command: name, waited })
                    }
                    Ok(_) => None,
                };
                if let Some(e) = over {
                    self.failed = true;
                    return Err(e);
                }
            }
            env.clock.pause(Duration::ZERO);
        }
    }

    /// Asks the controller to report its next event, whenever that may be.
    pub(crate) fn watch_events(&mut self) -> Result<(), ControllerError> {
        self.pair.submit(Command::new(AdminOpcode::AsyncEventRequest as u8, 0), None, EVENT)?;
        self.pair.ring();
        Ok(())
    }

    /// Dword 0 of the event that was reported, if one was.
    pub(crate) fn poll_event(&mut self, env: &Env) -> Result<Option<u32>, ControllerError> {
        // The first poll lets a device that is emulated inline say something, the second hears it.
        for _ in 0..2 {
            let event = &mut self.event;
            let reaped = self.pair.reap(1, |d| {
                if d.token == EVENT && d.status.is_success() {
                    *event = Some(d.result);
                }
            });
            if let Err(source) = reaped {
                self.failed = true;
                return Err(ControllerError::Protocol { name: env.name().to_owned(), source });
            }
        }
        Ok(self.event.take())
    }

    /// Get Log Page, the first 512 bytes, with Retain Asynchronous Event cleared.
    pub(crate) fn read_log(&mut self, env: &Env, page: u8) -> Result<(), ControllerError> {
        let mut command = Command::new(AdminOpcode::GetLogPage as u8, u32::MAX);
        command.cdw10 = (512 / 4 - 1) << 16 | u32::from(page);
        self.execute(env, "Get Log Page", command, true).map(|_| ())
    }

    /// Set Features, Asynchronous Event Configuration: critical warnings, and namespace attribute notices if `notices`.
    pub(crate) fn configure_events(&mut self, env: &Env, notices: bool) -> Result<(), ControllerError> {
        let mut command = Command::new(AdminOpcode::SetFeatures as u8, 0);
        command.cdw10 = u32::from(FEAT_ASYNC_EVENT);
        command.cdw11 = 0x1f | u32::from(notices) << 8;
        self.execute(env, "Set Features (Asynchronous Event Configuration)", command, false).map(|_| ())
    }

    /// Identify, returning the 4 KiB data structure.
    fn identify<T: Pod>(
        &mut self,
        env: &Env,
        name: &'static str,
        cns: u8,
        nsid: u32,
    ) -> Result<Box<T>, ControllerError> {
        const { assert!(size_of::<T>() == PAGE) };
        let mut command = Command::new(AdminOpcode::Identify as u8, nsid);
        command.cdw10 = u32::from(cns);
        self.execute(env, name, command, true)?;
        let mut data = Box::new(T::zeroed());
        self.buffer.read(0, bytemuck::bytes_of_mut(&mut *data))?;
        Ok(data)
    }

    pub(crate) fn identify_controller(
        &mut self,
        env: &Env,
    ) -> Result<Box<IdentifyController>, ControllerError> {
        self.identify(env, "Identify Controller", CNS_CONTROLLER, 0)
    }

    pub(crate) fn identify_namespace(
        &mut self,
        env: &Env,
        nsid: u32,
    ) -> Result<Box<IdentifyNamespace>, ControllerError> {
        self.identify(env, "Identify Namespace", CNS_NAMESPACE, nsid)
    }

    /// The active namespace identifiers, ascending; the first 1,024 of them.
    pub(crate) fn active_namespaces(&mut self, env: &Env) -> Result<Vec<u32>, ControllerError> {
        let list: Box<[u32; PAGE / 4]> =
            self.identify(env, "Identify Active Namespace ID list", CNS_ACTIVE_NAMESPACES, 0)?;
        Ok(list.iter().copied().take_while(|&nsid| nsid != 0).collect())
    }

    /// Set Features, Number of Queues: asks for `want` queue pairs, returns how many there are (at most `want`).
    pub(crate) fn number_of_queues(&mut self, env: &Env, want: u16) -> Result<u16, ControllerError> {
        let want = want.max(1);
        let mut command = Command::new(AdminOpcode::SetFeatures as u8, 0);
        command.cdw10 = u32::from(FEAT_NUMBER_OF_QUEUES);
        command.cdw11 = u32::from(want - 1) << 16 | u32::from(want - 1);
        let got = self.execute(env, "Set Features (Number of Queues)", command, false)?;
        // 0's based: submission queues in the low half, completion queues in the high half.
        let (sqs, cqs) = ((got & 0xffff) + 1, (got >> 16) + 1);
        Ok(u32::from(want).min(sqs).min(cqs) as u16)
    }

    /// Get Features, Volatile Write Cache: whether it is enabled.
    pub(crate) fn write_cache_enabled(&mut self, env: &Env) -> Result<bool, ControllerError> {
        let mut command = Command::new(AdminOpcode::GetFeatures as u8, 0);
        command.cdw10 = u32::from(FEAT_VOLATILE_WRITE_CACHE);
        Ok(self.execute(env, "Get Features (Volatile Write Cache)", command, false)? & 1 == 1)
    }

    /// Creates the completion queue, then the submission queue, without interrupts.
    pub(crate) fn create_queues(&mut self, env: &Env, at: Layout) -> Result<(), ControllerError> {
        let size = u32::from(at.entries - 1) << 16 | u32::from(at.qid);
        let mut cq = Command::new(AdminOpcode::CreateIoCq as u8, 0);
        (cq.prp1, cq.cdw10, cq.cdw11) = (at.cq_address, size, PHYSICALLY_CONTIGUOUS);
        self.execute(env, "Create I/O Completion Queue", cq, false)?;
        let mut sq = Command::new(AdminOpcode::CreateIoSq as u8, 0);
        (sq.prp1, sq.cdw10) = (at.sq_address, size);
        sq.cdw11 = u32::from(at.qid) << 16 | PHYSICALLY_CONTIGUOUS;
        let created = self.execute(env, "Create I/O Submission Queue", sq, false);
        // After a failure of the queue itself nothing more can be said, and nothing goes on before a reset, which deletes it.
        if created.is_err() && !self.failed {
            self.delete(env, AdminOpcode::DeleteIoCq, at.qid)?;
        }
        created.map(|_| ())
    }

    /// Deletes the submission queue, then the completion queue. When it returns the controller uses neither.
    pub(crate) fn delete_queues(&mut self, env: &Env, qid: u16) -> Result<(), ControllerError> {
        self.delete(env, AdminOpcode::DeleteIoSq, qid)?;
        self.delete(env, AdminOpcode::DeleteIoCq, qid)
    }

    fn delete(&mut self, env: &Env, opcode: AdminOpcode, qid: u16) -> Result<(), ControllerError> {
        let mut command = Command::new(opcode as u8, 0);
        command.cdw10 = u32::from(qid);
        self.execute(env, "Delete I/O Queue", command, false).map(|_| ())
    }

    /// Abort: asks the controller to give up a command; says whether it did.
    pub(crate) fn abort(&mut self, env: &Env, sqid: u16, cid: u16) -> Result<bool, ControllerError> {
        let mut command = Command::new(AdminOpcode::Abort as u8, 0);
        command.cdw10 = u32::from(cid) << 16 | u32::from(sqid);
        // Bit 0 of the result: the command was not aborted.
        Ok(self.execute(env, "Abort", command, false)? & 1 == 0)
    }
}

/// CDW11 of Create I/O Queue: Physically Contiguous.
const PHYSICALLY_CONTIGUOUS: u32 = 1;
