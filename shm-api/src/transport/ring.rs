//! Shared-memory rings: requests from client to server, replies back, one region per client.
//!
//! The region is a server-created memfd sealed in size. The client can write every byte of it at any time, so the server keeps its own
//! positions privately, copies an entry once and then checks it, and never believes a word twice.
//!
//! A client that finds the server asleep sends it `Kick` over the socket; a server that finds the client asleep wakes its futex. While both
//! are awake neither makes a system call.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use nvme_driver::mem::{MapError, Mapping, OutOfRange};
use rustix::fs::{SealFlags, fcntl_add_seals};
use rustix::thread::futex;

use crate::protocol::wire::{Wire, wire_struct};

/// "cmbfring", little-endian, at offset 0.
pub const RING_MAGIC: u64 = u64::from_le_bytes(*b"cmbfring");
/// Entries in each ring.
pub const ENTRIES: u32 = 64;
/// Bytes per entry.
pub const ENTRY: usize = 64;
/// Length of a ring region in bytes.
pub const RING_LEN: usize = 4096 + 2 * ENTRIES as usize * ENTRY;

/// Offsets of the words, each on a cache line of its own.
pub mod word {
    /// `u64`: [`RING_MAGIC`](super::RING_MAGIC).
    pub const MAGIC: usize = 0;
    /// `u32`: version, 1.
    pub const VERSION: usize = 8;
    /// `u32`: [`ENTRIES`](super::ENTRIES).
    pub const ENTRIES: usize = 12;
    /// `u32`, the client's: requests put, ever (wraps).
    pub const REQUEST_TAIL: usize = 64;
    /// `u32`, the server's: 1 while it sleeps and wants a `Kick`.
    pub const SERVER_SLEEPS: usize = 128;
    /// `u32`, the server's: replies put, ever (wraps). The client's futex.
    pub const REPLY_TAIL: usize = 192;
    /// `u32`, the client's: replies taken, ever (wraps).
    pub const REPLY_HEAD: usize = 256;
    /// `u32`, the client's: 1 while it sleeps on `REPLY_TAIL`.
    pub const CLIENT_SLEEPS: usize = 320;
    /// `u32`, the server's: requests taken, ever (wraps).
    pub const REQUEST_HEAD: usize = 384;
    /// `u32`, the server's: raised when something more is asked back of a lease that this client holds. A futex.
    pub const RECALLS: usize = 448;
    /// First request entry.
    pub const REQUESTS: usize = 4096;
    /// First reply entry.
    pub const REPLIES: usize = 4096 + super::ENTRIES as usize * super::ENTRY;
}

/// Ring opcode: make a window resident; the reply says where.
pub const RING_FAULT: u32 = 1;
/// Ring opcode: the window was used; no reply.
pub const RING_TOUCH: u32 = 2;

wire_struct! {
    /// One request in the ring.
    RingRequest {
        /// Returned in the reply.
        request: u64,
        /// An open file.
        handle: u64,
        /// An offset inside the window.
        offset: u64,
        /// `RING_*`.
        opcode: u32,
        /// `MAP_*`.
        flags: u32,
        /// Always 0.
        reserved: [u8; 32],
    }
}

wire_struct! {
    /// One reply in the ring.
    RingReply {
        /// The request it answers.
        request: u64,
        /// 0 or an [`ErrorCode`](crate::protocol::ErrorCode). There is no room for a text: ask again over the socket.
        status: u32,
        /// The window's control slot.
        slot: u32,
        /// The slot's incarnation.
        incarnation: u32,
        /// `PLACE_*`.
        place: u32,
        /// Always 0.
        reserved: u64,
        /// Always 0.
        reserved2: [u8; 32],
    }
}

/// The client broke the rules of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ring's {what} is {found}, which is impossible at position {expected}")]
pub struct RingBroken {
    /// Which word.
    pub what: &'static str,
    /// What it said.
    pub found: u32,
    /// Where this side is.
    pub expected: u32,
}

fn entry_at(base: usize, position: u32) -> usize {
    base + (position % ENTRIES) as usize * ENTRY
}

/// The server's end.
#[derive(Debug)]
pub struct ServerRing {
    memory: Arc<Mapping>,
    taken: u32,
    put: u32,
}

