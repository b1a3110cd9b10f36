//! Objects: what windows are windows of.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;

use super::ahead::Sequence;
use super::device::Losses;
use super::memory::Own;
use super::{Windows, WindowsError};
use crate::host::HostFile;
use crate::layout::{LANE, MIN_WINDOW};

/// Where an object's windows may live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// In the CMB while there is room and reason, else in the host cache.
    #[default]
    Auto,
    /// In the CMB for peers and for whoever asks for it there; else in the host cache, because the CMB is slow for processors.
    PeersFirst,
    /// In the host cache only: the object opted out of the CMB.
    HostOnly,
    /// In the CMB only: no host memory is used for it (peers, raw CMB objects). A refusal then is a refusal.
    CmbOnly,
}

/// How an object is registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectOptions {
    /// Bytes per window: a power of two from 4 KiB to 1 GiB.
    pub window_size: usize,
    /// Where they may live.
    pub placement: Placement,
}

impl Default for ObjectOptions {
    fn default() -> Self {
        Self { window_size: crate::layout::DEFAULT_WINDOW, placement: Placement::Auto }
    }
}

#[derive(Debug)]
pub(super) struct Object {
    pub(super) options: ObjectOptions,
    /// Window number (offset / window size) to control slot.
    pub(super) windows: BTreeMap<u64, u32>,
    pub(super) host: Option<HostFile>,
    /// Ranges that somebody has taken out under a layout: no window may be filled from them.
    pub(super) excluded: Vec<Range<u64>>,
    /// Where it ends, while what stands behind it has not been cut there yet.
    pub(super) cut: Option<u64>,
    pub(super) sequence: Sequence,
    /// No file: bytes of memory, and nothing behind them.
    pub(super) raw: Option<u64>,
    /// Device memory of its own.
    pub(super) own: Option<Own>,
    /// What a reset of the device has cost.
    pub(super) losses: Losses,
}

impl Windows {
    /// Registers an object. Registering it again changes its placement, but not its window size while it is registered.
    pub fn add_object(&mut self, object: u64, options: ObjectOptions) -> Result<(), WindowsError> {
        let size = options.window_size;
        if !size.is_power_of_two() || !(MIN_WINDOW..=1 << 30).contains(&size) {
            return Err(WindowsError::BadWindowSize(size));
        }
        if let Some(known) = self.objects.get_mut(&object) {
            if known.options.window_size != size {
                return Err(WindowsError::OtherWindowSize(object, known.options.window_size));
            }
            known.options = options;
            if options.placement == Placement::CmbOnly {
                let windows: Vec<u32> = known.windows.values().copied().collect();
                self.drop_spares_of(&windows);
            }
            return Ok(());
        }
        let fresh = Object {
            options,
            windows: BTreeMap::new(),
            host: None,
            excluded: Vec::new(),
            cut: None,
            sequence: Sequence::default(),
            raw: None,
            own: None,
            losses: Losses::default(),
        };
        self.objects.insert(object, fresh);
        Ok(())
    }

    /// Whether the object is registered.
    pub fn has_object(&self, object: u64) -> bool {
        self.objects.contains_key(&object)
    }

    /// Forgets an object that has no windows left (revoke it first). Says whether it is gone.
    pub fn remove_object(&mut self, object: u64) -> bool {
        let idle: Vec<u32> =
            self.objects.get(&object).map(|o| o.windows.values().copied().collect()).unwrap_or_default();
        for index in idle {
            self.forget_if_idle(index);
        }
        if self.out.iter().any(|o| o.object == object) {
            return false;
        }
        match self.objects.get(&object) {
            Some(o) if o.windows.is_empty() => {
                self.raw_bytes -= o.raw.unwrap_or(0);
                self.objects.remove(&object).is_some()
            }
            Some(_) => false,
            None => true,
        }
    }

    /// A descriptor of the object's host-cache file: created when first asked for, read-only unless `writable`.
    pub fn host_fd(&mut self, object: u64, writable: bool) -> Result<OwnedFd, WindowsError> {
        Ok(self.host_file(object)?.client_fd(writable)?)
    }

    /// Keeps a range from being filled (a write layout over it is out). Windows there are not revoked by this, but lose their spares.
    pub fn exclude(&mut self, object: u64, range: Range<u64>) -> Result<(), WindowsError> {
        let known = self.objects.get_mut(&object).ok_or(WindowsError::UnknownObject(object))?;
        known.excluded.push(range.clone());
        let windows = self.slots_in(object, &range);
        self.drop_spares_of(&windows);
        Ok(())
    }

    /// Ends one [`exclude`](Self::exclude) of exactly this range. With the last that reaches to the end of all objects, what was
    /// [truncated](Self::truncate) is cut on the drive as well.
    pub fn readmit(&mut self, object: u64, range: &Range<u64>) {
        if let Some(known) = self.objects.get_mut(&object)
            && let Some(at) = known.excluded.iter().position(|r| r == range)
        {
            known.excluded.swap_remove(at);
            if known.excluded.iter().all(|r| r.end < LANE) {
                known.cut = None;
            }
        }
    }

    /// Whether any of a range is out under a layout, or being cut off.
    pub(super) fn is_excluded(&self, object: u64, bytes: Range<u64>) -> bool {
        let excluded = self.objects.get(&object).map_or(&[][..], |o| &o.excluded);
        excluded.iter().any(|r| r.start < bytes.end && bytes.start < r.end)
    }

    pub(super) fn host_file(&mut self, object: u64) -> Result<&HostFile, WindowsError> {
        let known = self.objects.get_mut(&object).ok_or(WindowsError::UnknownObject(object))?;
        if known.host.is_none() {
            known.host = Some(HostFile::create(object)?);
        }
        known.host.as_ref().ok_or(WindowsError::UnknownObject(object))
    }

    /// The slot of the window that holds `offset`, made if there is none.
    pub(super) fn slot_for(&mut self, object: u64, offset: u64) -> Result<u32, WindowsError> {
        let known = self.objects.get(&object).ok_or(WindowsError::UnknownObject(object))?;
        if offset >= LANE {
            return Err(WindowsError::TooFar(offset));
        }
        if !known.reaches(offset) {
            let len = known.own.as_ref().map_or(0, |own| own.len);
            return Err(WindowsError::BeyondMemory { object, offset, len });
        }
        let size = known.options.window_size;
        let number = offset / size as u64;
        if let Some(index) = known.windows.get(&number) {
            return Ok(*index);
        }
        let index = self.new_slot(object, number, size)?;
        if let Some(known) = self.objects.get_mut(&object) {
            known.windows.insert(number, index);
        }
        Ok(index)
    }

    /// The windows of an object that exist in a range of it, in order.
    pub(super) fn slots_in(&self, object: u64, range: &Range<u64>) -> Vec<u32> {
        let Some(known) = self.objects.get(&object) else { return Vec::new() };
        if range.is_empty() {
            return Vec::new();
        }
        let size = known.options.window_size as u64;
        let (first, last) = (range.start / size, (range.end - 1) / size);
        known.windows.range(first..=last).map(|(_, index)| *index).collect()
    }

    /// Where the first window of an object at or after the one of byte `from` begins, if there is any: between them there is nothing.
    pub fn next_window(&self, object: u64, from: u64) -> Option<u64> {
        let known = self.objects.get(&object)?;
        let size = known.options.window_size as u64;
        known.windows.range(from / size..).next().map(|(number, _)| number * size)
    }
}
