//! What the model knows of the world, and its normal form.
//!
//! One window of one page. Its content is a version number; every store makes a new one, so that "older" is a comparison. A freed page
//! is poison at once. Only the order of versions matters and not which place or client is called which, so each state is kept in a normal
//! form: versions are ranks, the home is place 0 and a move's destination the next one, of two clients the lesser comes first, and
//! what nobody will look at any more is forgotten.

pub const PLACES: usize = 3;
pub const POISON: u8 = 0xff;
/// What a reset leaves in a place of the CMB. Stores into it do not make it whole again.
pub const LEFT: u8 = 0xfe;
/// The claim of a drive command on quarantined pages; those of clients are the bits of their slots.
pub const DRIVE: u8 = 0x80;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Owner {
    Free,
    Window,
    /// Left for the CMB and kept: the window's way back.
    Spare,
    /// By bit: slots and the drive that may still touch it.
    Quarantined(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Slot {
    Idle,
    Write,
    Borrow,
    Fenced,
}

/// Where a client is in its own code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum At {
    Out,
    /// Its slot is set; it has not looked at the generation.
    Announced,
    /// It has seen an open window at this place and not looked back at its slot (a writer) or noted the place (a borrower).
    Seen(u8),
    In(u8),
    /// It has stored this version.
    Stored(u8),
    /// Its dirty bit is set.
    Marked(u8),
    Borrowing(u8),
    /// Dead, and the server does not know. Once it does, the client is as one that is out for good.
    Dead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Client {
    pub at: At,
    pub slot: Slot,
    /// The place that its borrow is of; none while that is not known.
    pub note: Option<u8>,
    /// A borrow: the device generation has moved since it looked.
    pub old: bool,
    /// Sections or borrows that it may still begin.
    pub sections: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    Idle,
    /// Step 1 is over.
    Copied,
    /// Frozen; waits for these slots (by bit), each until it changes.
    Draining(u8),
    /// These slots were fenced and have not answered.
    Drained(u8),
    /// Step 4 could not bring the bytes to safety while these were out.
    Stuck(u8),
    LastCopied(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reader {
    Idle,
    /// At this place, and has to find this version there or a newer one.
    Looked {
        place: u8,
        floor: u8,
    },
}

/// A device with a mapping of one place, and perhaps a DMA under way there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    pub mapped: Option<u8>,
    /// The oldest version that the DMA may find (0 for a writing one).
    pub flying: Option<u8>,
    pub maps: u8,
    pub dmas: u8,
}

/// What a revocation wants. The stronger wish wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Want {
    /// The CMB. Where places are told apart only.
    Promote,
    /// The host cache; any other place where they are not told apart.
    Elsewhere,
    Nowhere,
}

/// How far a reset of the device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reset {
    None,
    /// The device generation has moved.
    Announced,
    /// What was in the CMB is lost. The server has not noticed.
    Lost,
}

/// A drive command that has not completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Command {
    pub page: u8,
    /// It reads the drive, and so stores into the page.
    pub fills: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// The generation is odd.
    pub frozen: bool,
    pub place: Option<u8>,
    /// Where the server knows the bytes to be, also while the place is hidden.
    pub home: Option<u8>,
    pub pages: [u8; PLACES],
    pub owner: [Owner; PLACES],
    /// Which places are in the CMB; none where that makes no difference.
    pub cmb: [bool; PLACES],
    pub drive: u8,
    /// Known to the server.
    pub dirty: bool,
    /// Set by a client, not harvested yet.
    pub bit: bool,

    pub phase: Phase,
    pub dest: Option<u8>,
    pub changed: bool,
    /// The window may have changed since it left its spare.
    pub outdated: bool,
    pub discard: bool,
    /// It discards what a reset left.
    pub by_reset: bool,
    pub next: Option<Want>,
    /// A truncation was asked for and is not through.
    pub truncating: bool,

    pub reset: Reset,
    /// The place carries the stamp of an earlier device generation.
    pub stale: bool,
    /// Of a mass revocation: the window has still to follow.
    pub sweep: bool,
    /// The server counted lost pages, and has told nobody yet.
    pub losses: bool,
    /// The truth: a reset took what was published, and nobody was told.
    pub owed: bool,
    /// The truth: a reset found the window in the CMB, so that there may be something to tell.
    pub excuse: bool,

    pub clients: [Client; 2],
    /// The newest version that was published, or that any reader has accepted.
    pub newest: u8,
    /// The newest version that was published.
    pub promised: u8,
    pub reader: Reader,
    pub writing_peer: Peer,
    pub reading_peer: Peer,
    pub command: Option<Command>,

    /// A layout of the file's blocks is out.
    pub layout: bool,
    /// It was asked back: the blocks are to be freed.
    pub recalled: bool,

    pub reads: u8,
    pub revocations: u8,
    pub fills: u8,
    pub commits: u8,
    pub truncations: u8,
    pub deaths: u8,
    pub time_outs: u8,
    pub resets: u8,
    pub announcements: u8,
    pub wrong: Option<&'static str>,
}

impl State {
    /// Whether places of the CMB are told from others.
    pub fn has_kinds(&self) -> bool {
        self.cmb.contains(&true)
    }

    pub fn spare(&self) -> Option<u8> {
        (0..).zip(&self.owner).find(|(_, o)| **o == Owner::Spare).map(|(p, _)| p)
    }

