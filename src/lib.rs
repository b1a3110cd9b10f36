//! cmbfs: files on an NVMe drive as shared memory, straight from its Controller Memory Buffer.
//!
//! This crate is the facade: what most programs need, by one name. The layers are crates of their own, each useful alone:
//!
//! * [`nvme_driver`]: PCI function, controller, queues, DMA memory, CMB, the emulated controller: [`open`], [`DeviceUrl`], [`Disk`]
//! * [`extent_fs`]: the filesystem: [`Filesystem`]
//! * [`p2p`]: windows over the CMB, generations, peers, revocation
//! * [`shm_api`]: server and client in separate processes: [`Client`], [`File`], [`Mapped`], [`Peer`]
pub use extent_fs;
pub use nvme_driver;
pub use p2p;
pub use shm_api;

pub use extent_fs::{
    Filesystem, FormatOptions, FsError, Kind as InodeKind, MountOptions, NewInode, Stat as FsStat,
};
pub use nvme_driver::disk::{Disk, DiskError};
pub use nvme_driver::url::DeviceUrl;
pub use nvme_driver::{Device, OpenError, OpenOptions, open};
pub use shm_api::client::{
    Client, ClientError, CommitReport, File, Mapped, OpenMode, PathCounts, Peer, PeerWindow, RevokeReport,
    ServerInfo, Stat as ClientStat, Status,
};
