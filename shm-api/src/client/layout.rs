//! Block numbers under a lease: for clients that reach the device by a path of their own, and run as the server's user.

use std::cell::Cell;
use std::ops::Range;
use std::time::Duration;

use super::{Client, ClientError, File};
use crate::protocol::Op;
use crate::protocol::messages::{
    self as m, Empty, LayoutCommitReply, LayoutCommitRequest, LayoutMapRequest, LayoutReleaseRequest,
    LayoutReply, LeaseRequest, RecallsReply,
};
use crate::protocol::records::{self, EXTENT_HOLE, EXTENT_WRITTEN, ExtentRecord, RecallRecord};
use crate::protocol::wire::Wire;

/// What a layout is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading the blocks; shared with other readers.
    Read,
    /// Reading and writing them; nobody else touches the range.
    Write,
}

/// What lies behind a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// No blocks; reads as zeros.
    Hole,
    /// Blocks that read as zeros until they are committed, whatever the device holds.
    Unwritten,
    /// Blocks with the file's bytes.
    Written,
}

/// Adjoining blocks of the device behind adjoining blocks of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where in the file, in bytes.
    pub offset: u64,
    /// First logical block on the device, of [`Layout::block_size`] bytes; 0 for a hole.
    pub lba: u64,
    /// Length in blocks of 4 KiB.
    pub blocks: u64,
    /// What lies there.
    pub state: BlockState,
}

impl Extent {
    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.blocks * 4096
    }
}

/// A lease by its number. Whoever is told it can hold it too ([`Client::share_layout`]), if it runs as the server's user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseName {
    /// Its number.
    pub id: u64,
    /// The device generation that it was given under.
    pub device_generation: u64,
}

/// What is asked back of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recall {
    /// The lease.
    pub lease: LeaseName,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// When the lease ends without the holder's word: nanoseconds since 1970.
    pub deadline: u64,
}

/// The blocks behind a range of a file, and the right to use them. Given back when dropped.
///
/// Before each access to the blocks look at [`recalls`](Self::recalls): it makes no system call unless something was asked back.
#[derive(Debug)]
pub struct Layout {
    client: Client,
    lease: LeaseName,
    body: LayoutReply,
    extents: Vec<Extent>,
    /// Recalls known when they were last asked for.
    seen: Cell<u32>,
}

impl Layout {
    fn new(client: Client, seen: u32, reply: &crate::protocol::Message) -> Result<Self, ClientError> {
        let (body, tail) = reply.body::<LayoutReply>()?;
        let extents = records::fixed::<ExtentRecord>(tail, body.count, "an extent")?;
        let lease = LeaseName { id: body.lease, device_generation: body.device_generation };
        let extents = extents.iter().map(|e| Extent {
            offset: e.offset,
            lba: e.lba,
            blocks: e.blocks,
            state: match e.state {
                EXTENT_HOLE => BlockState::Hole,
                EXTENT_WRITTEN => BlockState::Written,
                _ => BlockState::Unwritten,
            },
        });
        Ok(Self { lease, body, extents: extents.collect(), seen: Cell::new(seen), client })
    }

    pub(super) fn map(file: &File, offset: u64, len: u64, access: Access) -> Result<Self, ClientError> {
        let client = file.inner.client.clone();
        let seen = client.recall_count()?;
        let access = if access == Access::Read { m::LAYOUT_READ } else { m::LAYOUT_WRITE };
        let request = LayoutMapRequest { handle: file.inner.handle, offset, len, access, reserved: 0 };
        let reply = client.inner.connection.call(Op::LayoutMap, "a layout", &request, &[])?;
        Self::new(client, seen, &reply.message)
    }

    pub(super) fn share(client: Client, lease: LeaseName) -> Result<Self, ClientError> {
        // What was asked back before is to be seen too.
        let seen = client.recall_count()?.wrapping_sub(1);
        let request = LeaseRequest { lease: lease.id, device_generation: lease.device_generation };
        let reply = client.inner.connection.call(Op::LayoutShare, "a shared layout", &request, &[])?;
        Self::new(client, seen, &reply.message)
    }

    /// What to tell another process so that it can hold the lease too.
    pub fn lease(&self) -> LeaseName {
        self.lease
    }

    /// The filesystem's uuid: which device the block numbers are of.
    pub fn uuid(&self) -> [u8; 16] {
        self.body.uuid
    }

    /// Bytes per logical block of the device.
    pub fn block_size(&self) -> u32 {
        self.body.block_size
    }

    /// The file's size in bytes when the layout was given.
    pub fn size(&self) -> u64 {
        self.body.size
    }

