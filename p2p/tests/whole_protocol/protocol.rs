//! What may happen when, and what must always hold.

use stateright::{Model, Property};

use crate::broken::Broken;
use crate::state::{At, Client, DRIVE, Owner, PLACES, POISON, Peer, Phase, Reader, Reset, Slot, State, Want};

/// One step of one party.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Do {
    /// A revoker asks; its first write-back may time out.
    Revoke(Want, bool),
    Truncate,
    Commit(bool),
    Fill(u8, bool),
    Freeze,
    /// All writers have answered, or the grace is over: those who have not are fenced.
    Drained,
    LastCopy(bool),
    Publish,
    Enter(usize, Slot),
    Client(usize),
    Die(usize),
    Reap(usize),
    Read,
    MapWriter,
    MapReader,
    PeerWrites,
    PeerReads,
    WriteLands,
    ReadLands,
    /// A command that timed out is through, or its controller was reset.
    LateCommand,
    /// The driver is about to reset the device, and moves the device generation.
    Announce,
    /// The reset: what is in the CMB is lost, and no command is out any more.
    Lose,
    /// The server deals with it.
    Notice,
    /// A mass revocation: the device generation moves, and nothing is lost.
    AnnounceAll,
    /// The window follows the mass revocation.
    Sweep,
    /// The last layout comes back, and no command is out: the cut blocks are freed.
    ReturnLayout,
}

/// What may happen how often, and which rule is broken.
#[derive(Clone, Debug)]
pub struct Protocol {
    pub revocations: u8,
    pub fills: u8,
    pub sections: [u8; 2],
    /// Clients may borrow as well as write.
    pub borrows: bool,
    pub reads: u8,
    pub commits: u8,
    pub deaths: u8,
    pub truncations: u8,
    pub peer_writes: u8,
    pub peer_reads: u8,
    pub time_outs: u8,
    pub resets: u8,
    pub announcements: u8,
    /// Which places are in the CMB; none where that makes no difference.
    pub cmb: [bool; PLACES],
    pub broken: Broken,
}

impl Protocol {
    fn may_fail(s: &State) -> bool {
        // The driver resets before it gives up: a command that is given up between a reset and its notice is out no longer.
        s.time_outs > 0 && s.command.is_none() && !s.unnoticed()
    }

    /// What others may ask of the server now.
    fn requests(s: &State, actions: &mut Vec<Do>) {
        let (may_fail, idle) = (Self::may_fail(s), s.phase == Phase::Idle);
        // One that has nothing to write may have something to tell.
        if s.commits > 0 && (s.would_write() || s.has_kinds()) {
            actions.push(Do::Commit(false));
            if may_fail && s.would_write() {
                actions.push(Do::Commit(true));
            }
        }
        if s.home.is_some() {
            if s.revocations > 0 {
                actions.extend([Do::Revoke(Want::Elsewhere, false), Do::Revoke(Want::Nowhere, false)]);
                if s.has_kinds() {
                    actions.push(Do::Revoke(Want::Promote, false));
                }
                if may_fail && idle && s.would_write() {
                    actions.push(Do::Revoke(Want::Nowhere, true));
                }
            }
            if s.truncations > 0 {
                actions.push(Do::Truncate);
            }
        } else if s.fills > 0 {
            for cmb in [false, true] {
                let Some(page) = s.first_free(cmb) else { continue };
                actions.push(Do::Fill(page, false));
                if may_fail {
                    actions.push(Do::Fill(page, true));
                }
            }
        }
        if s.announcements > 0 && s.home.is_some() {
            actions.push(Do::AnnounceAll);
        }
        if s.sweep {
            actions.push(Do::Sweep);
        }
        if s.reset == Reset::Lost {
            actions.push(Do::Notice);
        }
    }

