//! Open files: open, close, map, unmap, commit, truncate, read.

use std::os::fd::OwnedFd;

use extent_fs::{Access, Falloc};
use p2p::layout::LANE;
use p2p::windows::{ClientId, PeerId, Scope, Want};

use super::core::{Core, windows_error};
use super::jobs::{Answer, Work};
use super::names::{View, fs_error};
use super::permission::{READ, WRITE};
use super::requests::Outcome;
use super::session::{MapEntry, OpenFile, ReplyTo, Session};
use crate::protocol::messages as m;
use crate::protocol::records::WindowRecord;
use crate::protocol::wire::Wire;
use crate::protocol::{ErrorCode, MAX_WINDOWS, Op, WireError};
use crate::transport::ring::{RING_FAULT, RING_TOUCH, RingRequest};

fn too_big(end: u64) -> WireError {
    let text = format!("byte {end} is behind the last that a server reaches in a file ({LANE})");
    WireError::new(ErrorCode::TooBig, text)
}

fn invalid(text: impl Into<String>) -> WireError {
    WireError::new(ErrorCode::Invalid, text)
}

impl Core {
    pub(super) fn view<'a>(&'a mut self, session: &'a Session) -> View<'a, Box<dyn nvme_driver::disk::Disk>> {
        View { fs: &mut self.backing.fs, who: &session.identity, server_uid: self.server_uid }
    }

    pub(super) fn open(
        &mut self,
        session: &mut Session,
        request: &m::OpenRequest,
        path: &str,
        now: u64,
    ) -> Result<(m::OpenReply, OwnedFd), WireError> {
        let flags = request.flags;
        let (readable, writable) = (flags & m::OPEN_READ != 0, flags & m::OPEN_WRITE != 0);
        if flags & !m::OPEN_ALL != 0 || !(readable || writable) {
            return Err(invalid(format!(
                "open flags {flags:#x}: read or write or both, and nothing unknown"
            )));
        }
        if flags & (m::OPEN_CREATE | m::OPEN_TRUNCATE) != 0 && !writable {
            return Err(invalid("only a file that is opened for writing can be created or cut"));
        }
        let new = m::OPEN_CREATE | m::OPEN_EXCLUSIVE;
        if flags & m::OPEN_TEMPORARY != 0 && flags & new != new {
            return Err(invalid("only a file that is made, and was not there before, is temporary"));
        }
        session.room_for_file()?;
        let mut view = self.view(session);
        let ino = match view.walk(path) {
            Ok(_) if flags & m::OPEN_CREATE != 0 && flags & m::OPEN_EXCLUSIVE != 0 => {
                return Err(WireError::new(ErrorCode::Exists, format!("\"{path}\" exists")));
            }
            Ok(ino) => {
                // Whoever writes gets a descriptor that also reads: both are wanted then.
                let bits = if writable { READ | WRITE } else { READ };
                view.require_file(ino, bits, "open", path)?;
                ino
            }
            Err(e) if e.code == ErrorCode::NotFound && flags & m::OPEN_CREATE != 0 => {
                view.create(path, request.mode)?
            }
            Err(e) => return Err(e),
        };
        let has_cmb = session.has_cmb;
        self.open_inode(ino, has_cmb)?;
        let opened = self.finish_open(ino, writable);
        match opened {
            Ok((fd, size)) => {
                // What nobody has been told of yet is told to whoever commits next, through this handle or another.
                let losses = self.windows.losses(ino, &mut self.backing, now).reported;
                let handle = session.add_file(OpenFile { ino, writable, losses, reaches: has_cmb });
                if flags & m::OPEN_TEMPORARY != 0 {
                    session.temporary.insert(handle, path.to_owned());
                }
                let window_size = self.window_size as u64;
                let reply = m::OpenReply { handle, ino, size, cache_len: LANE, window_size };
                Ok((reply, fd))
            }
            Err(e) => {
                self.close_inode(ino, has_cmb, now);
                Err(e)
            }
        }
    }

    fn finish_open(&mut self, ino: u64, writable: bool) -> Result<(OwnedFd, u64), WireError> {
        let fd = self.windows.host_fd(ino, writable).map_err(|e| windows_error(&e))?;
        let stat = self.backing.fs.stat(ino).map_err(|e| fs_error(&e))?;
        Ok((fd, stat.size))
    }

    pub(super) fn close(&mut self, session: &mut Session, handle: u64, now: u64) -> Result<(), WireError> {
        let file = session.file(handle)?;
        let maps: Vec<u64> =
            session.maps.iter().filter(|(_, map)| map.file == handle).map(|(id, _)| *id).collect();
        for map in maps {
            self.unmap(session, map)?;
        }
        session.files.remove(&handle);
        if let Some(path) = session.temporary.remove(&handle) {
            self.drop_temporary(session, file.ino, &path);
        }
        self.close_inode(file.ino, file.reaches, now);
        Ok(())
    }

