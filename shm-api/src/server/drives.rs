//! Drives of the server's own that are peers: other NVMe controllers, which it has opened, and which move bytes between their blocks and
//! windows for clients that may.
//!
//! A drive's blocks are raw blocks: whoever reaches one reaches all. So it is opened by root and by the server's own user only, and
//! written only if the server was told that it may be. Clients share the one registration. What each of them has mapped is noted with it,
//! so that it reaches windows that it could open itself, and no others; and so that they are taken back when it has gone and the last of its
//! commands has ended.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use nvme_driver::Device;
use nvme_driver::controller::Controller;
use nvme_driver::topology::{Answer, Fence, Topology};
use nvme_driver::url::DeviceUrl;
use p2p::counters::{Path as Way, Reason};
use p2p::drive_copy::Obstacle;
use p2p::peer::{NvmePeer, try_out};
use p2p::windows::{PeerId, PeerMapping, PeerPath, Scope, WindowsError};

use super::ServerError;
use super::core::Core;
use super::jobs::{Job, Work};
use super::session::{PeerEntry, PeerKind, Session};
use crate::protocol::messages as m;
use crate::protocol::{ErrorCode, WireError};

/// A drive that the server is to have as a peer.
#[derive(Clone, Debug)]
pub struct PeerDevice {
    /// What clients call it.
    pub name: String,
    /// Its controller. Its deadlines bound how long a drive that does not answer can hold up everybody else.
    pub controller: Arc<Controller>,
    /// What takes windows back from it, beside unmapping.
    pub fence: Fence,
    /// What is in the way of its DMA: then all bytes go through host memory, counted with this reason.
    pub obstacle: Option<Obstacle>,
    /// Whether clients may have its blocks written.
    pub writable: bool,
    /// Kept for as long as the peer: it keeps others from the image behind an emulated one.
    pub device: Option<Arc<Device>>,
}

impl PeerDevice {
    /// A controller as a peer, for reading its blocks. Whether its DMA reaches the windows is the caller's to know.
    pub fn new(name: impl Into<String>, controller: &Arc<Controller>, fence: Fence) -> Self {
        let (name, controller) = (name.into(), Arc::clone(controller));
        Self { name, controller, fence, obstacle: None, writable: false, device: None }
    }

    /// An open device as a peer of windows on `served`, by its URL. Reads the way between the two from the machine's topology, and tries
    /// it: so nobody may be using the CMB of `served` yet. See [`try_out`] for what that does to the drive.
    pub fn open(device: Device, served: &Device, writable: bool) -> Result<Self, ServerError> {
        let name = device.url().to_string();
        let Some(controller) = device.controller().cloned() else {
            return Err(ServerError::NoController { name });
        };
        let (fence, mut obstacle) = way(Path::new("/sys"), device.url(), served.url());
        if obstacle.is_none()
            && let Some(cmb) = served.disk()?.cmb()
        {
            obstacle = try_out(&mut *device.disk()?, cmb, writable).err();
        }
        Ok(Self { name, controller, fence, obstacle, writable, device: Some(Arc::new(device)) })
    }
}

/// What takes `owner`'s memory back from `requester`, and what is in the way of its reaching it at all, by the topology as sysfs shows it.
fn way(sys: &Path, requester: &DeviceUrl, owner: &DeviceUrl) -> (Fence, Option<Obstacle>) {
    // Between processes and emulated controllers there is no fabric: memory is reached as it is mapped.
    let (DeviceUrl::Pci(requester), DeviceUrl::Pci(owner)) = (requester, owner) else {
        return (Fence::Unmap, None);
    };
    match Topology::at(sys).between(*requester, *owner) {
        Ok(verdict) if verdict.answer == Answer::No => {
            (Fence::Queue, Some(Obstacle::new(Reason::Topology, verdict.reason)))
        }
        Ok(verdict) => (verdict.fence, None),
        Err(e) => (Fence::Queue, Some(Obstacle::new(Reason::Topology, e.to_string()))),
    }
}

/// A drive that is a peer, and who uses it.
#[derive(Debug)]
pub(crate) struct Drive {
    id: PeerId,
    peer: NvmePeer,
    device: PeerDevice,
    users: Vec<User>,
}

/// One client's use of a drive: over when nothing but this holds `alive`, neither the client nor a job of it.
#[derive(Debug)]
struct User {
    alive: Arc<()>,
    /// By window.
    maps: BTreeMap<u32, Mapped>,
}

