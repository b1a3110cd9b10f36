//! One call's commands.

use crate::disk::{DiskError, Op};
use crate::queue::{Data, Done, SubmitError};
use crate::spec::Status;
use crate::spec::command::DsmRange;

use super::NvmeDisk;

/// Times one command is sent at most.
pub(super) const ATTEMPTS: u8 = 3;

/// What a call asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    pub(super) op: Op,
    pub(super) lba: u64,
    pub(super) blocks: u64,
    /// Bytes of one command at most.
    pub(super) piece: usize,
}

/// Where the data is.
pub(super) enum Memory<'a> {
    Into(&'a mut [u8]),
    From(&'a [u8]),
    /// In the CMB, from this address.
    Bus(u64),
    /// In another device's memory, from this address: a reset of this one does nothing to it.
    Peer(u64),
    None,
}

/// One command: all it takes to send it again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) op: Op,
    pub(super) lba: u64,
    pub(super) blocks: u32,
    /// Where its data begins in the call's memory.
    at: usize,
    data: Option<Data>,
    /// The data lies in the CMB, where a reset leaves nothing that may be sent again.
    pub(super) from_cmb: bool,
    pub(super) attempts: u8,
}

impl Default for Request {
    fn default() -> Self {
        Self { op: Op::Flush, lba: 0, blocks: 0, at: 0, data: None, from_cmb: false, attempts: 0 }
    }
}

impl NvmeDisk {
    /// Sends a call's commands, keeps as many in flight as there are pieces, and returns when none is left in flight: all
    /// done, or the first error.
    pub(super) fn run(&mut self, job: Job, mut memory: Memory<'_>) -> Result<(), DiskError> {
        self.alive()?;
        let per_command = (job.piece / self.geometry.block_size as usize) as u64;
        let per_command = if job.op == Op::Deallocate { per_command } else { per_command.min(1 << 16) };
        let depth = self.requests.len();
        let mut next = 0;
        let mut error = None;
        self.watch.restart();
        loop {
            while error.is_none() && next < job.blocks {
                let Some(token) = self.free.pop() else { break };
                let blocks = per_command.min(job.blocks - next);
                let prepared = self.prepare(token, &job, next, blocks as u32, &memory);
                if let Err(e) = prepared.and_then(|()| self.send(token)) {
                    self.free.push(token);
                    error = Some(e);
                    break;
                }
                next += blocks;
            }
            self.queue.ring();
            if self.free.len() == depth {
                return error.map_or(Ok(()), Err);
            }
            self.collect(&mut memory, &mut error)?;
        }
    }

    fn prepare(
        &mut self,
        token: usize,
        job: &Job,
        next: u64,
        blocks: u32,
        memory: &Memory<'_>,
    ) -> Result<(), DiskError> {
        let lba = job.lba + next;
        let len = blocks as usize * self.geometry.block_size as usize;
        let at = next as usize * self.geometry.block_size as usize;
        let here = token * self.piece;
        let bounce = self.bounce.bus_address() + here as u64;
        let bad = |e| DiskError::Io { op: job.op, lba, source: std::io::Error::other(e) };
        let data = match (job.op, memory) {
            (Op::Deallocate, _) => {
                let range = DsmRange { cattr: 0, nlb: blocks, slba: lba };
                self.bounce.write(here, bytemuck::bytes_of(&range)).map_err(bad)?;
                Some(Data { address: bounce, len: size_of::<DsmRange>() })
            }
            (_, Memory::Into(_)) => Some(Data { address: bounce, len }),
            (_, Memory::From(from)) => {
                let part = from.get(at..at + len).unwrap_or_default();
                self.bounce.write(here, part).map_err(bad)?;
                Some(Data { address: bounce, len })
            }
            (_, Memory::Bus(address) | Memory::Peer(address)) => {
                Some(Data { address: address + at as u64, len })
            }
            (_, Memory::None) => None,
        };
        let from_cmb = job.op == Op::Write && matches!(memory, Memory::Bus(_));
        self.requests[token] = Request { op: job.op, lba, blocks, at, data, from_cmb, attempts: 0 };
        Ok(())
    }

    /// Queues the command of a request.
    pub(super) fn send(&mut self, token: usize) -> Result<(), DiskError> {
        let request = &mut self.requests[token];
        request.attempts += 1;
        let Request { op, lba, blocks, data, .. } = *request;
        let none = Data { address: 0, len: 0 };
        let (queue, nsid, data, token) = (&mut self.queue, self.nsid, data.unwrap_or(none), token as u64);
        let sent = match op {
            Op::Read => queue.read(nsid, lba, blocks, data, token),
            Op::Write => queue.write(nsid, lba, blocks, data, token),
            Op::Flush => queue.flush(nsid, token),
            Op::WriteZeroes => queue.write_zeroes(nsid, lba, blocks, token),
            Op::Deallocate => queue.deallocate(nsid, 1, data, token),
        };
        sent.map(|_| ()).map_err(|e: SubmitError| DiskError::Io { op, lba, source: std::io::Error::other(e) })
    }

    /// Waits for at least one completion and deals with what came. An error here is the end of the disk.
    fn collect(&mut self, memory: &mut Memory<'_>, error: &mut Option<DiskError>) -> Result<(), DiskError> {
        let mut idle = 0;
        loop {
            let mut done = std::mem::take(&mut self.done);
            done.clear();
            let reaped = self.queue.reap(done.capacity(), |d| done.push(d));
            for d in &done {
                self.finish(d, memory, error);
            }
            let got = !done.is_empty();
            self.done = done;
            match reaped {
                Err(e) => return self.after_protocol_error(e, error),
                Ok(_) if got => return Ok(()),
                Ok(_) => {}
            }
            idle += 1;
            if self.is_time_to_look(idle) && self.look(error)? {
                return Ok(());
            }
        }
    }

    /// Deals with one completion: by its own status, nobody else's.
    fn finish(&mut self, done: &Done, memory: &mut Memory<'_>, error: &mut Option<DiskError>) {
        let token = done.token as usize;
        let Request { op, lba, blocks, at, attempts, .. } = self.requests[token];
        let mut failed = None;
        if !done.status.is_success() {
            if attempts < ATTEMPTS && is_transient(done.status) {
                self.recoveries.replays += 1;
                match self.send(token) {
                    Ok(()) => return,
                    Err(e) => failed = Some(e),
                }
            } else {
                failed = Some(DiskError::Device { op, lba, status: done.status });
            }
        } else if let Memory::Into(into) = memory {
            let len = blocks as usize * self.geometry.block_size as usize;
            let part = into.get_mut(at..at + len).unwrap_or_default();
            if let Err(e) = self.bounce.read(token * self.piece, part) {
                failed = Some(DiskError::Io { op, lba, source: std::io::Error::other(e) });
            }
        }
        self.free.push(token);
        if error.is_none() {
            *error = failed;
        }
    }
}

/// Whether sending the same command again may help: the status does not say "do not retry", and names a passing condition.
fn is_transient(status: Status) -> bool {
    let passing = [
        Status::ABORT_REQUESTED,
        Status::ABORTED_SQ_DELETION,
        Status::COMMAND_INTERRUPTED,
        Status::TRANSIENT_TRANSPORT_ERROR,
        Status::NAMESPACE_NOT_READY,
    ];
    !status.dnr() && passing.iter().any(|&s| status.is(s))
}
