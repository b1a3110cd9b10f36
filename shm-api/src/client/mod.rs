//! The client library: blocking, for programs that want files as shared memory and no more.
//!
//! * [`Client`]: a connection; everything that goes by path
//! * [`File`]: an open file: mapping, whole reads and writes, commit
//! * [`Mapped`]: a range of it in memory; reads, writes and borrows without system calls
//! * [`Layout`]: block numbers under a lease, for the server's own user
//! * [`Peer`]: an emulated device that does DMA to mapped windows
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
mod borrow;
mod connection;
mod error;
mod file;
mod layout;
mod mapped;
mod memory;
mod path_counts;
mod peer;
mod refused;
mod revoke;

use std::path::Path;
use std::sync::Arc;

pub use error::ClientError;
pub use file::{CommitReport, File, OpenMode};
pub use layout::{Access, BlockState, Extent, Layout, LeaseName, Recall};
pub use mapped::Mapped;
pub use path_counts::PathCounts;
pub use peer::{Peer, PeerInfo, PeerList, PeerMappingInfo, PeerTransfer, PeerWindow};
pub use revoke::RevokeReport;

use crate::protocol::messages::{
    self as m, Empty, InfoReply, ListReply, ListRequest, MkdirRequest, RenameRequest, SetAttrRequest,
    StatReply, StatusReply,
};
use crate::protocol::records::{self, DirEntry, PathCount};
use crate::protocol::{Op, WireError};
use crate::{PlacedBy, Placement};
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
}

/// What a file or directory is.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Stat {
    /// The inode's number.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Bytes of blocks allocated to it.
    pub allocated: u64,
    /// Last change of the content, in nanoseconds since 1970.
    pub mtime_ns: u64,
    /// Last change of the attributes, in nanoseconds since 1970.
    pub ctime_ns: u64,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names it has.
    pub links: u32,
    /// Where its windows may live.
    pub placement: Placement,
    /// Who says so.
    pub placed_by: PlacedBy,
}

impl From<StatReply> for Stat {
    fn from(r: StatReply) -> Self {
        Self {
            ino: r.ino,
            size: r.size,
            allocated: r.allocated,
            mtime_ns: r.mtime_ns,
            ctime_ns: r.ctime_ns,
            is_dir: r.kind == m::KIND_DIRECTORY,
            mode: r.mode,
            uid: r.uid,
            gid: r.gid,
            links: r.links,
            placement: Placement::from_number(r.placement.into()).unwrap_or_default(),
            placed_by: PlacedBy::from_number(r.placed_by),
        }
    }
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Entry {
    /// The name.
    pub name: String,
    /// The inode's number.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
}

impl From<DirEntry> for Entry {
    fn from(e: DirEntry) -> Self {
        Self {
            name: e.name,
            ino: e.record.ino,
            size: e.record.size,
            is_dir: e.record.kind == m::KIND_DIRECTORY,
            mode: e.record.mode,
            uid: e.record.uid,
        }
    }
}

/// The server's counters.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Status {
    /// Clients connected now.
    pub clients: u64,
    /// Files open now.
    pub open_files: u64,
    /// Windows resident in the CMB.
    pub cmb_windows: u64,
    /// Windows resident in the host cache.
    pub host_windows: u64,
    /// Bytes of the CMB for windows.
    pub cmb_bytes: u64,
    /// Bytes of it in use.
    pub cmb_used: u64,
    /// Bytes of it that wait for a silent client.
    pub cmb_quarantined: u64,
    /// Window moves since the start.
    pub revocations: u64,
    /// Write sections fenced.
    pub fenced: u64,
    /// Commits.
    pub commits: u64,
    /// Clients disconnected for breaking the protocol or not reading.
    pub expelled: u64,
    /// Clients that died without saying goodbye.
    pub died: u64,
    /// The device generation.
    pub device_generation: u64,
    /// Bytes of host cache in use.
    pub host_bytes: u64,
    /// Bytes of host cache that may be used.
    pub host_limit: u64,
    /// Resets of the device since the start.
    pub resets: u64,
    /// Bytes that were written and not committed, and that a reset took.
    pub lost_bytes: u64,
    /// Bytes of the host cache in use that are kept for windows of the CMB until somebody needs the room.
    pub spare_bytes: u64,
    /// Bytes of device memory that clients can open: a PMR, what peers export.
    pub memory_bytes: u64,
    /// Windows resident there.
    pub memory_windows: u64,
    /// Where windows may live of files that have no setting of their own.
    pub placement: Placement,
    /// Whether [`Placement::Auto`] has readers on the processor in the CMB; else it was measured to be slow for them, and they get the host cache.
    pub auto_reads_cmb: bool,
    /// Every path that bytes took, why, how often and how many.
    pub paths: Vec<PathLine>,
    /// Every client.
    pub people: Vec<ClientLine>,
    /// How the device is.
    pub device_state: DeviceState,
    /// Why it does not work as it should, if it does not.
    pub device_trouble: Option<String>,
}

