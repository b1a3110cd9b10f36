//! Where a window's bytes are on the drive: the joint between the filesystem, which knows blocks, and p2p, which knows memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use extent_fs::{Access, BlockState, Extent, Filesystem, FsError};
use nvme_driver::disk::{Disk, DiskError, Op};
use nvme_driver::mem::Mapping;
use nvme_driver::pmr::{Pmr, PmrError};
use p2p::backing::{Backing, BackingError};
use p2p::windows::ResetSignal;

/// The filesystem, as windows see it.
pub(crate) struct FileBacking {
    pub(crate) fs: Filesystem<Box<dyn Disk>>,
    cmb: Option<Arc<Mapping>>,
    /// Resets of the device, counted before each; and how many of them the windows have dealt with.
    resets: Arc<AtomicU64>,
    noticed: u64,
    /// The drive's PMR, and its object.
    pmr: Option<(u64, Arc<Pmr>)>,
    /// It was off, and the windows do not know yet.
    interrupted: bool,
}

impl FileBacking {
    pub(crate) fn new(fs: Filesystem<Box<dyn Disk>>) -> Self {
        let cmb = fs.disk().cmb().map(|cmb| Arc::clone(&cmb.memory));
        Self { fs, cmb, resets: Arc::default(), noticed: 0, pmr: None, interrupted: false }
    }

    /// The drive's PMR is this object.
    pub(crate) fn add_pmr(&mut self, object: u64, pmr: &Arc<Pmr>) {
        self.pmr = Some((object, Arc::clone(pmr)));
    }

    /// Makes what is stored in the PMR persistent. If it was off meanwhile, that is said by [`was_interrupted`](Self::was_interrupted).
    pub(crate) fn pmr_barrier(&mut self) -> Result<(), PmrError> {
        match self.pmr.as_ref().map_or(Ok(()), |(_, pmr)| pmr.barrier()) {
            Err(PmrError::Interrupted(_)) => {
                self.interrupted = true;
                // If that reset the controller the disk's queue is gone, which it finds with the next command: one that is sent again,
                // and not a write from the CMB, which would fail for a reset that came before it.
                if let Err(e) = self.fs.disk_mut().flush() {
                    tracing::error!("after a reset that turned the PMR off: {e}");
                }
                Ok(())
            }
            other => other,
        }
    }

    /// The object of the PMR, if it was off since this was asked last: what was stored there before is not known to be persistent.
    pub(crate) fn was_interrupted(&mut self) -> Option<u64> {
        std::mem::take(&mut self.interrupted).then_some(self.pmr.as_ref()?.0)
    }

    /// Has `signal` raised before each reset of the device.
    pub(crate) fn announce_resets(&mut self, signal: ResetSignal) {
        let resets = Arc::clone(&self.resets);
        self.fs.disk_mut().on_reset(Arc::new(move || {
            signal.raise();
            resets.fetch_add(1, Ordering::AcqRel);
        }));
    }

    /// Writes blocks of a file through `transfer`, which moves one extent, and makes them the file's contents.
    fn write_blocks(
        &mut self,
        ino: u64,
        offset: u64,
        len: usize,
        mut transfer: impl FnMut(&mut Box<dyn Disk>, u64, usize, usize) -> Result<(), DiskError>,
    ) -> Result<(), BackingError> {
        let what = || format!("writing {len} bytes at {offset} of inode {ino} back");
        let fail = |e: FsError| failed(what(), e);
        // Behind the end there is nothing to keep.
        let size = self.fs.stat(ino).map_err(fail)?.size;
        let end = (offset + len as u64).min(size.next_multiple_of(extent_fs::BLOCK));
        if end <= offset {
            return Ok(());
        }
        let layout = self.fs.map_blocks(ino, offset, end - offset, Access::Write).map_err(fail)?;
        let mut written = Ok(());
        for extent in &layout.extents {
            let (at, bytes) = place_in(extent, offset, len);
            written = transfer(self.fs.disk_mut(), extent.lba, at, bytes);
            if written.is_err() {
                break;
            }
        }
        // A failed write leaves old or new bytes per block in blocks that were written before, and unwritten ones as they were.
        let committed = match &written {
            Ok(()) => self.fs.commit_blocks(layout.lease, &layout.extents, None),
            Err(_) => Ok(()),
        };
        let released = self.fs.release(layout.lease);
        written.map_err(|e| disk_failed(what(), e))?;
        committed.and(released).map_err(fail)
    }
}

