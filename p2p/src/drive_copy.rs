//! Blocks from one drive to another: through the source's CMB, so that no byte passes host memory; or, where that is not to be
//! had, through a bounce buffer in host memory. Which of the two ran, and why, is known and counted (P11).
//!
//! Directly: the source fills its CMB by NVMe reads, the sink writes from there by NVMe writes, for which the CMB is mapped in
//! the sink's I/O address space - for reading only. Both work at once, each on its own piece of the CMB.
//!
//! Before the first byte goes that way it is tried: a DMA that the IOMMU refused is not always reported (some controllers complete the
//! command all the same), and what then lies on the drive is anything. So the processor puts a pattern into the CMB, the sink writes it
//! to blocks that are about to be overwritten anyway, reads them back into another page of the CMB, and the two are compared.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;

use nvme_driver::disk::{CmbMemory, Disk, DiskError};
use nvme_driver::mem::PAGE;
use nvme_driver::pci::DmaAccess;
use nvme_driver::peer_memory::PeerMemory;

use crate::counters::{Counters, Path, Reason};
use crate::region::{Region, RegionKind};

/// Bytes that are under way at a time at most, in whichever way. Drives split them and keep many commands in flight.
const PIECE: usize = 4 << 20;
/// Pieces of the CMB in turns: one is filled while the other is written.
const PIECES: usize = 2;

/// A copy failed at one of its ends.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Reading.
    #[error("the source: {0}")]
    Source(#[source] DiskError),
    /// Writing.
    #[error("the destination: {0}")]
    Sink(#[source] DiskError),
}

/// Why bytes do not go directly: what is counted, and what people are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// What is counted.
    pub reason: Reason,
    /// What is in the way, in words.
    pub text: String,
}

impl Obstacle {
    /// An obstacle.
    pub fn new(reason: Reason, text: impl Into<String>) -> Self {
        Self { reason, text: text.into() }
    }
}

/// Where the bytes go through.
#[derive(Debug)]
enum Via {
    /// The source's CMB from offset 0 on, which the sink reaches through this.
    Cmb(PeerMemory),
    /// Host memory.
    Host { buffer: Vec<u8>, why: Obstacle },
}

/// A piece of the CMB that the source has read into.
#[derive(Clone, Copy, Debug)]
struct Filled {
    at: usize,
    len: usize,
    /// Resets of the source before it began to read.
    resets: u64,
}

/// A way from one drive to another.
#[derive(Debug)]
pub struct DriveCopy {
    via: Via,
    /// Bytes of a piece.
    piece: usize,
    /// Pieces of the CMB.
    pieces: usize,
    counters: Counters,
    /// Resets of the source so far: its CMB keeps nothing across one.
    resets: Arc<AtomicU64>,
}