    /// A reset comes when it comes. It is announced first.
    fn resets(&self, s: &State, actions: &mut Vec<Do>) {
        let (first, second) = match self.broken {
            Broken::AnnouncedLate => (Do::Lose, Do::Announce),
            _ => (Do::Announce, Do::Lose),
        };
        match s.reset {
            Reset::None if s.resets > 0 => actions.push(first),
            Reset::Announced => actions.push(second),
            _ => {}
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Do;

    fn init_states(&self) -> Vec<State> {
        let client = |n: usize| Client {
            at: At::Out,
            slot: Slot::Idle,
            note: None,
            old: false,
            sections: self.sections[n],
        };
        let peer = |dmas| Peer { mapped: None, flying: None, maps: dmas, dmas };
        let state = State {
            frozen: false,
            place: Some(0),
            home: Some(0),
            pages: [0, POISON, POISON],
            owner: [Owner::Window, Owner::Free, Owner::Free],
            cmb: self.cmb,
            drive: 0,
            dirty: false,
            bit: false,
            phase: Phase::Idle,
            dest: None,
            changed: false,
            outdated: false,
            discard: false,
            by_reset: false,
            next: None,
            truncating: false,
            clients: [client(0), client(1)],
            reset: Reset::None,
            stale: false,
            sweep: false,
            losses: false,
            owed: false,
            excuse: false,
            newest: 0,
            promised: 0,
            reader: Reader::Idle,
            writing_peer: peer(self.peer_writes),
            reading_peer: peer(self.peer_reads),
            command: None,
            layout: self.truncations > 0,
            recalled: false,
            reads: self.reads,
            revocations: self.revocations,
            fills: self.fills,
            commits: self.commits,
            truncations: self.truncations,
            deaths: self.deaths,
            time_outs: self.time_outs,
            resets: self.resets,
            announcements: self.announcements,
            wrong: None,
        };
        vec![state.normal()]
    }

    fn actions(&self, s: &State, actions: &mut Vec<Do>) {
        if s.wrong.is_some() {
            return;
        }
        let may_fail = Self::may_fail(s);
        let idle = s.phase == Phase::Idle;
        // The server is one thread, and from fencing to publication it does nothing else.
        let busy = matches!(s.phase, Phase::Drained(_) | Phase::LastCopied(_));
        match s.phase {
            Phase::Idle => {}
            Phase::Copied => actions.push(Do::Freeze),
            Phase::Draining(_) => actions.push(Do::Drained),
            Phase::Drained(_) | Phase::Stuck(_) => {
                actions.push(Do::LastCopy(false));
                if may_fail && s.dest.is_none() && s.would_write() {
                    actions.push(Do::LastCopy(true));
                }
            }
            Phase::LastCopied(_) => actions.push(Do::Publish),
        }
        if !busy {
            Self::requests(s, actions);
        }
        self.resets(s, actions);
        for (c, client) in s.clients.iter().enumerate() {
            match client.at {
                At::Out if client.sections == 0 => {}
                At::Out => {
                    actions.push(Do::Enter(c, Slot::Write));
                    if self.borrows {
                        actions.push(Do::Enter(c, Slot::Borrow));
                    }
                }
                At::Dead if busy => {}
                At::Dead => actions.push(Do::Reap(c)),
                _ => {
                    actions.push(Do::Client(c));
                    if s.deaths > 0 {
                        actions.push(Do::Die(c));
                    }
                }
            }
        }
        if s.reads > 0 || s.reader != Reader::Idle {
            actions.push(Do::Read);
        }
        let frozen = !matches!(s.phase, Phase::Idle | Phase::Copied);
        for (peer, map, submit, lands) in [
            (&s.writing_peer, Do::MapWriter, Do::PeerWrites, Do::WriteLands),
            (&s.reading_peer, Do::MapReader, Do::PeerReads, Do::ReadLands),
        ] {
            // Whoever asks for a mapping has the server notice a reset first; only the CMB is mapped for peers.
            let open = !s.unnoticed() && !s.stale && (!s.has_kinds() || s.in_cmb(s.home));
            if peer.maps > 0 && peer.mapped.is_none() && idle && s.home.is_some() && open {
                actions.push(map);
            }
            // Peers are told to stop with the freeze.
            let told = frozen && self.broken != Broken::PeerStays;
            if peer.dmas > 0 && peer.mapped.is_some() && peer.flying.is_none() && !told {
                actions.push(submit);
            }
            if peer.flying.is_some() {
                actions.push(lands);
            }
        }
        if s.command.is_some() {
            actions.push(Do::LateCommand);
        }
        if s.recalled && s.layout && s.command.is_none() {
            actions.push(Do::ReturnLayout);
        }
    }

    fn next_state(&self, last: &State, action: Do) -> Option<State> {
        let mut s = *last;
        self.step(&mut s, action);
        let s = s.normal();
        (s != *last).then_some(s)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always("P1, P2 and P7; a loss is told", |_, s| s.wrong.is_none()),
            Property::<Self>::always("P3: a move always can go on, whoever is silent", |m, s| {
                // In the middle of a reset the server waits for its driver.
                if s.phase == Phase::Idle || s.reset == Reset::Announced || s.wrong.is_some() {
                    return true;
                }
                let server = [Do::Freeze, Do::Drained, Do::LastCopy(false), Do::Publish, Do::Notice];
                let mut actions = Vec::new();
                m.actions(s, &mut actions);
                actions.iter().any(|a| server.contains(a) && m.next_state(s, *a).is_some())
            }),
            Property::<Self>::always("P3: who is out or dead for sure claims nothing", |_, s| {
                let claims =
                    |mask: u8| (0..2).any(|c: usize| mask & (1 << c) != 0 && s.clients[c].at == At::Out);
                !s.owner.iter().any(|o| matches!(o, Owner::Quarantined(m) if claims(*m)))
            }),
            Property::<Self>::always(
                "P3: after a reset nothing waits for a command that was given up",
                |_, s| {
                    let waits = |o: &Owner| matches!(o, Owner::Quarantined(m) if m & DRIVE != 0);
                    s.command.is_some() || s.unnoticed() || !s.owner.iter().any(waits)
                },
            ),
            Property::<Self>::always("whoever asks is not kept out for ever", |_, s| {
                let dealt_with = s.phase == Phase::Idle && !s.sweep && !s.unnoticed();
                !dealt_with || s.home.is_none() || !s.stale
            }),
            Property::<Self>::always("nothing published is lost", |_, s| match (s.phase, s.home) {
                (Phase::Idle | Phase::Copied, Some(home)) => s.pages[home as usize] >= s.newest,
                (Phase::Idle, None) => s.drive >= s.newest,
                _ => true,
            }),
            Property::<Self>::always("P10: only a truncation ends a layout", |m, s| {
                m.truncations == 0 || s.layout || s.recalled
            }),
        ]
    }
}
