//! Random 4 KiB reads of one drive: our driver over VFIO against the guest kernel's nvme driver with io_uring. Turn and turn
//! about, the same loop around both, every block's stamp checked. Not part of the tests: speed is printed, not judged.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use nvme_driver::controller::ControllerOptions;
use nvme_driver::mem::Mapping;
use nvme_driver::vfio;

use crate::driver::{Io, controller};
use crate::lab::{Case, Outcome, addresses, expect, node_of};

pub(crate) const CASES: &[(&str, Case)] = &[("random-reads", random_reads)];

const BLOCK: usize = 4096;
const BLOCKS: u64 = (64 << 20) / BLOCK as u64;
const DEPTHS: [usize; 2] = [1, 32];
/// Pairs of runs: an odd number, so that there is a middle one.
const ROUNDS: usize = 21;
const LENGTH: Duration = Duration::from_millis(300);
/// What ours should be of the kernel's.
const TARGET: f64 = 1.5;

/// A way to read blocks, many at a time.
trait Reader {
    /// Starts reading `block` into buffer `slot`.
    fn start(&mut self, slot: usize, block: u64) -> Outcome;
    /// Gives what was started to the device and waits until something has come back; says what, by slot.
    fn wait(&mut self, done: &mut Vec<usize>) -> Outcome;
    /// The first word of a buffer: the block's stamp.
    fn stamp(&self, slot: usize) -> Outcome<u64>;
}

/// Reads random blocks for a while; how many a second.
fn rate(reader: &mut impl Reader, depth: usize, seed: u64) -> Outcome<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % BLOCKS
    };
    let (mut wanted, mut done) = (vec![0; depth], Vec::with_capacity(depth));
    for (slot, block) in wanted.iter_mut().enumerate() {
        *block = random();
        reader.start(slot, *block)?;
    }
    let (start, mut reads, mut in_flight) = (Instant::now(), 0u64, depth);
    while in_flight > 0 {
        reader.wait(&mut done)?;
        let going_on = start.elapsed() < LENGTH;
        for slot in done.drain(..) {
            expect(reader.stamp(slot)? == wanted[slot], "another block's bytes")?;
            reads += 1;
            if going_on {
                wanted[slot] = random();
                reader.start(slot, wanted[slot])?;
            } else {
                in_flight -= 1;
            }
        }
    }
    Ok(reads as f64 / start.elapsed().as_secs_f64())
}

impl Reader for Io {
    fn start(&mut self, slot: usize, block: u64) -> Outcome {
        let data = self.data(slot * BLOCK, BLOCK);
        self.queue.read(1, block * 8, 8, data, slot as u64)?;
        Ok(())
    }

    fn wait(&mut self, done: &mut Vec<usize>) -> Outcome {
        self.queue.ring();
        let mut failed = None;
        while done.is_empty() {
            self.queue.reap(usize::MAX, |d| {
                if !d.status.is_success() {
                    failed = Some(d.status);
                }
                done.push(d.token as usize);
            })?;
        }
        failed.map_or(Ok(()), |status| Err(format!("a read failed: {status}").into()))
    }

    fn stamp(&self, slot: usize) -> Outcome<u64> {
        let mut word = [0; 8];
        self.buffer.read(slot * BLOCK, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }
}

/// The kernel's driver: O_DIRECT, the file registered, so that io_uring does as little as it can for each read.
struct Kernel {
    ring: IoUring,
    buffer: std::sync::Arc<Mapping>,
    _file: File,
}

impl Kernel {
    fn open(node: &str) -> Outcome<Self> {
        let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
        let file = File::options().read(true).custom_flags(direct).open(node)?;
        let ring = IoUring::new(64)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Self { ring, buffer: Mapping::memfd("bench", 32 * BLOCK)?, _file: file })
    }

    #[expect(unsafe_code, reason = "io_uring takes raw pointers")]
    fn push(&mut self, entry: &squeue::Entry) -> Outcome {
        // SAFETY: the entry points into `buffer`, which lives as long as the ring (`rate` waits for all that it starts), and
        // nobody holds a reference to its bytes.
        Ok(unsafe { self.ring.submission().push(entry) }?)
    }
}