    /// Takes the name of a temporary file away, if it still has it. The file goes when it is closed.
    pub(super) fn drop_temporary(&mut self, session: &Session, ino: u64, path: &str) {
        let mut view = self.view(session);
        if view.walk(path).is_ok_and(|there| there == ino)
            && let Err(e) = view.unlink(path)
        {
            tracing::warn!("the temporary file \"{path}\" stays: {e}");
        }
    }

    pub(super) fn map(
        &mut self,
        session: &mut Session,
        request: &m::MapRequest,
        now: u64,
    ) -> Result<(m::MapReply, Vec<u8>), WireError> {
        let write = request.flags & m::MAP_WRITE != 0;
        if request.flags & !m::MAP_ALL != 0 || request.reserved != 0 || request.len == 0 {
            return Err(invalid("a mapping of no bytes, or with unknown flags"));
        }
        let file =
            if write { session.writable_file(request.handle)? } else { session.file(request.handle)? };
        session.room_for_map()?;
        let size = self.window_of(file.ino);
        let end = request
            .offset
            .checked_add(request.len)
            .filter(|end| *end <= LANE)
            .ok_or_else(|| too_big(request.offset.saturating_add(request.len)))?;
        let first = request.offset - request.offset % size;
        let count = (end - first).div_ceil(size).min(MAX_WINDOWS as u64);
        if super::raw::is_raw(file.ino) {
            let len = self.size_of(file.ino)?;
            if end > len {
                return Err(invalid(format!("the range ends at {end}, the memory at {len}")));
            }
        } else if write {
            self.reserve(file.ino, request.offset, end.min(first + count * size))?;
            self.leave_to_readers(file.ino, first..first + count * size, now)?;
        }
        let Some(client) = session.client else { return Err(invalid("no hello yet")) };
        let mut held = Vec::new();
        let mut records = Vec::new();
        for n in 0..count {
            match self.windows.hold(client, file.ino, first + n * size, write) {
                Ok(hold) => {
                    held.push(hold.handle.index);
                    let record = WindowRecord {
                        slot: hold.handle.index,
                        incarnation: hold.handle.incarnation,
                        dirty_word: hold.dirty_word.unwrap_or(0),
                        reserved: 0,
                    };
                    record.put(&mut records);
                }
                Err(e) => {
                    for slot in held {
                        // Just taken, so it is there to be given back.
                        let _ = self.windows.release(client, slot);
                    }
                    return Err(self.object_error(file.ino, &e));
                }
            }
        }
        let file_size = self.size_of(file.ino)?;
        let map = session.add_map(MapEntry { file: request.handle, windows: held });
        let count = u32::try_from(count).unwrap_or(0);
        let reply = m::MapReply { map, first, size: file_size, window_size: size, count, reserved: 0 };
        Ok((reply, records))
    }

    /// Blocks for what a writable mapping may write are taken now: a full device must show here, not when a window is written back. The file
    /// grows to the mapping's end.
    fn reserve(&mut self, ino: u64, from: u64, to: u64) -> Result<(), WireError> {
        let fs = &mut self.backing.fs;
        fs.fallocate(ino, from, to - from, Falloc::Extend).map_err(|e| fs_error(&e))
    }

    pub(super) fn unmap(&mut self, session: &mut Session, map: u64) -> Result<(), WireError> {
        let entry = session.maps.get_mut(&map).ok_or_else(|| {
            WireError::new(ErrorCode::BadHandle, format!("{map} is no mapping of this connection"))
        })?;
        let Some(client) = session.client else { return Ok(()) };
        while let Some(slot) = entry.windows.last() {
            // One that is in use stays held, and the mapping with it: the client may ask again.
            self.windows.release(client, *slot).map_err(|e| windows_error(&e))?;
            entry.windows.pop();
        }
        session.maps.remove(&map);
        Ok(())
    }

    /// The control slot of a window that the client holds.
    pub(super) fn held_slot(&self, session: &Session, handle: u64, offset: u64) -> Result<u32, WireError> {
        let file = session.file(handle)?;
        let held = session.client.and_then(|client| self.windows.held(client, file.ino, offset));
        held.ok_or_else(|| {
            WireError::new(ErrorCode::BadHandle, format!("no window at {offset} of this file is mapped"))
        })
    }

