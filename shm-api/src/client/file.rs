//! An open file.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use p2p::region::Region;

use super::layout::{Access, Layout};
use super::mapped::Mapped;
use super::{Client, ClientError, RevokeReport, Stat};
use crate::protocol::messages::{
    self as m, AllocateRequest, CommitReply, CommitRequest, Empty, HandleRequest, OpenReply, OpenRequest,
    RevokeRequest, StatReply, TruncateRequest,
};
use crate::protocol::{MAX_WINDOWS, Op};

/// How to open a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenMode {
    flags: u32,
    mode: u32,
}

impl OpenMode {
    /// For reading.
    pub fn read() -> Self {
        Self { flags: m::OPEN_READ, mode: 0 }
    }

    /// For reading and writing.
    pub fn write() -> Self {
        Self { flags: m::OPEN_READ | m::OPEN_WRITE, mode: 0 }
    }

    /// For reading and writing; created with mode 0644 if it does not exist.
    pub fn create() -> Self {
        Self { flags: m::OPEN_READ | m::OPEN_WRITE | m::OPEN_CREATE, mode: 0o644 }
    }

    /// Fails if the file exists.
    pub fn exclusive(self) -> Self {
        Self { flags: self.flags | m::OPEN_EXCLUSIVE, ..self }
    }

    /// Cuts the file to nothing.
    pub fn truncate(self) -> Self {
        Self { flags: self.flags | m::OPEN_TRUNCATE, ..self }
    }

    /// The file is new, and its name goes with the last clone of the handle, or with this client, unless it was renamed until then: for
    /// what is to have its name only when it is whole.
    pub fn temporary(self) -> Self {
        Self { flags: self.flags | m::OPEN_CREATE | m::OPEN_EXCLUSIVE | m::OPEN_TEMPORARY, ..self }
    }

    /// Permission bits of a file that is created.
    pub fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }
}

/// What a commit did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct CommitReport {
    /// The file's size in bytes.
    pub size: u64,
    /// Bytes that went to the drive straight from the CMB.
    pub from_cmb: u64,
    /// Bytes that went to the drive from the host cache.
    pub from_host: u64,
}

/// An open file. Closed when the last clone of it and of its mappings is gone.
#[derive(Clone, Debug)]
pub struct File {
    pub(super) inner: Arc<FileInner>,
}

#[derive(Debug)]
pub(super) struct FileInner {
    pub(super) client: Client,
    pub(super) handle: u64,
    pub(super) ino: u64,
    pub(super) window: u64,
    pub(super) cache: OwnedFd,
    pub(super) writable: bool,
    pub(super) direct: Direct,
}

/// Where windows of a file are when they are not in the host cache.
#[derive(Debug)]
pub(super) enum Direct {
    /// In the CMB, which the connection has, or has not.
    Cmb,
    /// In the device memory that the file is, or why this client has not got it.
    Memory(Result<Region, String>),
}

impl Drop for FileInner {
    fn drop(&mut self) {
        let request = HandleRequest { handle: self.handle };
        let closed: Result<Empty, _> =
            self.client.inner.connection.ask(Op::Close, "a file to be closed", &request, &[]);
        if let Err(e) = closed {
            tracing::debug!("closing inode {}: {e}", self.ino);
        }
    }
}

impl File {
    pub(super) fn open(client: Client, path: &str, mode: OpenMode) -> Result<Self, ClientError> {
        let request = OpenRequest { flags: mode.flags, mode: mode.mode };
        let reply =
            client.inner.connection.call(Op::Open, "a file to be opened", &request, path.as_bytes())?;
        let body: OpenReply = reply.message.body_only()?;
        let cache = reply.fds.into_iter().next();
        Self::opened(client, &body, cache, mode.flags & m::OPEN_WRITE != 0, Direct::Cmb)
    }

    /// Raw memory, with the same handle.
    pub(super) fn allocate(client: Client, len: u64, name: &str) -> Result<Self, ClientError> {
        let request = AllocateRequest { len };
        let reply = client.inner.connection.call(Op::Allocate, "memory", &request, name.as_bytes())?;
        let body: OpenReply = reply.message.body_only()?;
        Self::opened(client, &body, reply.fds.into_iter().next(), true, Direct::Cmb)
    }