    /// The blocks, in file order, without gaps. They end before the range asked for does when there are more than fit a
    /// message: map the rest too.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// What was written to `extents` (of this layout, or parts) becomes the file's contents, durably, and the file at least
    /// `size` bytes long. Returns its size.
    pub fn commit(&self, extents: &[Extent], size: Option<u64>) -> Result<u64, ClientError> {
        let mut now = 0;
        let mut left = extents.chunks(m::MAX_EXTENTS).peekable();
        while let Some(part) = left.next() {
            let mut tail = Vec::new();
            for e in part {
                let record = ExtentRecord {
                    offset: e.offset,
                    lba: e.lba,
                    blocks: e.blocks,
                    ..ExtentRecord::default()
                };
                record.put(&mut tail);
            }
            let body = LayoutCommitRequest {
                lease: self.lease.id,
                device_generation: self.lease.device_generation,
                // The file grows when all of it is there.
                size: if left.peek().is_none() { size.unwrap_or(0) } else { 0 },
                count: part.len() as u32,
                reserved: 0,
            };
            let reply =
                self.client.inner.connection.call(Op::LayoutCommit, "a layout's commit", &body, &tail)?;
            now = reply.message.body_only::<LayoutCommitReply>()?.size;
        }
        Ok(now)
    }

    /// What is asked back of this lease now. Without a system call while nothing is. An error: the server is gone, and
    /// with it the lease; stop.
    pub fn recalls(&self) -> Result<Vec<Recall>, ClientError> {
        let connection = &self.client.inner.connection;
        if !connection.server_lives() {
            return Err(ClientError::Gone(" (its word says so)"));
        }
        let count = self.client.recall_count()?;
        if count == self.seen.get() {
            return Ok(Vec::new());
        }
        let mut mine = self.client.recalls()?;
        mine.retain(|r| r.lease == self.lease);
        if mine.is_empty() {
            self.seen.set(count);
        }
        Ok(mine)
    }

    /// Gives a part back, as a recall asks for: from here on its blocks must not be touched.
    pub fn release_range(&self, offset: u64, len: u64) -> Result<(), ClientError> {
        if len == 0 { Ok(()) } else { self.give_back(offset, len) }
    }

    /// Gives all of it back.
    pub fn release(self) -> Result<(), ClientError> {
        let done = self.give_back(0, 0);
        self.forget();
        done
    }

    fn give_back(&self, offset: u64, len: u64) -> Result<(), ClientError> {
        let request = LayoutReleaseRequest {
            lease: self.lease.id,
            device_generation: self.lease.device_generation,
            offset,
            len,
        };
        let _: Empty = self.client.inner.connection.ask(
            Op::LayoutRelease,
            "a layout to be given back",
            &request,
            &[],
        )?;
        Ok(())
    }

    /// Ends this value without giving the lease back, which ends with the process then.
    fn forget(mut self) {
        self.lease.id = 0;
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // Leases are numbered from 1.
        if self.lease.id != 0
            && let Err(e) = self.give_back(0, 0)
        {
            tracing::debug!("giving back lease {}: {e}", self.lease.id);
        }
    }
}

impl Client {
    /// Holds a lease that another process was given: it told its name.
    pub fn share_layout(&self, lease: LeaseName) -> Result<Layout, ClientError> {
        Layout::share(self.clone(), lease)
    }

    /// How often something was asked back of this client's leases. No system call.
    pub fn recall_count(&self) -> Result<u32, ClientError> {
        Ok(self.inner.connection.recalls.count()?)
    }

    /// Waits until something more is asked back than `seen` times, or for so long. Returns the count.
    pub fn wait_recall(&self, seen: u32, longest: Duration) -> Result<u32, ClientError> {
        let milliseconds = u32::try_from(longest.as_millis()).unwrap_or(u32::MAX);
        Ok(self.inner.connection.recalls.wait(seen, milliseconds)?)
    }

    /// Everything that is asked back of the leases this client holds, and that it has not given back.
    pub fn recalls(&self) -> Result<Vec<Recall>, ClientError> {
        let reply = self.inner.connection.call(Op::LayoutRecalls, "recalls", &Empty {}, &[])?;
        let (body, tail) = reply.message.body::<RecallsReply>()?;
        let records = records::fixed::<RecallRecord>(tail, body.count, "a recall")?;
        Ok(records.iter().map(Recall::from).collect())
    }
}

impl From<&RecallRecord> for Recall {
    fn from(r: &RecallRecord) -> Self {
        let lease = LeaseName { id: r.lease, device_generation: r.device_generation };
        Self { lease, offset: r.offset, len: r.len, deadline: r.deadline }
    }
}

impl Recall {
    /// The bytes asked back.
    pub fn bytes(&self) -> Range<u64> {
        self.offset..self.offset + self.len
    }
}
