//! A range of a file in memory.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Duration;

use nvme_driver::clock::Clock;
use p2p::control::{ControlPages, WindowHandle};
use p2p::layout::{Home, Place};
use p2p::reader::Outcome;
use p2p::region::{Region, RegionKind, View};
use p2p::writer::{Finished, NotEntered, Slot, WriteHandle};

use super::file::Direct;
use super::path_counts::PathCounts;
use super::refused::Refusals;
use super::{ClientError, File};
use crate::protocol::messages::{
    self as m, Empty, FaultRequest, MapReply, MapRequest, ReadReply, ReadRequest, UnmapRequest,
};
use crate::protocol::{ErrorCode, MAX_WINDOWS, Op, WireError, records};

/// How often a piece is tried before the caller is told that it cannot be had.
pub(super) const TRIES: u32 = 100_000;
/// How often the server may have no place for a window before it is asked for the bytes themselves.
pub(super) const REFUSALS: u32 = 16;
/// How often a writer looks at a window that is closed to writers, before it asks the server what is in the way: about a tenth of a second.
const LOOKS: u32 = 1000;
/// How many window reads go by before the server is told which window is being read. It cannot see reads, and
/// evicts what it believes to be unused.
const TOUCH_EVERY: u64 = 4096;

/// A mapped range. Belongs to one thread at a time; other threads map it again (the memory is the same).
///
/// In the steady state [`read`](Self::read) and [`write`](Self::write) make no system call. When the server takes a window back
/// they go on at its new place by themselves.
#[derive(Debug)]
pub struct Mapped {
    pub(super) file: File,
    pub(super) pages: ControlPages,
    pub(super) offset: u64,
    len: u64,
    pub(super) first: u64,
    window: u64,
    pub(super) shift: u32,
    flags: u32,
    maps: Vec<u64>,
    pub(super) windows: Vec<WriteHandle>,
    pub(super) view: RefCell<View>,
    slot: RefCell<Option<Slot>>,
    counts: Cell<PathCounts>,
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let inner = &self.file.inner.client.inner;
        inner.counts.add(&self.counts.get());
        for &map in &self.maps {
            let gone: Result<Empty, _> =
                inner.connection.ask(Op::Unmap, "a mapping to be given back", &UnmapRequest { map }, &[]);
            if let Err(e) = gone {
                tracing::debug!("unmap: {e}");
                return;
            }
        }
    }
}

impl Mapped {
    pub(super) fn new(file: File, offset: u64, len: u64, flags: u32) -> Result<Self, ClientError> {
        let window = file.inner.window;
        let end = offset.checked_add(len).ok_or(ClientError::OutOfRange { offset, len, mapped: u64::MAX })?;
        let client = file.inner.client.clone();
        let first = offset - offset % window;
        let mut mapped = Self {
            pages: client.inner.pages.clone(),
            offset,
            len,
            first,
            window,
            shift: window.trailing_zeros(),
            flags,
            maps: Vec::new(),
            windows: Vec::new(),
            view: RefCell::default(),
            slot: RefCell::default(),
            counts: Cell::default(),
            file,
        };
        let mut at = first;
        while at < end {
            let piece = (end - at).min(window * MAX_WINDOWS as u64);
            at += mapped.map_piece(at, piece)? * window;
        }
        let connection = &client.inner.connection;
        let kind = |canary| RegionKind::Device { canary };
        let kind = client.inner.pages.canary().map_or(RegionKind::Ordinary, kind);
        let cmb = match &mapped.file.inner.direct {
            Direct::Cmb => connection.cmb.as_ref().map(|memory| Region::new(Arc::clone(memory), 0, kind)),
            Direct::Memory(own) => own.as_ref().ok().cloned(),
        };
        let host = if len == 0 {
            Vec::new()
        } else {
            let bytes = mapped.windows.len() as u64 * window;
            vec![Region::new(mapped.file.map_cache(first, bytes)?, first, RegionKind::Ordinary)]
        };
        mapped.view = RefCell::new(View { cmb, host });
        Ok(mapped)
    }

