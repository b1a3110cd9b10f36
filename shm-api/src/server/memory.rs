//! Device memory for clients: the drive's Persistent Memory Region, and what peers export. Windows with the API of a file; what stands
//! behind them is that memory.
//!
//! The PMR is one object that is always there, as if it were a file of the server's user with mode 0600. A peer's memory is an object
//! from its export until nobody has it open, the peer itself gone or not: like raw memory, for one client or, by a name, for all of
//! its user's.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nvme_driver::mem::Mapping;
use nvme_driver::pmr::{Health, Pmr};
use p2p::region::RegionKind;
use p2p::windows::{DeviceMemory, ObjectOptions, WindowsError};

use super::core::{Core, windows_error};
use super::raw::{Allocation, RAW};
use super::session::{OpenFile, Session};
use super::{ServerError, requests};
use crate::protocol::messages as m;
use crate::protocol::{ErrorCode, WireError};

/// The PMR's object.
const PMR: u64 = RAW;
/// Root, who may open what is the server's user's.
const ROOT: u32 = 0;

/// The device memory that an object is.
#[derive(Clone, Debug)]
pub(super) struct OwnMemory {
    memory: Arc<Mapping>,
    kind: RegionKind,
    /// Bytes per window.
    pub(super) window: usize,
}

impl OwnMemory {
    /// Where its windows live of itself: readers on the processor are spared a bus.
    pub(super) fn auto(&self) -> p2p::windows::Placement {
        match self.kind {
            RegionKind::Ordinary => p2p::windows::Placement::Auto,
            RegionKind::Device { .. } => p2p::windows::Placement::PeersFirst,
        }
    }
}

/// The largest window that divides `len`, a multiple of 4 KiB, and is at most `most`.
fn window_for(len: usize, most: usize) -> usize {
    (1 << len.trailing_zeros().min(30)).min(most)
}

impl Core {
    /// Makes the drive's PMR an object.
    pub(super) fn add_pmr(&mut self, pmr: &Arc<Pmr>) -> Result<(), ServerError> {
        if pmr.health() == Health::ContentLost {
            tracing::warn!("the drive says that what its PMR held was lost");
        }
        let (mut len, mut window) = (pmr.size(), window_for(pmr.size(), self.window_size));
        let kind = if pmr.is_device_memory() {
            // A word that never holds all ones tells a device that is gone: its page is the last one, and the rest is whole windows.
            let page = len - 4096;
            window = window.min(1 << (len / 16).max(4096).ilog2());
            len = page - page % window;
            RegionKind::Device { canary: page as u64 }
        } else {
            RegionKind::Ordinary
        };
        let memory = DeviceMemory {
            memory: Arc::clone(pmr.memory()),
            bus_address: pmr.bus_address().unwrap_or(0),
            offset: 0,
            len,
            kind,
        };
        self.add_memory(PMR, memory, window, self.server_uid, "")?;
        self.backing.add_pmr(PMR, pmr);
        Ok(())
    }

    fn add_memory(
        &mut self,
        object: u64,
        memory: DeviceMemory,
        window: usize,
        uid: u32,
        name: &str,
    ) -> Result<(), WindowsError> {
        let own = OwnMemory { memory: Arc::clone(&memory.memory), kind: memory.kind, window };
        let len = memory.len as u64;
        let options = ObjectOptions { window_size: window, placement: own.auto() };
        self.windows.add_memory(object, memory, options)?;
        self.allocations.insert(object, Allocation { len, uid, name: name.to_owned(), own: Some(own) });
        Ok(())
    }