/// A window that a client has mapped for a drive.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    iova: u64,
    len: u64,
    write: bool,
}

/// A drive as one client has it open.
#[derive(Clone, Debug)]
pub(crate) struct OpenDrive {
    pub(super) peer: NvmePeer,
    pub(super) writable: bool,
    /// Why its bytes go through host memory only.
    pub(super) bounces: Option<Reason>,
    pub(super) block: u64,
    pub(super) bytes: u64,
    alive: Arc<()>,
}

impl OpenDrive {
    /// Whether these bytes are on the drive, whole blocks, and may go this way, between there and `place` in the window; their first
    /// block. `write`: towards the drive.
    pub(super) fn lba(&self, at: u64, len: u64, place: u64, write: bool) -> Result<u64, WireError> {
        let invalid = |text: String| Err(WireError::new(ErrorCode::Invalid, text));
        if write && !self.writable {
            let text = "this drive's blocks are for reading: the server was not told that they may be written \
                        (cmbfs serve --peer-write)";
            return Err(WireError::new(ErrorCode::ReadOnly, text));
        }
        if len == 0 || !len.is_multiple_of(self.block) || !at.is_multiple_of(self.block) {
            return invalid(format!(
                "{len} bytes at {at} of a drive: both are multiples of {}, its blocks",
                self.block
            ));
        }
        if !place.is_multiple_of(4) {
            return invalid(format!("{place} is no multiple of 4: a drive's DMA begins at one"));
        }
        if at.checked_add(len).is_none_or(|end| end > self.bytes) {
            return invalid(format!("{len} bytes at {at} are not on a drive of {} bytes", self.bytes));
        }
        Ok(at / self.block)
    }
}

impl Core {
    /// Registers a drive as a peer.
    pub(super) fn add_drive(&mut self, device: &PeerDevice) -> Result<(), ServerError> {
        if self.drives.iter().any(|d| d.device.name == device.name) {
            return Err(ServerError::PeerTwice { name: device.name.clone() });
        }
        let peer = NvmePeer::new(&device.controller, device.fence)?.named(&device.name);
        let id = self.windows.register_peer(Box::new(peer.clone()));
        self.drives.push(Drive { id, peer, device: device.clone(), users: Vec::new() });
        Ok(())
    }

    /// Lets a client use a drive. One mapping reaches raw blocks: so root and the server's own user may, and nobody else (P8).
    pub(super) fn open_drive(
        &mut self,
        session: &mut Session,
        name: &str,
    ) -> Result<m::PeerOpenReply, WireError> {
        session.room_for_peer()?;
        if !self.is_server(session) {
            let text = format!(
                "a drive's blocks are everybody's bytes: they are for root and the server's own uid {}, not for {}",
                self.server_uid, session.identity.uid
            );
            return Err(WireError::new(ErrorCode::Denied, text));
        }
        let Some(drive) = self.drives.iter_mut().find(|d| d.device.name == name) else {
            let text =
                format!("this server has no drive \"{name}\" as a peer; `cmbfs peers` lists what it has");
            return Err(WireError::new(ErrorCode::NotFound, text));
        };
        let gone = |e: p2p::peer::PeerError| WireError::new(ErrorCode::Device, e.to_string());
        let (block, blocks) = drive.peer.geometry().map_err(gone)?;
        let bytes = blocks.saturating_mul(u64::from(block));
        let alive = Arc::new(());
        drive.users.push(User { alive: Arc::clone(&alive), maps: BTreeMap::new() });
        let open = OpenDrive {
            peer: drive.peer.clone(),
            writable: drive.device.writable,
            bounces: drive.device.obstacle.as_ref().map(|o| o.reason),
            block: u64::from(block),
            bytes,
            alive,
        };
        let flags = drive.flags();
        let peer = session.add_peer(PeerEntry { id: drive.id, kind: PeerKind::Drive(open) });
        Ok(m::PeerOpenReply { peer, local_len: bytes, block_size: block, flags })
    }

    /// What kind of peer this is, as listed.
    pub(super) fn peer_flags(&self, peer: PeerId) -> u32 {
        self.drives.iter().find(|d| d.id == peer).map_or(0, Drive::flags)
    }