impl ServerRing {
    /// Creates the region.
    pub fn create() -> Result<Self, RingError> {
        let memory = Mapping::memfd("cmbfs-ring", RING_LEN)?;
        if let Some((fd, _)) = memory.fd() {
            fcntl_add_seals(fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
                .map_err(|e| RingError::Io(e.into()))?;
        }
        memory.u64_at(word::MAGIC)?.store(RING_MAGIC, Ordering::Relaxed);
        memory.u32_at(word::VERSION)?.store(1, Ordering::Relaxed);
        memory.u32_at(word::ENTRIES)?.store(ENTRIES, Ordering::Relaxed);
        Ok(Self { memory, taken: 0, put: 0 })
    }

    /// The region, to pass on to the client.
    pub fn memory(&self) -> &Arc<Mapping> {
        &self.memory
    }

    /// The next request, if there is one. An error: the client does not keep to the protocol.
    pub fn take(&mut self) -> Result<Option<RingRequest>, RingError> {
        let tail = self.memory.u32_at(word::REQUEST_TAIL)?.load(Ordering::Acquire);
        let waiting = tail.wrapping_sub(self.taken);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > ENTRIES {
            return Err(RingBroken { what: "request tail", found: tail, expected: self.taken }.into());
        }
        let mut bytes = [0; ENTRY];
        self.memory.read(entry_at(word::REQUESTS, self.taken), &mut bytes)?;
        self.taken = self.taken.wrapping_add(1);
        self.memory.u32_at(word::REQUEST_HEAD)?.store(self.taken, Ordering::Release);
        let request = RingRequest::from_bytes(&bytes).unwrap_or_default();
        Ok(Some(request))
    }

    /// Puts a reply and wakes the client if it sleeps. An error: the client leaves its replies lying and put no end to asking.
    pub fn put(&mut self, reply: &RingReply) -> Result<(), RingError> {
        let head = self.memory.u32_at(word::REPLY_HEAD)?.load(Ordering::Acquire);
        let unread = self.put.wrapping_sub(head);
        if unread >= ENTRIES {
            return Err(RingBroken { what: "reply head", found: head, expected: self.put }.into());
        }
        self.memory.write(entry_at(word::REPLIES, self.put), &reply.to_bytes())?;
        self.put = self.put.wrapping_add(1);
        let tail = self.memory.u32_at(word::REPLY_TAIL)?;
        tail.store(self.put, Ordering::Release);
        // Either we see that the client sleeps, or it sees the new tail before it does.
        fence(Ordering::SeqCst);
        if self.memory.u32_at(word::CLIENT_SLEEPS)?.load(Ordering::Relaxed) != 0 {
            futex::wake(tail, futex::Flags::empty(), 1).map_err(|e| RingError::Io(e.into()))?;
        }
        Ok(())
    }

    /// Says that something is asked back of the client's leases.
    pub fn recall(&self) -> Result<(), RingError> {
        let word = self.memory.u32_at(word::RECALLS)?;
        word.fetch_add(1, Ordering::Release);
        futex::wake(word, futex::Flags::empty(), u32::MAX >> 1).map_err(|e| RingError::Io(e.into()))?;
        Ok(())
    }

    /// Says that the server is about to sleep; returns whether it may: no request is waiting.
    pub fn about_to_sleep(&self) -> Result<bool, RingError> {
        self.memory.u32_at(word::SERVER_SLEEPS)?.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        Ok(self.memory.u32_at(word::REQUEST_TAIL)?.load(Ordering::Relaxed) == self.taken)
    }

    /// Says that the server is awake.
    pub fn awake(&self) -> Result<(), RingError> {
        self.memory.u32_at(word::SERVER_SLEEPS)?.store(0, Ordering::Relaxed);
        Ok(())
    }
}

/// The client's end. One thread at a time (the client keeps it under a lock).
#[derive(Debug)]
pub struct ClientRing {
    memory: Arc<Mapping>,
    put: u32,
    taken: u32,
}

impl ClientRing {
    /// Takes the region that came with hello.
    pub fn attach(memory: Arc<Mapping>) -> Result<Self, RingError> {
        let magic = memory.u64_at(word::MAGIC)?.load(Ordering::Relaxed);
        let entries = memory.u32_at(word::ENTRIES)?.load(Ordering::Relaxed);
        if magic != RING_MAGIC || entries != ENTRIES || memory.len() < RING_LEN {
            return Err(RingBroken { what: "header", found: entries, expected: ENTRIES }.into());
        }
        Ok(Self { memory, put: 0, taken: 0 })
    }