    pub(super) fn opened(
        client: Client,
        body: &OpenReply,
        cache: Option<OwnedFd>,
        writable: bool,
        direct: Direct,
    ) -> Result<Self, ClientError> {
        let cache =
            cache.ok_or_else(|| ClientError::Protocol("no descriptor for the host cache".to_owned()))?;
        if !body.window_size.is_power_of_two() || body.window_size < p2p::layout::MIN_WINDOW as u64 {
            return Err(ClientError::Protocol(format!("windows of {} bytes", body.window_size)));
        }
        let inner = FileInner {
            client,
            handle: body.handle,
            ino: body.ino,
            window: body.window_size,
            cache,
            writable,
            direct,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    fn connection(&self) -> &super::Connection {
        &self.inner.client.inner.connection
    }

    /// The inode's number.
    pub fn ino(&self) -> u64 {
        self.inner.ino
    }

    /// Bytes per window: what is moved, revoked and written back as one.
    pub fn window_size(&self) -> u64 {
        self.inner.window
    }

    /// Attributes now.
    pub fn stat(&self) -> Result<Stat, ClientError> {
        let request = HandleRequest { handle: self.inner.handle };
        let reply: StatReply = self.connection().ask(Op::FileStat, "attributes", &request, &[])?;
        Ok(reply.into())
    }

    /// Size now, in bytes.
    pub fn size(&self) -> Result<u64, ClientError> {
        Ok(self.stat()?.size)
    }

    /// Maps a range, to read and, if the file is open for writing, to write: then the file grows to the range's end, and its
    /// blocks are taken from the device now, so that a full device shows here and not later.
    pub fn map(&self, offset: u64, len: u64) -> Result<Mapped, ClientError> {
        let flags = if self.inner.writable { m::MAP_WRITE } else { 0 };
        Mapped::new(self.clone(), offset, len, flags)
    }

    /// Maps a range to read only. Bytes past the end of the file read as zeros.
    pub fn map_read(&self, offset: u64, len: u64) -> Result<Mapped, ClientError> {
        Mapped::new(self.clone(), offset, len, 0)
    }

    /// Maps a range to read only, and asks for the host cache: a window without a place gets one there. One that has a place stays, for a
    /// window has one place for everybody, and another client's wish may bring it to the CMB: then this mapping reads it there.
    /// To keep a file out of the CMB see [`Client::set_placement`](super::Client::set_placement).
    pub fn map_host(&self, offset: u64, len: u64) -> Result<Mapped, ClientError> {
        Mapped::new(self.clone(), offset, len, m::MAP_HOST)
    }

    /// How many bytes to map at a time: enough to be worth the request, few enough to leave windows to others.
    fn piece(&self) -> u64 {
        (self.inner.window * (MAX_WINDOWS as u64 / 64)).max(self.inner.window)
    }

    /// Reads from `offset` on; returns how many bytes there were, less than the buffer only at the end of the file.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<usize, ClientError> {
        let size = self.size()?;
        let available = size.saturating_sub(offset).min(into.len() as u64);
        let mut done = 0u64;
        while done < available {
            let at = offset + done;
            // Up to the next multiple of a piece, so that no window is mapped twice.
            let len = (self.piece() - at % self.piece()).min(available - done);
            let mapped = self.map_read(at, len)?;
            let (from, to) = (done as usize, (done + len) as usize);
            mapped.read(0, into.get_mut(from..to).unwrap_or_default())?;
            done += len;
        }
        Ok(done as usize)
    }

    /// Writes at `offset`; the file grows as needed. Durable after [`commit`](Self::commit).
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), ClientError> {
        if !self.inner.writable {
            return Err(ClientError::ReadOnly { what: "the file" });
        }
        let end = offset.checked_add(from.len() as u64).ok_or(ClientError::OutOfRange {
            offset,
            len: from.len() as u64,
            mapped: u64::MAX,
        })?;
        let mut done = 0u64;
        while offset + done < end {
            let at = offset + done;
            let len = (self.piece() - at % self.piece()).min(from.len() as u64 - done);
            let mapped = self.map(at, len)?;
            mapped.write(0, from.get(done as usize..(done + len) as usize).unwrap_or_default())?;
            done += len;
        }
        Ok(())
    }

    /// Makes everything written to the file durable: when this returns, it survives a power cut.
    pub fn commit(&self) -> Result<CommitReport, ClientError> {
        self.commit_range(0, 0, 0)
    }

    /// As [`commit`](Self::commit), for a range (`len` 0: to the end), after which the file is at least `size` bytes long (0: leaves it alone).
    pub fn commit_range(&self, offset: u64, len: u64, size: u64) -> Result<CommitReport, ClientError> {
        let request = CommitRequest { handle: self.inner.handle, offset, len, size };
        let reply: CommitReply = self.connection().ask(Op::Commit, "a commit", &request, &[])?;
        Ok(CommitReport { size: reply.size, from_cmb: reply.from_cmb, from_host: reply.from_host })
    }

    /// Sets the size. What is cut off is gone; what is added reads as zeros.
    pub fn truncate(&self, size: u64) -> Result<(), ClientError> {
        let request = TruncateRequest { handle: self.inner.handle, size };
        let _: Empty = self.connection().ask(Op::Truncate, "a truncation", &request, &[])?;
        Ok(())
    }

    /// Hands out the device's blocks behind a range, under a lease. For writing the file must be open for writing; holes get blocks
    /// first, so that no later write meets a full device. Windows over the range leave, and come back when the lease ends: whoever
    /// wants one there meanwhile recalls the lease, this client too. Only for clients that run as the server's user.
    pub fn map_blocks(&self, offset: u64, len: u64, access: Access) -> Result<Layout, ClientError> {
        Layout::map(self, offset, len, access)
    }

    /// Moves the window that holds `offset` out of the CMB.
    pub fn revoke_window(&self, offset: u64) -> Result<RevokeReport, ClientError> {
        let request = RevokeRequest {
            handle: self.inner.handle,
            offset,
            scope: m::REVOKE_WINDOW,
            ..Default::default()
        };
        self.inner.client.revoke_request(request, "")
    }

    pub(super) fn map_cache(
        &self,
        offset: u64,
        len: u64,
    ) -> Result<Arc<nvme_driver::mem::Mapping>, ClientError> {
        use nvme_driver::mem::{Access, Mapping};
        let fd = self.inner.cache.as_fd().try_clone_to_owned()?;
        let access = if self.inner.writable { Access::ReadWrite } else { Access::ReadOnly };
        let len = usize::try_from(len).map_err(|_| ClientError::Protocol(format!("{len} bytes to map")))?;
        Ok(Mapping::from_fd(fd, offset, len, access)?)
    }
}
