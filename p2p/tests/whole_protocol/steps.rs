//! Every step of every party, with its effect.
//!
//! Three reductions keep the search small, and hide nothing. What a client stores in shared words takes one step each, and so does what the
//! server does to them; but the server's steps between fencing and hiding are one, since only fenced writers can store meanwhile, and for
//! them the whole window counts as changed. A claim is dropped when its slot changes, and pages are free with their last claim: reuse is
//! never earlier in the server. And a reader accepts its bytes as soon as it has copied them: had it waited, the generation would have to
//! be the same still; one that has missed a change of it stops at once, since it would throw its bytes away.

use crate::broken::Broken;
use crate::protocol::{Do, Protocol};
use crate::state::{At, Command, DRIVE, Owner, POISON, Peer, Phase, Reader, Slot, State, Want};

impl State {
    fn free(&mut self, page: u8) {
        self.owner[page as usize] = Owner::Free;
        self.pages[page as usize] = POISON;
    }

    fn first_free(&self) -> Option<u8> {
        (0..).zip(&self.owner).find(|(_, o)| **o == Owner::Free).map(|(p, _)| p)
    }

    fn store(&mut self, page: u8, who: &'static str) -> u8 {
        if self.owner[page as usize] == Owner::Free {
            self.wrong = Some(who);
        }
        let version = self.fresh();
        self.pages[page as usize] = version;
        version
    }

    fn harvest(&mut self) {
        if std::mem::take(&mut self.bit) {
            self.dirty = true;
            self.changed = true;
        }
    }

    /// The server looks at what this client may still do no more: its slot changed, or it is dead for sure.
    fn answered(&mut self, client: usize) {
        let bit = 1 << client;
        if let Phase::Draining(m) | Phase::Drained(m) | Phase::Stuck(m) | Phase::LastCopied(m) =
            &mut self.phase
        {
            *m &= !bit;
        }
        self.drop_claims(bit);
    }

    fn drop_claims(&mut self, claims: u8) {
        for page in 0..self.owner.len() {
            if let Owner::Quarantined(m) = &mut self.owner[page] {
                *m &= !claims;
                if *m == 0 {
                    self.free(page as u8);
                }
            }
        }
    }

    fn leave(&mut self, client: usize) {
        let c = &mut self.clients[client];
        (c.slot, c.at, c.note) = (Slot::Idle, At::Out, None);
        self.answered(client);
    }

    /// Whether a write-back now would send a command.
    pub fn would_write(&self) -> bool {
        self.home.is_some() && !self.discard && (self.dirty || self.bit || self.writing_peer.mapped.is_some())
    }
}

impl Protocol {
    fn raise(&self, s: &mut State) {
        if self.broken != Broken::NoRecheck {
            s.reader = Reader::Idle;
        }
    }

    /// False: the command did not complete, and the drive may look at the page again. It has not been told anything newer by then: the
    /// driver resets the controller before it gives up on a command.
    fn write_back(&self, s: &mut State, late: bool) -> bool {
        s.harvest();
        let Some(home) = s.home else { return true };
        if s.discard && self.broken != Broken::NoDiscard {
            s.dirty = false;
            return true;
        }
        if s.writing_peer.mapped.is_some() {
            s.dirty = true;
        }
        if !s.dirty {
            return true;
        }
        if s.truncating && s.discard {
            s.wrong = Some("P7: truncated bytes reach the drive");
        }
        if late {
            s.time_outs -= 1;
            s.command = Some(Command { page: home, fills: false });
            return false;
        }
        s.drive = s.pages[home as usize];
        s.dirty = false;
        true
    }

    fn begin(&self, s: &mut State, want: Want, discard: bool, late: bool) {
        if self.broken == Broken::EvictionRecalls && want == Want::Nowhere {
            s.layout = false;
        }
        let Some(home) = s.home else { return };
        s.discard = discard;
        s.harvest();
        s.changed = false;
        s.dest = if want == Want::Elsewhere { s.first_free() } else { None };
        if let Some(d) = s.dest {
            s.owner[d as usize] = Owner::Window;
            s.pages[d as usize] = s.pages[home as usize];
        } else if !self.write_back(s, late) {
            // Given up before anything was frozen.
            s.discard = false;
            return;
        }
        s.phase = Phase::Copied;
    }