    /// Opens device memory.
    pub(super) fn open_memory(
        &mut self,
        session: &mut Session,
        request: &m::MemoryRequest,
        name: &str,
        now: u64,
    ) -> Result<(m::MemoryReply, String, Vec<OwnedFd>), WireError> {
        session.room_for_file()?;
        let invalid = |text: String| Err(WireError::new(ErrorCode::Invalid, text));
        let uid = session.identity.uid;
        match request.what {
            _ if request.reserved != 0 || (request.peer != 0) != (request.what == m::MEMORY_EXPORT) => {
                invalid("a peer is named for its export, and only then".to_owned())
            }
            m::MEMORY_PMR if !name.is_empty() => invalid("the PMR has no name".to_owned()),
            m::MEMORY_PMR => {
                if !self.windows.has_memory(PMR) {
                    let text = "this server serves no PMR: the device has none, or it could not be enabled";
                    return Err(WireError::new(ErrorCode::NotFound, text));
                }
                if ![self.server_uid, ROOT].contains(&uid) {
                    let text = format!("the PMR is uid {}'s, not {uid}'s", self.server_uid);
                    return Err(WireError::new(ErrorCode::Denied, text));
                }
                self.opened_memory(session, PMR, now)
            }
            m::MEMORY_EXPORT => {
                let object = self.export(session, request.peer, name)?;
                self.opened_memory(session, object, now)
            }
            m::MEMORY_SHARED => match self.find_memory(uid, name) {
                Some((object, true)) => self.opened_memory(session, object, now),
                Some((_, false)) => {
                    let text = format!("\"{name}\" is raw memory and no peer's: allocate it with length 0");
                    Err(WireError::new(ErrorCode::NotFound, text))
                }
                None => Err(WireError::new(
                    ErrorCode::NotFound,
                    format!("no peer's memory is exported as \"{name}\""),
                )),
            },
            other => invalid(format!("memory {other}")),
        }
    }

    /// What a user has under a name, and whether it is device memory.
    pub(super) fn find_memory(&self, uid: u32, name: &str) -> Option<(u64, bool)> {
        let mut all = self.allocations.iter();
        let found = all.find(|(_, a)| !name.is_empty() && a.uid == uid && a.name == name);
        found.map(|(object, a)| (*object, a.own.is_some()))
    }

    /// Makes the memory of a peer of this client an object.
    fn export(&mut self, session: &Session, peer: u64, name: &str) -> Result<u64, WireError> {
        let memory = Arc::clone(session.engine(peer)?.1.local());
        let uid = session.identity.uid;
        let exists = |text: String| Err(WireError::new(ErrorCode::Exists, text));
        if self.find_memory(uid, name).is_some() {
            return exists(format!("\"{name}\" is there already"));
        }
        // Two objects over the same bytes would not know of each other's writers.
        if self.allocations.values().any(|a| a.own.as_ref().is_some_and(|o| Arc::ptr_eq(&o.memory, &memory)))
        {
            return exists(format!("peer {peer}'s memory is exported already"));
        }
        // It is host memory in truth, and may outlive its peer: all of it together is at most as much as raw memory may be.
        let pmr = self.allocations.get(&PMR).map_or(0, |a| a.len);
        let room = (self.windows.host_bytes().1 / 2).saturating_sub(self.windows.memory_bytes() - pmr);
        let len = memory.len();
        if len as u64 > room {
            let text = format!("{len} bytes of exported memory are more than the {room} that are left");
            return Err(WireError::new(ErrorCode::TooBig, text));
        }
        let object = self.next_object();
        let window = window_for(len, self.window_size);
        let memory = DeviceMemory { memory, bus_address: 0, offset: 0, len, kind: RegionKind::Ordinary };
        self.add_memory(object, memory, window, uid, name).map_err(|e| windows_error(&e))?;
        Ok(object)
    }

    fn opened_memory(
        &mut self,
        session: &mut Session,
        object: u64,
        now: u64,
    ) -> Result<(m::MemoryReply, String, Vec<OwnedFd>), WireError> {
        let Some((own, len)) = self.allocations.get(&object).and_then(|a| Some((a.own.clone()?, a.len)))
        else {
            return Err(WireError::new(ErrorCode::NotFound, "there is no such memory"));
        };
        let (reason, text) = self.memory_for(session, object, &own);
        let reaches = reason == m::CMB_GIVEN;
        let opened = self.opened.entry(object).or_default();
        opened.count += 1;
        opened.without_cmb += u32::from(!reaches);
        let placed = self.place_object(object).and_then(|()| self.windows.host_fd(object, true));
        let fds = placed.map_err(|e| windows_error(&e)).and_then(|host| {
            let direct = if reaches { Some(requests::descriptor(&own.memory)?) } else { None };
            Ok(std::iter::once(host).chain(direct).collect())
        });
        let fds = fds.inspect_err(|_| self.close_inode(object, reaches, now))?;
        let losses = self.windows.losses(object, &mut self.backing, now).reported;
        let handle = session.add_file(OpenFile { ino: object, writable: true, losses, reaches });
        let reply = m::MemoryReply {
            handle,
            ino: object,
            size: len,
            cache_len: p2p::layout::LANE,
            window_size: own.window as u64,
            memory_len: if reaches { own.memory.len() as u64 } else { 0 },
            memory_offset: own.memory.fd().filter(|_| reaches).map_or(0, |(_, offset)| offset),
            canary: match own.kind {
                RegionKind::Device { canary } => canary,
                RegionKind::Ordinary => u64::MAX,
            },
            reason,
            reserved: 0,
        };
        Ok((reply, text, fds))
    }

