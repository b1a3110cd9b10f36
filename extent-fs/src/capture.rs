//! A checkpoint's items, gathered while changes go on: every inode as it was when the checkpoint began.
//!
//! Inodes are saved in order; who changes one before its turn saves it first. An inode that takes more than one item for its
//! extents or names is saved item by item: from its first change on it remembers what it was (see `past`). So no change waits for
//! more than one inode's attributes, however large the inode.

use std::collections::BTreeSet;

use crate::inode::{Ino, Inode};
use crate::state::State;

/// Inodes from `cursor` to `end` are still to be saved.
#[derive(Debug)]
pub(crate) struct Capture {
    id: u32,
    cursor: Ino,
    end: Ino,
    /// Inodes of which the attributes are saved, and the rest is not yet.
    begun: BTreeSet<Ino>,
    out: Vec<u8>,
    /// Bytes at the front of `out` that are on disk already.
    taken: usize,
}

impl Capture {
    /// What lies ready of the checkpoint, in whole items, if it is at least `len` bytes.
    pub(crate) fn ready(&self, len: usize) -> Option<&[u8]> {
        self.out.get(self.taken..).filter(|r| r.len() >= len)
    }

    /// `len` bytes are on disk.
    pub(crate) fn take(&mut self, len: usize) {
        self.taken += len;
        if self.taken * 2 >= self.out.len() {
            self.out.drain(..self.taken);
            self.taken = 0;
        }
    }

    /// Saves an inode, or begins to, unless that was done before.
    fn save(&mut self, ino: Ino, inode: &mut Inode) {
        if inode.saved == self.id {
            return;
        }
        inode.saved = self.id;
        if inode.save_begin(ino, &mut self.out) {
            self.begun.insert(ino);
        }
    }
}

impl State {
    /// Begins to gather a checkpoint of the state as it is now.
    pub(crate) fn begin_capture(&mut self) {
        self.captures = self.captures.wrapping_add(1).max(1);
        self.capture = Some(Capture {
            id: self.captures,
            cursor: 0,
            end: self.next_ino,
            begun: BTreeSet::new(),
            out: Vec::new(),
            taken: 0,
        });
    }

    /// Saves an inode that is about to change into the capture that still lacks it.
    pub(crate) fn save_first(&mut self, ino: Ino) {
        if let Some(c) = &mut self.capture
            && (c.cursor..c.end).contains(&ino)
            && let Some(inode) = self.inodes.get_mut(&ino)
        {
            c.save(ino, inode);
        }
    }

    /// Saves all of an inode that is about to go.
    pub(crate) fn save_last(&mut self, ino: Ino) {
        self.save_first(ino);
        if let Some(c) = &mut self.capture
            && c.begun.remove(&ino)
            && let Some(inode) = self.inodes.get_mut(&ino)
        {
            while inode.save_more(ino, &mut c.out) {}
        }
    }

