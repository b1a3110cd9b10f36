//! Windows that other devices reach: peers, their mappings, and taking those back.

use std::collections::BTreeMap;
use std::sync::Arc;

use nvme_driver::pci::DmaAccess;

use super::object::Placement;
use super::place::{Ensured, Want};
use super::reclaim::Claim;
use super::registry::Peer;
use super::revoke::{Outcome, Ticket};
use super::{Windows, WindowsError};
use crate::backing::Backing;
use crate::counters::{Path, Reason};
use crate::layout::{Home, LANE};
use crate::peer::{Mapper, PeerError};
use crate::refusal::Point;

/// A registered peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u32);

/// One window as a peer sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerMapping {
    /// The peer.
    pub peer: PeerId,
    /// The window.
    pub window: u32,
    /// Where the peer finds it.
    pub iova: u64,
    /// Length in bytes.
    pub len: usize,
    /// Whether the peer may write.
    pub writable: bool,
}

/// How a peer reaches a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerPath {
    /// By DMA to the CMB, until the window is revoked.
    Direct(PeerMapping),
    /// Not at all: copy through host memory ([`Windows::bounce_to_peer`], [`Windows::bounce_from_peer`]). And why.
    Bounce(Reason),
    /// The window is moving: poll, and ask again.
    Moving,
}

/// A peer as listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    /// Its id.
    pub peer: PeerId,
    /// Its name.
    pub name: String,
    /// Mappings that exist.
    pub mappings: usize,
}

impl Windows {
    /// Registers a peer.
    pub fn register_peer(&mut self, mapper: Box<dyn Mapper>) -> PeerId {
        self.peers.next += 1;
        let id = self.peers.next;
        self.peers.peers.insert(id, Peer { mapper, maps: BTreeMap::new() });
        PeerId(id)
    }

    /// Takes a peer's mappings back and forgets it. Refused if one cannot be taken back.
    pub fn unregister_peer(&mut self, peer: PeerId, now: u64) -> Result<(), WindowsError> {
        let known = self.peers.peers.get(&peer.0).ok_or(WindowsError::UnknownPeer(peer.0))?;
        let maps: Vec<PeerMapping> = known.maps.values().copied().collect();
        for m in maps {
            let known = self.peers.peers.get_mut(&peer.0).ok_or(WindowsError::UnknownPeer(peer.0))?;
            known.mapper.stop(m.iova, m.len);
            known.mapper.unmap(m.iova, m.len)?;
            self.peers.remove(&m);
            self.unmapped(&m);
        }
        self.peers.peers.remove(&peer.0);
        self.reclaim(now);
        Ok(())
    }

