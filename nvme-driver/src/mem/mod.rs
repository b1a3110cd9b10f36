//! Memory that devices and other processes share with us.
//!
//! * [`Mapping`]: one `mmap`ed range, read and written only through copies and atomic words
//! * [`copy`]: the racing copies themselves
//! * `removal`: memory of a device that went away
pub mod copy;
mod mapping;
mod removal;

pub use mapping::{Access, MapError, Mapping, OutOfRange};

/// The page size that everything here is granular to: 4 KiB.
pub const PAGE: usize = 4096;