    /// Saves more until `want` bytes lie ready, or all are saved.
    pub(crate) fn capture_more(&mut self, want: usize) {
        let Some(c) = &mut self.capture else { return };
        loop {
            while let Some(&ino) = c.begun.first() {
                if c.out.len() - c.taken >= want {
                    return;
                }
                let more = self.inodes.get_mut(&ino).is_some_and(|i| i.save_more(ino, &mut c.out));
                if !more {
                    c.begun.remove(&ino);
                }
            }
            let mut all = true;
            for (&ino, inode) in self.inodes.range_mut(c.cursor..c.end) {
                c.cursor = ino;
                if c.out.len() - c.taken >= want {
                    return;
                }
                c.save(ino, inode);
                if !c.begun.is_empty() {
                    c.cursor = ino + 1;
                    all = false;
                    break;
                }
            }
            if all {
                c.cursor = c.end;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Take;
    use crate::extents::{Piece, Run};
    use crate::inode::{Kind, ROOT};
    use crate::item::Item;
    use crate::names::NewInode;
    use crate::state::Freed;

    fn apply(state: &mut State, item: &Item<'_>) {
        state.apply(item, &mut Freed::new()).unwrap();
    }

    fn create(state: &mut State, parent: Ino, kind: Kind, name: &[u8]) -> Ino {
        let ino = state.next_ino;
        apply(state, &Item::Create { parent, ino, kind, mode: 0o644, uid: 1, gid: 2, time: ino, name });
        ino
    }

    fn map(state: &mut State, ino: Ino, file: u64) {
        let run = Run { disk: 10 * ino + 7 * file, len: 1, written: file.is_multiple_of(3) };
        let maps = vec![Piece { file, run }];
        apply(state, &Item::Write { ino, size: 1 << 30, time: file, maps, commits: Vec::new() });
    }

    fn name(i: u64) -> Vec<u8> {
        format!("name-{i}").into_bytes()
    }

    /// Small and large directories and files, and inodes without anything.
    fn rig() -> (State, Vec<Ino>, Vec<Ino>) {
        let mut state = State::fresh(1 << 40, 1, &NewInode::directory(), 0);
        let dirs: Vec<Ino> = (0..4).map(|i| create(&mut state, ROOT, Kind::Directory, &name(i))).collect();
        for (i, &dir) in dirs.iter().enumerate() {
            for n in 0..[3, 64, 65, 500][i] {
                create(&mut state, dir, Kind::File, &name(2 * n));
            }
        }
        let files: Vec<Ino> = (0..4).map(|i| create(&mut state, ROOT, Kind::File, &name(100 + i))).collect();
        for (i, &file) in files.iter().enumerate() {
            for n in 0..[1, 256, 257, 900][i] {
                map(&mut state, file, 2 * n);
            }
        }
        (state, dirs, files)
    }

    /// Everything that a checkpoint keeps.
    fn all(state: &State) -> Vec<String> {
        let inode = |(ino, i): (Ino, &Inode)| {
            let extents: Option<Vec<Piece>> = i.extents().map(|m| m.iter().collect());
            let entries = i.directory().map(|d| (d.parent, &d.entries));
            let times = (i.atime, i.mtime, i.ctime);
            let (mode, placement, links) = (i.mode, i.placement, i.nlink);
            format!(
                "{ino} {mode} {placement} {links} {} {times:?} {} {extents:?} {entries:?}",
                i.size, i.blocks
            )
        };
        state.iter().map(inode).collect()
    }

    #[test]
    fn shows_every_inode_as_it_was_whatever_changes_meanwhile() {
        // A step of a full-period generator, so that what changes has no pattern.
        let mut seed = 1u64;
        let mut any = move |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for round in 0..20 {
            let (mut state, dirs, files) = rig();
            let (begun, cost, next_ino) = (all(&state), state.cost as usize, state.next_ino);
            state.begin_capture();
            let mut stream = Vec::new();
            while stream.len() < cost {
                for _ in 0..any(30) {
                    let (dir, file) = (dirs[any(4) as usize], files[any(4) as usize]);
                    let (n, m) = (name(any(1000)), name(any(1000)));
                    let there = |n: &[u8]| {
                        state.get(dir).and_then(Inode::directory).is_some_and(|d| d.entries.contains_key(n))
                    };
                    let (has_n, has_m, time) = (there(&n), there(&m), any(1000));
                    let has_file = state.get(file).is_some();
                    match any(7) {
                        0 if !has_n => drop(create(&mut state, dir, Kind::File, &n)),
                        1 if has_n => {
                            apply(&mut state, &Item::Unlink { parent: dir, time, keep: false, name: &n });
                        }
                        2 if has_n && !has_m => {
                            let (old, new) = (&n[..], &m[..]);
                            apply(
                                &mut state,
                                &Item::Rename { from: dir, to: dir, time, keep: false, old, new },
                            );
                        }
                        3 if has_file => map(&mut state, file, any(2000)),
                        4 if has_file => {
                            apply(
                                &mut state,
                                &Item::Punch { ino: file, first: any(2000), blocks: any(9), time },
                            );
                        }
                        6 if has_file => {
                            let Item::Attr { ino, mode, uid, gid, atime, mtime, ctime, .. } =
                                state.get(file).unwrap().attr(file)
                            else {
                                unreachable!()
                            };
                            let placement = any(4) as u8;
                            apply(
                                &mut state,
                                &Item::Attr { ino, mode, uid, gid, atime, mtime, ctime, placement },
                            );
                        }
                        5 if has_file && any(40) == 0 => {
                            let i = files.iter().position(|&f| f == file).unwrap() as u64;
                            let name = name(100 + i);
                            apply(&mut state, &Item::Unlink { parent: ROOT, time, keep: false, name: &name });
                        }
                        _ => {}
                    }
                }
                let want = (1 + any(6000) as usize).min(cost - stream.len());
                state.capture_more(want);
                let capture = state.capture.as_mut().unwrap();
                stream.extend_from_slice(&capture.ready(want).unwrap()[..want]);
                capture.take(want);
            }
            let capture = state.capture.take().unwrap();
            assert!(
                capture.begun.is_empty() && capture.ready(1).is_none(),
                "round {round}: more than was counted"
            );
            let mut got = State::empty(1 << 40, next_ino);
            let mut rest = Take(&stream);
            while !rest.is_empty() {
                got.load(&Item::decode(&mut rest).unwrap()).unwrap();
            }
            assert_eq!(all(&got), begun, "round {round}");
        }
    }
}