    /// Maps one request's worth; returns the number of windows.
    fn map_piece(&mut self, offset: u64, len: u64) -> Result<u64, ClientError> {
        let request =
            MapRequest { handle: self.file.inner.handle, offset, len, flags: self.flags, reserved: 0 };
        let connection = &self.file.inner.client.inner.connection;
        let reply = connection.call(Op::Map, "a mapping", &request, &[])?;
        let (body, tail) = reply.message.body::<MapReply>()?;
        self.maps.push(body.map);
        let windows = records::windows(tail, body.count)?;
        if body.first != offset || body.window_size != self.window || windows.is_empty() {
            return Err(ClientError::Protocol(format!("asked for windows at {offset}, got {body:?}")));
        }
        self.windows.extend(windows.iter().map(|w| WriteHandle {
            window: WindowHandle { index: w.slot, incarnation: w.incarnation, len: body.window_size },
            dirty_word: w.dirty_word,
        }));
        Ok(windows.len() as u64)
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Which paths the bytes of this mapping took so far.
    pub fn paths(&self) -> PathCounts {
        self.counts.get()
    }

    fn count(&self, add: impl FnOnce(&mut PathCounts)) {
        let mut counts = self.counts.get();
        add(&mut counts);
        self.counts.set(counts);
    }

    pub(super) fn check(&self, offset: u64, len: usize) -> Result<(), ClientError> {
        let end = offset.checked_add(len as u64);
        if end.is_some_and(|end| end <= self.len) {
            return Ok(());
        }
        Err(ClientError::OutOfRange { offset, len: len as u64, mapped: self.len })
    }

    /// Copies `into.len()` bytes from `offset` of the mapping. Within one window (see [`File::window_size`]) they are the bytes of one
    /// moment as far as moves go; against a concurrent writer, aligned 8-byte words are whole.
    #[inline]
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), ClientError> {
        self.check(offset, into.len())?;
        let mut at = self.offset - self.first + offset;
        let mut rest = into;
        while !rest.is_empty() {
            let inside = (at & (self.window - 1)) as usize;
            let n = rest.len().min(self.window as usize - inside);
            let (now, later) = rest.split_at_mut(n);
            self.read_window((at >> self.shift) as usize, inside, now)?;
            at += n as u64;
            rest = later;
        }
        Ok(())
    }

    #[inline]
    fn read_window(&self, index: usize, inside: usize, into: &mut [u8]) -> Result<(), ClientError> {
        let Some(handle) = self.windows.get(index) else { return Err(self.no_window(index)) };
        let mut refused = 0;
        for tries in 0..TRIES {
            let outcome = self.pages.read(handle.window, &self.view.borrow(), inside, into);
            match outcome {
                Outcome::Copied(home) => {
                    let n = into.len() as u64;
                    self.count(|c| match home {
                        Home::Cmb => {
                            (c.cmb_reads, c.cmb_read_bytes) = (c.cmb_reads + 1, c.cmb_read_bytes + n);
                        }
                        _ => (c.host_reads, c.host_read_bytes) = (c.host_reads + 1, c.host_read_bytes + n),
                    });
                    let counts = self.counts.get();
                    if (counts.cmb_reads + counts.host_reads).is_multiple_of(TOUCH_EVERY) {
                        self.touch(index);
                    }
                    return Ok(());
                }
                Outcome::Moving => self.moving(tries),
                Outcome::NotResident | Outcome::DeviceMoved => {
                    if self.fault(index, 0)?.is_some() {
                        refused += 1;
                        if refused == REFUSALS {
                            return self.read_sent(index, inside, into);
                        }
                    }
                }
                Outcome::Unmapped(place) => self.reach(index, place)?,
                Outcome::ServerGone => return Err(ClientError::Gone(" (its word says so)")),
                Outcome::StaleHandle | Outcome::OutOfRange => return Err(self.no_window(index)),
            }
        }
        Err(self.starved(index, "read"))
    }

