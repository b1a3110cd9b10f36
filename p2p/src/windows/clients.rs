//! Clients: their regions, what they hold, and their death.

use std::collections::{BTreeMap, BTreeSet};

use super::{Windows, WindowsError};
use crate::backing::Backing;
use crate::control::{ClientRegion, WindowHandle};
use crate::layout::{Home, SECTION_SLOTS, SectionKind, SectionState, SectionWord};
use crate::protocol::{Native, busy, harvest};

/// An attached client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(pub u32);

/// One client's hold on a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hold {
    /// The window's handle.
    pub handle: WindowHandle,
    /// Where the window begins in its object, in bytes.
    pub offset: u64,
    /// For a hold that may write: the first of its dirty words in the client's region.
    pub dirty_word: Option<u32>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Holder {
    pub(super) client: u32,
    pub(super) dirty_word: Option<u32>,
    /// How often the client holds it.
    pub(super) count: u32,
}

#[derive(Debug)]
pub(super) struct Client {
    pub(super) region: ClientRegion,
    pub(super) holds: BTreeSet<u32>,
    /// First dirty word that was never handed out.
    next_word: u32,
    /// Runs of dirty words that came back, by length.
    free_words: BTreeMap<u32, Vec<u32>>,
    /// Revoked as a whole: may hold nothing any more.
    pub(super) barred: bool,
}

impl Windows {
    /// Attaches a client. Its region goes to it, writable; the server trusts no word of it.
    pub fn attach(&mut self) -> Result<(ClientId, ClientRegion), WindowsError> {
        let region = ClientRegion::create(self.dirty_words)?;
        let id = self.next_client;
        self.next_client += 1;
        self.clients.insert(
            id,
            Client {
                region: region.clone(),
                holds: BTreeSet::new(),
                next_word: 0,
                free_words: BTreeMap::new(),
                barred: false,
            },
        );
        Ok((ClientId(id), region))
    }

