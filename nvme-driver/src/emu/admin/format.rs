//! Format NVM (NVM Command Set Specification, "Format NVM command").

use super::super::state::State;
use super::identify::FORMATS;
use crate::spec::{Command, Status};

impl State {
    /// Erases the namespace and gives it another block size. Metadata and protection information are not supported.
    pub(super) fn format_nvm(&mut self, cmd: &Command) -> Result<u32, Status> {
        if !matches!(cmd.nsid, 1 | 0xffff_ffff) || !self.admin.attached {
            return Err(Status::INVALID_NAMESPACE);
        }
        let (lbaf, erase) = ((cmd.cdw10 & 0xf) as usize, cmd.cdw10 >> 9 & 7);
        let with_metadata = cmd.cdw10 & (1 << 4 | 7 << 5) != 0;
        let shift = *FORMATS.get(lbaf).ok_or(Status::INVALID_FORMAT)?;
        if with_metadata {
            return Err(Status::INVALID_FORMAT);
        }
        if self.namespace.bytes >> shift == 0 {
            return Err(Status::INVALID_FORMAT);
        }
        // Cryptographic erase is not supported.
        if erase > 1 {
            return Err(Status::INVALID_FIELD);
        }
        let all = self.namespace.bytes;
        self.namespace.zero(0, all, true).map_err(|_| Status::WRITE_FAULT)?;
        self.namespace.flush().map_err(|_| Status::WRITE_FAULT)?;
        self.namespace.block_shift = u32::from(shift);
        Ok(0)
    }
}
