//! Objects with device memory of their own: a drive's Persistent Memory Region, what a GPU or another peer exports, another drive's CMB.
//!
//! For such an object [`Home::Cmb`] means its own device memory, and a window has one place there, at its own offset. Nothing else stands
//! behind it: what is in the device memory is what the object holds, as blocks of the drive are for a file. So a window that becomes
//! resident there needs no transfer, one that leaves it for nowhere loses nothing, and one in the host cache is written back to it.
//! A reset of the drive does not concern it, but one that turned the memory off for a while: [`Windows::memory_interrupted`].
//!
//! What someone silent may still store to is not written and not read back: [`WindowsError::MemoryHeld`].

use std::sync::Arc;
use std::sync::atomic::Ordering;

use nvme_driver::mem::Mapping;

use super::moves::Request;
use super::object::Object;
use super::window::Window;
use super::{ObjectOptions, Windows, WindowsError};
use crate::backing::Backing;
use crate::counters::Reason;
use crate::layout::{Home, LANE, MIN_WINDOW};
use crate::policy::Key;
use crate::refusal::Point;
use crate::region::{Region, RegionKind};

/// Memory on a device, as mapped here.
#[derive(Clone, Debug)]
pub struct DeviceMemory {
    /// The mapping.
    pub memory: Arc<Mapping>,
    /// Where the mapping's first byte is on the bus. Only a device that decodes its own memory without an IOMMU looks at it
    /// ([`NvmePeer`](crate::peer::NvmePeer) on its own CMB); 0 where there is none.
    pub bus_address: u64,
    /// Where in the mapping the object begins: a multiple of 4 KiB.
    pub offset: usize,
    /// Length in bytes: whole windows.
    pub len: usize,
    /// Ordinary memory, or a device's; then with a canary in the mapping, outside the object.
    pub kind: RegionKind,
}

/// An object's own device memory.
#[derive(Debug)]
pub(super) struct Own {
    pub(super) region: Region,
    pub(super) bus_address: u64,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// The device is gone, and its memory with it.
    pub(super) gone: bool,
}

fn bad(object: u64, why: impl Into<String>) -> WindowsError {
    WindowsError::BadMemory { object, why: why.into() }
}

impl Windows {
    /// Registers device memory as an object. It may live there and in the host cache, as `options` say.
    pub fn add_memory(
        &mut self,
        object: u64,
        memory: DeviceMemory,
        options: ObjectOptions,
    ) -> Result<(), WindowsError> {
        let (offset, len, size) = (memory.offset, memory.len, memory.memory.len());
        let end = offset.checked_add(len).filter(|end| *end <= size && len > 0);
        let end = end.ok_or_else(|| bad(object, format!("{len} bytes at {offset} of {size}")))?;
        if !offset.is_multiple_of(MIN_WINDOW) || !len.is_multiple_of(options.window_size.max(1)) {
            let text = format!("{len} bytes at {offset} are not whole windows of {}", options.window_size);
            return Err(bad(object, text));
        }
        if let RegionKind::Device { canary } = memory.kind {
            let at = usize::try_from(canary).unwrap_or(usize::MAX);
            if at.checked_add(8).is_none_or(|c| c > offset && at < end) {
                return Err(bad(object, format!("the canary at {canary} is among its bytes")));
            }
            memory.memory.u64_at(at)?.store(0, Ordering::Relaxed);
        }
        if self.has_object(object) {
            return Err(WindowsError::Registered(object));
        }
        self.add_object(object, options)?;
        if let Some(o) = self.objects.get_mut(&object) {
            o.own = Some(Own {
                region: Region::new(memory.memory, 0, memory.kind),
                bus_address: memory.bus_address,
                offset: offset as u64,
                len: len as u64,
                gone: false,
            });
        }
        Ok(())
    }

    /// Bytes of device memory that are objects.
    pub fn memory_bytes(&self) -> u64 {
        self.objects.values().filter_map(|o| o.own.as_ref()).map(|own| own.len).sum()
    }

