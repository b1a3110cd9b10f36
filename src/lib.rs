//! cmbfs: files on an NVMe drive as shared memory, straight from its Controller Memory Buffer.
//!
//! This crate is the facade: what most programs need, by one name. The layers are crates of their own, each useful alone:
//!
//! * [`nvme_driver`]: PCI function, controller, queues, DMA memory, CMB, the emulated controller: [`open`], [`DeviceUrl`], [`Disk`]
//! * [`extent_fs`]: the filesystem: [`Filesystem`]
//! * [`p2p`]: windows over the CMB, generations, peers, revocation
//! * [`shm_api`]: server and client in separate processes: [`Client`], [`File`], [`Mapped`], [`Peer`], [`PeerDrive`]
//!
//! ```
//! use cmbfs::{Client, Filesystem, FormatOptions, MountOptions, OpenMode, OpenOptions, Server, ServerOptions};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     // An emulated NVMe drive in memory and a filesystem on it. A real drive: "pci:0000:01:00.0".
//!     let device = cmbfs::open(&"emu:ram?cmb=16M&size=64M".parse()?, &OpenOptions::default())?;
//!     cmbfs::format(&mut device.disk()?, &FormatOptions::default())?;
//!     let fs = Filesystem::mount(device.disk()?, MountOptions::default())?;
//!
//!     // The server is one thread; here it is in this process, usually `cmbfs serve` is one of its own.
//!     let socket = std::env::temp_dir().join(format!("cmbfs-example-{}", std::process::id()));
//!     let server = Server::new(fs, ServerOptions::new(&socket))?;
//!     let stop = server.stop_handle();
//!     let running = std::thread::spawn(move || server.run());
//!
//!     let client = Client::connect(&socket)?;
//!     let file = client.open("/hello", OpenMode::create())?;
//!     file.write_at(0, b"hello, shared memory")?;
//!     file.commit()?; // durable, also across a power cut
//!
//!     let window = file.map_read(0, 20)?; // in the drive's own memory, the CMB
//!     let mut word = [0; 5];
//!     window.read(0, &mut word)?; // no system call
//!     client.revoke("/hello")?; // the CMB is taken back ...
//!     window.read(0, &mut word)?; // ... and reading goes on: the same bytes, from the host cache
//!     assert_eq!(&word, b"hello");
//!
//!     drop((window, file, client));
//!     stop.stop();
//!     running.join().expect("the server does not panic")?;
//!     Ok(())
//! }
//! ```
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
    Client, ClientError, CommitReport, DeviceState, File, Mapped, OpenMode, PathCounts, Peer, PeerDrive,
    PeerList, PeerTransfer, PeerWindow, RevokeReport, ServerInfo, Stat as ClientStat, Status,
};
pub use shm_api::server::{PeerDevice, Server, ServerError, ServerOptions, StopHandle};
pub use shm_api::{PlacedBy, Placement};

/// Makes an empty filesystem; everything on the device is lost. Its root directory belongs to this process's effective user and
/// group unless the options say otherwise: a server lets nobody change a directory of root's but root, not even its own user.
pub fn format<D: Disk>(disk: &mut D, options: &FormatOptions) -> Result<(), FsError> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let root = options.root.unwrap_or(NewInode { uid, gid, ..NewInode::directory() });
    extent_fs::format(disk, &FormatOptions { root: Some(root), ..options.clone() })
}

/// The example in the README is run too.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
