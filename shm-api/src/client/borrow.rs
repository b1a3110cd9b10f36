//! A window's bytes in place, without a copy.

use p2p::writer::{Borrow, NotEntered};

use super::ClientError;
use super::mapped::{Mapped, REFUSALS, TRIES};
use crate::protocol::{ErrorCode, WireError};

impl Mapped {
    /// Lends `look` the bytes of the window that holds `offset` of the mapping, in place; offsets in it count from the window's first byte.
    ///
    /// It keeps nobody from moving the window: from then on the bytes are a snapshot, whose pages nobody reuses before `look` returns.
    /// [`Borrow::is_current`] says whether it may have come to that. Only a writer that did not end its section in time may still store there. After
    /// a reset of the device a borrow in the CMB that is not current has lost its bytes; one in the host cache ([`Borrow::home`]) has not. Each borrow takes one of the client's section slots.
    pub fn borrow<R>(&self, offset: u64, look: impl FnOnce(&Borrow<'_>) -> R) -> Result<R, ClientError> {
        self.check(offset, 1)?;
        let index = ((self.offset - self.first + offset) >> self.shift) as usize;
        let Some(handle) = self.windows.get(index) else { return Err(self.no_window(index)) };
        let Some(mut slot) = self.file.inner.client.inner.slots.take() else {
            let text = format!("more than {} sections and borrows at once", p2p::layout::SECTION_SLOTS);
            return Err(WireError::new(ErrorCode::TooMany, text).into());
        };
        let mut refused = 0;
        for tries in 0..TRIES {
            // Its own: `look` may read and write through this mapping, and so change what it has mapped.
            let view = self.view.borrow().clone();
            match slot.borrow(&self.pages, handle.window, &view) {
                Ok(borrow) => return Ok(look(&borrow)),
                Err(NotEntered::Moving) => self.moving(tries),
                Err(NotEntered::NotResident | NotEntered::DeviceMoved) => {
                    if self.fault(index, 0)?.is_some() {
                        refused += 1;
                        if refused == REFUSALS {
                            let text = "there is no place for the window now; copy its bytes instead";
                            return Err(WireError::new(ErrorCode::NotResident, text).into());
                        }
                    }
                }
                Err(NotEntered::Unmapped(place)) => self.reach(index, place)?,
                Err(NotEntered::ServerGone) => return Err(ClientError::Gone(" (its word says so)")),
                Err(NotEntered::StaleHandle) => return Err(self.no_window(index)),
            }
        }
        Err(self.starved(index, "borrow"))
    }
}
