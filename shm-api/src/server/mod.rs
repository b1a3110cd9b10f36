//! The server: one thread that owns a filesystem and its windows and serves clients over a Unix socket.
//!
//! * `reactor`: the thread's loop: sockets, rings, deaths
//! * `session`, `outbox`: one client's connection, and what waits to be sent to it
//! * `core`: what is open, and by whom; the joint state
//! * `requests`, `files`, `raw`, `memory`, `names`, `peers`: what clients ask for
//! * `drives`: drives of the server's own that are peers; `drive_jobs`: the bytes that go between them and windows
//! * `layouts`, `leases`: block numbers for clients, and who holds them
//! * `jobs`: what takes longer than one turn
//! * `left`: clients whose connection is gone and whose process lives
//! * `permission`: who may do what (P8)
//! * `placing`, `auto`: where windows may live, and where those of files that nobody has said anything about
//! * `backing`: where a window's bytes are on the drive
//! * `stop`: how it ends
//!
//! ```no_run
//! use shm_api::server::{Server, ServerOptions};
//! # fn disk() -> Box<dyn nvme_driver::disk::Disk> { unimplemented!() }
//!
//! let filesystem = extent_fs::Filesystem::mount(disk(), extent_fs::MountOptions::default())?;
//! let server = Server::new(filesystem, ServerOptions::new("/run/cmbfs.sock"))?;
//! server.stop_on_signals()?.run()?; // until SIGTERM: then everything is written back, synced and unmounted
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
mod auto;
mod backing;
mod core;
mod drive_jobs;
mod drives;
mod files;
mod jobs;
mod layouts;
mod leases;
mod left;
mod memory;
mod names;
mod outbox;
mod peers;
mod permission;
mod placing;
mod raw;
mod reactor;
mod requests;
mod session;
mod stop;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use extent_fs::{Filesystem, FsError};
use nvme_driver::OpenError;
use nvme_driver::controller::ControllerError;
use nvme_driver::disk::Disk;
use nvme_driver::pmr::Pmr;
use p2p::refusal::Refusals;
use p2p::windows::WindowsError;

pub use crate::transport::listener::ListenError;
pub use drives::PeerDevice;
pub use p2p::windows::WriteBack;
pub use stop::StopHandle;

use crate::Placement;
use crate::transport::listener::Listener;

/// What makes further access by a silent holder of a layout impossible: deletes its queue, unmaps its device, ends its process.
///
/// It gets what is asked back of which lease and the processes that hold it, and says whether it could. Without one, or where it
/// could not, the file moves off the holder's blocks instead, and they stay out of use until the holder is gone.
#[derive(Clone)]
pub struct Fence(FenceFn);

type FenceFn = Arc<dyn Fn(&extent_fs::Recall, &[i32]) -> bool + Send + Sync>;

impl Fence {
    /// A fence that calls `fence` on the server's thread: it is to return within the time that others may wait.
    pub fn new(fence: impl Fn(&extent_fs::Recall, &[i32]) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(fence))
    }

    fn fence(&self, recall: &extent_fs::Recall, pids: &[i32]) -> bool {
        (self.0)(recall, pids)
    }
}

impl std::fmt::Debug for Fence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Fence")
    }
}

/// How to serve.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where to listen.
    pub socket: PathBuf,
    /// Bytes per window: a power of two from 4 KiB. What is moved, revoked and written back as one.
    pub window_size: usize,
    /// How long a silent client may delay a revocation.
    pub grace: Duration,
    /// Bytes of host memory for the cache: two windows at least.
    pub host_cache: u64,
    /// Where windows may live, whatever their files say. `Auto` leaves it to each file, and then to the filesystem.
    pub placement: Placement,
    /// How long one request waits for a window that moves, or for a layout over it. Then the client is told what is in the way, and may
    /// ask again.
    pub patience: Duration,
    /// Placements to refuse at random: every one may be, and no byte changes (P4). Refuses nothing unless a test says so.
    pub refusals: Refusals,
    /// How dirty pages are written back in the background; `None`: on commit and eviction only.
    pub write_back: Option<WriteBack>,
    /// For holders of layouts that do not answer a recall.
    pub fence: Option<Fence>,
    /// The drive's Persistent Memory Region, for clients to open ([`Client::pmr`](crate::client::Client::pmr)).
    pub pmr: Option<Arc<Pmr>>,
    /// Other drives, as peers that clients may open ([`Client::open_drive`](crate::client::Client::open_drive)).
    pub peers: Vec<PeerDevice>,
}

