//! What happens.

use p2p::layout::Home;
use p2p::reader::Outcome;
use p2p::windows::{Ensured, PeerPath, Progress, Scope, Want};
use p2p::writer::{Finished, NotEntered};
use rand_xoshiro::rand_core::Rng;

use crate::common::{GRACE, writing};
use crate::world::{
    FILES, LEN, OBJECTS, OWN, STABLE, W, WINDOWS, WORDS, World, bytes_of, name, word, words_of,
};

impl World {
    pub fn step(&mut self) {
        let (client, object, window) =
            (self.pick(self.clients.len()), self.pick(OBJECTS), self.pick(WINDOWS));
        let what = self.pick(100);
        self.last.push(format!(
            "{what} by {client} on {object}/{window}, device {}",
            self.rig.drive.reset_count()
        ));
        match what {
            0..22 => self.read(client, object, window),
            22..42 => self.write(client, object, window),
            42..47 => self.open_section(client, object, window),
            47..53 => self.borrow(client, object, window),
            53..61 => self.peer_now(object, window),
            61..66 => self.peer_later(object, window),
            66..72 => self.end_some(),
            72..82 => self.revoke(client, object, window),
            82..85 => self.commit(object),
            85..87 => self.truncate(object),
            87..89 => self.layout(object, window),
            89..91 => {
                let index = self.index(object, window);
                self.rig.windows.promote(index, &mut self.rig.drive, self.rig.now);
            }
            91 => self.die(client),
            92 => {
                let ok = self.rig.drive.reset_count() > 0 || self.rng.next_u64().is_multiple_of(4);
                if ok && self.resets() {
                    self.rig.drive.reset();
                }
            }
            93 => {
                let index = self.index(object, window);
                let want = [Want::Auto, Want::Cmb, Want::Host][self.pick(3)];
                self.rig.windows.ensure(index, want, &mut self.rig.drive, self.rig.now).unwrap();
            }
            _ => {
                self.rig.now += GRACE / 3;
                self.rig.poll();
            }
        }
        self.verify_borrows();
        if self.is_unresolved() && self.pick(3) == 0 {
            self.resolve();
        }
    }

    fn read(&mut self, client: usize, object: usize, window: usize) {
        let first = self.pick(WORDS);
        let n = 1 + self.pick(WORDS - first);
        let hold = self.clients[client].1[object][window];
        let (view, control) = (self.view(client, object), self.clients[client].0.control.clone());
        let mut bytes = vec![0; n * 8];
        for _ in 0..20 {
            match control.read(hold.handle, &view, first * 8, &mut bytes) {
                Outcome::Copied(home) => {
                    let got = words_of(&bytes);
                    if self.is_unresolved() {
                        // Whatever is accepted is this window's, reset or no reset.
                        self.check_words(object, window, &got, "a reader, after a reset");
                    }
                    return self.check(object, window, first, &got, &format!("a reader, from {home:?}"));
                }
                Outcome::NotResident | Outcome::DeviceMoved | Outcome::Moving => {}
                other => panic!("{other:?}"),
            }
            let index = hold.handle.index;
            match self.rig.windows.ensure(index, Want::Auto, &mut self.rig.drive, self.rig.now).unwrap() {
                Ensured::Refused(_) => {
                    let from = (window * W + first * 8) as u64;
                    let range = from..from + bytes.len() as u64;
                    let (w, d) = (&mut self.rig.windows, &mut self.rig.drive);
                    w.read_through(name(object), range, &mut bytes, d).unwrap();
                    let got = words_of(&bytes);
                    self.check_words(object, window, &got, "read through");
                    return self.check(object, window, first, &got, "read through");
                }
                Ensured::Moving => self.settle(),
                Ensured::Ready(..) => {}
            }
        }
        // A window of a device's own memory that has no other place stays closed for as long as somebody is silent in it.
        let (home, moving) = self.rig.windows.status(hold.handle.index).map(|w| (w.home, w.moving)).unwrap();
        let closed = object == OWN && home == Home::Cmb && moving;
        assert!(closed, "never readable: object {object} window {window}\n{}", self.story());
        self.end_sections_of(object, window);
        self.settle();
        self.read(client, object, window);
    }