    /// Writes `from` at `offset` of the mapping. Readers of the same windows see it at once; it is durable after
    /// [`File::commit`]. A window that is taken back in the middle is written again.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), ClientError> {
        self.check(offset, from.len())?;
        let mut at = self.offset - self.first + offset;
        let mut rest = from;
        while !rest.is_empty() {
            let inside = (at & (self.window - 1)) as usize;
            let (now, later) = rest.split_at(rest.len().min(self.window as usize - inside));
            self.section((at >> self.shift) as usize, |section| section.write(inside, now), now.len())?;
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    /// Stores one aligned little-endian 8-byte word, whole for every reader.
    pub fn write_u64(&self, offset: u64, value: u64) -> Result<(), ClientError> {
        self.check(offset, 8)?;
        let at = self.offset - self.first + offset;
        let inside = (at & (self.window - 1)) as usize;
        self.section((at >> self.shift) as usize, |section| section.write_u64(inside, value), 8)
    }

    /// Runs `store` in one write section of the window that holds `offset` of the mapping; offsets in the section count from the window's first byte.
    /// It runs again if the section was fenced, and so must store the same each time. Keep it short: a revocation of the window waits for it, up to the server's grace.
    pub fn write_section(
        &self,
        offset: u64,
        store: impl FnMut(&mut p2p::writer::Section<'_>) -> Result<(), nvme_driver::mem::OutOfRange>,
    ) -> Result<(), ClientError> {
        self.check(offset, 1)?;
        let at = self.offset - self.first + offset;
        self.section((at >> self.shift) as usize, store, 0)
    }

    fn section(
        &self,
        index: usize,
        mut store: impl FnMut(&mut p2p::writer::Section<'_>) -> Result<(), nvme_driver::mem::OutOfRange>,
        len: usize,
    ) -> Result<(), ClientError> {
        if self.flags & m::MAP_WRITE == 0 {
            return Err(ClientError::ReadOnly { what: "the mapping" });
        }
        let Some(&handle) = self.windows.get(index) else { return Err(self.no_window(index)) };
        let mut slot = self.slot.borrow_mut();
        if slot.is_none() {
            *slot = self.file.inner.client.inner.slots.take();
        }
        let Some(slot) = slot.as_mut() else {
            let text = format!("more than {} threads write at once", p2p::layout::SECTION_SLOTS);
            return Err(WireError::new(ErrorCode::TooMany, text).into());
        };
        let (mut refusals, mut odd) = (Refusals::default(), 0);
        for _ in 0..TRIES {
            let view = self.view.borrow();
            let refused = match slot.write(&self.pages, handle, &view) {
                Ok(mut section) => {
                    store(&mut section)?;
                    let home = section.home();
                    match section.finish() {
                        Finished::Done => {
                            let n = len as u64;
                            self.count(|c| match home {
                                Home::Cmb => {
                                    (c.cmb_writes, c.cmb_write_bytes) =
                                        (c.cmb_writes + 1, c.cmb_write_bytes + n);
                                }
                                _ => {
                                    (c.host_writes, c.host_write_bytes) =
                                        (c.host_writes + 1, c.host_write_bytes + n);
                                }
                            });
                            return Ok(());
                        }
                        Finished::Revoked => {
                            self.count(|c| c.fenced += 1);
                            if !self.pages.server_alive() {
                                return Err(ClientError::Gone(" (its word says so)"));
                            }
                            continue;
                        }
                    }
                }
                Err(refused) => refused,
            };
            drop(view);
            match refused {
                NotEntered::Moving if odd < LOOKS => {
                    odd += 1;
                    self.moving(odd);
                }
                NotEntered::Moving | NotEntered::NotResident | NotEntered::DeviceMoved => {
                    odd = 0;
                    self.fault_to_write(index, &mut refusals)?;
                }
                NotEntered::Unmapped(place) => self.reach(index, place)?,
                NotEntered::ServerGone => return Err(ClientError::Gone(" (its word says so)")),
                NotEntered::StaleHandle => return Err(self.no_window(index)),
            }
        }
        Err(self.starved(index, "write"))
    }

    /// Gives way to the server, for longer the longer it takes.
    #[cold]
    pub(super) fn moving(&self, tries: u32) {
        self.count(|c| c.moving += 1);
        if tries < 100 {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    pub(super) fn clock(&self) -> &dyn Clock {
        self.file.inner.client.inner.clock.as_ref()
    }

    pub(super) fn window_offset(&self, index: usize) -> u64 {
        self.first + ((index as u64) << self.shift)
    }

    /// Asks for the range to be brought into the CMB now, as far as there is room. A wish: see [`paths`](Self::paths) for what became of it.
    pub fn prefer_cmb(&self) -> Result<(), ClientError> {
        for index in 0..self.windows.len() {
            self.fault(index, m::MAP_CMB)?;
        }
        Ok(())
    }

    /// Asks the server to make a window resident; what is in the way, if it is not now.
    #[cold]
    pub(super) fn fault(&self, index: usize, flags: u32) -> Result<Option<ErrorCode>, ClientError> {
        self.count(|c| c.faults += 1);
        let flags = flags | self.flags;
        let offset = self.window_offset(index);
        let want = FaultRequest { handle: self.file.inner.handle, offset, flags, reserved: 0 };
        let connection = &self.file.inner.client.inner.connection;
        let reply = connection.fault(want)?;
        if reply.status == 0 {
            return Ok(None);
        }
        if let Some(code) = ErrorCode::from_u32(reply.status).filter(|code| code.passes()) {
            self.clock().pause(Duration::from_micros(200));
            return Ok(Some(code));
        }
        self.fault_in_words(index, flags)?;
        Ok(None)
    }

    /// The same over the socket. The ring has no room for the text of a refusal: ask once more where there is.
    #[cold]
    pub(super) fn fault_in_words(&self, index: usize, flags: u32) -> Result<(), ClientError> {
        let (handle, offset) = (self.file.inner.handle, self.window_offset(index));
        let want = FaultRequest { handle, offset, flags: flags | self.flags, reserved: 0 };
        let connection = &self.file.inner.client.inner.connection;
        let _: m::FaultReply = connection.ask(Op::Fault, "a window to be resident", &want, &[])?;
        Ok(())
    }

    /// The last resort: no window can be placed anywhere, so the server sends the bytes.
    #[cold]
    fn read_sent(&self, index: usize, inside: usize, into: &mut [u8]) -> Result<(), ClientError> {
        let mut offset = self.window_offset(index) + inside as u64;
        for piece in into.chunks_mut(m::MAX_READ as usize) {
            // At most MAX_READ.
            let len = piece.len() as u32;
            let request = ReadRequest { handle: self.file.inner.handle, offset, len, reserved: 0 };
            let connection = &self.file.inner.client.inner.connection;
            let reply = connection.call(Op::Read, "bytes", &request, &[])?;
            let (body, bytes) = reply.message.body::<ReadReply>()?;
            if body.len != len || bytes.len() != piece.len() {
                return Err(ClientError::Protocol(format!("asked for {len} bytes, got {}", bytes.len())));
            }
            piece.copy_from_slice(bytes);
            offset += u64::from(len);
        }
        let n = into.len() as u64;
        self.count(|c| (c.sent_reads, c.sent_read_bytes) = (c.sent_reads + 1, c.sent_read_bytes + n));
        Ok(())
    }

    #[cold]
    fn touch(&self, index: usize) {
        let (handle, offset) = (self.file.inner.handle, self.window_offset(index));
        if let Err(e) = self.file.inner.client.inner.connection.touch(handle, offset) {
            // A hint that is lost costs nothing; a server that is gone shows in the next read.
            tracing::debug!("touch: {e}");
        }
    }

    /// Maps the place where a window turned out to be.
    #[cold]
    pub(super) fn reach(&self, index: usize, place: Place) -> Result<(), ClientError> {
        match place.home() {
            Home::Host => {
                let memory = self.file.map_cache(place.offset(), self.window)?;
                let region = Region::new(memory, place.offset(), RegionKind::Ordinary);
                self.view.borrow_mut().host.push(region);
                Ok(())
            }
            // The CMB is not for this client: have the window moved to where it can be reached.
            _ => self.fault(index, m::MAP_HOST).map(drop),
        }
    }

    #[cold]
    pub(super) fn no_window(&self, index: usize) -> ClientError {
        let offset = self.window_offset(index);
        WireError::new(
            ErrorCode::BadHandle,
            format!("the window at {offset} is not mapped any more; map it again"),
        )
        .into()
    }

    #[cold]
    pub(super) fn starved(&self, index: usize, what: &'static str) -> ClientError {
        ClientError::Starved { offset: self.window_offset(index), times: TRIES, what }
    }
}
