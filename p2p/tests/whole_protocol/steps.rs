//! Every step of every party, with its effect.
//!
//! Three reductions keep the search small, and hide nothing. What a client stores in shared words takes one step each, and so does what the
//! server does to them; but the server's steps between fencing and hiding are one, since only fenced writers can store meanwhile, and for
//! them the whole window counts as changed. A claim is dropped when its slot changes, and pages are free with their last claim: reuse is
//! never earlier in the server. And a reader accepts its bytes as soon as it has copied them: had it waited, the generation would have to
//! be the same still; one that has missed a change of it stops at once, since it would throw its bytes away.

use crate::broken::Broken;
use crate::protocol::{Do, Protocol};
use crate::state::{At, Command, DRIVE, LEFT, Owner, POISON, Peer, Phase, Reader, Reset, Slot, State, Want};

impl State {
    pub fn free(&mut self, page: u8) {
        self.owner[page as usize] = Owner::Free;
        self.pages[page as usize] = POISON;
    }

    /// A free place, in the CMB or not.
    pub fn first_free(&self, cmb: bool) -> Option<u8> {
        (0..)
            .zip(&self.owner)
            .find(|(p, o)| **o == Owner::Free && self.in_cmb(Some(*p)) == cmb)
            .map(|(p, _)| p)
    }

    /// Somebody is told that this version is in the window.
    pub fn publish_version(&mut self, version: u8) {
        if self.by_reset && version > self.drive {
            // It went where a reset had been, and the window is given up already. A truncation is newer.
            self.owed |= !self.truncating;
            return;
        }
        self.newest = self.newest.max(version);
        self.promised = self.promised.max(version);
    }

    /// What the server reads from this place now is not to be believed.
    pub fn is_doubtful(&self, place: u8) -> bool {
        self.in_cmb(Some(place)) && self.unnoticed()
    }

    pub fn store(&mut self, page: u8, who: &'static str) -> u8 {
        if matches!(self.owner[page as usize], Owner::Free | Owner::Spare) {
            self.wrong = Some(who);
        }
        let version = self.fresh();
        if self.pages[page as usize] != LEFT {
            self.pages[page as usize] = version;
        }
        version
    }

    /// The server looks at what this client may still do no more: its slot changed, or it is dead for sure.
    pub fn answered(&mut self, client: usize) {
        let bit = 1 << client;
        if let Phase::Draining(m) | Phase::Drained(m) | Phase::Stuck(m) | Phase::LastCopied(m) =
            &mut self.phase
        {
            *m &= !bit;
        }
        self.drop_claims(bit);
    }

    pub fn drop_claims(&mut self, claims: u8) {
        for page in 0..self.owner.len() {
            if let Owner::Quarantined(m) = &mut self.owner[page] {
                *m &= !claims;
                if *m == 0 {
                    self.free(page as u8);
                }
            }
        }
    }

    pub fn leave(&mut self, client: usize) {
        let c = &mut self.clients[client];
        (c.slot, c.at, c.note, c.old) = (Slot::Idle, At::Out, None, false);
        self.answered(client);
    }

    /// Whether a write-back now would send a command.
    pub fn would_write(&self) -> bool {
        self.home.is_some() && !self.discard && (self.dirty || self.bit || self.writing_peer.mapped.is_some())
    }
}

impl Protocol {
    pub fn harvest(&self, s: &mut State) {
        if std::mem::take(&mut s.bit) {
            (s.dirty, s.changed) = (true, true);
            s.outdated |= self.broken != Broken::SpareMissesHarvest;
        }
    }

    pub fn raise(&self, s: &mut State) {
        if self.broken != Broken::NoRecheck {
            s.reader = Reader::Idle;
        }
    }

    pub fn unmap(peer: &mut Peer) {
        // What is under way there faults.
        (peer.mapped, peer.flying) = (None, None);
    }

