//! The peers that there are, and who of them reaches a window.

use std::collections::{BTreeMap, BTreeSet};

use super::peers::PeerMapping;
use super::reclaim::Claim;
use super::revoke::Ticket;
use crate::peer::Mapper;

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) mapper: Box<dyn Mapper>,
    /// By window.
    pub(super) maps: BTreeMap<u32, PeerMapping>,
}

#[derive(Debug, Default)]
pub(super) struct Peers {
    pub(super) next: u32,
    pub(super) peers: BTreeMap<u32, Peer>,
    /// By window those who map it: a move asks only them, however many peers there are.
    by_window: BTreeMap<u32, BTreeSet<u32>>,
    /// Revocations of a whole peer that wait for it to drain: ticket, peer, deadline.
    pub(super) leaving: Vec<(Ticket, u32, u64)>,
}

impl Peers {
    pub(super) fn exists(&self, peer: u32) -> bool {
        self.peers.contains_key(&peer)
    }

    /// The peers that map a window, and their mappings of it.
    pub(super) fn of(&self, window: u32) -> impl Iterator<Item = (&Peer, &PeerMapping)> {
        let ids = self.by_window.get(&window).into_iter().flatten();
        ids.filter_map(move |id| {
            let peer = self.peers.get(id)?;
            Some((peer, peer.maps.get(&window)?))
        })
    }

    pub(super) fn insert(&mut self, m: PeerMapping) {
        if let Some(peer) = self.peers.get_mut(&m.peer.0) {
            peer.maps.insert(m.window, m);
            self.by_window.entry(m.window).or_default().insert(m.peer.0);
        }
    }

    pub(super) fn remove(&mut self, m: &PeerMapping) {
        if let Some(peer) = self.peers.get_mut(&m.peer.0) {
            peer.maps.remove(&m.window);
        }
        if let Some(ids) = self.by_window.get_mut(&m.window) {
            ids.remove(&m.peer.0);
            if ids.is_empty() {
                self.by_window.remove(&m.window);
            }
        }
    }

    pub(super) fn has_writers(&self, window: u32) -> bool {
        self.of(window).any(|(_, m)| m.writable)
    }

    /// Has every peer that reaches a window take on no more work there.
    pub(super) fn stop(&mut self, window: u32) {
        for id in self.by_window.get(&window).into_iter().flatten() {
            if let Some(peer) = self.peers.get_mut(id)
                && let Some(m) = peer.maps.get(&window)
            {
                peer.mapper.stop(m.iova, m.len);
            }
        }
    }

    /// Whether no peer has work left there.
    pub(super) fn drained(&mut self, window: u32) -> bool {
        self.by_window.get(&window).into_iter().flatten().all(|id| match self.peers.get_mut(id) {
            Some(peer) => peer.maps.get(&window).is_none_or(|m| peer.mapper.drained(m.iova, m.len)),
            None => true,
        })
    }

    /// Takes back the mappings of a window. What cannot be taken back claims the pages.
    pub(super) fn unmap(&mut self, window: u32, writers: bool) -> (u32, Vec<Claim>) {
        let (mut taken, mut claims) = (0, Vec::new());
        let maps: Vec<PeerMapping> =
            self.of(window).map(|(_, m)| *m).filter(|m| m.writable == writers).collect();
        for m in maps {
            let Some(peer) = self.peers.get_mut(&m.peer.0) else { continue };
            peer.mapper.stop(m.iova, m.len);
            let unmapped = peer.mapper.unmap(m.iova, m.len);
            if let Err(e) = &unmapped {
                tracing::error!("{e}");
            }
            // Verified, not believed: a mapping that still passes would let a late DMA land in someone else's bytes.
            if unmapped.is_err() || peer.mapper.is_mapped(m.iova, m.len) {
                claims.push(Claim::Peer(m.peer.0));
            }
            self.remove(&m);
            taken += 1;
        }
        (taken, claims)
    }
}