    fn write(&mut self, client: usize, object: usize, window: usize) {
        let first = self.pick(STABLE);
        let n = 1 + self.pick((STABLE - first).min(700));
        let hold = self.clients[client].1[object][window];
        let view = self.view(client, object);
        let (control, slots) = (self.clients[client].0.control.clone(), self.clients[client].0.slots.clone());
        // In some sections the server acts.
        let act = self.pick(5);
        for _ in 0..20 {
            if self.is_unresolved() {
                // Else what is written next would be in pages that the model does not know.
                self.resolve();
            }
            let Some(mut slot) = slots.take() else { return };
            match slot.write(&control, writing(&hold), &view) {
                Ok(mut section) => {
                    self.time += 1;
                    let value = word(object, window, self.time);
                    section.write(first * 8, &bytes_of(&vec![value; n])).unwrap();
                    let at = window * WORDS + first;
                    if act == 0 {
                        let scope = Scope::Window(hold.handle.index);
                        self.rig.windows.revoke(&scope, &mut self.rig.drive, self.rig.now).unwrap();
                        self.rig.poll();
                        if self.rng.next_u64().is_multiple_of(2) {
                            self.settle();
                        }
                    }
                    let done = section.finish() == Finished::Done;
                    if done {
                        self.want[object][at..at + n].fill(value);
                        return;
                    }
                    self.adopt(object, window, first, n, value);
                }
                Err(NotEntered::Moving) => self.settle(),
                Err(NotEntered::NotResident | NotEntered::DeviceMoved) => {
                    let index = hold.handle.index;
                    let (w, d) = (&mut self.rig.windows, &mut self.rig.drive);
                    if let Ensured::Refused(_) = w.ensure(index, Want::Auto, d, self.rig.now).unwrap() {
                        self.settle();
                    }
                }
                Err(other) => panic!("{other:?}"),
            }
        }
    }

    /// A section was fenced: its words may be there or not, and will be written again or not. What is there is the truth now.
    fn adopt(&mut self, object: usize, window: usize, first: usize, n: usize, value: u64) {
        self.settle();
        let mut bytes = vec![0; n * 8];
        let from = (window * W + first * 8) as u64;
        let (w, d) = (&mut self.rig.windows, &mut self.rig.drive);
        w.read_through(name(object), from..from + bytes.len() as u64, &mut bytes, d).unwrap();
        let at = window * WORDS + first;
        for (want, got) in self.want[object][at..at + n].iter_mut().zip(words_of(&bytes)) {
            if got == value {
                *want = value;
            }
        }
    }

    fn peer_now(&mut self, object: usize, window: usize) {
        let index = self.index(object, window);
        let write = self.pick(3) == 0;
        let (w, d, now) = (&mut self.rig.windows, &mut self.rig.drive, self.rig.now);
        let PeerPath::Direct(m) = w.map_peer(self.peers[0], index, write, d, now).unwrap() else { return };
        let engine = self.engines[0].clone();
        if self.is_unresolved() {
            return;
        }
        if write {
            self.time += 1;
            let value = word(object, window, self.time);
            let first = self.pick(STABLE - 64);
            engine.local().write(0, &bytes_of(&[value; 64])).unwrap();
            engine.copy(m.iova + first as u64 * 8, 0, 512, true).unwrap();
            self.want[object][window * WORDS + first..][..64].fill(value);
        }
        engine.copy(m.iova, 0, W, false).unwrap();
        let mut bytes = vec![0; W];
        engine.local().read(0, &mut bytes).unwrap();
        self.check(object, window, 0, &words_of(&bytes), "a peer");
        if self.pick(2) == 0 {
            self.rig.windows.unmap_peer(self.peers[0], index).unwrap();
            assert!(engine.copy(m.iova, 0, 8, false).is_err());
        }
    }