    /// What becomes of the world.
    pub fn step(&self, s: &mut State, action: Do) {
        match action {
            Do::Revoke(want, late) => {
                s.revocations -= 1;
                self.request(s, want, false, late);
            }
            Do::Truncate => {
                s.truncations -= 1;
                // What it cuts is nobody's loss any more.
                (s.truncating, s.owed) = (true, false);
                self.request(s, Want::Nowhere, true, false);
            }
            Do::Commit(late) => {
                s.commits -= 1;
                self.commit(s, late);
            }
            Do::Fill(page, late) => self.fill(s, page, late),
            Do::Freeze => {
                s.frozen = true;
                self.raise(s);
                let mut waiting = 0;
                for (c, client) in s.clients.iter().enumerate() {
                    if client.slot == Slot::Write {
                        waiting |= 1 << c;
                    }
                }
                s.phase = Phase::Draining(waiting);
            }
            Do::Drained => {
                if let Phase::Draining(waiting) = s.phase {
                    self.drained(s, waiting);
                }
            }
            Do::LastCopy(late) => {
                if let Phase::Drained(fenced) | Phase::Stuck(fenced) = s.phase {
                    self.last_copy(s, fenced, late);
                }
            }
            Do::Publish => {
                if let Phase::LastCopied(fenced) = s.phase {
                    self.publish(s, fenced);
                }
            }
            Do::Enter(c, slot) => {
                let client = &mut s.clients[c];
                client.sections -= 1;
                (client.slot, client.at, client.note, client.old) = (slot, At::Announced, None, false);
            }
            Do::Client(c) => self.client(s, c),
            Do::Die(c) => {
                s.deaths -= 1;
                // What it stored without finishing its section was never promised; what readers saw of it counts all the same.
                s.clients[c].at = At::Dead;
            }
            Do::Reap(c) => self.reap(s, c),
            Do::Read => self.read(s),
            Do::MapWriter => {
                s.writing_peer.maps -= 1;
                s.writing_peer.mapped = s.home;
            }
            Do::MapReader => {
                s.reading_peer.maps -= 1;
                s.reading_peer.mapped = s.home;
            }
            Do::PeerWrites => {
                s.writing_peer.dmas -= 1;
                s.writing_peer.flying = Some(0);
            }
            Do::PeerReads => {
                s.reading_peer.dmas -= 1;
                s.reading_peer.flying = Some(s.newest);
            }
            Do::WriteLands => self.peer_lands(s, true),
            Do::ReadLands => self.peer_lands(s, false),
            Do::LateCommand => {
                if let Some(Command { page, fills }) = s.command.take() {
                    let owner = s.owner[page as usize];
                    if matches!(owner, Owner::Free | Owner::Spare) || (fills && owner == Owner::Window) {
                        s.wrong = Some("P2: a drive command reached a reused page");
                    }
                }
                s.drop_claims(DRIVE);
            }
            Do::Announce => {
                let late = self.broken == Broken::AnnouncedLate;
                s.resets -= u8::from(!late);
                s.reset = if late { Reset::Lost } else { Reset::Announced };
                self.move_device(s);
            }
            Do::Lose => {
                let late = self.broken == Broken::AnnouncedLate;
                s.resets -= u8::from(late);
                s.reset = if late { Reset::Announced } else { Reset::Lost };
                self.lose(s);
            }
            Do::Notice => self.notice(s),
            Do::AnnounceAll => {
                s.announcements -= 1;
                if s.reset == Reset::Lost {
                    self.notice(s);
                }
                self.move_device(s);
                s.sweep = true;
            }
            Do::Sweep => {
                s.sweep = false;
                if s.in_cmb(s.home) || s.phase != Phase::Idle {
                    self.request(s, Want::Elsewhere, false, false);
                } else if self.broken != Broken::SweepForgotten {
                    self.restamp(s);
                }
            }
            Do::ReturnLayout => s.layout = false,
        }
    }
}