    /// Whether a client is given the memory itself. A descriptor of the PMR spans a whole BAR, as that of a CMB does (P8); a peer's
    /// memory is a file of its own, sealed, and goes to whoever may open it.
    fn memory_for(&self, session: &Session, object: u64, own: &OwnMemory) -> (u32, String) {
        if own.memory.fd().is_none() {
            return (m::CMB_NONE, "this memory cannot be mapped by other processes".to_owned());
        }
        if object == PMR && session.identity.uid != self.server_uid {
            let text = format!(
                "a mapping of the PMR is given to the server's own uid {} only, not to {}; the host cache serves instead",
                self.server_uid, session.identity.uid
            );
            return (m::CMB_OTHER_UID, text);
        }
        (m::CMB_GIVEN, String::new())
    }

    /// What people call memory that is no file's.
    pub(super) fn memory_name(&self, object: u64) -> String {
        let Some(a) = self.allocations.get(&object) else { return "this memory".to_owned() };
        match (a.own.is_some(), a.name.as_str()) {
            _ if object == PMR => "the drive's PMR".to_owned(),
            (true, "") => "a peer's memory".to_owned(),
            (true, name) => format!("\"{name}\", exported by a peer,"),
            (false, "") => "raw memory".to_owned(),
            (false, name) => format!("raw memory \"{name}\""),
        }
    }

    /// An error of the windows' about an object, which is named if it is memory: its number tells nobody anything.
    pub(super) fn object_error(&self, object: u64, error: &WindowsError) -> WireError {
        let mut wire = windows_error(error);
        if super::raw::is_raw(object) {
            wire.text = wire.text.replace(&format!("object {object}"), &self.memory_name(object));
        }
        wire
    }

    /// Refuses a read that goes on behind the end of device memory, where files have zeros.
    pub(super) fn must_reach(&self, object: u64, bytes: &std::ops::Range<u64>) -> Result<(), WireError> {
        match self.allocations.get(&object) {
            Some(a) if a.own.is_some() && bytes.end > a.len => {
                let (len, name) = (bytes.end - bytes.start, self.memory_name(object));
                let text = format!("{len} bytes at {} end behind the {} bytes of {name}", bytes.start, a.len);
                Err(WireError::new(ErrorCode::Invalid, text))
            }
            _ => Ok(()),
        }
    }

    /// Whether an object stays when nobody has it open.
    pub(super) fn stays(object: u64) -> bool {
        object == PMR
    }

    /// Makes what was committed to an object of device memory persistent, if the memory is; its size. `None`: it is a file.
    /// If it was off meanwhile that is a loss ([`none_lost`](Self::none_lost) tells of it), and all that is in the host cache is to be
    /// committed again.
    pub(super) fn sync_memory(&mut self, object: u64) -> Option<Result<u64, WireError>> {
        let len = self.allocations.get(&object)?.len;
        if object != PMR {
            return Some(Ok(len));
        }
        let done = self.backing.pmr_barrier();
        self.note_interruption();
        Some(done.map(|()| len).map_err(|e| WireError::new(ErrorCode::Device, e.to_string())))
    }

    /// Has the windows know if the PMR was off.
    pub(super) fn note_interruption(&mut self) -> bool {
        let interrupted = self.backing.was_interrupted();
        if let Some(object) = interrupted {
            self.windows.memory_interrupted(object);
        }
        interrupted.is_some()
    }
}
