//! What a server says of files, of itself and of its clients.

use crate::protocol::messages::{self as m, StatReply};
use crate::protocol::records::{self, DirEntry, PathCount};
use crate::{PlacedBy, Placement};

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
    pub(super) fn from_number(number: u32) -> Self {
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