    /// A window is wanted: at once if it is there, else as a job.
    pub(super) fn start_fault(
        &mut self,
        session: &Session,
        request: &m::FaultRequest,
        now: u64,
    ) -> Result<Result<Answer, Work>, WireError> {
        if request.flags & !m::MAP_ALL != 0 {
            return Err(invalid(format!("fault flags {:#x}", request.flags)));
        }
        let slot = self.held_slot(session, request.handle, request.offset)?;
        let reaches = session.file(request.handle)?.reaches;
        let want = if request.flags & m::MAP_HOST != 0 || !reaches {
            Want::Host
        } else if request.flags & m::MAP_CMB != 0 {
            Want::Cmb
        } else {
            Want::Auto
        };
        let leave_cmb = !reaches;
        match self.fault(slot, want, leave_cmb, now) {
            Some(result) => result.map(Ok),
            None => Ok(Err(Work::Fault { slot, want, leave_cmb, since: now })),
        }
    }

    /// One entry of the ring. An error: the client breaks the protocol.
    pub(crate) fn ring_request(
        &mut self,
        session: &mut Session,
        entry: &RingRequest,
        now: u64,
    ) -> Result<(), WireError> {
        let want =
            m::FaultRequest { handle: entry.handle, offset: entry.offset, flags: entry.flags, reserved: 0 };
        match entry.opcode {
            RING_FAULT => {
                let to = ReplyTo::Ring(entry.request);
                match self.start_fault(session, &want, now) {
                    Ok(Ok(answer)) => session.answer(to, Ok(answer)),
                    Ok(Err(work)) => match self.begin(session.id, to, work) {
                        Ok(()) => Ok(()),
                        Err(error) => session.answer(to, Err(error)),
                    },
                    Err(error) => session.answer(to, Err(error)),
                }
                .map_err(|e| WireError::new(ErrorCode::BadMessage, e.to_string()))
            }
            RING_TOUCH => {
                // A hint, wrong or late as it may be: looking the window up marks it as used.
                if let Ok(slot) = self.held_slot(session, entry.handle, entry.offset)
                    && !self.is_leased(slot)
                {
                    let _ = self.windows.ensure(slot, Want::Auto, &mut self.backing, now);
                }
                Ok(())
            }
            other => Err(WireError::new(ErrorCode::BadMessage, format!("ring opcode {other}"))),
        }
    }

    /// A commit, as a job.
    pub(super) fn start_commit(
        &self,
        session: &Session,
        request: &m::CommitRequest,
    ) -> Result<Work, WireError> {
        let file = session.writable_file(request.handle)?;
        self.must_be_kept(file.ino, "commit to")?;
        let size = self.size_of(file.ino)?;
        if super::raw::is_raw(file.ino) && request.size > size {
            return Err(invalid(format!("device memory of {size} bytes does not grow to {}", request.size)));
        }
        let end = match request.len {
            0 => size.max(request.size),
            len => request.offset.saturating_add(len).min(size.max(request.size)),
        };
        if request.size > LANE {
            return Err(too_big(request.size));
        }
        let at = request.offset.min(end);
        let (handle, losses) = (request.handle, file.losses);
        Ok(Work::Commit {
            ino: file.ino,
            handle,
            at,
            end,
            size: request.size,
            from_cmb: 0,
            from_host: 0,
            losses,
        })
    }

    /// Cuts or extends a file. `None`: done; a job if windows have to go first.
    pub(super) fn start_truncate(
        &mut self,
        session: &Session,
        request: &m::TruncateRequest,
        now: u64,
    ) -> Result<Option<Work>, WireError> {
        let file = session.writable_file(request.handle)?;
        self.must_be_file(file.ino, "cut")?;
        self.truncate(file.ino, request.size, now)
    }

    pub(super) fn truncate(&mut self, ino: u64, size: u64, now: u64) -> Result<Option<Work>, WireError> {
        let old = self.backing.fs.stat(ino).map_err(|e| fs_error(&e))?.size;
        if size >= old {
            self.backing.fs.truncate(ino, size).map_err(|e| fs_error(&e))?;
            return Ok(None);
        }
        // Until the file is cut, nothing behind its new end may come back from the drive.
        let window = self.window_size as u64;
        let excluded = size - size % window..LANE;
        self.windows.exclude(ino, excluded.clone()).map_err(|e| windows_error(&e))?;
        match self.windows.truncate(ino, size, &mut self.backing, now) {
            Ok(ticket) => Ok(Some(Work::Truncate { ino, size, excluded, ticket, opened: None })),
            Err(e) => {
                self.windows.readmit(ino, &excluded);
                Err(windows_error(&e))
            }
        }
    }

