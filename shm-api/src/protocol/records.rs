//! What follows the body in some messages.

use super::error::{ErrorCode, WireError};
use super::wire::{Wire, wire_struct};

wire_struct! {
    /// One directory entry; `name_len` bytes of name follow, without padding.
    DirRecord {
        /// The inode's number.
        ino: u64,
        /// Size in bytes.
        size: u64,
        /// `KIND_*`.
        kind: u32,
        /// Permission bits.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Length of the name in bytes.
        name_len: u32,
    }
}

wire_struct! {
    /// One window of a mapping.
    WindowRecord {
        /// Its control slot.
        slot: u32,
        /// The slot's incarnation: if the slot shows another one, the handle is old.
        incarnation: u32,
        /// For a mapping to write: index of the window's first word of dirty bits in the client's region.
        dirty_word: u32,
        /// Always 0.
        reserved: u32,
    }
}

/// `state`: no blocks; reads as zeros.
pub const EXTENT_HOLE: u32 = 0;
/// `state`: blocks that read as zeros until they are committed, whatever the device holds there.
pub const EXTENT_UNWRITTEN: u32 = 1;
/// `state`: blocks with the file's bytes.
pub const EXTENT_WRITTEN: u32 = 2;

wire_struct! {
    /// Adjoining blocks of the device behind adjoining blocks of a file.
    ExtentRecord {
        /// Where in the file, in bytes.
        offset: u64,
        /// First logical block on the device; 0 for a hole.
        lba: u64,
        /// Length in blocks of 4 KiB.
        blocks: u64,
        /// `EXTENT_*`.
        state: u32,
        /// Always 0.
        reserved: u32,
    }
}

wire_struct! {
    /// A range that is asked back.
    RecallRecord {
        /// The lease.
        lease: u64,
        /// Its device generation.
        device_generation: u64,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// When the lease ends without its holder's word: nanoseconds since 1970.
        deadline: u64,
    }
}

wire_struct! {
    /// How many transfers took a path, and why.
    PathRecord {
        /// Number of transfers.
        count: u64,
        /// Bytes moved.
        bytes: u64,
        /// Length of the path's name ("cmb", "host", ...) in bytes.
        path_len: u32,
        /// Length of the reason in bytes. Both follow, the path first.
        reason_len: u32,
    }
}

wire_struct! {
    /// A client of the server.
    ClientRecord {
        /// Its number on the server.
        client: u32,
        /// Its process, or 0 if that cannot be seen.
        pid: u32,
        /// Its user.
        uid: u32,
        /// Windows that it holds.
        windows: u32,
    }
}

wire_struct! {
    /// A peer; `name_len` bytes of name follow, without padding.
    PeerRecord {
        /// Its number on this server.
        peer: u32,
        /// Windows mapped for it.
        mappings: u32,
        /// Length of its name in bytes.
        name_len: u32,
        /// `DRIVE*` of a drive, else 0.
        flags: u32,
        /// Bytes that it moved by DMA.
        direct: u64,
        /// Bytes of its that went through host memory.
        bounced: u64,
    }
}

wire_struct! {
    /// One window as one peer reaches it.
    MappingRecord {
        /// The peer's number on this server.
        peer: u32,
        /// 1 if it may write.
        write: u32,
        /// The file's inode.
        ino: u64,
        /// File offset of the window's first byte.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// Where the peer finds it.
        iova: u64,
    }
}

/// A directory entry as a client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The name.
    pub name: String,
    /// Its attributes.
    pub record: DirRecord,
}

/// A peer as a client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerEntry {
    /// Its name.
    pub name: String,
    /// What is known of it.
    pub record: PeerRecord,
}

/// A path counter as a client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathCount {
    /// The path: "cmb", "host", "peer", "bounce".
    pub path: String,
    /// Why this path was taken.
    pub reason: String,
    /// Number of transfers.
    pub count: u64,
    /// Bytes moved.
    pub bytes: u64,
}

fn short(what: &str) -> WireError {
    WireError::new(ErrorCode::BadMessage, format!("the message ends inside {what}"))
}

fn text<'a>(from: &'a [u8], len: u32, what: &str) -> Result<(String, &'a [u8]), WireError> {
    let len = usize::try_from(len).map_err(|_| short(what))?;
    let (text, rest) = from.split_at_checked(len).ok_or_else(|| short(what))?;
    let text = std::str::from_utf8(text)
        .map_err(|_| WireError::new(ErrorCode::BadMessage, format!("{what} is not UTF-8")))?;
    Ok((text.to_owned(), rest))
}

/// Splits the tail of a request into two strings of the lengths its body announces.
pub fn two_texts(tail: &[u8], first: u32, second: u32) -> Result<(String, String), WireError> {
    let (a, rest) = text(tail, first, "its first text")?;
    let (b, rest) = text(rest, second, "its second text")?;
    if !rest.is_empty() {
        return Err(WireError::new(ErrorCode::BadMessage, format!("{} bytes too many", rest.len())));
    }
    Ok((a, b))
}

