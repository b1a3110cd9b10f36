//! A tiny extent filesystem with leases: blocks, names, layouts. It knows nothing of memory windows.
//!
//! All metadata is in memory. A change becomes items; the items of one or many changes become one record in the log; a
//! sync writes that record and flushes. When the log grows, a checkpoint of all metadata is written beside it.
//! `docs/on-disk-format.md` describes the bytes, `docs/extent-fs.md` argues why every power cut is survived.
//!
//! The rooms, from the device upwards:
//! * `io`: the disk in bytes, with the latch that stops all writes after the first device error; `time`: the system's clock
//! * `codec`, `superblock`, `record`, `item`, `chunk`: the on-disk format, one structure each
//! * `log`: the ring that records live in
//! * `extents`, `inode`, `state`: the metadata in memory, and how an item changes it
//! * `alloc`: the free blocks
//! * `past`, `capture`: what the metadata was, saved while it changes
//! * `commit`: transactions; `checkpoint`: checkpoints; `mount`: mkfs and mount; `recover`: reading what is on disk
//! * `verify`, `fault`: what can be wrong; `check`, `repair`, `mend`: finding it and putting it right
//! * `layout`, `leases`, `sever`: blocks handed out, recalled, fenced, and given up
//! * `fs`: the mounted filesystem and the calls that only look; `names`, `data`, `space`: the calls that change

mod alloc;
mod capture;
mod check;
mod checkpoint;
mod chunk;
mod codec;
mod commit;
mod data;
mod error;
mod extents;
mod fault;
mod fs;
mod inode;
mod io;
mod item;
mod layout;
mod leases;
mod log;
mod mend;
mod mount;
mod names;
mod past;
mod record;
mod recover;
mod repair;
mod sever;
mod space;
mod state;
mod superblock;
mod time;
mod verify;

pub use check::{CheckOptions, Finding, Outcome, Report, check};
pub use commit::Ticket;
pub use error::FsError;
pub use fault::Fault;
pub use fs::{Clock, DirEntry, Filesystem, Stat, StatFs};
pub use inode::{Ino, Kind, MAX_FILE_SIZE, PLACEMENT_MAX, ROOT};
pub use io::BLOCK;
pub use item::NAME_MAX;
pub use layout::{BlockState, Extent, Layout};
pub use leases::{Access, Lease, Recall};
pub use mount::{FormatOptions, MountOptions, format, probe};
pub use names::{NewInode, SetAttr};
pub use space::Falloc;
pub use superblock::VERSION;
pub use time::system_time;
