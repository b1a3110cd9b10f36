//! What can go wrong, said with what it happened to; each error has its POSIX number.

use nvme_driver::disk::DiskError;

/// A filesystem call could not do what was asked. Nothing was changed unless the variant says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// No such file, directory or inode.
    #[error("{what} does not exist")]
    NotFound {
        /// The path, name or inode number.
        what: String,
    },
    /// The name is taken.
    #[error("{what} exists already")]
    Exists {
        /// The name.
        what: String,
    },
    /// A directory was needed.
    #[error("{what} is not a directory")]
    NotADirectory {
        /// The name or inode number.
        what: String,
    },
    /// A file was needed.
    #[error("{what} is a directory")]
    IsADirectory {
        /// The name or inode number.
        what: String,
    },
    /// The directory has entries.
    #[error("directory {what} is not empty")]
    NotEmpty {
        /// The name.
        what: String,
    },
    /// Not enough free blocks, counting the space that the next checkpoint is promised.
    #[error("no space: {needed} blocks of 4 KiB needed, {free} free; delete files, or return layouts")]
    NoSpace {
        /// Blocks asked for.
        needed: u64,
        /// Blocks that may be allocated.
        free: u64,
    },
    /// A name is longer than 255 bytes.
    #[error("a name of {len} bytes is too long (at most 255)")]
    NameTooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// The argument makes no sense.
    #[error("{reason}")]
    Invalid {
        /// What was wrong with what.
        reason: String,
    },
    /// The file would be larger than the format allows.
    #[error("a file of {size} bytes is too large (at most {max})")]
    TooLarge {
        /// The size asked for.
        size: u64,
        /// The largest size.
        max: u64,
    },
    /// The inode has as many names as its counter can hold.
    #[error("inode {ino} has too many links")]
    TooManyLinks {
        /// The inode number.
        ino: u64,
    },
    /// The filesystem takes no changes: mounted that way, or a device error latched it.
    #[error("the filesystem is read-only: {reason}")]
    ReadOnly {
        /// Why.
        reason: String,
    },
    /// The image contradicts itself.
    #[error("the image is damaged: {what}; run check, then check --repair")]
    Damaged {
        /// Where and how.
        what: String,
    },
    /// Neither superblock says cmbfs.
    #[error("{name} holds no cmbfs filesystem; make one with mkfs")]
    NotCmbfs {
        /// The device.
        name: String,
    },
    /// Another version of the format.
    #[error("the image has format version {found}; this program knows {known}: use a matching version")]
    Version {
        /// In the image.
        found: u32,
        /// Supported here.
        known: u32,
    },
    /// The image uses features that this program does not know.
    #[error("the image needs features {bits:#x} ({class}) that this program does not know")]
    Features {
        /// The unknown bits.
        bits: u64,
        /// Which class they are in.
        class: &'static str,
    },
    /// The device does not suit this filesystem.
    #[error("{name} cannot hold a cmbfs filesystem: {reason}")]
    Unsuitable {
        /// The device.
        name: String,
        /// Why not.
        reason: String,
    },
    /// A lease is in the way. It has been asked back; try again when it is returned or fenced.
    #[error("lease {lease} covers this range of inode {ino} and is being recalled; try again")]
    LeaseConflict {
        /// The inode.
        ino: u64,
        /// One lease that is in the way.
        lease: u64,
    },
    /// The lease is not valid (any more): released, fenced, or from another device generation.
    #[error("lease {lease} is stale: {reason}")]
    StaleLease {
        /// The lease.
        lease: u64,
        /// Why.
        reason: String,
    },
    /// The device failed. If it was a write or a flush the filesystem is read-only from here on.
    #[error(transparent)]
    Device(#[from] DiskError),
}

impl FsError {
    /// The `errno` value (Linux numbering) for callers that speak POSIX.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NotFound { .. } => 2,
            Self::Device(e) if e.is_no_space() => 28,
            Self::Device(_) => 5,
            Self::LeaseConflict { .. } => 11,
            Self::Exists { .. } => 17,
            Self::NotADirectory { .. } => 20,
            Self::IsADirectory { .. } => 21,
            Self::Invalid { .. } | Self::Unsuitable { .. } => 22,
            Self::TooLarge { .. } => 27,
            Self::NoSpace { .. } => 28,
            Self::ReadOnly { .. } => 30,
            Self::TooManyLinks { .. } => 31,
            Self::NameTooLong { .. } => 36,
            Self::NotEmpty { .. } => 39,
            Self::StaleLease { .. } => 116,
            Self::Damaged { .. } => 117,
            Self::NotCmbfs { .. } | Self::Version { .. } | Self::Features { .. } => 124,
        }
    }

    pub(crate) fn damaged(what: impl Into<String>) -> Self {
        Self::Damaged { what: what.into() }
    }

    pub(crate) fn invalid(reason: impl Into<String>) -> Self {
        Self::Invalid { reason: reason.into() }
    }

    pub(crate) fn no_inode(ino: u64) -> Self {
        Self::NotFound { what: format!("inode {ino}") }
    }
}

/// A name as shown in messages.
pub(crate) fn shown(name: &[u8]) -> String {
    format!("\"{}\"", String::from_utf8_lossy(name).escape_debug())
}