    /// The device is gone: what was in its memory is lost, and counted. What is in the host cache can be read, and goes nowhere.
    /// The server notices by itself where the memory has a canary.
    pub fn memory_lost(&mut self, object: u64, backing: &mut dyn Backing, now: u64) {
        let Some(own) = self.objects.get_mut(&object).and_then(|o| o.own.as_mut()).filter(|own| !own.gone)
        else {
            return;
        };
        own.gone = true;
        let len = own.len;
        let (mut kept, mut there) = (0, Vec::new());
        for index in self.slots_in(object, &(0..LANE)) {
            let Some(w) = self.window(index) else { continue };
            if w.home == Home::Host {
                kept += w.len as u64;
            } else {
                there.push(index);
            }
            self.redirect_from_cmb(index);
        }
        let lost = len - kept.min(len);
        self.counters.lost_bytes += lost;
        if let Some(o) = self.objects.get_mut(&object) {
            o.losses.events += 1;
            o.losses.bytes += lost;
        }
        let ticket = self.request_all(&there, Home::None, true, Reason::Drive, backing, now);
        self.tickets.forget(ticket);
        tracing::error!("the device memory of object {object} is gone; {lost} bytes are lost");
    }

    /// The device was reset with its memory: that is there again, with what was persistent. What was stored there since it was last made
    /// persistent may be lost, whoever stored it, so the object has a loss, which everybody who commits is told of once. What is in the
    /// host cache is not: it is brought there once more, all of it, for of what was brought nobody knows what arrived.
    pub fn memory_interrupted(&mut self, object: u64) {
        if !self.has_memory(object) {
            return;
        }
        for index in self.slots_in(object, &(0..LANE)) {
            let Some(w) = self.window_mut(index).filter(|w| w.home == Home::Host) else { continue };
            w.dirty.add_all();
            w.distrust_copies();
            self.pace.dirty = true;
        }
        if let Some(o) = self.objects.get_mut(&object) {
            o.losses.events += 1;
        }
        tracing::warn!(
            "the device memory of object {object} was off; what was stored there and not committed may be lost"
        );
    }

    /// Whether an object's device memory is gone with its device.
    pub fn memory_is_gone(&self, object: u64) -> bool {
        self.own(object).is_some_and(|own| own.gone)
    }

    pub(super) fn own(&self, object: u64) -> Option<&Own> {
        self.objects.get(&object)?.own.as_ref()
    }

    /// Whether an object has device memory of its own.
    pub fn has_memory(&self, object: u64) -> bool {
        self.own(object).is_some()
    }

    /// Whether a window is in the CMB proper: a reset of the drive takes it.
    pub(super) fn in_cmb(&self, w: &Window) -> bool {
        w.home == Home::Cmb && !self.has_memory(w.object)
    }

    /// Whether reading the CMB for this object may show what a reset left.
    pub(super) fn reset_matters(&self, object: u64) -> bool {
        self.device_moved() && !self.has_memory(object)
    }

    /// The memory that [`Home::Cmb`] means for an object.
    pub(super) fn direct(&self, object: u64) -> Option<&Region> {
        match self.own(object) {
            Some(own) => Some(&own.region),
            None => self.cmb.as_ref().map(|c| &c.region),
        }
    }

    /// Whether an object's device memory still answers. A device's memory is looked at.
    pub(super) fn memory_answers(&mut self, object: u64, backing: &mut dyn Backing, now: u64) -> bool {
        match self.own(object) {
            Some(own) if own.gone => false,
            Some(own) if !own.region.present() => {
                backing.revive_memory(object);
                let back = self.own(object).is_some_and(|own| own.region.present());
                if !back {
                    self.memory_lost(object, backing, now);
                }
                back
            }
            _ => true,
        }
    }

    /// Whether someone silent may still touch a window's place in its own device memory.
    fn is_held(&self, object: u64, at: u64) -> bool {
        self.out.iter().any(|o| o.home == Home::Cmb && o.object == object && o.at == at)
    }

    /// Whether someone silent may still touch the place of the window at `offset` in its own device memory.
    pub(super) fn own_place_is_held(&self, object: u64, offset: u64) -> bool {
        self.own(object).is_some_and(|own| self.is_held(object, own.offset + offset))
    }

