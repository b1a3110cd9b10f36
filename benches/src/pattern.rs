//! A drive for benchmarks of windows: it costs nothing but the copy.

use std::sync::Arc;

use nvme_driver::disk::CmbMemory;
use nvme_driver::mem::Mapping;
use p2p::backing::{Backing, BackingError};

/// A drive that fills the CMB with a pattern and forgets what is written.
#[derive(Debug)]
pub struct Pattern(pub Arc<Mapping>);

impl Backing for Pattern {
    fn read_to_cmb(&mut self, _: u64, offset: u64, at: usize, len: usize) -> Result<(), BackingError> {
        let bytes: Vec<u8> = (0..len).map(|i| ((offset as usize + i) % 251) as u8).collect();
        self.0.write(at, &bytes).map_err(|e| BackingError::Unsupported(e.to_string()))
    }
    fn read_to_host(&mut self, _: u64, offset: u64, into: &mut [u8]) -> Result<(), BackingError> {
        for (i, byte) in into.iter_mut().enumerate() {
            *byte = ((offset as usize + i) % 251) as u8;
        }
        Ok(())
    }
    fn write_from_cmb(&mut self, _: u64, _: u64, _: usize, _: usize) -> Result<(), BackingError> {
        Ok(())
    }
    fn write_from_host(&mut self, _: u64, _: u64, _: &[u8]) -> Result<(), BackingError> {
        Ok(())
    }
}

/// The CMB of an emulated controller: ordinary memory.
pub fn cmb_memory(memory: &Arc<Mapping>) -> CmbMemory {
    CmbMemory {
        memory: Arc::clone(memory),
        bus_address: 0,
        is_device_memory: false,
        read_data: true,
        write_data: true,
    }
}