/// Takes the whole tail as one string.
pub fn one_text(tail: &[u8]) -> Result<String, WireError> {
    two_texts(tail, u32::try_from(tail.len()).unwrap_or(u32::MAX), 0).map(|(text, _)| text)
}

/// Appends one directory entry.
pub fn put_dir_entry(entry: &DirEntry, out: &mut Vec<u8>) {
    entry.record.put(out);
    out.extend_from_slice(entry.name.as_bytes());
}

/// Decodes `count` directory entries, after which nothing may follow.
pub fn dir_entries(mut tail: &[u8], count: u32) -> Result<Vec<DirEntry>, WireError> {
    let mut entries = Vec::new();
    for _ in 0..count {
        let (record, rest) = DirRecord::take(tail).ok_or_else(|| short("a directory entry"))?;
        let (name, rest) = text(rest, record.name_len, "a name")?;
        entries.push(DirEntry { name, record });
        tail = rest;
    }
    if tail.is_empty() { Ok(entries) } else { Err(short("what follows the last directory entry")) }
}

/// Decodes `count` records of a fixed size, after which nothing may follow. `what` is one of them, in words.
pub fn fixed<T: Wire>(mut tail: &[u8], count: u32, what: &str) -> Result<Vec<T>, WireError> {
    let mut records = Vec::new();
    for _ in 0..count {
        let (record, rest) = T::take(tail).ok_or_else(|| short(what))?;
        records.push(record);
        tail = rest;
    }
    if tail.is_empty() {
        Ok(records)
    } else {
        Err(short(&format!("what follows the last of {count}: {what}")))
    }
}

/// Decodes `count` windows, after which nothing may follow.
pub fn windows(tail: &[u8], count: u32) -> Result<Vec<WindowRecord>, WireError> {
    fixed(tail, count, "a window")
}

/// Appends one path counter.
pub fn put_path_count(count: &PathCount, out: &mut Vec<u8>) {
    let record = PathRecord {
        count: count.count,
        bytes: count.bytes,
        path_len: u32::try_from(count.path.len()).unwrap_or(0),
        reason_len: u32::try_from(count.reason.len()).unwrap_or(0),
    };
    record.put(out);
    out.extend_from_slice(count.path.as_bytes());
    out.extend_from_slice(count.reason.as_bytes());
}

/// Decodes `count` path counters, and returns what follows them.
pub fn path_counts(mut tail: &[u8], count: u32) -> Result<(Vec<PathCount>, &[u8]), WireError> {
    let mut counts = Vec::new();
    for _ in 0..count {
        let (record, rest) = PathRecord::take(tail).ok_or_else(|| short("a path counter"))?;
        let (path, rest) = text(rest, record.path_len, "a path's name")?;
        let (reason, rest) = text(rest, record.reason_len, "a reason")?;
        counts.push(PathCount { path, reason, count: record.count, bytes: record.bytes });
        tail = rest;
    }
    Ok((counts, tail))
}

/// Decodes `count` clients and a text of `text` bytes, after which nothing may follow.
pub fn clients(mut tail: &[u8], count: u32, text: u32) -> Result<(Vec<ClientRecord>, String), WireError> {
    let mut clients = Vec::new();
    for _ in 0..count {
        let (record, rest) = ClientRecord::take(tail).ok_or_else(|| short("a client"))?;
        clients.push(record);
        tail = rest;
    }
    if usize::try_from(text).ok() != Some(tail.len()) {
        return Err(short("what follows the last client"));
    }
    Ok((clients, one_text(tail)?))
}

/// Appends one peer.
pub fn put_peer(record: &PeerRecord, name: &str, out: &mut Vec<u8>) {
    record.put(out);
    out.extend_from_slice(name.as_bytes());
}

/// Decodes `count` peers, each with its name, and returns them with what follows.
pub fn peers(mut tail: &[u8], count: u32) -> Result<(Vec<PeerEntry>, &[u8]), WireError> {
    let mut peers = Vec::new();
    for _ in 0..count {
        let (record, rest) = PeerRecord::take(tail).ok_or_else(|| short("a peer"))?;
        let (name, rest) = text(rest, record.name_len, "a peer's name")?;
        peers.push(PeerEntry { name, record });
        tail = rest;
    }
    Ok((peers, tail))
}

/// Decodes `count` mappings, after which nothing may follow.
pub fn mappings(mut tail: &[u8], count: u32) -> Result<Vec<MappingRecord>, WireError> {
    let mut mappings = Vec::new();
    for _ in 0..count {
        let (record, rest) = MappingRecord::take(tail).ok_or_else(|| short("a peer's mapping"))?;
        mappings.push(record);
        tail = rest;
    }
    if tail.is_empty() { Ok(mappings) } else { Err(short("what follows the last mapping")) }
}
