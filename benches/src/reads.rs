//! 4 KiB reads in a closed loop: what the benchmarks of the driver and of the controller do.

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use nvme_driver::controller::Controller;
use nvme_driver::dma::DmaBuffer;
use nvme_driver::io_queue::IoQueue;
use nvme_driver::queue::{Data, SubmitError};

/// Bytes per read.
pub const BLOCK: usize = 4096;
/// Empty polls in a row after which a read is not waited for any longer: several seconds.
const GIVE_UP: u64 = 1 << 30;
/// Reads in flight at most.
pub const MOST: usize = 128;

/// A queue, and memory for the reads in flight.
#[derive(Debug)]
pub struct Reads {
    /// The queue.
    pub queue: IoQueue,
    /// [`MOST`] blocks, one for each read in flight.
    pub memory: DmaBuffer,
    /// Blocks of the namespace are `1 << shift` to a read; reads start below `range` reads.
    shift: u32,
    range: u64,
}

impl Reads {
    /// Makes a queue and its memory. Reads go all over namespace 1, up to 16 GiB of it.
    pub fn new(controller: &Arc<Controller>) -> Result<Self, Box<dyn Error>> {
        let namespace = controller.namespace()?;
        let block = namespace.block_size as usize;
        if block > BLOCK {
            return Err(format!("blocks of {block} bytes").into());
        }
        let shift = (BLOCK / block).trailing_zeros();
        // A power of two, so that drawing one needs no division.
        let range = 1 << (namespace.blocks >> shift).clamp(1, 1 << 22).ilog2();
        let queue = controller.create_queue()?;
        let memory = controller.arena().alloc(MOST * BLOCK)?;
        Ok(Self { queue, memory, shift, range })
    }

    /// Writes something to the first `bytes` of the namespace, so that there is memory behind it.
    pub fn fill(&mut self, bytes: u64) -> Result<(), Box<dyn Error>> {
        let at_once = MOST.min(self.queue.pair().max_transfer() / BLOCK);
        let data = Data { address: self.memory.bus_address(), len: at_once * BLOCK };
        for at in (0..bytes / BLOCK as u64).step_by(at_once) {
            self.queue.write(1, at << self.shift, (at_once as u32) << self.shift, data, 0)?;
            self.queue.ring();
            let mut success = true;
            while self.queue.reap(1, |d| success = d.status.is_success())? == 0 {}
            if !success {
                return Err("a write failed".into());
            }
        }
        Ok(())
    }

    /// Queues read number `n`, from some place of the namespace into block `slot` of the memory.
    #[inline(always)]
    pub fn submit(&mut self, n: u64, slot: u64) -> Result<u16, SubmitError> {
        let data = Data { address: self.memory.bus_address() + slot * BLOCK as u64, len: BLOCK };
        let lba = (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 & (self.range - 1)) << self.shift;
        self.queue.read(1, lba, 1 << self.shift, data, slot)
    }

    /// Reads per second of `count` reads, `depth` (at most [`MOST`]) of them in flight.
    pub fn rate(&mut self, depth: usize, count: u64) -> Result<f64, Box<dyn Error>> {
        let start = Instant::now();
        let (mut sent, mut done, mut idle) = (0u64, 0u64, 0u64);
        let mut free: Vec<u64> = (0..depth as u64).collect();
        while done < count {
            while sent < count
                && let Some(slot) = free.pop()
            {
                self.submit(sent, slot)?;
                sent += 1;
            }
            self.queue.ring();
            let mut failed = false;
            let reaped = self.queue.reap(depth, |d| {
                failed |= !d.status.is_success();
                free.push(d.token);
            })?;
            done += reaped as u64;
            idle = if reaped == 0 { idle + 1 } else { 0 };
            if failed || idle > GIVE_UP {
                return Err("a read failed or did not complete".into());
            }
        }
        Ok(count as f64 / start.elapsed().as_secs_f64())
    }
}
