//! The client library: blocking, for programs that want files as shared memory and no more.
//!
//! * [`Client`]: a connection; everything that goes by path
//! * [`Stat`], [`Entry`], [`Status`], [`ServerInfo`]: what a server says of files and of itself
//! * [`File`]: an open file: mapping, whole reads and writes, commit
//! * [`Mapped`]: a range of it in memory; reads, writes and borrows without system calls
//! * [`Layout`]: block numbers under a lease, for the server's own user
//! * [`Peer`]: an emulated device that does DMA to mapped windows
//! * [`PeerDrive`]: another drive of the server's, whose blocks go to mapped windows and come from them, for its own user and root
//! * [`PathCounts`]: which path the bytes took
//!
//! ```no_run
//! use shm_api::client::{Client, OpenMode};
//!
//! let client = Client::connect("/run/cmbfs.sock")?;
//! let file = client.open("/hello", OpenMode::create())?;
//! file.write_at(0, b"hello, shared memory")?;
//! file.commit()?;
//!
//! let mapped = file.map(0, 5)?;
//! let mut word = [0; 5];
//! mapped.read(0, &mut word)?; // no system call; goes on working while the server moves the bytes elsewhere
//! assert_eq!(&word, b"hello");
//! # Ok::<(), shm_api::client::ClientError>(())
//! ```
mod answers;
mod borrow;
mod connection;
mod error;
mod file;
mod layout;
mod mapped;
mod memory;
mod path_counts;
mod peer;
mod peer_drive;
mod refused;
mod revoke;
mod silence;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use answers::{ClientLine, DeviceState, Entry, PathLine, ServerInfo, Stat, Status};
pub use error::ClientError;
pub use file::{CommitReport, File, OpenMode};
pub use layout::{Access, BlockState, Extent, Layout, LeaseName, Recall};
pub use mapped::Mapped;
pub use path_counts::PathCounts;
pub use peer::{Peer, PeerInfo, PeerList, PeerMappingInfo, PeerTransfer, PeerWindow};
pub use peer_drive::{DriveState, PeerDrive};
pub use revoke::RevokeReport;
pub use silence::{DEFAULT_PATIENCE, ServerProcess};

use nvme_driver::clock::{Clock, SystemClock};

use crate::Placement;
use crate::protocol::messages::{
    self as m, Empty, InfoReply, ListReply, ListRequest, MkdirRequest, RenameRequest, SetAttrRequest,
    StatReply, StatusReply,
};
use crate::protocol::records;
use crate::protocol::{Op, WireError};
use connection::Connection;
use path_counts::SharedCounts;

/// A connection to a server. Clones share it; threads may use it at the same time.
#[derive(Clone, Debug)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    connection: Connection,
    pages: p2p::control::ControlPages,
    slots: Arc<p2p::writer::Slots>,
    counts: SharedCounts,
    /// By which writers wait.
    clock: Arc<dyn Clock>,
}

impl Client {
    /// Connects to the server that listens on `socket`. One that is silent for [`DEFAULT_PATIENCE`] is given up, now and in every later call.
    pub fn connect(socket: impl AsRef<Path>) -> Result<Self, ClientError> {
        Self::connect_within(socket, DEFAULT_PATIENCE)
    }

    /// As [`connect`](Self::connect), for a server that may be silent for `patience`, here and in every later call. What takes long is waited
    /// for as long as the server answers at all, or waits for a disk.
    pub fn connect_within(socket: impl AsRef<Path>, patience: Duration) -> Result<Self, ClientError> {
        Self::connect_with_clock(socket, patience, Arc::new(SystemClock::new()))
    }

