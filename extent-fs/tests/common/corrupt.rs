//! Finding the structures of an image by their bytes, and changing them so that their checksums are right again.

pub const BLOCK: usize = 4096;

/// An image being corrupted. It knows the format by itself, from docs/on-disk-format.md.
pub struct Corrupter {
    pub bytes: Vec<u8>,
}

/// A structure with a checksum: where it is, where its CRC is, and what the CRC covers.
#[derive(Clone, Copy, Debug)]
pub struct Structure {
    pub at: usize,
    pub end: usize,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Superblock,
    Sealed,
}

/// An item inside a checkpoint or record: offset of its body and kind.
#[derive(Clone, Copy, Debug)]
pub struct ItemAt {
    pub kind: u16,
    pub body: usize,
    pub len: usize,
    pub inside: Structure,
}

/// A name in a directory of the checkpoint: where its inode number is.
#[derive(Clone, Copy, Debug)]
pub struct EntryAt {
    pub at: usize,
    pub dir: u64,
    pub ino: u64,
    pub inside: Structure,
}

pub const INODE: u16 = 16;
pub const EXTENTS: u16 = 17;
pub const ENTRIES: u16 = 18;

impl Corrupter {
    pub fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap())
    }

    pub fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    pub fn put(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    /// The two superblocks.
    pub fn superblocks(&self) -> Vec<Structure> {
        [0, 16 * BLOCK]
            .into_iter()
            .map(|at| Structure { at, end: at + BLOCK, kind: Kind::Superblock })
            .collect()
    }

    fn sealed(&self, magic: &[u8; 4], step: usize, len_at: usize) -> Vec<Structure> {
        let mut out = Vec::new();
        for at in (0..self.bytes.len()).step_by(step) {
            if &self.bytes[at..at + 4] != magic {
                continue;
            }
            let end = at + 64 + self.u32(at + len_at) as usize;
            let s = Structure { at, end, kind: Kind::Sealed };
            if end <= self.bytes.len() && self.crc(s) == self.u32(at + 4) {
                out.push(s);
            }
        }
        out
    }

    /// Log records that do not wrap, by place.
    pub fn records(&self) -> Vec<Structure> {
        self.sealed(b"CFSR", 512, 36)
    }

    /// Chunks of the current checkpoint, by number.
    pub fn chunks(&self) -> Vec<Structure> {
        let generation = self.u64(56).max(self.u64(16 * BLOCK + 56));
        let mut chunks = self.sealed(b"CFSC", BLOCK, 20);
        chunks.retain(|c| self.u64(c.at + 8) == generation);
        chunks.sort_by_key(|c| self.u32(c.at + 16));
        chunks
    }

    /// The items of the checkpoint; those that go on in another chunk are left out.
    pub fn items(&self) -> Vec<ItemAt> {
        let mut out = Vec::new();
        for c in self.chunks() {
            let mut at = c.at + 64 + self.u32(c.at + 40) as usize;
            while at + 8 <= c.end {
                let kind = u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]]);
                let len = self.u32(at + 4) as usize;
                if at + 8 + len <= c.end {
                    out.push(ItemAt { kind, body: at + 8, len, inside: c });
                }
                at += 8 + len;
            }
        }
        out
    }

    /// The item of this kind that belongs to `ino`.
    pub fn item(&self, kind: u16, ino: u64) -> ItemAt {
        let item = self.items().into_iter().find(|i| i.kind == kind && self.u64(i.body) == ino);
        item.unwrap_or_else(|| panic!("no item of kind {kind} for inode {ino}"))
    }

    /// Every name in the checkpoint; those that go on in another chunk are left out.
    pub fn entries(&self) -> Vec<EntryAt> {
        let mut out = Vec::new();
        for item in self.items().into_iter().filter(|i| i.kind == ENTRIES) {
            let mut at = item.body + 16;
            while at < item.body + item.len {
                let (dir, ino) = (self.u64(item.body), self.u64(at));
                out.push(EntryAt { at, dir, ino, inside: item.inside });
                at += 9 + usize::from(self.bytes[at + 8]);
            }
        }
        out
    }

    /// Where in the image the inode number of an entry is.
    pub fn entry(&self, dir: u64, name: &str) -> (usize, Structure) {
        for item in self.items().into_iter().filter(|i| i.kind == ENTRIES && self.u64(i.body) == dir) {
            let mut at = item.body + 16;
            while at < item.body + item.len {
                let len = usize::from(self.bytes[at + 8]);
                if &self.bytes[at + 9..at + 9 + len] == name.as_bytes() {
                    return (at, item.inside);
                }
                at += 9 + len;
            }
        }
        panic!("no entry {name} in {dir}");
    }

    fn crc(&self, s: Structure) -> u32 {
        let seed = crc32c::crc32c(&self.bytes[16..32]);
        match s.kind {
            Kind::Sealed => crc32c::crc32c_append(seed, &self.bytes[s.at + 8..s.end]),
            Kind::Superblock => {
                let mut block = self.bytes[s.at..s.end].to_vec();
                block[12..16].fill(0);
                crc32c::crc32c_append(crc32c::crc32c(&block[16..32]), &block)
            }
        }
    }

    /// Makes the checksum fit the changed bytes.
    pub fn seal(&mut self, s: Structure) {
        let crc = self.crc(s).to_le_bytes();
        self.put(s.at + if s.kind == Kind::Superblock { 12 } else { 4 }, &crc);
    }
}