    fn request(&self, s: &mut State, want: Want, discard: bool, late: bool) {
        if s.phase == Phase::Idle {
            return self.begin(s, want, discard, late);
        }
        if discard {
            // From now on nothing of it may reach the drive.
            s.discard = true;
            s.dirty = false;
        }
        s.next = s.next.max(Some(want));
        s.cut_next |= discard;
    }

    fn go_on(&self, s: &mut State) {
        s.phase = Phase::Idle;
        (s.dest, s.changed, s.discard) = (None, false, false);
        if let Some(want) = s.next.take() {
            let cut = std::mem::take(&mut s.cut_next);
            if s.home.is_some() {
                self.begin(s, want, cut, false);
            } else if cut {
                self.cut(s);
            }
        }
    }

    /// The truncation is through, and acknowledged: a new version, which the drive has.
    fn cut(&self, s: &mut State) {
        (s.dirty, s.truncating, s.recalled) = (false, false, true);
        if self.broken == Broken::FreedUnderLayout && (s.layout || s.command.is_some()) {
            s.wrong = Some("P7: blocks are freed under a layout or a command");
        }
        let version = s.fresh();
        (s.drive, s.newest) = (version, version);
    }

    fn unmap(peer: &mut Peer) {
        // What is under way there faults.
        (peer.mapped, peer.flying) = (None, None);
    }

    /// Step 3 is over: those who are still out are fenced.
    fn drained(&self, s: &mut State, waiting: u8) {
        let fenced = if self.broken == Broken::NoDrain { 0 } else { waiting };
        for c in (0..2).filter(|c| fenced & (1 << c) != 0) {
            s.clients[c].slot = Slot::Fenced;
        }
        if s.writing_peer.mapped.is_some() {
            (s.changed, s.dirty) = (true, true);
            if self.broken != Broken::PeerStays {
                Self::unmap(&mut s.writing_peer);
            }
        }
        s.harvest();
        if fenced != 0 {
            (s.changed, s.dirty) = (true, true);
            if self.broken != Broken::NoHide {
                s.place = None;
                self.raise(s);
            }
            if self.broken != Broken::ReadingPeerSeesLateStores {
                Self::unmap(&mut s.reading_peer);
            }
        }
        s.phase = Phase::Drained(fenced);
    }

    fn last_copy(&self, s: &mut State, fenced: u8, late: bool) {
        if let (Some(d), Some(home)) = (s.dest, s.home) {
            if s.changed {
                s.pages[d as usize] = s.pages[home as usize];
            }
        } else if !self.write_back(s, late) {
            if fenced != 0 {
                // Reopened at its old place it would take the fenced writer's late stores.
                s.phase = Phase::Stuck(fenced);
                return;
            }
            (s.frozen, s.place) = (false, s.home);
            self.raise(s);
            return self.go_on(s);
        }
        s.phase = Phase::LastCopied(fenced);
    }

    fn publish(&self, s: &mut State, fenced: u8) {
        Self::unmap(&mut s.reading_peer);
        let old = s.home;
        (s.place, s.home) = (s.dest, s.dest);
        s.frozen = false;
        self.raise(s);
        if s.dest.is_none() {
            s.dirty = false;
        }
        if s.discard {
            s.dirty = false;
            if s.dest.is_none() && s.truncating {
                self.cut(s);
            }
        }
        let mut claims = if self.broken == Broken::NoFenceClaim { 0 } else { fenced };
        for (c, client) in s.clients.iter().enumerate() {
            let here = client.note.is_none() || client.note == old;
            let borrowed = client.slot == Slot::Borrow && here;
            if borrowed && self.broken != Broken::NoBorrowClaim {
                claims |= 1 << c;
            }
        }
        if s.command.is_some_and(|c| Some(c.page) == old) && self.broken != Broken::NoCommandClaim {
            claims |= DRIVE;
        }
        if let Some(page) = old {
            if claims == 0 { s.free(page) } else { s.owner[page as usize] = Owner::Quarantined(claims) }
        }
        self.go_on(s);
    }