impl DriveCopy {
    /// A way through the source's CMB, of which nobody else may use anything meanwhile; or, with what is in the way, through host
    /// memory. `scratch` is a logical block of the sink from which on 4 KiB may be overwritten with anything. Takes the source's
    /// reset hook.
    pub fn direct(source: &mut dyn Disk, sink: &mut dyn Disk, scratch: u64) -> Self {
        let resets = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&resets);
        source.on_reset(Arc::new(move || {
            count.fetch_add(1, Ordering::AcqRel);
        }));
        match Self::connect(source, sink, scratch) {
            Ok((memory, len)) => {
                let pieces = PIECES.min(len / PAGE);
                let piece = len / pieces / PAGE * PAGE;
                Self { via: Via::Cmb(memory), piece, pieces, counters: Counters::default(), resets }
            }
            Err(why) => Self::bounce(why),
        }
    }

    /// A way through host memory, and why.
    pub fn bounce(why: Obstacle) -> Self {
        let via = Via::Host { buffer: Vec::new(), why };
        Self { via, piece: PIECE, pieces: 1, counters: Counters::default(), resets: Arc::default() }
    }

    /// What is in the way of the direct path; `None` if bytes go there.
    pub fn obstacle(&self) -> Option<&Obstacle> {
        match &self.via {
            Via::Cmb(_) => None,
            Via::Host { why, .. } => Some(why),
        }
    }

    /// What went which way so far, and why.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Maps the source's CMB for the sink, and tries whether the sink's DMA arrives.
    fn connect(
        source: &mut dyn Disk,
        sink: &mut dyn Disk,
        scratch: u64,
    ) -> Result<(PeerMemory, usize), Obstacle> {
        let Some(cmb) = source.cmb().cloned() else {
            return Err(Obstacle::new(Reason::NoCmb, format!("{} has no CMB", source.name())));
        };
        if !cmb.read_data {
            let text = format!("{} cannot read data into its CMB (CMBSZ.RDS is 0)", source.name());
            return Err(Obstacle::new(Reason::CmbUnsupported, text));
        }
        // The last page is where the sink reads the trial back to.
        let len = (cmb.memory.len() & !(PAGE - 1)).saturating_sub(PAGE).min(PIECE);
        if len == 0 {
            let text = format!("the CMB of {} is smaller than two pages", source.name());
            return Err(Obstacle::new(Reason::TooLarge, text));
        }
        let refused = |e: DiskError| Obstacle::new(Reason::MapRefused, e.to_string());
        let memory = sink.map_peer(&cmb.memory, 0, len, DmaAccess::Read).map_err(refused)?;
        let back = sink.map_peer(&cmb.memory, len, PAGE, DmaAccess::Write).map_err(refused)?;
        try_out(&cmb, len, sink, scratch, &memory, &back)?;
        Ok((memory, len))
    }

    /// Copies `bytes` bytes (a multiple of 4 KiB) from `from` on the source to `to` on the sink, both in logical blocks of the
    /// drive. If the direct way fails underway, the rest goes through host memory.
    pub fn copy(
        &mut self,
        (source, from): (&mut dyn Disk, u64),
        (sink, to): (&mut dyn Disk, u64),
        bytes: u64,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), CopyError> {
        let (source_block, sink_block) =
            (u64::from(source.geometry().block_size), u64::from(sink.geometry().block_size));
        let (mut done, why) = self.directly((&mut *source, from), (&mut *sink, to), bytes, progress);
        if let Some(why) = why {
            tracing::warn!("no longer directly from drive to drive: {}", why.text);
            (self.via, self.piece) = (Via::Host { buffer: Vec::new(), why }, PIECE);
        }
        while done < bytes {
            // At most a piece, which is a usize.
            let len = (bytes - done).min(self.piece as u64) as usize;
            let (from, to) = (from + done / source_block, to + done / sink_block);
            self.through_host(source, from, sink, to, len)?;
            done += len as u64;
            progress(len as u64);
        }
        Ok(())
    }

    /// Copies through the CMB, the source reading one piece of it while the sink writes another. Returns how many bytes have
    /// arrived, and why it is not all of them.
    fn directly(
        &mut self,
        (source, from): (&mut dyn Disk, u64),
        (sink, to): (&mut dyn Disk, u64),
        bytes: u64,
        progress: &mut dyn FnMut(u64),
    ) -> (u64, Option<Obstacle>) {
        let Via::Cmb(memory) = &self.via else { return (0, None) };
        let failed = |text: String| Obstacle::new(Reason::Drive, text);
        let (piece, pieces, resets) = (self.piece, self.pieces, &*self.resets);
        let (name, sink_block) = (source.name().to_owned(), u64::from(sink.geometry().block_size));
        let counters = &mut self.counters;
        std::thread::scope(|scope| {
            let (free, to_fill) = sync_channel(pieces);
            let (filled, to_write) = sync_channel(pieces);
            for at in 0..pieces {
                // There is room for all of them.
                let _ = free.send(at * piece);
            }
            let reading = move || {
                let block = u64::from(source.geometry().block_size);
                let mut done = 0;
                while done < bytes
                    && let Ok(at) = to_fill.recv()
                {
                    let len = (bytes - done).min(piece as u64) as usize;
                    let before = resets.load(Ordering::Acquire);
                    let read = source.read_to_cmb(from + done / block, at, len);
                    let read = read.map(|()| Filled { at, len, resets: before }).map_err(|e| e.to_string());
                    let over = read.is_err();
                    if filled.send(read).is_err() || over {
                        return;
                    }
                    done += len as u64;
                }
            };
            if let Err(e) =
                std::thread::Builder::new().name("copy-source".to_owned()).spawn_scoped(scope, reading)
            {
                return (0, Some(failed(format!("no thread for the source: {e}"))));
            }
            let mut done = 0;
            while done < bytes {
                let piece = match to_write.recv() {
                    Ok(Ok(piece)) => piece,
                    Ok(Err(text)) => return (done, Some(failed(text))),
                    Err(_) => return (done, Some(failed(format!("nothing more came from {name}")))),
                };
                if let Err(e) = sink.write_from_peer(to + done / sink_block, memory, piece.at, piece.len) {
                    return (done, Some(failed(e.to_string())));
                }
                // A reset since before it was read: what had arrived by then may be gone. It may be the next piece's that is read meanwhile.
                if resets.load(Ordering::Acquire) != piece.resets {
                    return (done, Some(failed(format!("{name} had to be reset"))));
                }
                counters.add(Path::PeerToPeer, Reason::Asked, piece.len);
                done += piece.len as u64;
                progress(piece.len as u64);
                // Nobody takes it when all has been read.
                let _ = free.send(piece.at);
            }
            (done, None)
        })
    }

    fn through_host(
        &mut self,
        source: &mut dyn Disk,
        from: u64,
        sink: &mut dyn Disk,
        to: u64,
        len: usize,
    ) -> Result<(), CopyError> {
        let Via::Host { buffer, why } = &mut self.via else { return Ok(()) };
        buffer.resize(len, 0);
        source.read(from, buffer).map_err(CopyError::Source)?;
        sink.write(to, buffer).map_err(CopyError::Sink)?;
        self.counters.add(Path::Bounce, why.reason, len);
        Ok(())
    }
}

