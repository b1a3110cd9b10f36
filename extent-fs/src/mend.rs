//! Changes to the metadata that only repairing makes.

use crate::extents::{Piece, Run};
use crate::inode::{Body, Directory, Ino, Inode, MAX_FILE_BLOCKS, ROOT};
use crate::io::BLOCK;
use crate::state::{Applied, Freed, State};

const LOST_AND_FOUND: &[u8] = b"lost+found";

impl State {
    fn fresh_directory(parent: Ino, mode: u16) -> Inode {
        Inode {
            mode,
            placement: 0,
            nlink: 2,
            uid: 0,
            gid: 0,
            saved: 0,
            size: 0,
            atime: 0,
            mtime: 0,
            ctime: 0,
            blocks: 0,
            body: Body::Directory(Box::new(Directory::new(parent))),
        }
    }

    /// An empty root directory in the place of one that is lost (or of a file that has its number).
    pub(crate) fn new_root(&mut self) -> Applied {
        if self.get(ROOT).is_some() {
            self.forget(ROOT, &mut Freed::new())?;
        }
        self.next_ino = self.next_ino.max(ROOT + 1);
        self.put(ROOT, Self::fresh_directory(ROOT, 0o755));
        Ok(())
    }

    /// Removes the names of `ino` in `dir`, but for the first `keep`.
    pub(crate) fn drop_names(&mut self, dir: Ino, ino: Ino, keep: usize) -> Applied {
        self.change_dir(dir, |i| {
            if let Body::Directory(d) = &mut i.body {
                let names: Vec<_> =
                    d.entries.iter().filter(|e| *e.1 == ino).map(|e| e.0.clone()).skip(keep).collect();
                for name in names {
                    d.remove(&name);
                }
            }
        })
    }

    pub(crate) fn set_parent(&mut self, ino: Ino, parent: Ino) -> Applied {
        self.change_dir(ino, |i| {
            if let Body::Directory(d) = &mut i.body {
                d.parent = parent;
            }
        })
    }

    pub(crate) fn set_links(&mut self, ino: Ino, links: u32) -> Applied {
        self.change(ino, |i| i.nlink = links)
    }

    /// The directory for what has lost its name; it is made if need be.
    pub(crate) fn lost_and_found(&mut self) -> Applied<Ino> {
        let root = self.get(ROOT).and_then(Inode::directory);
        let there = root.and_then(|d| d.entries.get(LOST_AND_FOUND).copied());
        if let Some(ino) = there.filter(|&i| self.get(i).is_some_and(|i| i.directory().is_some())) {
            return Ok(ino);
        }
        let ino = self.next_ino;
        self.next_ino += 1;
        let mut name = LOST_AND_FOUND.to_vec();
        while root_has(self, &name) {
            name.push(b'+');
        }
        self.put(ino, Self::fresh_directory(ROOT, 0o700));
        self.add_name(ROOT, &name, ino, 0, true)?;
        Ok(ino)
    }

    /// Gives an inode without a path a name in `home`.
    pub(crate) fn adopt(&mut self, home: Ino, ino: Ino) -> Applied {
        let is_dir = self.get(ino).is_some_and(|i| i.directory().is_some());
        if is_dir {
            // A directory in a circle loses its name there first.
            let holders: Vec<Ino> = self
                .iter()
                .filter(|(_, i)| i.directory().is_some_and(|d| d.entries.values().any(|&e| e == ino)))
                .map(|(dir, _)| dir)
                .collect();
            for dir in holders {
                self.drop_names(dir, ino, 0)?;
            }
            self.set_parent(ino, home)?;
        } else {
            self.set_links(ino, 1)?;
        }
        self.add_name(home, format!("inode-{ino}").as_bytes(), ino, 0, is_dir)
    }

    /// Makes every part of a file that lies on these disk blocks a hole.
    pub(crate) fn drop_blocks(&mut self, ino: Ino, block: u64, blocks: u64) -> Applied {
        let Some(map) = self.get(ino).and_then(Inode::extents) else { return Ok(()) };
        let hit: Vec<Piece> = map
            .iter()
            .filter(|p| {
                p.run.disk < block.saturating_add(blocks) && block < p.run.disk + u64::from(p.run.len)
            })
            .collect();
        for p in hit {
            self.unmap(ino, p.file, p.end(), &mut Freed::new())?;
        }
        Ok(())
    }

    /// Frees a file's blocks from `block` on.
    pub(crate) fn drop_behind(&mut self, ino: Ino, block: u64) -> Applied {
        debug_assert!(self.get(ino).is_none_or(|i| block >= i.size.div_ceil(BLOCK)));
        self.unmap(ino, block, MAX_FILE_BLOCKS, &mut Freed::new())
    }

    /// Puts another disk block behind one block of a file.
    pub(crate) fn replace_block(&mut self, ino: Ino, file: u64, disk: u64, written: bool) -> Applied {
        self.map(ino, &Piece { file, run: Run { disk, len: 1, written } }, &mut Freed::new())
    }
}

fn root_has(state: &State, name: &[u8]) -> bool {
    state.get(ROOT).and_then(Inode::directory).is_some_and(|d| d.entries.contains_key(name))
}