    /// The same, with the clock by which writers wait for windows that they are refused, and give up.
    pub fn connect_with_clock(
        socket: impl AsRef<Path>,
        patience: Duration,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, ClientError> {
        let connection = Connection::open(socket.as_ref(), patience)?;
        let bad = |e: p2p::control::ControlError| ClientError::Protocol(e.to_string());
        let pages = p2p::control::ControlPages::open(Arc::clone(&connection.control)).map_err(bad)?;
        let region = p2p::control::ClientRegion::open(Arc::clone(&connection.region)).map_err(bad)?;
        let slots = p2p::writer::Slots::new(region);
        let counts = SharedCounts::default();
        Ok(Self { inner: Arc::new(Inner { connection, pages, slots, counts, clock }) })
    }

    /// Whether this client may map the CMB, and if not, why not.
    pub fn cmb_access(&self) -> Result<(), &str> {
        match &self.inner.connection.cmb {
            Some(_) => Ok(()),
            None => Err(&self.inner.connection.cmb_text),
        }
    }

    /// This client's number on the server.
    pub fn id(&self) -> u32 {
        self.inner.connection.id
    }

    /// Opens (or creates) a file.
    pub fn open(&self, path: &str, mode: OpenMode) -> Result<File, ClientError> {
        File::open(self.clone(), path, mode)
    }

    /// Allocates `len` bytes of raw memory: zeros at first, in the CMB while there is room, with no file behind it. It has the API of an open
    /// file but for [`File::commit`] and [`File::truncate`], and goes with its last clone and mapping, or with this client.
    pub fn allocate(&self, len: u64) -> Result<File, ClientError> {
        File::allocate(self.clone(), len, "")
    }

    /// The same, shared under a name with all clients of this user; `len` 0 takes what is there. It goes with the last of them.
    pub fn allocate_shared(&self, name: &str, len: u64) -> Result<File, ClientError> {
        File::allocate(self.clone(), len, name)
    }

    /// The drive's Persistent Memory Region, with the API of an open file but for [`File::truncate`]: what is in it stays there, and
    /// [`File::commit`] returns when all that was written is persistent. For the server's own user (root gets it from the host cache).
    pub fn pmr(&self) -> Result<File, ClientError> {
        File::memory(self.clone(), m::MEMORY_PMR, 0, "")
    }

    /// The memory of a peer that a client of this user has exported under a name ([`Peer::export`]).
    pub fn peer_memory(&self, name: &str) -> Result<File, ClientError> {
        File::memory(self.clone(), m::MEMORY_SHARED, 0, name)
    }

    /// Attributes of a file or directory.
    pub fn stat(&self, path: &str) -> Result<Stat, ClientError> {
        let reply: StatReply =
            self.inner.connection.ask(Op::Stat, "attributes", &Empty {}, path.as_bytes())?;
        Ok(reply.into())
    }

    /// Everything in a directory, in the order of the names' bytes.
    pub fn list(&self, path: &str) -> Result<Vec<Entry>, ClientError> {
        let mut entries: Vec<Entry> = Vec::new();
        loop {
            let after = entries.last().map_or("", |e| e.name.as_str());
            let request = ListRequest { path_len: len32(path)?, after_len: len32(after)? };
            let tail = [path.as_bytes(), after.as_bytes()].concat();
            let reply = self.inner.connection.call(Op::List, "a listing", &request, &tail)?;
            let (body, tail) = reply.message.body::<ListReply>()?;
            let got = records::dir_entries(tail, body.count)?;
            let more = body.more != 0 && !got.is_empty();
            entries.extend(got.into_iter().map(Entry::from));
            if !more {
                return Ok(entries);
            }
        }
    }

    /// Makes a directory with these permission bits.
    pub fn mkdir(&self, path: &str, mode: u32) -> Result<(), ClientError> {
        let request = MkdirRequest { mode, reserved: 0 };
        self.done(Op::Mkdir, "a directory to be made", &request, path.as_bytes())
    }

    /// Removes a file's name. The file goes with its last name and its last open handle.
    pub fn unlink(&self, path: &str) -> Result<(), ClientError> {
        self.done(Op::Unlink, "a file to be removed", &Empty {}, path.as_bytes())
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, path: &str) -> Result<(), ClientError> {
        self.done(Op::Rmdir, "a directory to be removed", &Empty {}, path.as_bytes())
    }

    /// Renames; a file at the new path is replaced.
    pub fn rename(&self, from: &str, to: &str) -> Result<(), ClientError> {
        let request = RenameRequest { from_len: len32(from)?, to_len: len32(to)? };
        let tail = [from.as_bytes(), to.as_bytes()].concat();
        self.done(Op::Rename, "a rename", &request, &tail)
    }

    /// Makes all changes of names and attributes durable, everybody's. Bytes in windows are not: they are committed by file.
    /// Without it such changes are durable with the next commit of any file, or when the server ends in an orderly way.
    pub fn sync(&self) -> Result<(), ClientError> {
        self.done(Op::Sync, "a sync", &Empty {}, &[])
    }

    /// Sets a file's permission bits.
    pub fn set_mode(&self, path: &str, mode: u32) -> Result<(), ClientError> {
        let request = SetAttrRequest { fields: m::SET_MODE, mode, ..Default::default() };
        self.done(Op::SetAttr, "a mode to be set", &request, path.as_bytes())
    }

    /// Sets a file's owner. Root's and the server's own uid only.
    pub fn set_owner(&self, path: &str, uid: u32, gid: u32) -> Result<(), ClientError> {
        let request = SetAttrRequest { fields: m::SET_OWNER, uid, gid, ..Default::default() };
        self.done(Op::SetAttr, "an owner to be set", &request, path.as_bytes())
    }

    /// The server's counters.
    pub fn status(&self) -> Result<Status, ClientError> {
        let reply = self.inner.connection.call(Op::Status, "its status", &Empty {}, &[])?;
        let (s, tail) = reply.message.body::<StatusReply>()?;
        let (paths, tail) = records::path_counts(tail, s.reasons)?;
        let (people, trouble) = records::clients(tail, s.listed, s.trouble_len)?;
        Ok(Status {
            clients: s.clients,
            open_files: s.open_files,
            cmb_windows: s.cmb_windows,
            host_windows: s.host_windows,
            cmb_bytes: s.cmb_bytes,
            cmb_used: s.cmb_used,
            cmb_quarantined: s.cmb_quarantined,
            revocations: s.revocations,
            fenced: s.fenced,
            commits: s.commits,
            expelled: s.expelled,
            died: s.died,
            device_generation: s.device_generation,
            host_bytes: s.host_bytes,
            host_limit: s.host_limit,
            resets: s.resets,
            lost_bytes: s.lost_bytes,
            spare_bytes: s.spare_bytes,
            memory_bytes: s.memory_bytes,
            memory_windows: s.memory_windows,
            placement: Placement::from_number(s.placement).unwrap_or_default(),
            auto_reads_cmb: s.readers == m::PLACE_CMB,
            paths: paths.into_iter().map(PathLine::from).collect(),
            people: people.into_iter().map(ClientLine::from).collect(),
            device_state: DeviceState::from_number(s.device),
            device_trouble: (!trouble.is_empty()).then_some(trouble),
        })
    }

    /// What is being served, and by whom.
    pub fn info(&self) -> Result<ServerInfo, ClientError> {
        let reply = self.inner.connection.call(Op::Info, "about itself", &Empty {}, &[])?;
        let (i, name) = reply.message.body::<InfoReply>()?;
        Ok(ServerInfo {
            device: records::one_text(name)?,
            bytes: i.bytes,
            free_bytes: i.free_bytes,
            cmb_bytes: i.cmb_bytes,
            device_generation: i.device_generation,
            uuid: i.uuid,
            pid: i.pid,
            uid: i.uid,
            clients: i.clients,
            grace_ms: i.grace_ms,
        })
    }

    /// Attaches an emulated peer with `local_len` bytes (a multiple of 4 KiB) of memory of its own.
    pub fn attach_peer(&self, local_len: u64) -> Result<Peer, ClientError> {
        Peer::attach(self.clone(), local_len, 0)
    }

    /// The same for a peer whose DMA is not coherent with the processors' caches, as on some fabrics: it reaches windows for reading only.
    pub fn attach_incoherent_peer(&self, local_len: u64) -> Result<Peer, ClientError> {
        Peer::attach(self.clone(), local_len, crate::protocol::messages::PEER_NOT_COHERENT)
    }

    /// Opens a drive that the server has as a peer (`cmbfs serve --peer`), by its name, which is its URL. For root and the server's own user.
    pub fn open_drive(&self, name: &str) -> Result<PeerDrive, ClientError> {
        PeerDrive::open(self.clone(), name)
    }

    /// Every peer of the server, and what is mapped for them.
    pub fn peers(&self) -> Result<PeerList, ClientError> {
        PeerList::ask(self, 0)
    }

    /// The peers that reach a file or raw memory, by its inode, and by which mappings. For root and the server's own user.
    pub fn peers_of(&self, ino: u64) -> Result<PeerList, ClientError> {
        PeerList::ask(self, ino)
    }

    /// Which paths this client's bytes took so far. A [`Mapped`] adds its own when it is dropped.
    pub fn paths(&self) -> PathCounts {
        self.inner.counts.get()
    }

    /// Whether the server lives, by its robust word: one load, no system call.
    pub fn server_lives(&self) -> bool {
        self.inner.connection.server_lives()
    }

    fn done<T: crate::protocol::wire::Wire>(
        &self,
        op: Op,
        what: &'static str,
        body: &T,
        tail: &[u8],
    ) -> Result<(), ClientError> {
        self.inner.connection.ask::<T, Empty>(op, what, body, tail).map(|_| ())
    }
}

fn len32(text: &str) -> Result<u32, ClientError> {
    u32::try_from(text.len()).map_err(|_| {
        ClientError::Server(WireError::new(crate::protocol::ErrorCode::NameTooLong, "the path is too long"))
    })
}