    /// A revocation, as a job. It changes no byte, so whoever may open the file for reading may ask for it.
    pub(super) fn start_revoke(
        &mut self,
        session: &Session,
        request: &m::RevokeRequest,
        path: &str,
        now: u64,
    ) -> Result<Work, WireError> {
        let scope = match request.scope {
            m::REVOKE_WINDOW => Scope::Window(self.held_slot(session, request.handle, request.offset)?),
            m::REVOKE_FILE => {
                let view = self.view(session);
                let ino = view.walk(path)?;
                view.require_file(ino, READ, "revoke the windows of", path)?;
                Scope::Object(ino)
            }
            m::REVOKE_RANGE => {
                let view = self.view(session);
                let ino = view.walk(path)?;
                view.require_file(ino, READ, "revoke windows of", path)?;
                let end = request.offset.saturating_add(request.len).min(extent_fs::MAX_FILE_SIZE);
                Scope::Range { object: ino, bytes: request.offset..end.max(request.offset) }
            }
            m::REVOKE_CLIENT => Scope::Client(self.client_to_revoke(session, request.id)?),
            m::REVOKE_PEER if self.is_server(session) => Scope::Peer(PeerId(request.id)),
            m::REVOKE_ALL if self.is_server(session) => Scope::Everything,
            m::REVOKE_ALL | m::REVOKE_PEER => {
                return Err(WireError::new(
                    ErrorCode::Denied,
                    format!("uid {} may not revoke what is everybody's", session.identity.uid),
                ));
            }
            other => return Err(invalid(format!("revoke scope {other}"))),
        };
        let ticket = self.windows.revoke(&scope, &mut self.backing, now).map_err(|e| windows_error(&e))?;
        Ok(Work::Revoke { ticket, since: now })
    }

    /// Root and the server's own user.
    pub(super) fn is_server(&self, session: &Session) -> bool {
        [0, self.server_uid].contains(&session.identity.uid)
    }

    /// A client may be revoked by its own user, and by the server's.
    fn client_to_revoke(&self, session: &Session, client: u32) -> Result<ClientId, WireError> {
        let id = ClientId(client);
        let known = self.people.get(&id);
        match known {
            Some((_, uid)) if *uid == session.identity.uid || self.is_server(session) => Ok(id),
            Some(_) => Err(WireError::new(ErrorCode::Denied, format!("client {client} is another user's"))),
            None => Err(WireError::new(ErrorCode::BadHandle, format!("there is no client {client}"))),
        }
    }

    /// The last resort: bytes without a window.
    pub(super) fn read(
        &mut self,
        session: &Session,
        request: &m::ReadRequest,
    ) -> Result<(m::ReadReply, Vec<u8>), WireError> {
        let file = session.file(request.handle)?;
        let end = request.offset.checked_add(u64::from(request.len));
        let Some(end) = end.filter(|end| request.len <= m::MAX_READ && *end <= extent_fs::MAX_FILE_SIZE)
        else {
            return Err(invalid(format!("a read of {} bytes at {}", request.len, request.offset)));
        };
        self.must_reach(file.ino, &(request.offset..end))?;
        let mut bytes = vec![0; request.len as usize];
        if request.len > 0 {
            let (offset, len) = (request.offset, u64::from(request.len));
            self.backing.fs.make_way(file.ino, offset, len, Access::Read).map_err(|e| fs_error(&e))?;
        }
        self.windows
            .read_through(file.ino, request.offset..end, &mut bytes, &mut self.backing)
            .map_err(|e| self.object_error(file.ino, &e))?;
        Ok((m::ReadReply { len: request.len, reserved: 0 }, bytes))
    }

    /// Removes a name; the file goes when nobody has it open.
    pub(super) fn unlink(&mut self, session: &Session, path: &str, now: u64) -> Result<(), WireError> {
        let ino = self.view(session).walk(path)?;
        self.keep_while(ino, now, |core| core.view(session).unlink(path).map(drop))
    }

    pub(super) fn rename(
        &mut self,
        session: &Session,
        from: &str,
        to: &str,
        now: u64,
    ) -> Result<(), WireError> {
        match self.view(session).walk(to) {
            Ok(replaced) => {
                self.keep_while(replaced, now, |core| core.view(session).rename(from, to).map(drop))
            }
            Err(_) => self.view(session).rename(from, to).map(drop),
        }
    }

    /// Runs what may take an inode's last name. Its blocks must not be free before its windows are gone.
    fn keep_while(
        &mut self,
        ino: u64,
        now: u64,
        change: impl FnOnce(&mut Self) -> Result<(), WireError>,
    ) -> Result<(), WireError> {
        self.backing.fs.open(ino).map_err(|e| fs_error(&e))?;
        let result = change(self);
        let nameless = self.backing.fs.stat(ino).is_ok_and(|s| s.nlink == 0);
        if nameless && !self.opened.contains_key(&ino) {
            self.forget(ino, now);
        } else {
            self.close_in_fs(ino);
            self.empty_if_deserted(ino, now);
        }
        result
    }

    /// Has a job answer a request over the socket.
    pub(super) fn later(
        &mut self,
        session: &Session,
        op: Op,
        request: u64,
        work: Work,
    ) -> Result<Outcome, WireError> {
        self.begin(session.id, ReplyTo::Socket(op, request), work).map(|()| Outcome::Later)
    }
}