/// Where in a transfer of `len` bytes from `offset` an extent lies: offset and length in bytes.
fn place_in(extent: &Extent, offset: u64, len: usize) -> (usize, usize) {
    // Extents cover the range without gaps, so both fit the transfer's length.
    let at = usize::try_from(extent.file_offset.saturating_sub(offset)).unwrap_or(len).min(len);
    let bytes = usize::try_from(extent.bytes()).unwrap_or(len).min(len - at);
    (at, bytes)
}

fn failed(what: String, source: impl std::error::Error + Send + Sync + 'static) -> BackingError {
    BackingError::Failed { what, source: Box::new(source) }
}

fn disk_failed(what: String, error: DiskError) -> BackingError {
    match error {
        DiskError::TimedOut { .. } => BackingError::TimedOut(format!("{what}: {error}")),
        DiskError::Cmb { .. } => BackingError::Unsupported(error.to_string()),
        error => failed(what, error),
    }
}

impl Backing for FileBacking {
    fn read_to_cmb(
        &mut self,
        object: u64,
        offset: u64,
        cmb_offset: usize,
        len: usize,
    ) -> Result<(), BackingError> {
        let what = || format!("reading {len} bytes at {offset} of inode {object} into the CMB");
        let extents = self.fs.query_blocks(object, offset, len as u64).map_err(|e| failed(what(), e))?;
        for extent in &extents {
            let (at, bytes) = place_in(extent, offset, len);
            if extent.state == BlockState::Written {
                self.fs
                    .disk_mut()
                    .read_to_cmb(extent.lba, cmb_offset + at, bytes)
                    .map_err(|e| disk_failed(what(), e))?;
            } else if let Some(cmb) = &self.cmb {
                cmb.zero(cmb_offset + at, bytes).map_err(|e| failed(what(), e))?;
            }
        }
        Ok(())
    }

    fn read_to_host(&mut self, object: u64, offset: u64, into: &mut [u8]) -> Result<(), BackingError> {
        let len = into.len();
        let what = || format!("reading {len} bytes at {offset} of inode {object}");
        let extents = self.fs.query_blocks(object, offset, len as u64).map_err(|e| failed(what(), e))?;
        for extent in &extents {
            let (at, bytes) = place_in(extent, offset, len);
            let part = into.get_mut(at..at + bytes).unwrap_or_default();
            if extent.state == BlockState::Written {
                self.fs.disk_mut().read(extent.lba, part).map_err(|e| disk_failed(what(), e))?;
            } else {
                part.fill(0);
            }
        }
        Ok(())
    }

    fn write_from_cmb(
        &mut self,
        object: u64,
        offset: u64,
        cmb_offset: usize,
        len: usize,
    ) -> Result<(), BackingError> {
        let (resets, noticed) = (Arc::clone(&self.resets), self.noticed);
        self.write_blocks(object, offset, len, |disk, lba, at, bytes| {
            // Finding the blocks may have taken a command too, and that may have ended in a reset.
            if resets.load(Ordering::Acquire) != noticed {
                return Err(DiskError::CmbLost { op: Op::Write, lba });
            }
            disk.write_from_cmb(lba, cmb_offset + at, bytes)
        })
    }

    fn write_from_host(&mut self, object: u64, offset: u64, from: &[u8]) -> Result<(), BackingError> {
        self.write_blocks(object, offset, from.len(), |disk, lba, at, bytes| {
            disk.write(lba, from.get(at..at + bytes).unwrap_or_default())
        })
    }

    fn reset_noticed(&mut self) {
        self.noticed = self.resets.load(Ordering::Acquire);
    }

    fn revive_memory(&mut self, object: u64) {
        if self.pmr.as_ref().is_some_and(|(pmr, _)| *pmr == object)
            && let Err(e) = self.pmr_barrier()
        {
            tracing::error!("{e}");
        }
    }
}