    fn revoke(&mut self, client: usize, object: usize, window: usize) {
        let index = self.index(object, window);
        let bytes = (window * W / 2) as u64..(window * W + 100) as u64;
        let scope = match self.pick(8) {
            0..3 => Scope::Window(index),
            3 => Scope::Range { object: name(object), bytes },
            4 => Scope::Object(name(object)),
            5 => Scope::Peer(self.peers[self.pick(2)]),
            6 => Scope::Everything,
            _ => return self.rehold(client),
        };
        let evict = self.pick(3) == 0 && !matches!(scope, Scope::Peer(_));
        let (w, d, now) = (&mut self.rig.windows, &mut self.rig.drive, self.rig.now);
        let ticket = if evict { w.evict(&scope, d, now) } else { w.revoke(&scope, d, now) }.unwrap();
        if self.pick(2) == 0 {
            self.settle();
            let progress = self.rig.windows.progress(ticket);
            let stuck = matches!(progress, Some(Progress::Pending(_)));
            // A drive that fails may keep a window from going, and so may somebody silent where there is no other place.
            let closed = self.rig.windows.iter().any(|(_, w)| w.object == name(OWN) && w.moving);
            assert!(!stuck || self.is_bad() || closed, "{scope:?}: {progress:?} for ever\n{}", self.story());
        }
    }

    /// A client gives a window back that it is not in, and takes it again.
    fn rehold(&mut self, client: usize) {
        let (object, window) = (self.pick(OBJECTS), self.pick(WINDOWS));
        let (id, old) = (self.clients[client].0.id, self.clients[client].1[object][window]);
        if self.rig.windows.release(id, old.handle.index).is_err()
            || self.is_borrowed_by(client, object, window)
        {
            // In a section, or it holds a borrow of it: such a client would give up its claim.
            let again = self.rig.windows.hold(id, name(object), (window * W) as u64, true).unwrap();
            self.clients[client].1[object][window] = again;
            return;
        }
        let again = self.rig.windows.hold(id, name(object), (window * W) as u64, true).unwrap();
        self.clients[client].1[object][window] = again;
    }

    fn truncate(&mut self, object: usize) {
        if object >= FILES {
            return;
        }
        let at = self.pick(LEN / 8);
        self.want[object][at..].fill(0);
        // What the filesystem does: the file's own bytes beyond its end are gone first.
        self.rig.drive.objects.get_mut(&name(object)).unwrap()[at * 8..].fill(0);
        let (w, d) = (&mut self.rig.windows, &mut self.rig.drive);
        w.truncate(name(object), at as u64 * 8, d, self.rig.now).unwrap();
        self.settle();
    }

    /// Somebody has the blocks under a window, and writes them.
    fn layout(&mut self, object: usize, window: usize) {
        if object >= FILES {
            return;
        }
        let bytes = (window * W) as u64..((window + 1) * W) as u64;
        let scope = Scope::Range { object: name(object), bytes: bytes.clone() };
        self.rig.windows.exclude(name(object), bytes.clone()).unwrap();
        let ticket = self.rig.windows.evict(&scope, &mut self.rig.drive, self.rig.now).unwrap();
        self.settle();
        let gone =
            matches!(self.rig.windows.progress(ticket), Some(Progress::Done(r)) if r.failed.is_empty());
        let home = self.rig.windows.status(self.index(object, window)).unwrap().home;
        if gone && home == Home::None && !self.is_unresolved() {
            self.time += 1;
            let value = word(object, window, self.time);
            let file = self.rig.drive.objects.get_mut(&name(object)).unwrap();
            file[window * W..][..STABLE * 8].copy_from_slice(&bytes_of(&vec![value; STABLE]));
            self.want[object][window * WORDS..][..STABLE].fill(value);
            self.read(0, object, window);
        }
        self.rig.windows.readmit(name(object), &bytes);
    }
}