    pub fn in_cmb(&self, place: Option<u8>) -> bool {
        place.is_some_and(|p| self.cmb[p as usize])
    }

    /// A reset was announced that the server has not dealt with.
    pub fn unnoticed(&self) -> bool {
        self.reset != Reset::None
    }

    /// A version that nothing has had.
    pub fn fresh(&self) -> u8 {
        // In normal form the versions are 0, 1, 2 and so on.
        let mut newest = 0;
        let mut copy = *self;
        copy.versions(|v| newest = newest.max(*v));
        newest + 1
    }

    /// Every version in it.
    fn versions(&mut self, mut each: impl FnMut(&mut u8)) {
        self.pages.iter_mut().filter(|v| **v < LEFT).for_each(&mut each);
        each(&mut self.drive);
        each(&mut self.newest);
        each(&mut self.promised);
        if let Reader::Looked { floor, .. } = &mut self.reader {
            each(floor);
        }
        for client in &mut self.clients {
            if let At::Stored(v) | At::Marked(v) = &mut client.at {
                each(v);
            }
        }
        if let Some(floor) = &mut self.reading_peer.flying {
            each(floor);
        }
    }

    /// Every mention of a place.
    fn places(&mut self, mut each: impl FnMut(&mut u8)) {
        for place in [&mut self.place, &mut self.home, &mut self.dest] {
            place.iter_mut().for_each(&mut each);
        }
        for client in &mut self.clients {
            client.note.iter_mut().for_each(&mut each);
            if let At::Seen(p) | At::In(p) | At::Borrowing(p) = &mut client.at {
                each(p);
            }
        }
        if let Reader::Looked { place, .. } = &mut self.reader {
            each(place);
        }
        self.writing_peer.mapped.iter_mut().for_each(&mut each);
        self.reading_peer.mapped.iter_mut().for_each(&mut each);
        if let Some(command) = &mut self.command {
            each(&mut command.page);
        }
    }

    /// Forgets what nobody will look at any more.
    fn forget(&mut self) {
        if self.dest.is_none() || matches!(self.phase, Phase::LastCopied(_)) {
            self.changed = false;
        }
        for page in 0..PLACES {
            if matches!(self.owner[page], Owner::Quarantined(_)) && self.pages[page] < LEFT {
                // Of those who still look there, none cares for more than that it is not poison, nor what a reset left.
                self.pages[page] = self.drive;
            }
        }
        match self.spare() {
            Some(spare) if self.outdated => self.pages[spare as usize] = self.drive,
            Some(_) => {}
            None => self.outdated = false,
        }
        for client in &mut self.clients {
            if let At::Stored(v) | At::Marked(v) = &mut client.at
                && client.slot == Slot::Fenced
            {
                *v = self.newest;
            }
        }
        for client in &mut self.clients {
            client.old &= client.slot == Slot::Borrow && client.at != At::Announced;
        }
        if self.resets == 0 && !self.unnoticed() {
            // There is no more that can be lost.
            self.promised = self.newest;
        }
        if self.commits == 0 {
            (self.losses, self.owed) = (false, false);
        }
        for peer in [&mut self.writing_peer, &mut self.reading_peer] {
            if peer.mapped.is_none() && peer.maps == 0 {
                peer.dmas = 0;
            }
        }
        if self.clients.iter().all(|c| c.at == At::Out && c.sections == 0) {
            self.deaths = 0;
        }
    }

    /// The same state under the names that the normal form gives.
    pub fn normal(mut self) -> Self {
        self.forget();
        let mut used = 0u64;
        self.versions(|v| used |= 1 << *v);
        self.versions(|v| *v = (used & ((1 << *v) - 1)).count_ones() as u8);

        if self.clients[1] < self.clients[0] {
            self.clients.swap(0, 1);
            let swap = |mask: &mut u8| *mask = *mask & DRIVE | (*mask & 1) << 1 | (*mask & 2) >> 1;
            if let Phase::Draining(m) | Phase::Drained(m) | Phase::Stuck(m) | Phase::LastCopied(m) =
                &mut self.phase
            {
                swap(m);
            }
            for owner in &mut self.owner {
                if let Owner::Quarantined(m) = owner {
                    swap(m);
                }
            }
        }

        let mut mentioned = [0u32; PLACES];
        let mut nth = 0;
        self.places(|p| {
            mentioned[*p as usize] |= 1 << nth;
            nth += 1;
        });
        let mut order = [0u8, 1, 2];
        // The home is mentioned by bits that no other place has, and so is the destination.
        order.sort_by_key(|p| {
            let p = *p as usize;
            let is = |place: Option<u8>| place == Some(p as u8);
            (!is(self.home), !is(self.dest), self.owner[p], self.cmb[p], self.pages[p], mentioned[p])
        });
        let mut new_name = [0u8; PLACES];
        for (name, old) in order.iter().enumerate() {
            new_name[*old as usize] = name as u8;
        }
        if new_name != [0, 1, 2] {
            self.pages = order.map(|old| self.pages[old as usize]);
            self.owner = order.map(|old| self.owner[old as usize]);
            self.cmb = order.map(|old| self.cmb[old as usize]);
            self.places(|p| *p = new_name[*p as usize]);
        }
        self
    }
}