    fn fill(&self, s: &mut State, page: u8, late: bool) {
        s.fills -= 1;
        if late {
            s.time_outs -= 1;
            s.owner[page as usize] = Owner::Quarantined(DRIVE);
            if self.broken == Broken::NoCommandClaim {
                s.free(page);
            }
            s.command = Some(Command { page, fills: true });
            return;
        }
        s.owner[page as usize] = Owner::Window;
        s.pages[page as usize] = s.drive;
        (s.place, s.home) = (Some(page), Some(page));
        s.dirty = false;
        self.raise(s);
    }

    fn client(&self, s: &mut State, c: usize) {
        let client = &mut s.clients[c];
        match client.at {
            At::Out | At::Dead => {}
            At::Announced => match s.place {
                Some(p) if client.slot == Slot::Borrow => client.at = At::Seen(p),
                Some(p) if !s.frozen => {
                    client.at = if self.broken == Broken::NoLookBack { At::In(p) } else { At::Seen(p) };
                }
                _ => s.leave(c),
            },
            At::Seen(p) => match client.slot {
                Slot::Borrow => {
                    client.note = Some(p);
                    client.at = At::Borrowing(p);
                }
                Slot::Write => client.at = At::In(p),
                _ => s.leave(c),
            },
            At::In(p) => {
                let v = s.store(p, "P2: a late store");
                s.clients[c].at = At::Stored(v);
            }
            At::Stored(v) => {
                client.at = At::Marked(v);
                s.bit = true;
            }
            At::Marked(v) => {
                if client.slot == Slot::Write {
                    s.newest = s.newest.max(v);
                }
                s.leave(c);
            }
            At::Borrowing(p) => {
                if s.pages[p as usize] == POISON {
                    s.wrong = Some("P2: a borrowed page was reused");
                }
                s.leave(c);
            }
        }
    }

    fn reap(&self, s: &mut State, c: usize) {
        let client = &mut s.clients[c];
        let open = matches!(client.slot, Slot::Write | Slot::Fenced);
        let active = client.slot == Slot::Write;
        (client.at, client.slot, client.note, client.sections) = (At::Out, Slot::Idle, None, 0);
        if open && self.broken != Broken::DeadIsClean {
            // The pidfd says so: no more stores. It may have stored without saying so.
            s.dirty |= (active || s.phase != Phase::Idle) && s.home.is_some();
            s.changed |= s.phase != Phase::Idle;
        }
        s.answered(c);
    }

    fn accept(s: &mut State, value: u8, floor: u8) {
        if value == POISON {
            s.wrong = Some("P1: a reader accepted another's bytes");
        } else if value < floor {
            s.wrong = Some("P1: a reader accepted stale bytes");
        } else {
            s.newest = s.newest.max(value);
        }
    }

    fn read(&self, s: &mut State) {
        match s.reader {
            Reader::Idle => {
                s.reads -= 1;
                if let Some(place) = s.place {
                    s.reader = Reader::Looked { place, floor: s.newest };
                }
            }
            Reader::Looked { place, floor } => {
                s.reader = Reader::Idle;
                Self::accept(s, s.pages[place as usize], floor);
            }
        }
    }

    fn peer_lands(s: &mut State, writing: bool) {
        let peer = if writing { &mut s.writing_peer } else { &mut s.reading_peer };
        let (Some(page), Some(floor)) = (peer.mapped, peer.flying.take()) else { return };
        if writing {
            let v = s.store(page, "P2: a late DMA");
            s.newest = s.newest.max(v);
        } else {
            Self::accept(s, s.pages[page as usize], floor);
        }
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
                s.truncating = true;
                self.request(s, Want::Nowhere, true, false);
            }
            Do::Commit(late) => {
                s.commits -= 1;
                self.write_back(s, late);
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
                (client.slot, client.at, client.note) = (slot, At::Announced, None);
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
            Do::WriteLands => Self::peer_lands(s, true),
            Do::ReadLands => Self::peer_lands(s, false),
            Do::LateCommand => {
                if let Some(Command { page, fills }) = s.command.take() {
                    let owner = s.owner[page as usize];
                    if owner == Owner::Free || (fills && owner == Owner::Window) {
                        s.wrong = Some("P2: a drive command reached a reused page");
                    }
                }
                s.drop_claims(DRIVE);
            }
            Do::ReturnLayout => s.layout = false,
        }
    }
}
