//! The disk in bytes, with the latch: after the first device error nothing is written any more.

use nvme_driver::disk::{Disk, DiskError};

use crate::error::FsError;

/// Bytes in a filesystem block.
pub const BLOCK: u64 = 4096;
/// The same as a buffer length.
pub(crate) const BLOCK_LEN: usize = 4096;

/// A disk addressed in bytes that are multiples of its logical block size.
pub(crate) struct BlockIo<D> {
    pub(crate) disk: D,
    lba_size: u64,
    lba_shift: u32,
    latched: Option<String>,
    /// Something was written since the last flush.
    pub(crate) unflushed: bool,
}

impl<D: Disk> BlockIo<D> {
    pub(crate) fn new(disk: D) -> Result<Self, FsError> {
        let geometry = disk.geometry();
        let lba_size = u64::from(geometry.block_size);
        if !lba_size.is_power_of_two() || !(512..=BLOCK).contains(&lba_size) {
            return Err(FsError::Unsuitable {
                name: disk.name().to_owned(),
                reason: format!("logical blocks of {lba_size} bytes (512 to 4096 are supported)"),
            });
        }
        Ok(Self { disk, lba_size, lba_shift: lba_size.trailing_zeros(), latched: None, unflushed: false })
    }

    pub(crate) fn lba_size(&self) -> u64 {
        self.lba_size
    }

    pub(crate) fn lba(&self, byte: u64) -> u64 {
        byte >> self.lba_shift
    }

    /// Whole filesystem blocks on the disk.
    pub(crate) fn blocks(&self) -> u64 {
        self.disk.geometry().bytes() / BLOCK
    }

    /// Why nothing may be written, if so.
    pub(crate) fn latched(&self) -> Option<&str> {
        self.latched.as_deref()
    }

    pub(crate) fn latch(&mut self, reason: String) {
        tracing::error!(device = self.disk.name(), reason, "the filesystem is read-only from here on");
        self.latched.get_or_insert(reason);
    }

    /// Takes no writes, by choice and not by a failure.
    pub(crate) fn latch_quietly(&mut self, reason: &str) {
        self.latched.get_or_insert_with(|| reason.to_owned());
    }

    /// Refuses when latched.
    pub(crate) fn writable(&self) -> Result<(), FsError> {
        match &self.latched {
            None => Ok(()),
            Some(reason) => Err(FsError::ReadOnly { reason: reason.clone() }),
        }
    }

    fn failed(&mut self, error: DiskError) -> FsError {
        // A range error is a mistake of the caller's, not of the device.
        if !matches!(error, DiskError::BadRange { .. }) {
            self.latch(format!("device error: {error}"));
        }
        FsError::Device(error)
    }

    pub(crate) fn read(&mut self, byte: u64, into: &mut [u8]) -> Result<(), FsError> {
        self.disk.read(byte >> self.lba_shift, into).map_err(|e| self.failed(e))
    }

    pub(crate) fn write(&mut self, byte: u64, from: &[u8]) -> Result<(), FsError> {
        self.writable()?;
        self.unflushed = true;
        self.disk.write(byte >> self.lba_shift, from).map_err(|e| self.failed(e))
    }

    pub(crate) fn flush(&mut self) -> Result<(), FsError> {
        self.writable()?;
        self.disk.flush().map_err(|e| self.failed(e))?;
        self.unflushed = false;
        Ok(())
    }

    pub(crate) fn deallocate(&mut self, byte: u64, bytes: u64) -> Result<(), FsError> {
        self.writable()?;
        self.unflushed = true;
        self.disk.deallocate(byte >> self.lba_shift, bytes >> self.lba_shift).map_err(|e| self.failed(e))
    }
}
