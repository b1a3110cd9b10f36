//! What a writer does while the server has no place for its window. A reader has the bytes sent; a writer has no other way.

use std::time::Duration;

use super::ClientError;
use super::mapped::Mapped;
use crate::protocol::ErrorCode;
use crate::protocol::messages as m;

/// How often in a row the server may have no place for a window that is to be written, before the writer is told: with the waits in
/// between about 2 seconds. What passes (a truncation, a full cache, silent clients) has passed by then.
const REFUSALS: u32 = 256;
/// Each refusal is waited out longer than the one before by this much,
const STEP: Duration = Duration::from_micros(200);
/// and never longer than this.
const LONGEST: Duration = Duration::from_millis(10);

impl Mapped {
    /// Asks for a window to be resident, for a writer who was refused `refusals` times in a row so far.
    #[cold]
    pub(super) fn fault_to_write(&self, index: usize, refusals: &mut u32) -> Result<(), ClientError> {
        if self.fault(index, m::MAP_WRITE)? {
            *refusals = 0;
            return Ok(());
        }
        *refusals += 1;
        if *refusals < REFUSALS {
            std::thread::sleep((STEP * *refusals).min(LONGEST));
            return Ok(());
        }
        match self.fault_in_words(index, m::MAP_WRITE) {
            Err(ClientError::Server(why)) if why.code == ErrorCode::NotResident => {
                Err(ClientError::NoPlace { offset: self.window_offset(index), times: *refusals, why })
            }
            other => other.map(|()| *refusals = 0),
        }
    }
}
