//! What every message starts with, and how a datagram becomes a checked message.

use super::error::{ErrorBody, ErrorCode, WireError};
use super::wire::{Wire, wire_struct};
use super::{MAX_FDS, MAX_MESSAGE, MAX_PATH, VERSION};

/// The first four bytes of every message: "CMBF".
pub const MAGIC: u32 = u32::from_le_bytes(*b"CMBF");
/// Set in the opcode of a reply.
pub const REPLY: u16 = 0x8000;

wire_struct! {
    /// The first 32 bytes of every message.
    Header {
        /// [`MAGIC`].
        magic: u32,
        /// [`VERSION`].
        version: u16,
        /// An [`Op`]; in replies with [`REPLY`] set.
        opcode: u16,
        /// Chosen by the client, returned in the reply.
        request: u64,
        /// Length of the whole message in bytes; equals the datagram's.
        length: u32,
        /// Replies: 0 or an [`ErrorCode`]. Requests: 0.
        status: u32,
        /// Number of descriptors that come with the message.
        fds: u32,
        /// Always 0.
        reserved: u32,
    }
}

macro_rules! ops {
    ($($(#[$meta:meta])* $name:ident = $value:literal,)*) => {
        /// What a request asks for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Op {
            $($(#[$meta])* $name = $value,)*
        }
        impl Op {
            /// Every operation.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The operation behind an opcode, if there is one.
            pub fn from_u16(value: u16) -> Option<Self> {
                match value {
                    $($value => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

ops! {
    /// Agree on a version; get the shared regions. First, and once.
    Hello = 1,
    /// Describe the server.
    Info = 2,
    /// Counters and reasons.
    Status = 3,
    /// Look at the request ring: it has entries and the server had gone to sleep. Has no reply.
    Kick = 4,
    /// Open or create a file.
    Open = 16,
    /// Close an open file and everything mapped through it.
    Close = 17,
    /// Attributes by path.
    Stat = 18,
    /// Attributes of an open file.
    FileStat = 19,
    /// Some entries of a directory.
    List = 20,
    /// Make a directory.
    Mkdir = 21,
    /// Remove a file.
    Unlink = 22,
    /// Remove an empty directory.
    Rmdir = 23,
    /// Rename, replacing a file.
    Rename = 24,
    /// Set an open file's size.
    Truncate = 25,
    /// Change a file's mode, and (server's own uid or root only) its owner.
    SetAttr = 26,
    /// Say where a file's windows may live.
    SetPlacement = 27,
    /// Make all changes of names and attributes durable.
    Sync = 28,
    /// Get the windows behind a range of an open file.
    Map = 32,
    /// Give a mapping back.
    Unmap = 33,
    /// Make a range of what was written durable.
    Commit = 34,
    /// Make one window resident (also an operation of the ring).
    Fault = 35,
    /// Move windows out of the CMB, or all of everything.
    Revoke = 36,
    /// Read bytes in the reply itself: the last resort when no window can be placed anywhere.
    Read = 37,
    /// Get raw memory, with a handle as if it were an open file.
    Allocate = 44,
    /// Open device memory, the drive's PMR or a peer's, with a handle as if it were a file.
    Memory = 45,
    /// Attach an emulated peer.
    PeerAttach = 48,
    /// Map a file's range for a peer's DMA.
    PeerMap = 49,
    /// Have a peer do a DMA.
    PeerDma = 50,
    /// Take everything back from a peer.
    PeerRevoke = 51,
    /// Detach a peer.
    PeerDetach = 52,
    /// Every peer of the server and what is mapped for it.
    PeerList = 53,
    /// Copy bytes of a file into a peer's memory, by whichever path there is.
    PeerRead = 54,
    /// Copy bytes out of a peer's memory into a file, by whichever path there is.
    PeerWrite = 55,
    /// Open a drive that the server has as a peer.
    PeerOpen = 56,
    /// Make what was written to such a drive durable.
    PeerFlush = 57,
    /// Get the device's blocks behind a range of an open file, under a lease.
    LayoutMap = 64,
    /// Hold a lease that another process was given.
    LayoutShare = 65,
    /// Make what was written to leased blocks the file's contents, durably.
    LayoutCommit = 66,
    /// Give a lease or a part of it back.
    LayoutRelease = 67,
    /// What is asked back of the leases that this connection holds.
    LayoutRecalls = 68,
}

/// A message whose header has been checked. The body is decoded by [`body`](Self::body).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// What it asks or answers.
    pub op: Op,
    /// Whether it is a reply.
    pub reply: bool,
    /// The request it is or answers.
    pub request: u64,
    /// The status as it came: 0, or an error code.
    pub status: u32,
    /// How many descriptors should have come with it.
    pub fds: u32,
    /// Everything after the header.
    payload: Vec<u8>,
}

fn bad(text: impl Into<String>) -> WireError {
    WireError::new(ErrorCode::BadMessage, text)
}

impl Message {
    /// Checks a datagram's header and takes it apart. Every field is checked; the body's are [`body`](Self::body)'s and the handler's.
    pub fn decode(datagram: &[u8]) -> Result<Self, WireError> {
        if datagram.len() > MAX_MESSAGE {
            return Err(bad(format!("message of more than {MAX_MESSAGE} bytes")));
        }
        let Some((header, rest)) = Header::take(datagram) else {
            return Err(bad(format!("message of {} bytes is shorter than its header", datagram.len())));
        };
        if header.magic != MAGIC {
            return Err(bad(format!("message starts with {:#010x}, not with CMBF", header.magic)));
        }
        if header.version != VERSION {
            return Err(WireError::new(
                ErrorCode::BadVersion,
                format!("message of version {}; this side speaks version {VERSION}", header.version),
            ));
        }
        if usize::try_from(header.length).ok() != Some(datagram.len()) {
            return Err(bad(format!(
                "header says {} bytes, the message has {}",
                header.length,
                datagram.len()
            )));
        }
        if header.reserved != 0 {
            return Err(bad("reserved header field is not 0"));
        }
        let reply = header.opcode & REPLY != 0;
        if !reply && header.status != 0 {
            return Err(bad("a request with a status"));
        }
        if usize::try_from(header.fds).map_or(true, |n| n > MAX_FDS) {
            return Err(bad(format!("{} descriptors announced; at most {MAX_FDS} are allowed", header.fds)));
        }
        let Some(op) = Op::from_u16(header.opcode & !REPLY) else {
            return Err(bad(format!("unknown opcode {:#x}", header.opcode)));
        };
        Ok(Self {
            op,
            reply,
            request: header.request,
            status: header.status,
            fds: header.fds,
            payload: rest.to_vec(),
        })
    }

    /// Decodes the fixed-size body and returns it with the bytes that follow it.
    pub fn body<T: Wire>(&self) -> Result<(T, &[u8]), WireError> {
        T::take(&self.payload).ok_or_else(|| {
            bad(format!("{:?} has {} bytes of body; it needs {}", self.op, self.payload.len(), T::SIZE))
        })
    }

    /// Decodes a body after which nothing may follow.
    pub fn body_only<T: Wire>(&self) -> Result<T, WireError> {
        let (body, rest) = self.body()?;
        if !rest.is_empty() {
            return Err(bad(format!("{:?} has {} bytes too many", self.op, rest.len())));
        }
        Ok(body)
    }

    /// The error in a reply, if its status says that there is one.
    pub fn error(&self) -> Option<WireError> {
        if self.status == 0 {
            return None;
        }
        let code = ErrorCode::from_u32(self.status).unwrap_or(ErrorCode::Internal);
        Some(match self.body::<ErrorBody>() {
            Ok((body, text)) => {
                WireError { code, errno: body.errno, text: String::from_utf8_lossy(text).into_owned() }
            }
            Err(e) => e,
        })
    }
}

/// Encodes one message: header, body, and what follows it (path, records, text).
pub fn encode<T: Wire>(
    op: Op,
    reply: bool,
    request: u64,
    fds: usize,
    body: &T,
    tail: &[u8],
) -> Result<Vec<u8>, WireError> {
    finish(op, reply, request, 0, fds, body, tail)
}

/// Encodes the reply to a request that failed.
pub fn encode_error(op: Op, request: u64, error: &WireError) -> Vec<u8> {
    let text = error.text.as_bytes();
    // A text is cut rather than refused: the code must arrive in any case.
    let text = text.get(..text.len().min(MAX_PATH)).unwrap_or(text);
    let body = ErrorBody { errno: error.errno, reserved: 0 };
    finish(op, true, request, error.code as u32, 0, &body, text).unwrap_or_default()
}

fn finish<T: Wire>(
    op: Op,
    reply: bool,
    request: u64,
    status: u32,
    fds: usize,
    body: &T,
    tail: &[u8],
) -> Result<Vec<u8>, WireError> {
    let length = Header::SIZE + T::SIZE + tail.len();
    if length > MAX_MESSAGE || fds > MAX_FDS {
        return Err(WireError::new(
            ErrorCode::TooMany,
            format!("{op:?} of {length} bytes and {fds} descriptors does not fit one message"),
        ));
    }
    let header = Header {
        magic: MAGIC,
        version: VERSION,
        opcode: op as u16 | if reply { REPLY } else { 0 },
        request,
        // At most MAX_MESSAGE and MAX_FDS, just checked.
        length: length as u32,
        status,
        fds: fds as u32,
        reserved: 0,
    };
    let mut out = Vec::with_capacity(length);
    header.put(&mut out);
    body.put(&mut out);
    out.extend_from_slice(tail);
    Ok(out)
}
