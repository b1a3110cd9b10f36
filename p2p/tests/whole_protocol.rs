//! The whole protocol as a model, searched exhaustively for small counts: a server with several revocations, two clients that may stop (they
//! simply do not go on) or die at any step, a writing peer, truncation, and a drive command that times out. Memory is sequentially
//! consistent here: what weak memory adds is loom's part (`tests/loom.rs`).
//!
//! One window of one page. Its content is a version number; every store makes a new one, so that "older" is a comparison. A freed page
//! is poison at once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use stateright::{Checker, HasDiscoveries, Model, Property};

const PLACES: usize = 3;
const POISON: u8 = 200;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Owner {
    Free,
    Window,
    /// Slots (by bit) and the drive (bit 7) that may still touch it.
    Quarantined(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Slot {
    Idle,
    Write,
    Borrow,
    Fenced,
}

/// Where a client is in its own code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum At {
    Out,
    /// Its slot is set; it has not looked at the generation.
    Announced,
    /// It has seen an open window at this place and not looked back at its slot.
    Seen(u8),
    In(u8),
    /// It has stored this version there.
    Stored(u8, u8),
    Marked(u8, u8),
    Borrowing(u8),
    Dead,
    /// Dead, and the server knows.
    Reaped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Idle,
    /// Step 1 is over.
    Copied,
    /// Frozen; waits for these slots (by bit).
    Draining(u8),
    /// These slots were fenced; the window is hidden if there are any.
    Drained(u8),
    LastCopied(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Reader {
    Idle,
    Looked { generation: u8, place: u8, floor: u8 },
    Copied { generation: u8, value: u8, floor: u8 },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    generation: u8,
    place: Option<u8>,
    /// Where the server knows the bytes to be, also while the place is hidden.
    home: Option<u8>,
    pages: [u8; PLACES],
    owner: [Owner; PLACES],
    drive: u8,
    dirty: bool,
    bit: bool,
    phase: Phase,
    dest: Option<u8>,
    changed: bool,
    discard: bool,
    truncating: bool,
    slots: [Slot; 2],
    sequence: [u8; 2],
    /// The sequence that the server waits for in each slot.
    awaited: [u8; 2],
    note: Option<u8>,
    clients: [At; 2],
    sections: [u8; 2],
    begun: u8,
    published: u8,
    seen: u8,
    reader: Reader,
    reads: u8,
    moves: u8,
    truncations: u8,
    deaths: u8,
    peer: Option<u8>,
    peer_maps: u8,
    peer_stores: u8,
    /// A drive command on this page that has not completed, if any, and how many may still time out.
    command: Option<u8>,
    time_outs: u8,
    wrong: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Do {
    Begin(Option<u8>),
    Fill(u8),
    Truncate,
    Freeze,
    Grace,
    Drained,
    LastCopy,
    Publish,
    Reclaim(u8),
    Reap(usize),
    Client(usize),
    Die(usize),
    Read,
    MapPeer,
    PeerStore,
    LateCommand,
    Reset,
}

/// What may happen how often, and which rule is broken.
#[derive(Clone, Debug)]
struct Protocol {
    moves: u8,
    sections: [u8; 2],
    borrows: bool,
    reads: u8,
    deaths: u8,
    truncations: u8,
    peer: u8,
    time_outs: u8,
    broken: Broken,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Nothing,
    NoDrain,
    NoHide,
    NoLookBack,
    NoBorrowClaim,
    NoFenceClaim,
    DeadIsClean,
    PeerStays,
    NoDiscard,
    NoCommandClaim,
    NoRecheck,
}

impl State {
    fn free(&mut self, page: u8) {
        self.owner[page as usize] = Owner::Free;
        self.pages[page as usize] = POISON;
    }

    fn store(&mut self, page: u8, who: &'static str) -> u8 {
        if self.owner[page as usize] == Owner::Free {
            self.wrong = Some(who);
        }
        self.begun += 1;
        self.pages[page as usize] = self.begun;
        self.begun
    }

    fn harvest(&mut self) {
        if std::mem::take(&mut self.bit) {
            self.dirty = true;
            self.changed = true;
        }
    }

    fn write_back(&mut self, model: &Protocol) {
        let Some(home) = self.home else { return };
        if self.discard && model.broken != Broken::NoDiscard {
            self.dirty = false;
            return;
        }
        if std::mem::take(&mut self.dirty) {
            if self.truncating {
                self.wrong = Some("P7: truncated bytes reach the drive");
            }
            self.drive = self.pages[home as usize];
            if self.time_outs > 0 {
                // It was done, and its completion was lost: the drive may look at the page again.
                self.time_outs -= 1;
                self.command = Some(home);
            }
        }
    }
}

impl Protocol {
    fn client(&self, s: &mut State, c: usize) {
        match s.clients[c] {
            At::Out => {
                s.sections[c] -= 1;
                s.sequence[c] += 1;
                let borrow = self.borrows && c == 1;
                s.slots[c] = if borrow { Slot::Borrow } else { Slot::Write };
                if borrow {
                    s.note = None;
                }
                s.clients[c] = At::Announced;
            }
            At::Announced => match s.place {
                Some(p) if s.slots[c] == Slot::Borrow => s.clients[c] = At::Seen(p),
                Some(p) if s.generation.is_multiple_of(2) => {
                    s.clients[c] = if self.broken == Broken::NoLookBack { At::In(p) } else { At::Seen(p) };
                }
                _ => {
                    s.slots[c] = Slot::Idle;
                    s.sequence[c] += 1;
                    s.clients[c] = At::Out;
                }
            },
            At::Seen(p) => match s.slots[c] {
                Slot::Borrow => {
                    s.note = Some(p);
                    s.clients[c] = At::Borrowing(p);
                }
                Slot::Write => s.clients[c] = At::In(p),
                _ => {
                    s.slots[c] = Slot::Idle;
                    s.sequence[c] += 1;
                    s.clients[c] = At::Out;
                }
            },
            At::In(p) => {
                let v = s.store(p, "P2: a late store");
                s.clients[c] = At::Stored(p, v);
            }
            At::Stored(p, v) => {
                s.bit = true;
                s.clients[c] = At::Marked(p, v);
            }
            At::Marked(_, v) => {
                if s.slots[c] == Slot::Write {
                    s.published = s.published.max(v);
                }
                s.slots[c] = Slot::Idle;
                s.sequence[c] += 1;
                s.clients[c] = At::Out;
            }
            At::Borrowing(p) => {
                if s.pages[p as usize] == POISON {
                    s.wrong = Some("P2: a borrowed page was reused");
                }
                s.slots[c] = Slot::Idle;
                s.sequence[c] += 1;
                s.clients[c] = At::Out;
            }
            At::Dead | At::Reaped => {}
        }
    }

    fn read(&self, s: &mut State) {
        match s.reader {
            Reader::Idle => {
                s.reads -= 1;
                if let Some(place) = s.place {
                    let floor = s.published.max(s.seen);
                    s.reader = Reader::Looked { generation: s.generation, place, floor };
                }
            }
            Reader::Looked { generation, place, floor } => {
                s.reader = Reader::Copied { generation, value: s.pages[place as usize], floor };
            }
            Reader::Copied { generation, value, floor } => {
                s.reader = Reader::Idle;
                if generation == s.generation || self.broken == Broken::NoRecheck {
                    if value == POISON {
                        s.wrong = Some("P1: a reader accepted another's bytes");
                    } else if value < floor {
                        s.wrong = Some("P1: a reader accepted stale bytes");
                    }
                    s.seen = s.seen.max(value);
                }
            }
        }
    }

    fn publish(&self, s: &mut State, fenced: u8) {
        let old = s.home;
        s.place = s.dest;
        s.home = s.dest;
        s.generation += 1;
        s.phase = Phase::Idle;
        if s.dest.is_none() {
            s.dirty = false;
        }
        if s.discard {
            // The truncation is over, and acknowledged: a new version, which the drive has.
            s.dirty = false;
            s.discard = false;
            s.truncating = false;
            s.begun += 1;
            s.drive = s.begun;
            s.published = s.begun;
        }
        let mut claims = if self.broken == Broken::NoFenceClaim { 0 } else { fenced };
        for c in 0..2 {
            let here = s.note.is_none() || s.note == old;
            let borrowed = s.slots[c] == Slot::Borrow && here && s.clients[c] != At::Reaped;
            if borrowed && self.broken != Broken::NoBorrowClaim {
                claims |= 1 << c;
                s.awaited[c] = s.sequence[c];
            }
        }
        if s.command == old && s.command.is_some() && self.broken != Broken::NoCommandClaim {
            claims |= 0x80;
        }
        if let Some(page) = old {
            if claims == 0 { s.free(page) } else { s.owner[page as usize] = Owner::Quarantined(claims) }
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Do;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            generation: 0,
            place: Some(0),
            home: Some(0),
            pages: [1, POISON, POISON],
            owner: [Owner::Window, Owner::Free, Owner::Free],
            drive: 1,
            dirty: false,
            bit: false,
            phase: Phase::Idle,
            dest: None,
            changed: false,
            discard: false,
            truncating: false,
            slots: [Slot::Idle; 2],
            sequence: [0; 2],
            awaited: [0; 2],
            note: None,
            clients: [At::Out; 2],
            sections: self.sections,
            begun: 1,
            published: 1,
            seen: 1,
            reader: Reader::Idle,
            reads: self.reads,
            moves: self.moves,
            truncations: self.truncations,
            deaths: self.deaths,
            peer: None,
            peer_maps: self.peer,
            peer_stores: self.peer,
            command: None,
            time_outs: self.time_outs,
            wrong: None,
        }]
    }

    fn actions(&self, s: &State, actions: &mut Vec<Do>) {
        if s.wrong.is_some() {
            return;
        }
        let free = |p: &u8| s.owner[*p as usize] == Owner::Free;
        match s.phase {
            Phase::Idle if s.home.is_none() && s.moves > 0 => {
                actions.extend((0..3).filter(free).map(Do::Fill));
            }
            Phase::Idle if s.moves > 0 => {
                actions.push(Do::Begin(None));
                actions.extend((0..3).find(free).map(|p| Do::Begin(Some(p))));
            }
            Phase::Idle => {}
            Phase::Copied => actions.push(Do::Freeze),
            Phase::Draining(_) => {
                actions.push(Do::Drained);
                actions.push(Do::Grace);
            }
            Phase::Drained(_) => actions.push(Do::LastCopy),
            Phase::LastCopied(_) => actions.push(Do::Publish),
        }
        if s.truncations > 0 && s.home.is_some() {
            actions.push(Do::Truncate);
        }
        for (p, owner) in s.owner.iter().enumerate() {
            if matches!(owner, Owner::Quarantined(_)) {
                actions.push(Do::Reclaim(p as u8));
            }
        }
        for c in 0..2 {
            match s.clients[c] {
                At::Out if s.sections[c] == 0 => {}
                At::Reaped => {}
                At::Dead => actions.push(Do::Reap(c)),
                at => {
                    actions.push(Do::Client(c));
                    if s.deaths > 0 && at != At::Out {
                        actions.push(Do::Die(c));
                    }
                }
            }
        }
        if s.reads > 0 || s.reader != Reader::Idle {
            actions.push(Do::Read);
        }
        if s.peer_maps > 0 && s.peer.is_none() && s.phase == Phase::Idle && s.home.is_some() {
            actions.push(Do::MapPeer);
        }
        if s.peer_stores > 0 && s.peer.is_some() {
            actions.push(Do::PeerStore);
        }
        if s.command.is_some() {
            actions.extend([Do::LateCommand, Do::Reset]);
        }
    }

    fn next_state(&self, last: &State, action: Do) -> Option<State> {
        let mut s = last.clone();
        match action {
            Do::Begin(dest) => {
                s.moves -= 1;
                s.dest = dest;
                s.harvest();
                s.changed = false;
                match dest {
                    Some(d) => {
                        s.owner[d as usize] = Owner::Window;
                        s.pages[d as usize] = s.pages[s.home? as usize];
                    }
                    None => s.write_back(self),
                }
                s.phase = Phase::Copied;
            }
            Do::Fill(page) => {
                s.moves -= 1;
                s.owner[page as usize] = Owner::Window;
                s.pages[page as usize] = s.drive;
                (s.place, s.home) = (Some(page), Some(page));
                s.generation += 2;
                s.dirty = false;
            }
            Do::Truncate => {
                s.truncations -= 1;
                s.discard = true;
                s.truncating = true;
                if s.phase == Phase::Idle {
                    s.dest = None;
                    s.phase = Phase::Copied;
                } else if let Some(d) = s.dest.take() {
                    // The running move goes on to nowhere: the model's short form of "and is followed by a discard".
                    s.free(d);
                }
            }
            Do::Freeze => {
                s.generation += 1;
                let mut waiting = 0;
                for c in 0..2 {
                    if s.slots[c] == Slot::Write && s.clients[c] != At::Reaped {
                        waiting |= 1 << c;
                        s.awaited[c] = s.sequence[c];
                    }
                }
                s.phase = Phase::Draining(waiting);
            }
            Do::Drained | Do::Grace => {
                let Phase::Draining(waiting) = s.phase else { return None };
                let out = |s: &State, c: usize| {
                    s.clients[c] != At::Reaped && s.sequence[c] == s.awaited[c] && s.slots[c] != Slot::Idle
                };
                let mut fenced = 0;
                for c in (0..2).filter(|c| waiting & (1 << c) != 0) {
                    if out(&s, c) && self.broken != Broken::NoDrain {
                        if action == Do::Drained {
                            return None;
                        }
                        s.slots[c] = Slot::Fenced;
                        fenced |= 1 << c;
                    }
                }
                if fenced != 0 {
                    s.changed = true;
                    s.dirty = true;
                    if self.broken != Broken::NoHide {
                        s.generation += 2;
                        s.place = None;
                    }
                }
                if s.peer.is_some() {
                    s.changed = true;
                    s.dirty = true;
                    if self.broken != Broken::PeerStays {
                        s.peer = None;
                    }
                }
                s.harvest();
                s.phase = Phase::Drained(fenced);
            }
            Do::LastCopy => {
                let Phase::Drained(fenced) = s.phase else { return None };
                match s.dest {
                    Some(d) if s.changed => s.pages[d as usize] = s.pages[s.home? as usize],
                    Some(_) => {}
                    None => s.write_back(self),
                }
                s.phase = Phase::LastCopied(fenced);
            }
            Do::Publish => {
                let Phase::LastCopied(fenced) = s.phase else { return None };
                self.publish(&mut s, fenced);
            }
            Do::Reclaim(page) => {
                let Owner::Quarantined(claims) = s.owner[page as usize] else { return None };
                let mut left = claims;
                for c in 0..2 {
                    let answered = s.clients[c] == At::Reaped
                        || s.sequence[c] != s.awaited[c]
                        || s.slots[c] == Slot::Idle;
                    if answered {
                        left &= !(1 << c);
                    }
                }
                if s.command != Some(page) {
                    left &= !0x80;
                }
                if left == claims {
                    return None;
                }
                if left == 0 { s.free(page) } else { s.owner[page as usize] = Owner::Quarantined(left) }
            }
            Do::Reap(c) => {
                // The pidfd says so: no more stores. An open section may have stored without saying so.
                if s.slots[c] == Slot::Write && self.broken != Broken::DeadIsClean {
                    s.dirty = s.home.is_some();
                    s.changed = true;
                }
                s.clients[c] = At::Reaped;
            }
            Do::Client(c) => self.client(&mut s, c),
            Do::Die(c) => {
                s.deaths -= 1;
                // What it stored without finishing its section was never promised; what readers saw of it counts all the same.
                s.clients[c] = At::Dead;
            }
            Do::Read => self.read(&mut s),
            Do::MapPeer => {
                s.peer_maps -= 1;
                s.peer = s.home;
            }
            Do::PeerStore => {
                s.peer_stores -= 1;
                let page = s.peer?;
                let v = s.store(page, "P2: a late DMA");
                s.published = s.published.max(v);
            }
            Do::LateCommand => {
                if s.owner[s.command? as usize] == Owner::Free {
                    s.wrong = Some("P2: a drive command reached a reused page");
                }
                s.command = None;
            }
            Do::Reset => s.command = None,
        }
        (s != *last).then_some(s)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always("P1, P2 and P7", |_, s| s.wrong.is_none()),
            Property::<Self>::always("P3: a move always can go on", |m, s| {
                let mut actions = Vec::new();
                m.actions(s, &mut actions);
                let stuck = !matches!(s.phase, Phase::Idle)
                    && s.wrong.is_none()
                    && !actions.iter().any(|a| {
                        matches!(a, Do::Freeze | Do::Grace | Do::LastCopy | Do::Publish)
                            && m.next_state(s, *a).is_some()
                    });
                !stuck
            }),
            Property::<Self>::always("nothing published is lost", |_, s| {
                // Quiet: the bytes are at home, or on the drive.
                let quiet = s.phase == Phase::Idle && s.home.is_none();
                !quiet || s.drive >= s.published.max(s.seen)
            }),
        ]
    }
}

const SOUND: Protocol = Protocol {
    moves: 2,
    sections: [1, 1],
    borrows: false,
    reads: 1,
    deaths: 0,
    truncations: 0,
    peer: 0,
    time_outs: 0,
    broken: Broken::Nothing,
};

fn holds(name: &str, model: Protocol) {
    let checker = model.checker().threads(2).spawn_bfs().join();
    println!(
        "{name}: {} states, {} unique, depth {}",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth()
    );
    checker.assert_properties();
}

fn fails(model: Protocol) {
    let checker = model.checker().finish_when(HasDiscoveries::Any).spawn_bfs().join();
    assert!(!checker.discoveries().is_empty(), "a broken protocol that the search does not notice");
}

#[test]
fn two_writers_and_two_moves() {
    holds("two writers", SOUND);
}

#[test]
fn a_writer_and_a_borrower() {
    holds("writer and borrower", Protocol { borrows: true, ..SOUND });
}

#[test]
fn deaths() {
    holds("deaths", Protocol { deaths: 2, moves: 1, ..SOUND });
}

#[test]
fn truncation_during_moves() {
    holds("truncation", Protocol { truncations: 1, sections: [1, 0], reads: 2, ..SOUND });
}

#[test]
fn a_writing_peer() {
    holds("peer", Protocol { peer: 2, sections: [1, 0], ..SOUND });
}

#[test]
fn a_command_that_times_out() {
    holds("time-out", Protocol { time_outs: 1, sections: [1, 0], moves: 3, ..SOUND });
}

#[test]
#[ignore = "minutes, in a release build: everything at once"]
fn everything_at_once() {
    let all = Protocol {
        moves: 2,
        sections: [1, 1],
        borrows: true,
        reads: 1,
        deaths: 1,
        truncations: 1,
        peer: 1,
        time_outs: 1,
        broken: Broken::Nothing,
    };
    holds("everything", all);
}

#[test]
fn broken_protocols_are_noticed() {
    for (broken, base) in [
        (Broken::NoRecheck, Protocol { sections: [0, 0], ..SOUND }),
        (Broken::NoDrain, SOUND),
        (Broken::NoHide, Protocol { sections: [1, 0], reads: 2, moves: 1, ..SOUND }),
        (Broken::NoLookBack, Protocol { sections: [1, 0], moves: 3, reads: 0, ..SOUND }),
        (Broken::NoFenceClaim, SOUND),
        (Broken::NoBorrowClaim, Protocol { borrows: true, ..SOUND }),
        (Broken::DeadIsClean, Protocol { deaths: 1, ..SOUND }),
        (Broken::PeerStays, Protocol { peer: 2, sections: [0, 0], ..SOUND }),
        (Broken::NoDiscard, Protocol { truncations: 1, sections: [1, 0], ..SOUND }),
        (Broken::NoCommandClaim, Protocol { time_outs: 1, moves: 3, sections: [1, 0], ..SOUND }),
    ] {
        println!("{broken:?}");
        fails(Protocol { broken, ..base });
    }
}