impl ServerOptions {
    /// Listening on `socket`, with the usual values for the rest.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            window_size: p2p::layout::DEFAULT_WINDOW,
            grace: Duration::from_millis(20),
            host_cache: 1 << 30,
            placement: Placement::Auto,
            patience: Duration::from_secs(5),
            refusals: Refusals::default(),
            write_back: Some(WriteBack::default()),
            fence: None,
            pmr: None,
            peers: Vec::new(),
        }
    }
}

/// Serving failed.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket could not be opened.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Where the CMB has no place, and for files that are kept out of it, a writer needs a window in the host cache: one, beside the
    /// part of it (half at most) that is kept free for the CMB's dirty windows.
    #[error(
        "a host cache of {host_cache} bytes is too small for windows of {window_size} bytes, for it must have room for two: give it {} \
         bytes or more (--host-cache), or serve smaller windows (--window)",
        2 * .window_size
    )]
    HostCacheTooSmall {
        /// Bytes of host cache.
        host_cache: u64,
        /// Bytes per window.
        window_size: u64,
    },
    /// The windows failed.
    #[error(transparent)]
    Windows(#[from] WindowsError),
    /// The filesystem failed.
    #[error(transparent)]
    Filesystem(#[from] FsError),
    /// A device that was to be a peer has no NVMe controller that could do DMA.
    #[error("{name} is no NVMe controller: it does no DMA, so it cannot be a peer")]
    NoController {
        /// The device.
        name: String,
    },
    /// Two peers of one name.
    #[error("{name} is a peer already")]
    PeerTwice {
        /// The name.
        name: String,
    },
    /// A device that was to be a peer could not be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The controller of a peer could not be used.
    #[error(transparent)]
    Controller(#[from] ControllerError),
    /// The system refused.
    #[error("cannot {what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// A server that listens. Clients can connect from [`new`](Self::new) on, and are answered as soon as it runs.
pub struct Server {
    core: core::Core,
    listener: Listener,
    stop: StopHandle,
    signals: Option<OwnedFd>,
}

impl Server {
    /// Takes a mounted filesystem and begins to listen.
    pub fn new(filesystem: Filesystem<Box<dyn Disk>>, options: ServerOptions) -> Result<Self, ServerError> {
        let (host_cache, window_size) = (options.host_cache, options.window_size as u64);
        if host_cache / 2 < window_size {
            return Err(ServerError::HostCacheTooSmall { host_cache, window_size });
        }
        let listener = Listener::bind(&options.socket)?;
        let stop =
            StopHandle::new().map_err(|source| ServerError::System { what: "make an eventfd", source })?;
        Ok(Self { core: core::Core::new(filesystem, &options)?, listener, stop, signals: None })
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        self.listener.path()
    }

    /// Ends it from another thread.
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// Has SIGTERM and SIGINT end it in an orderly way. Blocks both signals in this thread, so call it before starting others.
    pub fn stop_on_signals(mut self) -> Result<Self, ServerError> {
        let fd =
            stop::signals().map_err(|source| ServerError::System { what: "watch for signals", source })?;
        self.signals = Some(fd);
        Ok(self)
    }

    /// Serves until stopped. Then everything is written back, synced and unmounted.
    pub fn run(self) -> Result<(), ServerError> {
        reactor::Reactor::new(self.core, self.listener, self.stop, self.signals).run()
    }
}
