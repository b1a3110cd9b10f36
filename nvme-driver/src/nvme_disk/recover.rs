//! Commands that do not come back: abort, then reset and replay, then a typed error.
//!
//! The bound: a command is sent [`ATTEMPTS`] times, and each time is waited for at most `io_timeout` and
//! `abort_timeout`, plus one reset. So a call ends after that many times their sum, or sooner.

use std::time::Duration;

use super::transfer::ATTEMPTS;
use super::{HEALTH, NvmeDisk};
use crate::controller::ControllerError;
use crate::disk::{DiskError, Op};
use crate::queue::QueueError;

/// Empty polls between two looks at the clock: of a real device, and of one that only moves when we poll it.
const POLLS: u32 = 1024;
const POLLS_INLINE: u32 = 4;

/// What a waiting call has noticed so far.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// When the registers were last looked at.
    health: Option<Duration>,
    /// Since when commands are overdue and asked to be aborted.
    aborting: Option<Duration>,
}

impl Watch {
    pub(super) fn restart(&mut self) {
        *self = Self::default();
    }
}

/// Why the controller is reset, and so which commands are to blame: those have used up one of their attempts.
#[derive(Clone, Copy, Debug)]
enum Cause {
    /// Another queue's owner did it: none of ours.
    Elsewhere,
    /// The overdue ones.
    Late,
    /// A completion made no sense: perhaps any.
    Protocol(QueueError),
    /// The controller failed: perhaps because of any.
    Failed,
}

impl NvmeDisk {
    pub(super) fn alive(&self) -> Result<(), DiskError> {
        match &self.dead {
            None => Ok(()),
            Some(reason) => Err(DiskError::Dead { name: self.name.clone(), reason: reason.clone() }),
        }
    }

    /// The end of this disk. Its controller is disabled or cut off from the bus, so nothing is in flight any more.
    fn die(&mut self, why: &ControllerError) -> DiskError {
        let why = why.to_string();
        // It is named beside the reason already.
        let itself = why.strip_prefix(&self.name).filter(|rest| rest.starts_with(' '));
        let reason = itself.map_or_else(|| why.clone(), |rest| format!("it{rest}"));
        tracing::error!("{}: {reason}", self.name);
        self.dead = Some(reason.clone());
        DiskError::Dead { name: self.name.clone(), reason }
    }

    pub(super) fn is_time_to_look(&mut self, idle: u32) -> bool {
        idle.is_multiple_of(if self.queue.pair().is_inline() { POLLS_INLINE } else { POLLS })
    }

    /// Looks at the clock, and at the controller if it is time. `true` if commands were dealt with.
    #[cold]
    pub(super) fn look(&mut self, error: &mut Option<DiskError>) -> Result<bool, DiskError> {
        if self.queue.is_gone() {
            // Another queue's owner reset the controller.
            return self.reset(Cause::Elsewhere, error).map(|()| true);
        }
        self.controller().clock().pause(Duration::ZERO);
        let now = self.controller().clock().now();
        let health = *self.watch.health.get_or_insert(now);
        if now.saturating_sub(health) >= HEALTH {
            self.watch.health = Some(now);
            // Failed, gone, or given up by another queue's owner: a reset helps, or makes sure that it is over.
            if let Err(e) = self.controller().check() {
                tracing::warn!("{}: {e}", self.name);
                return self.reset(Cause::Failed, error).map(|()| true);
            }
        }
        let limit = self.controller().options().io_timeout;
        self.late.clear();
        let late = &mut self.late;
        self.queue.pair().check_timeouts(now, limit, |cid, token| late.push((cid, token)));
        if self.late.is_empty() {
            self.watch.aborting = None;
            return Ok(false);
        }
        match self.watch.aborting {
            None => {
                self.watch.aborting = Some(now);
                self.abort_late(error)
            }
            Some(since) if now.saturating_sub(since) < self.controller().options().abort_timeout => Ok(false),
            Some(_) => self.reset(Cause::Late, error).map(|()| true),
        }
    }

    /// Asks the controller to give the overdue commands up. `true` if that went wrong and ended in a reset.
    fn abort_late(&mut self, error: &mut Option<DiskError>) -> Result<bool, DiskError> {
        let qid = self.queue.pair().qid();
        for &(cid, token) in &self.late {
            tracing::warn!(
                "{}: command {cid:#06x} ({}) is overdue",
                self.name,
                self.requests[token as usize].op
            );
            self.recoveries.aborts += 1;
            if let Err(e) = self.queue.controller().abort(qid, cid) {
                tracing::warn!("{}: abort: {e}", self.name);
                return self.reset(Cause::Late, error).map(|()| true);
            }
        }
        Ok(false)
    }

    /// A completion that made no sense: whose it was is unknown, so everything in flight is sent again after a reset.
    #[cold]
    pub(super) fn after_protocol_error(
        &mut self,
        e: QueueError,
        error: &mut Option<DiskError>,
    ) -> Result<(), DiskError> {
        tracing::warn!("{}: {e}", self.name);
        self.recoveries.protocol_errors += 1;
        self.reset(Cause::Protocol(e), error)
    }

    /// Resets the controller and sends everything that was in flight again, but for what has been sent too often, and for writes
    /// whose data the CMB has lost.
    fn reset(&mut self, cause: Cause, error: &mut Option<DiskError>) -> Result<(), DiskError> {
        match cause {
            Cause::Elsewhere => self.recoveries.resets_elsewhere += 1,
            _ => self.recoveries.resets += 1,
        }
        self.abandoned.clear();
        let abandoned = &mut self.abandoned;
        if let Err(e) = self.queue.recover(|token| abandoned.push(token)) {
            return Err(self.die(&e));
        }
        self.watch.restart();
        let given_up = std::mem::take(&mut self.abandoned);
        for &token in &given_up {
            let innocent = match cause {
                Cause::Elsewhere => true,
                Cause::Late => self.late.iter().all(|&(_, late)| late != token),
                Cause::Protocol(_) | Cause::Failed => false,
            };
            let token = token as usize;
            let request = &mut self.requests[token];
            request.attempts -= u8::from(innocent);
            let request = *request;
            let outcome = if request.from_cmb {
                Err(DiskError::CmbLost { op: request.op, lba: request.lba })
            } else if request.attempts >= ATTEMPTS {
                Err(self.too_often(request.op, request.lba, cause))
            } else {
                self.recoveries.replays += 1;
                self.send(token)
            };
            if let Err(e) = outcome {
                self.free.push(token);
                error.get_or_insert(e);
            }
        }
        self.abandoned = given_up;
        self.queue.ring();
        Ok(())
    }

    fn too_often(&self, op: Op, lba: u64, cause: Cause) -> DiskError {
        if let Cause::Protocol(e) = cause {
            return DiskError::Protocol { op, lba, reason: e.to_string() };
        }
        let options = self.controller().options();
        let waited = (options.io_timeout + options.abort_timeout) * u32::from(ATTEMPTS);
        DiskError::TimedOut { op, lba, waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX) }
    }
}
