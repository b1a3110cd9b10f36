//! Clients, readers and peers.

use crate::broken::Broken;
use crate::protocol::Protocol;
use crate::state::{At, LEFT, Owner, POISON, Phase, Reader, Slot, State};

impl Protocol {
    pub fn client(&self, s: &mut State, c: usize) {
        // A place with the stamp of another device generation is none.
        let place = s.place.filter(|_| !s.stale);
        let client = &mut s.clients[c];
        match client.at {
            At::Out | At::Dead => {}
            At::Announced => match place {
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
                    s.publish_version(v);
                }
                s.leave(c);
            }
            At::Borrowing(p) => {
                if s.owner[p as usize] == Owner::Spare {
                    s.wrong = Some("a borrowed page is a spare");
                }
                let old = client.old;
                match s.pages[p as usize] {
                    POISON => s.wrong = Some("P2: a borrowed page was reused"),
                    LEFT if !old => s.wrong = Some("P1: a current borrow has what a reset left"),
                    _ => {}
                }
                s.leave(c);
            }
        }
    }

    pub fn reap(&self, s: &mut State, c: usize) {
        let client = &mut s.clients[c];
        let open = matches!(client.slot, Slot::Write | Slot::Fenced);
        let active = client.slot == Slot::Write;
        (client.at, client.slot, client.note, client.sections) = (At::Out, Slot::Idle, None, 0);
        client.old = false;
        if open && self.broken != Broken::DeadIsClean {
            // The pidfd says so: no more stores. It may have stored without saying so.
            s.dirty |= (active || s.phase != Phase::Idle) && s.home.is_some();
            s.changed |= s.phase != Phase::Idle;
            s.outdated = true;
        }
        s.answered(c);
    }

    pub fn accept(s: &mut State, value: u8, floor: u8) {
        if value == POISON {
            s.wrong = Some("P1: a reader accepted another's bytes");
        } else if value == LEFT {
            s.wrong = Some("P1: a reader accepted what a reset left");
        } else if value < floor {
            s.wrong = Some("P1: a reader accepted stale bytes");
        } else {
            s.newest = s.newest.max(value);
        }
    }

    pub fn read(&self, s: &mut State) {
        match s.reader {
            Reader::Idle => {
                s.reads -= 1;
                if let Some(place) = s.place.filter(|_| !s.stale) {
                    s.reader = Reader::Looked { place, floor: s.newest };
                }
            }
            Reader::Looked { place, floor } => {
                s.reader = Reader::Idle;
                Self::accept(s, s.pages[place as usize], floor);
            }
        }
    }

    pub fn peer_lands(&self, s: &mut State, writing: bool) {
        let peer = if writing { &mut s.writing_peer } else { &mut s.reading_peer };
        let (Some(page), Some(floor)) = (peer.mapped, peer.flying.take()) else { return };
        if writing {
            let v = s.store(page, "P2: a late DMA");
            s.publish_version(v);
        } else if !s.is_doubtful(page) || self.broken == Broken::PeerDoesNotLookAgain {
            Self::accept(s, s.pages[page as usize], floor);
        }
    }
}
