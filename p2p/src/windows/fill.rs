//! A window's bytes from what stands behind it to a place that was taken for it.

use super::{Windows, WindowsError};
use crate::backing::Backing;
use crate::counters::{Path, Reason};

impl Windows {
    pub(super) fn fill_cmb(
        &mut self,
        index: u32,
        at: u64,
        why: Reason,
        backing: &mut dyn Backing,
    ) -> Result<(), WindowsError> {
        let Some(w) = self.window(index) else { return Err(WindowsError::UnknownWindow(index)) };
        let (object, offset, len) = (w.object, w.offset, w.len);
        if self.has_memory(object) {
            return Ok(());
        }
        if self.is_raw(object) {
            let zeros = [0; 4096];
            if let Some(cmb) = self.cmb.as_ref() {
                (0..len).step_by(4096).try_for_each(|page| cmb.region.write(at as usize + page, &zeros))?;
            }
            return Ok(());
        }
        let direct = self.cmb.as_ref().is_some_and(|c| c.memory.read_data);
        if direct {
            backing.read_to_cmb(object, offset, at as usize, len)?;
            self.counters.add(Path::Cmb, why, len);
            return Ok(());
        }
        // A CMB that takes no read data is filled by the processor.
        let mut bounce = std::mem::take(&mut self.bounce);
        bounce.resize(len, 0);
        let done = backing.read_to_host(object, offset, &mut bounce);
        let copied = done.map_err(WindowsError::from).and_then(|()| match self.cmb.as_ref() {
            Some(cmb) => Ok(cmb.region.write(at as usize, &bounce)?),
            None => Ok(()),
        });
        self.bounce = bounce;
        self.counters.add(Path::Bounce, Reason::CmbUnsupported, len);
        copied
    }

    pub(super) fn fill_host(
        &mut self,
        index: u32,
        at: u64,
        why: Reason,
        backing: &mut dyn Backing,
    ) -> Result<(), WindowsError> {
        let Some(w) = self.window(index) else { return Err(WindowsError::UnknownWindow(index)) };
        let (object, offset, len) = (w.object, w.offset, w.len);
        if self.is_raw(object) {
            return Ok(self.host_file(object)?.punch(at, len as u64)?);
        }
        let mut bounce = std::mem::take(&mut self.bounce);
        bounce.resize(len, 0);
        let done = self
            .read_behind(object, offset, &mut bounce, backing)
            .and_then(|()| Ok(self.host_file(object)?.write(at, &bounce)?));
        self.bounce = bounce;
        self.counters.add(Path::HostCache, why, len);
        done
    }
}