    /// Whether a request would fit now.
    pub fn has_room(&self) -> Result<bool, RingError> {
        let head = self.memory.u32_at(word::REQUEST_HEAD)?.load(Ordering::Acquire);
        Ok(self.put.wrapping_sub(head) < ENTRIES)
    }

    /// Puts a request, for which there must be [room](Self::has_room). Returns whether the server sleeps and has to be kicked.
    pub fn put(&mut self, request: &RingRequest) -> Result<bool, RingError> {
        if !self.has_room()? {
            return Err(RingBroken { what: "request ring", found: self.put, expected: self.taken }.into());
        }
        self.memory.write(entry_at(word::REQUESTS, self.put), &request.to_bytes())?;
        self.put = self.put.wrapping_add(1);
        self.memory.u32_at(word::REQUEST_TAIL)?.store(self.put, Ordering::Release);
        // Either the server sees the new tail before it sleeps, or we see that it sleeps.
        fence(Ordering::SeqCst);
        let sleeps = self.memory.u32_at(word::SERVER_SLEEPS)?;
        Ok(sleeps.load(Ordering::Relaxed) != 0 && sleeps.swap(0, Ordering::Relaxed) != 0)
    }

    /// The next reply, if it is there.
    pub fn take(&mut self) -> Result<Option<RingReply>, RingError> {
        let tail = self.memory.u32_at(word::REPLY_TAIL)?.load(Ordering::Acquire);
        if tail == self.taken {
            return Ok(None);
        }
        let mut bytes = [0; ENTRY];
        self.memory.read(entry_at(word::REPLIES, self.taken), &mut bytes)?;
        self.taken = self.taken.wrapping_add(1);
        self.memory.u32_at(word::REPLY_HEAD)?.store(self.taken, Ordering::Release);
        Ok(Some(RingReply::from_bytes(&bytes).unwrap_or_default()))
    }

    /// Sleeps until there may be a reply, or `milliseconds` have passed.
    pub fn sleep(&self, milliseconds: u32) -> Result<(), RingError> {
        let sleeps = self.memory.u32_at(word::CLIENT_SLEEPS)?;
        let tail = self.memory.u32_at(word::REPLY_TAIL)?;
        sleeps.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let slept = futex_wait(tail, self.taken, milliseconds);
        sleeps.store(0, Ordering::Relaxed);
        slept
    }
}

/// Counts recalls, in the ring's memory: known without a system call, and without the ring's lock.
#[derive(Clone, Debug)]
pub struct RecallWord(Arc<Mapping>);

impl RecallWord {
    /// The word of a ring region.
    pub fn of(memory: Arc<Mapping>) -> Self {
        Self(memory)
    }

    /// How often something was asked back so far (wraps).
    pub fn count(&self) -> Result<u32, RingError> {
        Ok(self.0.u32_at(word::RECALLS)?.load(Ordering::Acquire))
    }

    /// Sleeps until the count is another than `seen`, or `milliseconds` have passed. Returns the count.
    pub fn wait(&self, seen: u32, milliseconds: u32) -> Result<u32, RingError> {
        let word = self.0.u32_at(word::RECALLS)?;
        futex_wait(word, seen, milliseconds)?;
        Ok(word.load(Ordering::Acquire))
    }
}

/// Sleeps on a word while it is `value`, for so long at most.
fn futex_wait(word: &AtomicU32, value: u32, milliseconds: u32) -> Result<(), RingError> {
    let timeout = futex::Timespec {
        tv_sec: i64::from(milliseconds / 1000),
        tv_nsec: i64::from(milliseconds % 1000) * 1_000_000,
    };
    match futex::wait(word, futex::Flags::empty(), value, Some(&timeout)) {
        Ok(()) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::TIMEDOUT) => {
            Ok(())
        }
        Err(e) => Err(RingError::Io(e.into())),
    }
}

/// A ring cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The other side broke its rules.
    #[error(transparent)]
    Broken(#[from] RingBroken),
    /// Its memory could not be made.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Its memory is too small.
    #[error(transparent)]
    Range(#[from] OutOfRange),
    /// The system refused.
    #[error("the ring's futex or seal: {0}")]
    Io(io::Error),
}
