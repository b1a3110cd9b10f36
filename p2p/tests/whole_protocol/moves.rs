//! The server: moves, write-backs and fills.

use crate::broken::Broken;
use crate::protocol::Protocol;
use crate::state::{Command, DRIVE, LEFT, Owner, Phase, Slot, State, Want};

impl Protocol {
    /// False: the command did not complete, and the drive may look at the page again. It has not been told anything newer by then: the
    /// driver resets the controller before it gives up on a command.
    pub fn write_back(&self, s: &mut State, late: bool) -> bool {
        self.harvest(s);
        let Some(home) = s.home else { return true };
        if s.discard && self.broken != Broken::NoDiscard {
            if self.broken == Broken::LossClearedByCommit {
                s.dirty = false;
            }
            self.drop_dirty(s);
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
        if s.is_doubtful(home) && self.broken != Broken::LostBytesWritten {
            return false;
        }
        if s.pages[home as usize] == LEFT {
            s.wrong = Some("P1: the drive gets what a reset left");
            return true;
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

    pub fn begin(&self, s: &mut State, want: Want, discard: bool, late: bool) {
        if self.broken == Broken::EvictionRecalls && want == Want::Nowhere {
            s.layout = false;
        }
        let Some(home) = s.home else { return };
        let to_cmb = want == Want::Promote;
        if s.has_kinds() && want != Want::Nowhere && s.in_cmb(s.home) == to_cmb {
            // It is there.
            return;
        }
        let spare = s.spare().filter(|_| want != Want::Nowhere);
        let dest = if want == Want::Nowhere { None } else { spare.or(s.first_free(to_cmb)) };
        if to_cmb && dest.is_none() {
            return;
        }
        s.discard = discard;
        self.harvest(s);
        s.changed = false;
        s.dest = dest;
        if let Some(d) = s.dest {
            let good = spare.is_some() && !s.outdated;
            if !good && s.is_doubtful(home) && self.broken != Broken::CopyBelieved {
                // Given up before anything was frozen.
                s.dest = None;
                if let Some(spare) = spare {
                    s.free(spare);
                }
                return;
            }
            s.owner[d as usize] = Owner::Window;
            if !good {
                s.pages[d as usize] = s.pages[home as usize];
            }
        } else if !self.write_back(s, late) {
            // Given up before anything was frozen.
            s.discard = false;
            return;
        }
        s.phase = Phase::Copied;
    }

    pub fn request(&self, s: &mut State, want: Want, discard: bool, late: bool) {
        if s.phase == Phase::Idle {
            return self.begin(s, want, discard, late);
        }
        if discard {
            // From now on nothing of it may reach the drive, and the move ends nowhere.
            self.redirect(s);
            self.harvest(s);
            s.discard = true;
            s.dirty = false;
            return;
        }
        s.next = s.next.max(Some(want));
    }

    /// The move ends nowhere, and the place that it had taken is free: nobody has been told of it.
    pub fn redirect(&self, s: &mut State) {
        if let Some(dest) = s.dest.take() {
            s.free(dest);
        }
    }

    pub fn go_on(&self, s: &mut State) {
        s.phase = Phase::Idle;
        (s.dest, s.changed, s.discard, s.by_reset) = (None, false, false, false);
        if let Some(want) = s.next.take()
            && s.home.is_some()
        {
            self.begin(s, want, false, false);
        }
    }

    /// The truncation is through, and acknowledged: a new version, which the drive has.
    pub fn cut(&self, s: &mut State) {
        (s.dirty, s.truncating, s.recalled) = (false, false, true);
        if self.broken == Broken::FreedUnderLayout && (s.layout || s.command.is_some()) {
            s.wrong = Some("P7: blocks are freed under a layout or a command");
        }
        let version = s.fresh();
        (s.drive, s.newest, s.owed) = (version, version, false);
    }

    /// Step 3 is over: those who are still out are fenced.
    pub fn drained(&self, s: &mut State, waiting: u8) {
        let fenced = if self.broken == Broken::NoDrain { 0 } else { waiting };
        for c in (0..2).filter(|c| fenced & (1 << c) != 0) {
            s.clients[c].slot = Slot::Fenced;
        }
        if s.writing_peer.mapped.is_some() {
            (s.changed, s.dirty, s.outdated) = (true, true, true);
            if self.broken != Broken::PeerStays {
                Self::unmap(&mut s.writing_peer);
            }
        }
        if self.broken != Broken::ReadingPeerSeesLateStores {
            Self::unmap(&mut s.reading_peer);
        }
        self.harvest(s);
        if fenced != 0 {
            (s.changed, s.dirty, s.outdated) = (true, true, true);
            if self.broken != Broken::NoHide {
                s.place = None;
                self.raise(s);
            }
        }
        s.phase = Phase::Drained(fenced);
    }

    pub fn last_copy(&self, s: &mut State, fenced: u8, late: bool) {
        let safe = match (s.dest, s.home) {
            (Some(_), Some(home)) if s.changed && s.is_doubtful(home) => self.broken == Broken::CopyBelieved,
            (Some(_), Some(_)) => true,
            _ => self.write_back(s, late),
        };
        if let (true, true, Some(d), Some(home)) = (safe, s.changed, s.dest, s.home) {
            s.pages[d as usize] = s.pages[home as usize];
        }
        if !safe {
            if fenced != 0 {
                // Reopened at its old place it would take the fenced writer's late stores.
                s.phase = Phase::Stuck(fenced);
                return;
            }
            self.redirect(s);
            (s.frozen, s.place, s.stale) = (false, s.home, s.unnoticed());
            self.raise(s);
            return self.go_on(s);
        }
        if s.dest.is_some_and(|d| s.is_doubtful(d)) && self.broken != Broken::PromotedIntoLost {
            // What lies there is what a reset left, or will be. The move waits until that is noticed.
            s.phase = Phase::Stuck(fenced);
            return;
        }
        s.phase = Phase::LastCopied(fenced);
    }

    pub fn publish(&self, s: &mut State, fenced: u8) {
        Self::unmap(&mut s.reading_peer);
        let (old, hidden) = (s.home, s.place.is_none());
        (s.place, s.home) = (s.dest, s.dest);
        s.frozen = false;
        // The stamp is of the device generation as far as it has been dealt with.
        s.stale = s.unnoticed() && self.broken != Broken::PlaceNotStamped;
        self.raise(s);
        if s.discard {
            self.drop_dirty(s);
            if s.dest.is_none() && s.truncating {
                self.cut(s);
            }
        }
        if s.dest.is_none() {
            s.dirty = false;
            if let Some(spare) = s.spare().filter(|_| self.broken != Broken::SpareOutlivesItsWindow) {
                s.free(spare);
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
            let unclaimed = claims == 0 && !hidden || self.broken == Broken::ClaimedSpare;
            if s.has_kinds() && !s.in_cmb(old) && s.in_cmb(s.dest) && unclaimed {
                s.owner[page as usize] = Owner::Spare;
                s.outdated = false;
            } else if claims == 0 {
                s.free(page);
            } else {
                s.owner[page as usize] = Owner::Quarantined(claims);
            }
        }
        self.go_on(s);
    }

    pub fn fill(&self, s: &mut State, page: u8, late: bool) {
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
        if s.is_doubtful(page) {
            return;
        }
        s.owner[page as usize] = Owner::Window;
        s.pages[page as usize] = s.drive;
        (s.place, s.home, s.stale) = (Some(page), Some(page), s.unnoticed());
        s.dirty = false;
        self.raise(s);
    }
}
