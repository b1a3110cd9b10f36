//! Old pages: when they are free again, and quarantine for those that someone silent may still touch.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use super::Windows;
use super::clients::Client;
use super::registry::Peers;
use super::revoke::Ticket;
use super::window::Window;
use crate::layout::{Home, Place, SECTION_SLOTS, SectionKind, SectionWord};
use crate::protocol::{Native, busy, moved_on};

/// Why pages cannot be reused yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// A client's slot still says this: a borrow, or a fenced write section that has not answered.
    Section { client: u32, slot: usize, word: SectionWord },
    /// A drive command that did not complete.
    Device,
    /// A peer whose mapping could not be taken back.
    Peer(u32),
}

impl Claim {
    pub(super) fn is_client(&self, id: u32) -> bool {
        matches!(self, Self::Section { client, .. } if *client == id)
    }

    pub(super) fn still_out(&self, clients: &BTreeMap<u32, Client>, peers: &Peers) -> bool {
        match self {
            Self::Section { client, slot, word } => {
                clients.get(client).is_some_and(|c| !moved_on::<Native>(c.region.slot(*slot).0, *word))
            }
            Self::Device => true,
            Self::Peer(peer) => peers.exists(*peer),
        }
    }
}

/// Pages that a window has left.
#[derive(Debug)]
pub(super) struct PagesOut {
    pub(super) window: u32,
    pub(super) object: u64,
    pub(super) home: Home,
    pub(super) at: u64,
    pub(super) len: usize,
    pub(super) claims: Vec<Claim>,
    /// When they count as quarantined rather than on their way.
    pub(super) deadline: u64,
    /// Revocations that wait to know what becomes of them.
    pub(super) tickets: Vec<Ticket>,
    /// Counted as quarantined.
    pub(super) counted: bool,
}

impl PagesOut {
    pub(super) fn new(w: &Window, window: u32, deadline: u64, tickets: Vec<Ticket>) -> Self {
        let claims = Vec::new();
        Self {
            window,
            object: w.object,
            home: w.home,
            at: w.at,
            len: w.len,
            claims,
            deadline,
            tickets,
            counted: false,
        }
    }
}

/// Pages in quarantine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quarantine {
    /// The object that they belonged to.
    pub object: u64,
    /// The window that they belonged to.
    pub window: u32,
    /// CMB or host cache.
    pub home: Home,
    /// Offset there.
    pub at: u64,
    /// Length in bytes.
    pub len: usize,
    /// How many have not answered.
    pub claims: usize,
}

impl Windows {
    /// Pages that are not free because someone silent may still touch them.
    pub fn quarantine(&self) -> impl Iterator<Item = Quarantine> + '_ {
        self.out.iter().map(|o| Quarantine {
            object: o.object,
            window: o.window,
            home: o.home,
            at: o.at,
            len: o.len,
            claims: o.claims.len(),
        })
    }

    /// The drive's queue was deleted or its controller reset: no old command touches memory any more.
    pub fn device_drained(&mut self, now: u64) {
        for out in &mut self.out {
            out.claims.retain(|c| *c != Claim::Device);
        }
        for w in self.windows.iter_mut().flatten() {
            w.timed_out = false;
        }
        self.reclaim(now);
    }

    /// Step 5: borrows that may be looking at the old pages. Only slots whose holder may map this window are looked at.
    pub(super) fn borrows_of(&self, index: u32, old: &PagesOut) -> Vec<Claim> {
        let mut claims = Vec::new();
        let Some(w) = self.window(index) else { return claims };
        for holder in &w.holders {
            let Some(c) = self.clients.get(&holder.client) else { continue };
            for slot in 0..SECTION_SLOTS {
                let (word, note) = c.region.slot(slot);
                let Some(seen) = busy::<Native>(word, index, SectionKind::Borrow) else { continue };
                // The note says where the borrow is. Not written yet: it may be here.
                let place = Place::from_word(note.load(Ordering::Acquire));
                let here =
                    place.home() == Home::None || (place.home() == old.home && place.offset() == old.at);
                if here {
                    claims.push(Claim::Section { client: holder.client, slot, word: seen });
                }
            }
        }
        claims
    }

    /// Step 6, or not yet.
    pub(super) fn let_go(&mut self, mut pages: PagesOut, claims: Vec<Claim>) {
        pages.claims = claims;
        if pages.home == Home::None {
            return;
        }
        for ticket in &pages.tickets {
            self.tickets.pages_out(*ticket);
        }
        if pages.claims.is_empty() {
            self.free_pages(&pages);
        } else {
            self.out.push(pages);
        }
    }

    /// Frees what nobody claims any more, and calls quarantined what is still claimed after the grace.
    pub(super) fn reclaim(&mut self, now: u64) -> bool {
        let (clients, peers) = (&self.clients, &self.peers);
        for out in &mut self.out {
            out.claims.retain(|claim| claim.still_out(clients, peers));
        }
        let mut worked = false;
        let mut at = 0;
        while at < self.out.len() {
            if self.out[at].claims.is_empty() {
                let pages = self.out.swap_remove(at);
                if pages.counted {
                    self.counters.reclaimed_bytes += pages.len as u64;
                }
                self.free_pages(&pages);
                worked = true;
                continue;
            }
            if now >= self.out[at].deadline && !self.out[at].counted {
                let out = &mut self.out[at];
                out.counted = true;
                self.counters.quarantined_bytes += out.len as u64;
                for ticket in std::mem::take(&mut out.tickets) {
                    self.tickets.quarantined(ticket, out.len);
                }
                worked = true;
            }
            at += 1;
        }
        worked
    }

    fn free_pages(&mut self, pages: &PagesOut) {
        match pages.home {
            Home::Cmb if self.has_memory(pages.object) => {}
            Home::Cmb => {
                if let Some(cmb) = self.cmb.as_mut()
                    && let Err(e) = cmb.pool.free(pages.at as usize, pages.len)
                {
                    tracing::error!("CMB pages were not in use: {e}");
                }
            }
            Home::Host => {
                if let Some(host) = self.objects.get(&pages.object).and_then(|o| o.host.as_ref())
                    && let Err(e) = host.punch(pages.at, pages.len as u64)
                {
                    tracing::error!("cannot punch the host cache of object {}: {e}", pages.object);
                }
                self.host_bytes = self.host_bytes.saturating_sub(pages.len as u64);
            }
            Home::None => {}
        }
        for ticket in &pages.tickets {
            self.tickets.freed(*ticket, pages.len);
        }
    }

    /// Whether a client that is silent holds pages of this window: then it stays out of the CMB.
    pub(super) fn is_quarantined(&self, index: u32) -> bool {
        self.out.iter().any(|o| o.window == index)
    }
}