    /// Lets a peer reach a window, or says why not; of a drive it is noted for whom.
    pub(super) fn map_peer(
        &mut self,
        entry: &PeerEntry,
        slot: u32,
        write: bool,
        now: u64,
    ) -> Result<PeerPath, WindowsError> {
        if let PeerKind::Drive(OpenDrive { bounces: Some(why), .. }) = &entry.kind {
            self.windows.count_peer(Way::Bounce, *why, 0);
            return Ok(PeerPath::Bounce(*why));
        }
        let path = self.windows.map_peer(entry.id, slot, write, &mut self.backing, now)?;
        if let (PeerKind::Drive(open), PeerPath::Direct(mapping)) = (&entry.kind, path)
            && let Some(user) = self.drives.iter_mut().flat_map(|d| &mut d.users).find(|u| u.is(open))
        {
            user.note(&mapping, write);
        }
        Ok(path)
    }

    /// An error unless this client has mapped all of a range for the drive; for `write` to the window, if that is asked.
    pub(super) fn must_be_mapped(
        &self,
        open: &OpenDrive,
        (iova, len): (u64, u64),
        write: bool,
    ) -> Result<(), WireError> {
        let mut users = self.drives.iter().flat_map(|d| &d.users);
        let maps = users.find(|u| u.is(open)).map(|u| &u.maps);
        let holds =
            |map: &&Mapped| iova.checked_sub(map.iova).is_some_and(|at| at <= map.len && len <= map.len - at);
        match maps.and_then(|maps| maps.values().find(holds)) {
            Some(map) if write && !map.write => {
                Err(WireError::new(ErrorCode::PeerFault, "the mapping is for reading only"))
            }
            Some(_) => Ok(()),
            None => {
                let text = format!(
                    "{len} bytes at {iova:#x} are not in one window that this client has mapped for the drive"
                );
                Err(WireError::new(ErrorCode::PeerFault, text))
            }
        }
    }

    /// Takes windows back from drives for clients that have gone, their last commands included.
    pub(super) fn leave_drives(&mut self, now: u64) {
        let mut back = Vec::new();
        for drive in &mut self.drives {
            let gone: Vec<User> =
                drive.users.extract_if(.., |user| Arc::strong_count(&user.alive) == 1).collect();
            for (slot, map) in gone.iter().flat_map(|user| &user.maps) {
                let shared = drive.users.iter().any(|u| u.maps.get(slot).is_some_and(|m| m.iova == map.iova));
                if !shared {
                    back.push((drive.id, *slot, map.iova));
                }
            }
        }
        for (peer, slot, iova) in back {
            // It may have been taken back meanwhile, and mapped again for somebody else.
            if !self.windows.window_mappings(slot).any(|m| m.peer == peer && m.iova == iova) {
                continue;
            }
            if let Err(e) = self.windows.unmap_peer(peer, slot) {
                tracing::error!("a window stays mapped for a drive: {e}");
                if let Ok(ticket) = self.windows.revoke(&Scope::Window(slot), &mut self.backing, now) {
                    self.jobs.push(Job::unasked(Work::Revoke { ticket, since: now }));
                }
            }
        }
    }

    /// The end: no drive does anything any more when this returns.
    pub(super) fn close_drives(&mut self, now: u64) {
        for drive in self.drives.drain(..) {
            drive.peer.close();
            if let Err(e) = self.windows.unregister_peer(drive.id, now) {
                tracing::error!("{e}");
            }
        }
    }
}

impl Drive {
    fn flags(&self) -> u32 {
        let mut flags = m::DRIVE;
        let mut set = |bit, yes: bool| flags |= if yes { bit } else { 0 };
        set(m::DRIVE_WRITABLE, self.device.writable);
        set(m::DRIVE_BOUNCES, self.device.obstacle.is_some());
        set(m::DRIVE_FAILED, self.device.controller.check().is_err());
        flags
    }
}

impl User {
    fn is(&self, open: &OpenDrive) -> bool {
        Arc::ptr_eq(&self.alive, &open.alive)
    }

    /// What is there for a window replaces what was: an address is good for one mapping.
    fn note(&mut self, mapping: &PeerMapping, write: bool) {
        let (iova, len) = (mapping.iova, mapping.len as u64);
        let write = write || self.maps.get(&mapping.window).is_some_and(|m| m.iova == iova && m.write);
        self.maps.insert(mapping.window, Mapped { iova, len, write });
    }
}

#[cfg(test)]
#[path = "drives_tests.rs"]
mod tests;
