//! Message headers and fields (spec, "Header" and "Commands"). Everything is little-endian.

use rustix::io::Errno;

/// Bytes of a header.
pub(super) const HEADER: usize = 16;
/// Most bytes of data in one region or DMA access that we accept and announce (`max_data_xfer_size`).
pub const MAX_DATA: usize = 1 << 20;
/// Longest message accepted: the data and the fixed fields before it.
pub(super) const MAX_MESSAGE: usize = HEADER + 64 + MAX_DATA;
/// Most descriptors in one message that we accept and announce (`max_msg_fds`). QEMU takes a server that announces more for broken.
pub const MAX_FDS: usize = 16;

/// Commands (spec, "Commands").
pub mod command {
    #![expect(missing_docs, reason = "the specification's names")]
    pub const VERSION: u16 = 1;
    pub const DMA_MAP: u16 = 2;
    pub const DMA_UNMAP: u16 = 3;
    pub const DEVICE_GET_INFO: u16 = 4;
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    pub const DEVICE_GET_REGION_IO_FDS: u16 = 6;
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    pub const DEVICE_SET_IRQS: u16 = 8;
    pub const REGION_READ: u16 = 9;
    pub const REGION_WRITE: u16 = 10;
    pub const DMA_READ: u16 = 11;
    pub const DMA_WRITE: u16 = 12;
    pub const DEVICE_RESET: u16 = 13;
    pub const REGION_WRITE_MULTI: u16 = 15;
}

const TYPE_MASK: u32 = 0xf;
const TYPE_REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// A message's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Chosen by the sender, echoed in the reply.
    pub id: u16,
    /// One of [`command`].
    pub command: u16,
    /// Bytes of the whole message, header included.
    pub size: u32,
    /// Type and flags.
    pub flags: u32,
    /// Error number of a reply.
    pub error: u32,
}

impl Header {
    /// A command of `body` bytes after the header.
    pub fn command(id: u16, command: u16, body: usize) -> Self {
        Self { id, command, size: (HEADER + body) as u32, flags: 0, error: 0 }
    }

    /// The same with the No_reply flag.
    pub fn without_reply(mut self) -> Self {
        self.flags |= NO_REPLY;
        self
    }

    /// Reads a header.
    pub fn parse(bytes: &[u8; HEADER]) -> Self {
        let mut fields = Fields(bytes);
        Self {
            id: fields.u16().unwrap_or(0),
            command: fields.u16().unwrap_or(0),
            size: fields.u32().unwrap_or(0),
            flags: fields.u32().unwrap_or(0),
            error: fields.u32().unwrap_or(0),
        }
    }

    /// Writes a header.
    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..2].copy_from_slice(&self.id.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.command.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.size.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.flags.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.error.to_le_bytes());
        bytes
    }

    /// Bytes after the header, or `None` if the size is impossible: then the stream cannot be followed any further.
    pub(super) fn body_len(&self) -> Option<usize> {
        (self.size as usize).checked_sub(HEADER).filter(|_| self.size as usize <= MAX_MESSAGE)
    }

    /// Whether it is a reply.
    pub fn is_reply(&self) -> bool {
        self.flags & TYPE_MASK == TYPE_REPLY
    }

    /// Whether it is a command.
    pub(super) fn is_command(&self) -> bool {
        self.flags & TYPE_MASK == 0
    }

    /// Whether the sender wants no reply.
    pub(super) fn no_reply(&self) -> bool {
        self.flags & NO_REPLY != 0
    }

    /// Whether it is a reply that reports an error.
    pub fn is_error(&self) -> bool {
        self.flags & ERROR != 0
    }

    /// The header of the reply: with `body` bytes after it, or with an error and nothing after it.
    pub(super) fn reply(&self, body: usize, error: Option<Errno>) -> Self {
        Self {
            id: self.id,
            command: self.command,
            size: (HEADER + body) as u32,
            flags: TYPE_REPLY | if error.is_some() { ERROR } else { 0 },
            error: error.map_or(0, |e| e.raw_os_error().unsigned_abs()),
        }
    }
}

/// Reads fields one after the other; too short a message is EINVAL.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Errno> {
        let (head, rest) = self.0.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        self.bytes(N)?.try_into().map_err(|_| Errno::INVAL)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Errno> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, Errno> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Errno> {
        Ok(u64::from_le_bytes(self.array()?))
    }
}

/// Appends fields to a reply.
pub(super) trait Put {
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
}

impl Put for Vec<u8> {
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }
    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }
    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }
}
