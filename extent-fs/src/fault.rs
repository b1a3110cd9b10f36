//! What can be wrong with an image, kind by kind.

use crate::error::FsError;
use crate::inode::Ino;

/// One thing that is wrong with an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// One of the two superblocks is unreadable.
    #[error("superblock copy {copy} is unreadable")]
    Superblock {
        /// 0 or 1.
        copy: usize,
    },
    /// A chunk of the checkpoint is unreadable.
    #[error("chunk {index} of the checkpoint, at block {block}, is unreadable")]
    Chunk {
        /// Its number.
        index: u32,
        /// Its first block.
        block: u64,
    },
    /// The checkpoint holds another number of inodes than it says.
    #[error("the checkpoint holds {found} inodes instead of {expected}")]
    Inodes {
        /// Inodes found.
        found: u64,
        /// Inodes expected.
        expected: u64,
    },
    /// A log record that is known to have been durable is unreadable.
    #[error("log record {sequence} is unreadable, though it was durable (the last one seen is {last})")]
    Record {
        /// Its sequence.
        sequence: u64,
        /// The highest sequence found behind it.
        last: u64,
    },
    /// An item contradicts what is known.
    #[error("{what}")]
    Item {
        /// How.
        what: String,
    },
    /// There is no root directory.
    #[error("there is no root directory")]
    Root,
    /// An entry names an inode that does not exist.
    #[error("directory {dir}: {name} names inode {ino}, which does not exist")]
    Dangling {
        /// The directory.
        dir: Ino,
        /// The name, as shown in messages.
        name: String,
        /// The inode.
        ino: Ino,
    },
    /// A directory has more than one name, or the root directory has one.
    #[error("directory {ino} has a second name {name} in directory {dir}")]
    SecondName {
        /// The directory with two names.
        ino: Ino,
        /// Where the second name is.
        dir: Ino,
        /// The name, as shown in messages.
        name: String,
    },
    /// A directory does not know the directory it is in.
    #[error("directory {ino} is in directory {dir} but says it is in {says}")]
    Parent {
        /// The directory.
        ino: Ino,
        /// Where its name is.
        dir: Ino,
        /// What it says.
        says: Ino,
    },
    /// An inode counts on names that do not exist, or the other way round.
    #[error("inode {ino} has {found} links and says {says}")]
    Links {
        /// The inode.
        ino: Ino,
        /// Links found.
        found: u32,
        /// Links that it says it has.
        says: u32,
    },
    /// No path leads to an inode.
    #[error("no path leads to inode {ino}")]
    Unreachable {
        /// The inode.
        ino: Ino,
    },
    /// Two owners of one block.
    #[error("blocks {block} to {} belong to inode {ino} and to {other}", block + blocks - 1)]
    Overlap {
        /// First shared block.
        block: u64,
        /// How many.
        blocks: u64,
        /// The owner that comes second in the order of blocks.
        ino: Ino,
        /// The other owner, in words.
        other: String,
    },
    /// An extent lies in the fixed places or behind the device.
    #[error("inode {ino}: blocks {block} to {} are not for files", block + blocks - 1)]
    OutOfRange {
        /// The inode.
        ino: Ino,
        /// First block.
        block: u64,
        /// How many.
        blocks: u64,
    },
    /// Written blocks behind the end of a file.
    #[error("inode {ino} has written blocks behind its end, from file block {block}")]
    BehindEnd {
        /// The inode.
        ino: Ino,
        /// First such block of the file.
        block: u64,
    },
    /// A mounted filesystem's free map is not the complement of what is used.
    #[error("the free map is wrong: {what}")]
    FreeMap {
        /// How.
        what: String,
    },
}

/// Where faults go: a list, or the caller's error.
pub(crate) struct Faults {
    pub(crate) list: Vec<Fault>,
    strict: bool,
}

impl Faults {
    /// The first fault is an error.
    pub(crate) fn strict() -> Self {
        Self { list: Vec::new(), strict: true }
    }

    /// Faults are gathered.
    pub(crate) fn gather() -> Self {
        Self { list: Vec::new(), strict: false }
    }

    pub(crate) fn add(&mut self, fault: Fault) -> Result<(), FsError> {
        if self.strict {
            return Err(FsError::damaged(fault.to_string()));
        }
        self.list.push(fault);
        Ok(())
    }
}