    /// Every peer.
    pub fn peers(&self) -> impl Iterator<Item = PeerStatus> + '_ {
        self.peers.peers.iter().map(|(id, p)| PeerStatus {
            peer: PeerId(*id),
            name: p.mapper.name().to_owned(),
            mappings: p.maps.len(),
        })
    }

    /// Every mapping, of one peer or of all.
    pub fn peer_mappings(&self, peer: Option<PeerId>) -> impl Iterator<Item = PeerMapping> + '_ {
        self.peers
            .peers
            .iter()
            .filter(move |(id, _)| peer.is_none_or(|p| p.0 == **id))
            .flat_map(|(_, p)| p.maps.values().copied())
    }

    /// Mappings of one window, by all peers.
    pub fn window_mappings(&self, window: u32) -> impl Iterator<Item = PeerMapping> + '_ {
        self.peers.of(window).map(|(_, m)| *m)
    }

    /// Mappings of an object's windows, by all peers: by offset, then by peer.
    pub fn object_mappings(&self, object: u64) -> impl Iterator<Item = PeerMapping> + '_ {
        let reached = move |index: &u32| self.window(*index).is_some_and(|w| w.peers > 0);
        let windows = self.slots_in(object, &(0..LANE)).into_iter().filter(reached);
        windows.flat_map(|window| self.window_mappings(window))
    }

    /// Lets a peer reach a window, which is brought into the CMB for it. The mapping lasts until it is given back or revoked.
    pub fn map_peer(
        &mut self,
        peer: PeerId,
        window: u32,
        write: bool,
        backing: &mut dyn Backing,
        now: u64,
    ) -> Result<PeerPath, WindowsError> {
        // Before a mapping is shown that such a reset ends.
        self.notice_reset(backing, now);
        let known = self.peers.peers.get(&peer.0).ok_or(WindowsError::UnknownPeer(peer.0))?;
        if let Some(m) = known.maps.get(&window).filter(|m| m.writable || !write) {
            let leaving = self.peers.leaving.iter().any(|l| l.1 == peer.0);
            let frozen = self.window(window).and_then(|w| w.moving.as_ref()).is_some_and(|m| m.frozen());
            // Stopped there already: it is about to be taken back.
            return Ok(if leaving || frozen { PeerPath::Moving } else { PeerPath::Direct(*m) });
        }
        if write && !known.mapper.is_coherent() {
            return Ok(self.bounce(Reason::NotCoherent));
        }
        let object = self.window(window).map(|w| w.object).ok_or(WindowsError::UnknownWindow(window))?;
        if self.placement_of(window) == Some(Placement::HostOnly) && !self.has_memory(object) {
            // It may not be in the CMB, so nobody has to give way for it.
            return Ok(self.bounce(if self.cmb.is_none() { Reason::NoCmb } else { Reason::Asked }));
        }
        if self.window(window).is_some_and(|w| w.home == Home::Host) {
            // For a peer the CMB is not a matter of speed: without it the bytes go through host memory. Others give way.
            self.make_room(window, backing, now);
        }
        match self.ensure(window, Want::Peer, backing, now)? {
            Ensured::Ready(Home::Cmb, _) => {}
            Ensured::Ready(_, reason) | Ensured::Refused(reason) => {
                let reason =
                    if self.cmb.is_none() && !self.has_memory(object) { Reason::NoCmb } else { reason };
                return Ok(self.bounce(reason));
            }
            Ensured::Moving => return Ok(PeerPath::Moving),
        }
        if self.refusals.refuse(Point::PeerMap) {
            return Ok(self.bounce(Reason::Injected));
        }
        self.unmap_peer(peer, window)?;
        let (memory, bus) = match (self.own(object), self.cmb.as_ref()) {
            (Some(own), _) => (Arc::clone(own.region.memory()), own.bus_address),
            (None, Some(cmb)) => (Arc::clone(&cmb.memory.memory), cmb.memory.bus_address),
            (None, None) => return Ok(PeerPath::Bounce(Reason::NoCmb)),
        };
        let Some(known) = self.peers.peers.get_mut(&peer.0) else {
            return Err(WindowsError::UnknownPeer(peer.0));
        };
        let Some(w) = self.windows.get_mut(window as usize).and_then(Option::as_deref_mut) else {
            return Err(WindowsError::UnknownWindow(window));
        };
        let access = if write { DmaAccess::ReadWrite } else { DmaAccess::Read };
        let iova = match known.mapper.map(&memory, bus, w.at as usize, w.len, access) {
            Ok(iova) => iova,
            Err(e) => {
                tracing::warn!("{e}; its copies go through host memory");
                return Ok(self.bounce(Reason::MapRefused));
            }
        };
        let mapping = PeerMapping { peer, window, iova, len: w.len, writable: write };
        w.peers += 1;
        self.peers.insert(mapping);
        self.counters.peer_maps += 1;
        self.count_dirty(window);
        Ok(PeerPath::Direct(mapping))
    }

    fn bounce(&mut self, reason: Reason) -> PeerPath {
        self.counters.add(Path::Bounce, reason, 0);
        PeerPath::Bounce(reason)
    }

    /// Counts bytes that a peer moved, by the path it took.
    pub fn count_peer(&mut self, path: Path, reason: Reason, bytes: usize) {
        self.counters.add(path, reason, bytes);
    }

    /// Gives one mapping back: its DMA faults from now on.
    pub fn unmap_peer(&mut self, peer: PeerId, window: u32) -> Result<(), WindowsError> {
        let known = self.peers.peers.get_mut(&peer.0).ok_or(WindowsError::UnknownPeer(peer.0))?;
        let Some(m) = known.maps.get(&window).copied() else { return Ok(()) };
        known.mapper.stop(m.iova, m.len);
        known.mapper.unmap(m.iova, m.len)?;
        if known.mapper.is_mapped(m.iova, m.len) {
            let peer = known.mapper.name().to_owned();
            return Err(PeerError::Unmap { peer, iova: m.iova, reason: "it still passes".to_owned() }.into());
        }
        self.peers.remove(&m);
        self.unmapped(&m);
        Ok(())
    }

    fn unmapped(&mut self, m: &PeerMapping) {
        if let Some(w) = self.window_mut(m.window) {
            w.peers -= 1;
            if m.writable {
                // Nobody tells which pages a peer wrote.
                w.dirty.add_all();
                w.distrust_copies();
            }
        }
        self.pace.dirty |= m.writable;
        self.count_dirty(m.window);
    }

    /// The end of step 3: before the last copy.
    pub(super) fn unmap_writing_peers(&mut self, index: u32) -> Vec<Claim> {
        let writers = self.peers.has_writers(index);
        let (taken, claims) = self.peers.unmap(index, true);
        self.counters.peer_revocations += u64::from(taken);
        if let Some(w) = self.window_mut(index) {
            w.peers -= taken;
            if writers {
                w.dirty.add_all();
                w.distrust_copies();
            }
        }
        claims
    }

    /// With the writing peers; after a reset before anybody is waited for.
    pub(super) fn unmap_reading_peers(&mut self, index: u32) -> Vec<Claim> {
        let (taken, claims) = self.peers.unmap(index, false);
        self.counters.peer_revocations += u64::from(taken);
        if let Some(w) = self.window_mut(index) {
            w.peers -= taken;
        }
        claims
    }

    /// Takes all mappings of a peer back: stops its submissions now, unmaps when it has drained or the grace is over.
    pub(super) fn revoke_peer(&mut self, peer: PeerId, now: u64) -> Result<Ticket, WindowsError> {
        let known = self.peers.peers.get_mut(&peer.0).ok_or(WindowsError::UnknownPeer(peer.0))?;
        for m in known.maps.values() {
            known.mapper.stop(m.iova, m.len);
        }
        let ticket = self.tickets.open(1);
        self.peers.leaving.push((ticket, peer.0, now.saturating_add(self.grace)));
        self.step_peers(now);
        Ok(ticket)
    }

    /// Finishes revocations of peers that have drained, or whose grace is over.
    pub(super) fn step_peers(&mut self, now: u64) -> bool {
        let mut worked = false;
        for (ticket, id, deadline) in std::mem::take(&mut self.peers.leaving) {
            let Some(peer) = self.peers.peers.get_mut(&id) else {
                self.settle_all(&[ticket], Outcome::Already);
                continue;
            };
            let maps: Vec<PeerMapping> = peer.maps.values().copied().collect();
            let quiet = maps.iter().all(|m| peer.mapper.drained(m.iova, m.len));
            if !quiet && now < deadline {
                self.peers.leaving.push((ticket, id, deadline));
                continue;
            }
            worked = true;
            let failed: Vec<String> = maps
                .iter()
                .filter_map(|m| {
                    self.counters.peer_revocations += 1;
                    self.unmap_peer(PeerId(id), m.window).err().map(|e| e.to_string())
                })
                .collect();
            let outcome = if failed.is_empty() {
                Outcome::Moved { fenced: u64::from(!quiet) }
            } else {
                Outcome::Failed(failed.join("; "))
            };
            self.settle_all(&[ticket], outcome);
        }
        worked
    }
}