/// Whether what the sink's commands move to and from the CMB arrives: see the module's head.
fn try_out(
    cmb: &CmbMemory,
    back_at: usize,
    sink: &mut dyn Disk,
    scratch: u64,
    memory: &PeerMemory,
    back: &PeerMemory,
) -> Result<(), Obstacle> {
    let broken = |text: String| Obstacle::new(Reason::Untrusted, text);
    // The canary is of no use here: a device that is gone gives back no pattern.
    let kind = if cmb.is_device_memory { RegionKind::Device { canary: 0 } } else { RegionKind::Ordinary };
    let region = Region::new(Arc::clone(&cmb.memory), 0, kind);
    let outside = |e: nvme_driver::mem::OutOfRange| broken(e.to_string());
    let failed = |e: DiskError| Obstacle::new(Reason::Drive, e.to_string());
    // No byte of it is what memory that was never written, or a drive that was not, usually holds; nor what is put in its place below.
    let pattern: Vec<u8> = (0..PAGE).map(|i| (i as u8).wrapping_mul(167) ^ (i >> 8) as u8 ^ 0x5b).collect();
    region.write(0, &pattern).map_err(outside)?;
    region.write(back_at, &pattern.iter().map(|b| !b).collect::<Vec<_>>()).map_err(outside)?;
    sink.write_from_peer(scratch, memory, 0, PAGE).map_err(failed)?;
    sink.read_to_peer(scratch, back, 0, PAGE).map_err(failed)?;
    let mut got = vec![0; PAGE];
    region.read(back_at, &mut got).map_err(outside)?;
    if got != pattern {
        return Err(broken(format!(
            "{} says that it reached the other drive's CMB, but the bytes did not arrive",
            sink.name()
        )));
    }
    Ok(())
}