/// How a server's device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// It does what is asked.
    Works,
    /// Nothing is written to it any more: an error, or it was mounted that way. What is on it is read.
    ReadOnly,
    /// It is gone or has failed: what is not in memory yet cannot be read, and nothing can be committed.
    Failed,
}

impl DeviceState {
    fn from_number(number: u32) -> Self {
        match number {
            m::DEVICE_WORKS => Self::Works,
            m::DEVICE_READ_ONLY => Self::ReadOnly,
            _ => Self::Failed,
        }
    }
}

/// One line of [`Status::people`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ClientLine {
    /// Its number on the server: see [`Client::id`] and [`Client::revoke_client`].
    pub client: u32,
    /// Its process, or 0 if the server cannot see it.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Windows that it holds.
    pub windows: u32,
}

/// One line of [`Status::paths`].
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PathLine {
    /// The path.
    pub path: String,
    /// Why this path.
    pub reason: String,
    /// Number of transfers.
    pub count: u64,
    /// Bytes moved.
    pub bytes: u64,
}

impl From<records::ClientRecord> for ClientLine {
    fn from(c: records::ClientRecord) -> Self {
        Self { client: c.client, pid: c.pid, uid: c.uid, windows: c.windows }
    }
}

impl From<PathCount> for PathLine {
    fn from(p: PathCount) -> Self {
        Self { path: p.path, reason: p.reason, count: p.count, bytes: p.bytes }
    }
}

/// What is being served, and by whom.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ServerInfo {
    /// The device's name.
    pub device: String,
    /// Capacity of the filesystem in bytes.
    pub bytes: u64,
    /// Bytes free.
    pub free_bytes: u64,
    /// Size of the CMB in bytes, or 0.
    pub cmb_bytes: u64,
    /// The device generation.
    pub device_generation: u64,
    /// The filesystem's uuid.
    #[serde(serialize_with = "uuid_text")]
    pub uuid: [u8; 16],
    /// The server's process id.
    pub pid: u32,
    /// The server's uid.
    pub uid: u32,
    /// Connected clients.
    pub clients: u32,
    /// Milliseconds that a silent client delays a revocation at most.
    pub grace_ms: u32,
}

/// A uuid as it is usually written.
fn uuid_text<S: serde::Serializer>(uuid: &[u8; 16], to: S) -> Result<S::Ok, S::Error> {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let [a, b, c, d, e] = [&uuid[..4], &uuid[4..6], &uuid[6..8], &uuid[8..10], &uuid[10..]].map(hex);
    to.serialize_str(&format!("{a}-{b}-{c}-{d}-{e}"))
}

impl Client {
    /// Connects to the server that listens on `socket`.
    pub fn connect(socket: impl AsRef<Path>) -> Result<Self, ClientError> {
        let connection = Connection::open(socket.as_ref())?;
        let bad = |e: p2p::control::ControlError| ClientError::Protocol(e.to_string());
        let pages = p2p::control::ControlPages::open(Arc::clone(&connection.control)).map_err(bad)?;
        let region = p2p::control::ClientRegion::open(Arc::clone(&connection.region)).map_err(bad)?;
        let slots = p2p::writer::Slots::new(region);
        Ok(Self { inner: Arc::new(Inner { connection, pages, slots, counts: SharedCounts::default() }) })
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