    /// The one place of a window in its own device memory, if it may go there.
    pub(super) fn take_own(&mut self, object: u64, offset: u64) -> Option<Result<u64, Reason>> {
        let own = self.own(object)?;
        let at = own.offset + offset;
        if own.gone {
            return Some(Err(Reason::Drive));
        }
        if self.is_held(object, at) {
            return Some(Err(Reason::Quarantine));
        }
        if self.refusals.refuse(Point::CmbPlace) {
            return Some(Err(Reason::Injected));
        }
        Some(Ok(at))
    }

    /// A window is in a home, and may be chosen to leave it for another's sake. Nobody is in the way in an object's own memory.
    pub(super) fn enlist(&mut self, home: Home, key: Key, len: u64) {
        match (home, self.cmb.as_mut()) {
            (Home::Cmb, Some(cmb)) if self.objects.get(&key.0).is_none_or(|o| o.own.is_none()) => {
                cmb.policy.insert(key, len);
            }
            (Home::Host, _) => self.host_policy.insert(key, len),
            _ => {}
        }
    }

    /// Bytes from what stands behind an object.
    pub(super) fn read_behind(
        &self,
        object: u64,
        offset: u64,
        into: &mut [u8],
        backing: &mut dyn Backing,
    ) -> Result<(), WindowsError> {
        let Some(own) = self.own(object) else { return Ok(backing.read_to_host(object, offset, into)?) };
        if own.gone {
            return Err(WindowsError::MemoryGone(object));
        }
        if offset.checked_add(into.len() as u64).is_none_or(|end| end > own.len) {
            return Err(WindowsError::BeyondMemory { object, offset, len: own.len });
        }
        own.region.read((own.offset + offset) as usize, into)?;
        std::sync::atomic::fence(Ordering::Acquire);
        if own.region.present() { Ok(()) } else { Err(WindowsError::MemoryGone(object)) }
    }

    /// Bytes to what stands behind an object; `offset` in the window at `first`.
    pub(super) fn write_behind(
        &self,
        object: u64,
        (first, offset): (u64, u64),
        from: &[u8],
        backing: &mut dyn Backing,
    ) -> Result<(), WindowsError> {
        let Some(own) = self.own(object) else {
            return Ok(backing.write_from_host(object, first + offset, from)?);
        };
        if own.gone {
            return Err(WindowsError::MemoryGone(object));
        }
        if self.is_held(object, own.offset + first) {
            return Err(WindowsError::MemoryHeld { object, offset: first });
        }
        own.region.write((own.offset + first + offset) as usize, from)?;
        if own.region.present() { Ok(()) } else { Err(WindowsError::MemoryGone(object)) }
    }

    /// A move to nowhere would leave the bytes where a fenced writer may still store, or with nobody: it ends in the host cache.
    pub(super) fn turn_to_host(
        &mut self,
        index: u32,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<(), WindowsError> {
        let Some(w) = self.window(index) else { return Ok(()) };
        let (object, offset) = (w.object, w.offset);
        self.make_host_room(index, 0, backing, now);
        let at = self.take_host(index, 0).map_err(|why| {
            tracing::debug!("window {index} has no place in the host cache: {why}");
            if self.is_raw(object) {
                WindowsError::RawKept
            } else {
                WindowsError::MemoryHeld { object, offset }
            }
        })?;
        if let Some(m) = self.window_mut(index).and_then(|w| w.moving.as_mut()) {
            m.turn_to_host(at);
        }
        Ok(())
    }

    /// Has a window in its own memory follow a mass revocation that a reset has overtaken.
    pub(super) fn follow(&mut self, index: u32, backing: &mut dyn Backing, now: u64) {
        let request =
            Request { to: Home::Host, reason: Reason::Revoked, discard: false, tickets: Vec::new() };
        self.request(index, request, backing, now);
    }
}

impl Object {
    /// Whether a window of the object may begin at this offset.
    pub(super) fn reaches(&self, offset: u64) -> bool {
        self.own.as_ref().is_none_or(|own| offset < own.len)
    }
}
