//! An I/O queue pair of a controller: the NVM commands, and what to do when one does not come back.

use std::sync::Arc;

use crate::controller::{Controller, ControllerError};
use crate::queue::{Data, Done, QueueError, QueuePair, SubmitError};
use crate::spec::command::{Command, DSM_AD, NvmOpcode};

/// An I/O queue pair. Owned by one thread; deleted when dropped.
///
/// Commands name a namespace, and memory by its bus address: a [`DmaBuffer`](crate::dma::DmaBuffer)'s, or the CMB's
/// plus an offset. `token` comes back with the completion. Nothing is sent before [`ring`](Self::ring).
#[derive(Debug)]
pub struct IoQueue {
    controller: Arc<Controller>,
    pair: QueuePair,
    epoch: u64,
}

impl IoQueue {
    pub(crate) fn new(controller: Arc<Controller>, pair: QueuePair, epoch: u64) -> Self {
        Self { controller, pair, epoch }
    }

    /// Its controller.
    pub fn controller(&self) -> &Arc<Controller> {
        &self.controller
    }

    /// The queue pair under it.
    pub fn pair(&mut self) -> &mut QueuePair {
        &mut self.pair
    }

    /// Read: `blocks` (1 to 65,536) blocks from `lba` to `data`.
    #[inline]
    pub fn read(
        &mut self,
        nsid: u32,
        lba: u64,
        blocks: u32,
        data: Data,
        token: u64,
    ) -> Result<u16, SubmitError> {
        let command = Command::new(NvmOpcode::Read as u8, nsid).with_blocks(lba, blocks);
        self.pair.submit(command, Some(data), token)
    }

    /// Write: `blocks` (1 to 65,536) blocks at `lba` from `data`.
    #[inline]
    pub fn write(
        &mut self,
        nsid: u32,
        lba: u64,
        blocks: u32,
        data: Data,
        token: u64,
    ) -> Result<u16, SubmitError> {
        let command = Command::new(NvmOpcode::Write as u8, nsid).with_blocks(lba, blocks);
        self.pair.submit(command, Some(data), token)
    }

    /// Flush: everything written to the namespace before becomes durable.
    pub fn flush(&mut self, nsid: u32, token: u64) -> Result<u16, SubmitError> {
        self.pair.submit(Command::new(NvmOpcode::Flush as u8, nsid), None, token)
    }

    /// Write Zeroes: `blocks` (1 to 65,536) blocks at `lba` become zeros.
    pub fn write_zeroes(&mut self, nsid: u32, lba: u64, blocks: u32, token: u64) -> Result<u16, SubmitError> {
        let command = Command::new(NvmOpcode::WriteZeroes as u8, nsid).with_blocks(lba, blocks);
        self.pair.submit(command, None, token)
    }

    /// Dataset Management, deallocate: `ranges` (1 to 256) [`DsmRange`](crate::spec::command::DsmRange)s lie in `data`.
    pub fn deallocate(&mut self, nsid: u32, ranges: u8, data: Data, token: u64) -> Result<u16, SubmitError> {
        let mut command = Command::new(NvmOpcode::DatasetManagement as u8, nsid);
        command.cdw10 = u32::from(ranges.wrapping_sub(1));
        command.cdw11 = DSM_AD;
        self.pair.submit(command, Some(data), token)
    }

    /// Tells the device of everything submitted since the last time.
    #[inline]
    pub fn ring(&mut self) {
        self.pair.ring();
    }

    /// Takes up to `max` completions; see [`QueuePair::reap`].
    #[inline]
    pub fn reap(&mut self, max: usize, each: impl FnMut(Done)) -> Result<usize, QueueError> {
        self.pair.reap(max, each)
    }

    /// Whether the controller was reset since this queue was created: it is gone, and nothing in flight will come back.
    pub fn is_gone(&self) -> bool {
        self.epoch != self.controller.epoch()
    }

    /// Resets the controller (unless another queue's owner just did) and creates this queue again. `abandoned` gets the
    /// token of every command that was in flight: what it did is unknown, but it does nothing any more, and its memory may be reused.
    pub fn recover(&mut self, abandoned: impl FnMut(u64)) -> Result<(), ControllerError> {
        self.controller.reset(self.epoch)?;
        self.pair.restart(abandoned)?;
        self.epoch = self.controller.recreate_queue(&self.pair)?;
        Ok(())
    }
}

impl Drop for IoQueue {
    fn drop(&mut self) {
        if let Err(e) = self.controller.delete_queue(self.pair.qid(), self.epoch) {
            tracing::warn!("deleting queue {}: {e}", self.pair.qid());
        }
    }
}
