//! A disk in memory.

use nvme_driver::disk::{Disk, DiskError, Geometry, Op};

/// A RAM disk; 512-byte blocks unless made otherwise.
#[derive(Clone)]
pub struct RamDisk {
    pub bytes: Vec<u8>,
    geometry: Geometry,
}

impl RamDisk {
    pub fn new(bytes: usize) -> Self {
        Self::with_lba(bytes, 512)
    }

    pub fn with_lba(bytes: usize, lba: u32) -> Self {
        Self::from_image(vec![0; bytes], lba)
    }

    pub fn from_image(bytes: Vec<u8>, lba: u32) -> Self {
        let geometry = Geometry {
            block_size: lba,
            blocks: bytes.len() as u64 / u64::from(lba),
            max_transfer: 1 << 20,
            volatile_cache: true,
            can_deallocate: true,
        };
        Self { bytes, geometry }
    }

    fn range(&self, op: Op, lba: u64, len: u64) -> Result<std::ops::Range<usize>, DiskError> {
        let size = u64::from(self.geometry.block_size);
        let end = lba.checked_mul(size).and_then(|s| s.checked_add(len));
        match end {
            Some(end) if end <= self.bytes.len() as u64 && len.is_multiple_of(size) => {
                Ok((lba * size) as usize..end as usize)
            }
            _ => Err(DiskError::BadRange {
                op,
                lba,
                bytes: len,
                blocks: self.geometry.blocks,
                block_size: self.geometry.block_size,
            }),
        }
    }
}

impl Disk for RamDisk {
    fn name(&self) -> &str {
        "ram"
    }
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }
    fn read(&mut self, lba: u64, into: &mut [u8]) -> Result<(), DiskError> {
        let r = self.range(Op::Read, lba, into.len() as u64)?;
        into.copy_from_slice(&self.bytes[r]);
        Ok(())
    }
    fn write(&mut self, lba: u64, from: &[u8]) -> Result<(), DiskError> {
        let r = self.range(Op::Write, lba, from.len() as u64)?;
        self.bytes[r].copy_from_slice(from);
        Ok(())
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
    fn write_zeroes(&mut self, lba: u64, blocks: u64) -> Result<(), DiskError> {
        let r = self.range(Op::WriteZeroes, lba, blocks * u64::from(self.geometry.block_size))?;
        self.bytes[r].fill(0);
        Ok(())
    }
    fn deallocate(&mut self, lba: u64, blocks: u64) -> Result<(), DiskError> {
        let r = self.range(Op::Deallocate, lba, blocks * u64::from(self.geometry.block_size))?;
        self.bytes[r].fill(0xdd);
        Ok(())
    }
}