impl Reader for Kernel {
    fn start(&mut self, slot: usize, block: u64) -> Outcome {
        let at = self.buffer.as_ptr().wrapping_add(slot * BLOCK);
        let read = opcode::Read::new(types::Fixed(0), at, BLOCK as u32).offset(block * BLOCK as u64);
        self.push(&read.build().user_data(slot as u64))
    }

    fn wait(&mut self, done: &mut Vec<usize>) -> Outcome {
        self.ring.submit_and_wait(1)?;
        for entry in self.ring.completion() {
            expect(entry.result() == BLOCK as i32, format!("a read ended with {}", entry.result()))?;
            done.push(entry.user_data() as usize);
        }
        Ok(())
    }

    fn stamp(&self, slot: usize) -> Outcome<u64> {
        let mut word = [0; 8];
        self.buffer.read(slot * BLOCK, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }
}

/// Every block begins with its number.
fn stamp_all() -> Outcome {
    let controller = controller(0, ControllerOptions::default())?;
    let mut io = Io::new(&controller, 64 * BLOCK)?;
    for first in (0..BLOCKS).step_by(64) {
        let bytes: Vec<u8> = (first..first + 64)
            .flat_map(|n| n.to_le_bytes().into_iter().chain(std::iter::repeat_n(n as u8, BLOCK - 8)))
            .collect();
        io.put(first * 8, &bytes)?;
    }
    Ok(())
}

fn ours(seed: u64) -> Outcome<[f64; 2]> {
    vfio::bind(addresses()?[0])?;
    let controller = controller(0, ControllerOptions::default())?;
    let mut io = Io::new(&controller, 32 * BLOCK)?;
    Ok([rate(&mut io, DEPTHS[0], seed)?, rate(&mut io, DEPTHS[1], seed)?])
}

fn kernels(seed: u64) -> Outcome<[f64; 2]> {
    let address = addresses()?[0];
    vfio::unbind(address)?;
    let mut kernel = Kernel::open(&node_of(address)?)?;
    Ok([rate(&mut kernel, DEPTHS[0], seed)?, rate(&mut kernel, DEPTHS[1], seed)?])
}

/// The smallest, the middle and the largest of some numbers.
fn spread(mut of: Vec<f64>) -> [f64; 3] {
    of.sort_by(f64::total_cmp);
    [of[0], of[of.len() / 2], of[of.len() - 1]]
}

fn random_reads() -> Outcome {
    stamp_all()?;
    let mut pairs = Vec::new();
    for round in 0..ROUNDS {
        let seed = 1 + round as u64;
        // Who goes first takes turns, so that a machine that slows down or speeds up favours nobody.
        pairs.push(if round % 2 == 0 {
            let ours = ours(seed)?;
            (ours, kernels(seed)?)
        } else {
            let kernel = kernels(seed)?;
            (ours(seed)?, kernel)
        });
    }
    println!("4 KiB random reads, medians of {ROUNDS} interleaved pairs of {} ms each", LENGTH.as_millis());
    println!("{:>5} {:>9} {:>10} {:>6}  {:<14} target", "depth", "ours/s", "kernel/s", "ratio", "from .. to");
    for (i, depth) in DEPTHS.into_iter().enumerate() {
        let [_, ours, _] = spread(pairs.iter().map(|(ours, _)| ours[i]).collect());
        let [_, kernel, _] = spread(pairs.iter().map(|(_, kernel)| kernel[i]).collect());
        let [least, ratio, most] = spread(pairs.iter().map(|(ours, kernel)| ours[i] / kernel[i]).collect());
        let verdict = if ratio >= TARGET { "reached" } else { "missed" };
        let range = format!("{least:.2} .. {most:.2}");
        println!("{depth:>5} {ours:>9.0} {kernel:>10.0} {ratio:>6.2}  {range:<14} {TARGET}: {verdict}");
    }
    Ok(())
}
