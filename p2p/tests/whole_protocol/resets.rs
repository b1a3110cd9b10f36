//! A reset of the device, a mass revocation, and what a commit has to tell.

use crate::broken::Broken;
use crate::protocol::Protocol;
use crate::state::{DRIVE, LEFT, Owner, Phase, Reset, Slot, State};

impl Protocol {
    /// What is dirty of a window whose bytes are no longer wanted; if a reset took them, it is counted for whoever commits next.
    pub fn drop_dirty(&self, s: &mut State) {
        s.losses |= s.dirty && s.by_reset && self.broken != Broken::LossNotCounted;
        s.dirty = false;
    }

    /// What a reset left is nobody's to see: peers do not look at the device generation twice.
    pub fn discard_lost(&self, s: &mut State) {
        s.by_reset = true;
        if s.writing_peer.mapped.is_some() {
            s.dirty = true;
            if self.broken != Broken::WritingPeerOutlivesReset {
                Self::unmap(&mut s.writing_peer);
            }
        }
        if self.broken != Broken::ReadingPeerOutlivesReset {
            Self::unmap(&mut s.reading_peer);
        }
        self.drop_dirty(s);
    }

    /// The device generation moves: what was looked at before is not to be used any more.
    pub fn move_device(&self, s: &mut State) {
        s.stale = true;
        for client in &mut s.clients {
            client.old |= client.slot == Slot::Borrow && self.broken != Broken::BorrowForgetsDevice;
        }
        self.raise(s);
    }

    pub fn lose(&self, s: &mut State) {
        for page in 0..s.pages.len() {
            if s.cmb[page] && s.owner[page] != Owner::Free {
                s.pages[page] = LEFT;
            }
        }
        // A controller that was reset has forgotten its commands.
        s.command = None;
        let there = if matches!(s.phase, Phase::LastCopied(_)) { s.dest } else { s.home };
        s.excuse |= s.in_cmb(there);
    }

    pub fn notice(&self, s: &mut State) {
        s.reset = Reset::None;
        s.sweep = false;
        if self.broken != Broken::CommandOutlivesReset {
            s.drop_claims(DRIVE);
        }
        if s.in_cmb(s.home) {
            if s.phase == Phase::Idle {
                self.harvest(s);
                s.phase = Phase::Copied;
            } else {
                self.redirect(s);
                self.harvest(s);
            }
            s.discard = true;
            // The truth, for the properties: this is where the bytes are given up.
            if s.promised > s.drive && !s.truncating {
                s.owed = true;
                if !s.excuse {
                    s.wrong = Some("a reset took what was not in the CMB");
                }
            }
            (s.promised, s.newest) = (s.promised.min(s.drive), s.newest.min(s.drive));
            self.discard_lost(s);
            return;
        }
        if s.in_cmb(s.dest) {
            // By way of the drive.
            self.redirect(s);
        }
        self.restamp(s);
    }

    /// A window whose bytes are where they were is valid under the new device generation.
    pub fn restamp(&self, s: &mut State) {
        if s.home.is_some() && !s.frozen {
            s.stale = s.unnoticed();
        }
    }

    pub fn commit(&self, s: &mut State, late: bool) {
        let written = self.write_back(s, late);
        // Last of all, for the device may be reset as late as in the flush.
        if s.reset == Reset::Lost {
            self.notice(s);
        }
        if s.losses {
            if !s.excuse {
                s.wrong = Some("a loss is told twice, or there was none");
            }
            s.excuse &= s.by_reset;
            s.owed = false;
            s.losses = self.broken == Broken::LossToldAgain;
        } else if written && s.owed {
            s.wrong = Some("a commit is acknowledged after a loss that nobody was told of");
        }
    }
}
