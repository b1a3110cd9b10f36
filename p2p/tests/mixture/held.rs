//! What is held over everything that happens: sections that do not end, borrows, and DMA in flight. By hand, for they belong to no scope.

use std::sync::atomic::{AtomicU64, Ordering};

use p2p::layout::{Place, SectionKind, SectionState, SectionWord};
use p2p::peer::{CopyId, CopyState};
use p2p::protocol::{
    Native, Seen, enter_borrow, enter_write, leave_borrow, leave_write, mark_dirty, unchanged,
};
use p2p::windows::PeerPath;
use rand_xoshiro::rand_core::Rng;

use crate::world::{STABLE, W, WORDS, World, bytes_of, word, words_of};

/// Slots from here on are taken by hand.
const FIRST_SLOT: usize = 16;

#[derive(Debug)]
pub enum Held {
    Section { client: usize, slot: usize, word: SectionWord, object: usize, window: usize, place: Place },
    Borrow(Borrow),
    Dma { copy: CopyId, object: usize, window: usize, device: u64, time: Option<u64>, local: usize },
}

#[derive(Debug)]
pub struct Borrow {
    client: usize,
    slot: usize,
    word: SectionWord,
    object: usize,
    window: usize,
    seen: Seen,
    resets: u64,
    /// Once its window was taken back: what it must show from then on.
    snapshot: Option<Vec<u64>>,
}

impl World {
    fn free_slot(&self, client: usize) -> Option<usize> {
        let taken = |s: usize| {
            self.held.iter().any(|h| match h {
                Held::Section { client: c, slot, .. } | Held::Borrow(Borrow { client: c, slot, .. }) => {
                    (*c, *slot) == (client, s)
                }
                Held::Dma { .. } => false,
            })
        };
        (FIRST_SLOT..FIRST_SLOT + 4).find(|s| !taken(*s))
    }

    fn slot_words(&self, client: usize, slot: usize) -> (&AtomicU64, &AtomicU64) {
        self.clients[client].0.slots.region().slot(slot)
    }

    fn next_word(&self, client: usize, slot: usize, kind: SectionKind, index: u32) -> SectionWord {
        let last = SectionWord::from_word(self.slot_words(client, slot).0.load(Ordering::Relaxed));
        SectionWord::new(SectionState::Active, kind, index, last.sequence().wrapping_add(1))
    }

    pub fn open_section(&mut self, client: usize, object: usize, window: usize) {
        let Some(slot) = self.free_slot(client) else { return };
        let index = self.clients[client].1[object][window].handle.index;
        let word = self.next_word(client, slot, SectionKind::Write, index);
        let control = self.clients[client].0.control.clone();
        let (guard, _) = control.guard(index).unwrap();
        let entered = enter_write::<Native>(guard, self.slot_words(client, slot).0, word);
        let Ok(seen) = entered else { return };
        self.held.push(Held::Section { client, slot, word, object, window, place: seen.place });
        self.store_late(self.held.len() - 1);
    }

    /// What is in a section stores, whatever the server thinks of it.
    fn store_late(&mut self, at: usize) {
        let Held::Section { client, object, window, place, .. } = self.held[at] else { return };
        self.time += 1;
        let value = word(object, window, self.time);
        let first = STABLE + self.pick(WORDS - STABLE - 8);
        let view = self.view(client, object);
        let (region, at) = view.locate(place, first * 8, 64).unwrap();
        region.memory().write(at, &bytes_of(&[value; 8])).unwrap();
    }

    pub fn borrow(&mut self, client: usize, object: usize, window: usize) {
        let Some(slot) = self.free_slot(client) else { return };
        let index = self.clients[client].1[object][window].handle.index;
        let word = self.next_word(client, slot, SectionKind::Borrow, index);
        let control = self.clients[client].0.control.clone();
        let (guard, _) = control.guard(index).unwrap();
        let (s, note) = self.slot_words(client, slot);
        let Ok(seen) = enter_borrow::<Native>(guard, s, note, word) else { return };
        let resets = self.rig.drive.reset_count();
        self.held.push(Held::Borrow(Borrow {
            client,
            slot,
            word,
            object,
            window,
            seen,
            resets,
            snapshot: None,
        }));
    }

    pub fn verify_borrows(&mut self) {
        for at in 0..self.held.len() {
            let Held::Borrow(b) = &self.held[at] else { continue };
            if b.resets != self.rig.drive.reset_count() {
                // What it has may be what the reset left; and it is not current.
                let control = &self.clients[b.client].0.control;
                let (guard, _) = control.guard(b.word.window()).unwrap();
                assert!(!unchanged::<Native>(guard, b.seen), "current after a reset");
                continue;
            }
            let view = self.view(b.client, b.object);
            let (region, from) = view.locate(b.seen.place, 0, W).unwrap();
            let mut bytes = vec![0; W];
            region.memory().read(from, &mut bytes).unwrap();
            let got = words_of(&bytes);
            let who = format!("a borrow of {:?}", b.seen.place);
            self.check_words(b.object, b.window, &got, &who);
            let (guard, _) = self.clients[b.client].0.control.guard(b.word.window()).unwrap();
            if unchanged::<Native>(guard, b.seen) {
                self.check(b.object, b.window, 0, &got, &who);
                continue;
            }
            let now = self.rig.windows.status(b.word.window()).unwrap();
            if (now.home, now.at) == (b.seen.place.home(), b.seen.place.offset()) {
                // Not gone yet, or given up, or only announced: it is the window's place still.
                continue;
            }
            if let Some(snapshot) = &b.snapshot {
                let changed = got[..STABLE] != snapshot[..STABLE];
                assert!(!changed, "a snapshot of object {} window {} changed", b.object, b.window);
            }
            let Held::Borrow(b) = &mut self.held[at] else { continue };
            b.snapshot = Some(got);
        }
    }

