//! Memory that devices and other processes share with us.
//!
//! * [`Mapping`]: one `mmap`ed range, read and written only through copies and atomic words
//! * [`copy`]: the racing copies themselves
pub mod copy;
mod mapping;

pub use mapping::{Access, MapError, Mapping, OutOfRange};

/// The page size that everything here is granular to: 4 KiB.
pub const PAGE: usize = 4096;
