//! What windows need of the layer that knows where an object's bytes are on the drive.

/// The drive could not do what a window needed.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// It failed. The window's bytes in memory are untouched.
    #[error("{what}: {source}")]
    Failed {
        /// What was attempted.
        what: String,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The command did not complete and may still touch its memory: the pages stay quarantined until
    /// [`Windows::device_drained`](crate::windows::Windows::device_drained).
    #[error(
        "{0} did not complete; its memory is quarantined until the queue is deleted or the controller reset"
    )]
    TimedOut(String),
    /// This path does not exist (no read data or write data in this CMB): use the host's memory instead.
    #[error("{0}")]
    Unsupported(String),
}

/// Moves an object's bytes between drive and memory. Offsets and lengths are multiples of 4 KiB; what lies beyond the object's
/// end reads as zeros and is not written.
pub trait Backing {
    /// Drive to CMB, no byte through host memory.
    fn read_to_cmb(
        &mut self,
        object: u64,
        offset: u64,
        cmb_offset: usize,
        len: usize,
    ) -> Result<(), BackingError>;

    /// Drive to host memory.
    fn read_to_host(&mut self, object: u64, offset: u64, into: &mut [u8]) -> Result<(), BackingError>;

    /// CMB to drive, no byte through host memory. Need not be durable: that is the committer's flush.
    fn write_from_cmb(
        &mut self,
        object: u64,
        offset: u64,
        cmb_offset: usize,
        len: usize,
    ) -> Result<(), BackingError>;

    /// Host memory to drive.
    fn write_from_host(&mut self, object: u64, offset: u64, from: &[u8]) -> Result<(), BackingError>;

    /// A reset of the device has been dealt with: what lies in the CMB from here on is good. Between a reset and this call
    /// [`write_from_cmb`](Self::write_from_cmb) must fail rather than write what the reset left there; that matters to a backing
    /// that does something else with the device first, in the same call.
    fn reset_noticed(&mut self) {}

    /// The device memory of an object reads as if its device were gone. It may only have been turned off: brings it back then, and reports
    /// that to [`Windows::memory_interrupted`](crate::windows::Windows::memory_interrupted) later.
    fn revive_memory(&mut self, _object: u64) {}
}