    pub fn is_borrowed_by(&self, client: usize, object: usize, window: usize) -> bool {
        self.held.iter().any(
            |h| matches!(h, Held::Borrow(b) if (b.client, b.object, b.window) == (client, object, window)),
        )
    }

    /// A DMA that is submitted now and done later. Writes go to the last page.
    pub fn peer_later(&mut self, object: usize, window: usize) {
        let flying: Vec<usize> = self
            .held
            .iter()
            .filter_map(|h| if let Held::Dma { local, .. } = h { Some(*local) } else { None })
            .collect();
        let Some(local) = (0..8).map(|n| n * W).find(|l| !flying.contains(l)) else { return };
        let index = self.index(object, window);
        let write = self.pick(2) == 0;
        let (w, d, now) = (&mut self.rig.windows, &mut self.rig.drive, self.rig.now);
        let PeerPath::Direct(m) = w.map_peer(self.peers[1], index, write, d, now).unwrap() else { return };
        let device = self.rig.windows.control().device_generation();
        let engine = self.engines[1].clone();
        let (copy, time) = if write {
            self.time += 1;
            let value = word(object, window, self.time);
            engine.local().write(local, &bytes_of(&[value; 32])).unwrap();
            let first = STABLE + self.pick(WORDS - STABLE - 32);
            (engine.submit(m.iova + first as u64 * 8, local, 256, true), Some(self.time))
        } else {
            (engine.submit(m.iova, local, W, false), None)
        };
        if let Ok(copy) = copy {
            self.held.push(Held::Dma { copy, object, window, device, time, local });
        }
    }

    /// The oldest DMA in flight is done, or faults.
    fn land(&mut self) {
        let engine = self.engines[1].clone();
        engine.step(1);
        let Some(at) = self.held.iter().position(|h| matches!(h, Held::Dma { .. })) else { return };
        let Held::Dma { copy, object, window, device, time, local } = self.held.remove(at) else { return };
        let state = engine.take_result(copy);
        let unmoved = self.rig.windows.control().device_generation() == device;
        match state {
            Some(CopyState::Done) if time.is_none() && unmoved => {
                let mut bytes = vec![0; W];
                engine.local().read(local, &mut bytes).unwrap();
                let got = words_of(&bytes);
                self.check_words(object, window, &got, "a late DMA");
                self.check(object, window, 0, &got, "a late DMA");
            }
            Some(CopyState::Done | CopyState::Failed(_)) => {}
            other => panic!("{other:?}"),
        }
    }

    /// Something that is held goes on, or ends.
    pub fn end_some(&mut self) {
        if self.pick(3) == 0 {
            return self.land();
        }
        if self.held.is_empty() {
            return;
        }
        let at = self.pick(self.held.len());
        match &self.held[at] {
            Held::Section { .. } if self.rng.next_u64().is_multiple_of(2) => self.store_late(at),
            Held::Dma { .. } => self.land(),
            _ => self.end(at),
        }
    }

    fn end(&mut self, at: usize) {
        match self.held.remove(at) {
            Held::Section { client, slot, word, object, window, .. } => {
                let hold = self.clients[client].1[object][window];
                let region = self.clients[client].0.slots.region();
                mark_dirty::<Native>(region.dirty(hold.dirty_word.unwrap()).unwrap(), 1 << (STABLE / 512));
                leave_write::<Native>(region.slot(slot).0, word);
            }
            Held::Borrow(b) => leave_borrow::<Native>(self.slot_words(b.client, b.slot).0, b.word),
            Held::Dma { .. } => {}
        }
    }

    /// Whoever is in a section of a window ends it.
    pub fn end_sections_of(&mut self, object: usize, window: usize) {
        let here = |h: &Held| matches!(h, Held::Section { object: o, window: w, .. } if (*o, *w) == (object, window));
        while let Some(at) = self.held.iter().position(here) {
            self.end(at);
        }
    }

    /// Everything that is held ends.
    pub fn end_all(&mut self) {
        while let Some(last) = self.held.last() {
            match last {
                Held::Dma { .. } => self.land(),
                _ => self.end(self.held.len() - 1),
            }
        }
    }

    /// A client dies with all that it holds, and another comes.
    pub fn die(&mut self, client: usize) {
        let last = self.clients.len() - 1;
        self.held.retain(|h| match h {
            Held::Section { client: c, .. } | Held::Borrow(Borrow { client: c, .. }) => *c != client,
            Held::Dma { .. } => true,
        });
        let (dead, _) = self.clients.swap_remove(client);
        for h in &mut self.held {
            if let Held::Section { client: c, .. } | Held::Borrow(Borrow { client: c, .. }) = h
                && *c == last
            {
                *c = client;
            }
        }
        self.rig.windows.client_died(dead.id, &mut self.rig.drive, self.rig.now);
        self.new_client();
    }
}