    /// Clients that are attached.
    pub fn clients(&self) -> impl Iterator<Item = (ClientId, usize)> + '_ {
        self.clients.iter().map(|(id, c)| (ClientId(*id), c.holds.len()))
    }

    /// The window over `offset` of an object, for a peer: nobody holds it, and it goes when it is nowhere and no peer maps it.
    pub fn window_at(&mut self, object: u64, offset: u64) -> Result<u32, WindowsError> {
        self.slot_for(object, offset)
    }

    /// Has a client hold the window over `offset` of an object. A window is held as often as it is released.
    pub fn hold(
        &mut self,
        client: ClientId,
        object: u64,
        offset: u64,
        write: bool,
    ) -> Result<Hold, WindowsError> {
        match self.clients.get(&client.0) {
            Some(c) if !c.barred => {}
            Some(_) => return Err(WindowsError::Barred(client.0)),
            None => return Err(WindowsError::UnknownClient(client.0)),
        }
        let index = self.slot_for(object, offset)?;
        let Some(w) = self.windows.get_mut(index as usize).and_then(Option::as_deref_mut) else {
            return Err(WindowsError::UnknownWindow(index));
        };
        let Some(c) = self.clients.get_mut(&client.0) else {
            return Err(WindowsError::UnknownClient(client.0));
        };
        let at = w.holder(client.0);
        let mut fresh = false;
        let mut dirty_word = at.ok().and_then(|at| w.holders[at].dirty_word);
        if write && dirty_word.is_none() {
            let words = w.dirty.words() as u32;
            let Some(first) = c.take_words(words) else {
                self.forget_if_idle(index);
                return Err(WindowsError::TooManyDirtyPages(client.0));
            };
            dirty_word = Some(first);
            fresh = true;
        }
        match at {
            Ok(at) => {
                w.holders[at].count += 1;
                w.holders[at].dirty_word = dirty_word;
            }
            Err(at) => w.holders.insert(at, Holder { client: client.0, dirty_word, count: 1 }),
        }
        c.holds.insert(index);
        let handle = WindowHandle { index, incarnation: w.incarnation, len: w.len as u64 };
        let hold = Hold { handle, offset: w.offset, dirty_word: if write { dirty_word } else { None } };
        self.writable_holds += usize::from(fresh);
        self.count_dirty(index);
        Ok(hold)
    }

    /// The window over `offset` of an object, if this client holds it.
    pub fn held(&self, client: ClientId, object: u64, offset: u64) -> Option<u32> {
        let known = self.objects.get(&object)?;
        let index = *known.windows.get(&(offset / known.options.window_size as u64))?;
        self.window(index)?.holder(client.0).ok().map(|_| index)
    }

    /// Takes one hold back. With the last one the client's dirty bits are harvested. Refused while a section or borrow of
    /// the client is open there: nobody would wait for it any more.
    pub fn release(&mut self, client: ClientId, index: u32) -> Result<(), WindowsError> {
        let c = self.clients.get(&client.0).ok_or(WindowsError::UnknownClient(client.0))?;
        let open = (0..SECTION_SLOTS).any(|slot| {
            let word = c.region.slot(slot).0;
            [SectionKind::Write, SectionKind::Borrow]
                .iter()
                .any(|k| busy::<Native>(word, index, *k).is_some())
        });
        let w = self.known(index)?;
        let at = w.holder(client.0).map_err(|_| WindowsError::UnknownWindow(index))?;
        let holder = &mut w.holders[at];
        if holder.count > 1 {
            holder.count -= 1;
            return Ok(());
        }
        if open {
            return Err(WindowsError::InSection(index));
        }
        self.drop_hold(client.0, index);
        self.forget_if_idle(index);
        Ok(())
    }

    /// The client is gone: its process has ended (its pidfd says so), so it makes no more stores. Sections it died in count
    /// as having changed their whole window; pages that waited for it come back.
    pub fn client_died(&mut self, client: ClientId, backing: &mut dyn Backing, now: u64) {
        let Some(c) = self.clients.get(&client.0) else { return };
        for slot in 0..SECTION_SLOTS {
            let word =
                SectionWord::from_word(c.region.slot(slot).0.load(std::sync::atomic::Ordering::Acquire));
            // What the word says is hostile: only windows that this client holds for writing can have been written.
            let open = matches!(word.state(), SectionState::Active | SectionState::Fenced)
                && word.kind() == SectionKind::Write;
            if open
                && let Some(w) = self.windows.get_mut(word.window() as usize).and_then(Option::as_deref_mut)
                && w.holder(client.0).is_ok_and(|at| w.holders[at].dirty_word.is_some())
            {
                // A fenced section's late stores went to a place that is none any more, unless its move is not over and may yet be
                // given up; an active one's are in the window.
                let here = word.state() == SectionState::Active || w.moving.is_some();
                if here && w.home != Home::None {
                    w.dirty.add_all();
                }
                w.distrust_copies();
            }
        }
        let holds: Vec<u32> = c.holds.iter().copied().collect();
        for index in &holds {
            self.drop_hold(client.0, *index);
        }
        self.clients.remove(&client.0);
        for index in self.moving.clone() {
            if let Some(m) = self.window_mut(index).and_then(|w| w.moving.as_mut()) {
                m.forget_client(client.0);
            }
            self.step_move(index, backing, now);
        }
        self.reclaim(now);
        for index in holds {
            self.forget_if_idle(index);
        }
    }

    pub(super) fn drop_hold(&mut self, client: u32, index: u32) {
        self.harvest(index);
        let Some(w) = self.window_mut(index) else { return };
        let words = w.dirty.words() as u32;
        let Ok(at) = w.holder(client) else { return };
        let holder = w.holders.remove(at);
        let unheld = w.holders.is_empty();
        if let Some(c) = self.clients.get_mut(&client) {
            c.holds.remove(&index);
            if let Some(first) = holder.dirty_word {
                c.give_words(first, words);
            }
        }
        self.writable_holds -= usize::from(holder.dirty_word.is_some());
        // It may have left something.
        self.pace.dirty |= holder.dirty_word.is_some();
        if unheld {
            self.drop_spare(index);
        }
        self.count_dirty(index);
    }

    /// Takes the dirty bits of a window from all who hold it for writing. They count for the window, a move of it, and its spare.
    pub(super) fn harvest(&mut self, index: u32) {
        let Some(w) = self.windows.get_mut(index as usize).and_then(Option::as_deref_mut) else { return };
        for at in 0..w.holders.len() {
            let Holder { client, dirty_word, .. } = w.holders[at];
            let (Some(first), Some(c)) = (dirty_word, self.clients.get(&client)) else { continue };
            for word in 0..w.dirty.words() {
                let Some(shared) = c.region.dirty(first + word as u32) else { continue };
                let bits = harvest::<Native>(shared);
                if bits != 0 {
                    w.note_changed(word, bits);
                }
            }
        }
    }
}

impl Client {
    fn take_words(&mut self, words: u32) -> Option<u32> {
        if let Some(first) = self.free_words.get_mut(&words).and_then(Vec::pop) {
            return Some(first);
        }
        let end = self.next_word.checked_add(words)?;
        if end > self.region.dirty_words() {
            return None;
        }
        let first = self.next_word;
        self.next_word = end;
        Some(first)
    }

    fn give_words(&mut self, first: u32, words: u32) {
        self.free_words.entry(words).or_default().push(first);
    }
}
