//! Which path a client's bytes took (P11).

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes and calls by path, and what it took to get them through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct PathCounts {
    /// Window reads served by the CMB.
    pub cmb_reads: u64,
    /// Bytes of them.
    pub cmb_read_bytes: u64,
    /// Window reads served by the host cache.
    pub host_reads: u64,
    /// Bytes of them.
    pub host_read_bytes: u64,
    /// Write sections into the CMB.
    pub cmb_writes: u64,
    /// Bytes of them.
    pub cmb_write_bytes: u64,
    /// Write sections into the host cache.
    pub host_writes: u64,
    /// Bytes of them.
    pub host_write_bytes: u64,
    /// Reads that no window could serve: the server sent the bytes itself.
    pub sent_reads: u64,
    /// Bytes of them.
    pub sent_read_bytes: u64,
    /// Times the server had to be asked to make a window resident.
    pub faults: u64,
    /// Reads begun again because the window moved under every attempt.
    pub moving: u64,
    /// Write sections that were fenced and made again.
    pub fenced: u64,
}

macro_rules! fields {
    ($mac:ident) => {
        $mac!(
            cmb_reads,
            cmb_read_bytes,
            host_reads,
            host_read_bytes,
            cmb_writes,
            cmb_write_bytes,
            host_writes,
            host_write_bytes,
            sent_reads,
            sent_read_bytes,
            faults,
            moving,
            fenced
        );
    };
}

macro_rules! shared {
    ($($field:ident),*) => {
        /// The same, added up over all mappings of a client.
        #[derive(Debug, Default)]
        pub(super) struct SharedCounts {
            $($field: AtomicU64,)*
        }
        impl SharedCounts {
            pub(super) fn add(&self, counts: &PathCounts) {
                $(self.$field.fetch_add(counts.$field, Ordering::Relaxed);)*
            }
            pub(super) fn get(&self) -> PathCounts {
                PathCounts { $($field: self.$field.load(Ordering::Relaxed),)* }
            }
        }
    };
}
fields!(shared);
