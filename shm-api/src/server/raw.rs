//! Raw memory for clients: windows without a file behind them, for one client or, by a name, for all of its user's.

use std::os::fd::OwnedFd;

use p2p::windows::ObjectOptions;

use super::core::{Core, windows_error};
use super::memory::OwnMemory;
use super::session::{OpenFile, Session};
use crate::protocol::messages as m;
use crate::protocol::{ErrorCode, WireError};

/// Objects with this bit are raw memory; inode numbers do not come that far.
pub(super) const RAW: u64 = 1 << 63;

pub(super) fn is_raw(object: u64) -> bool {
    object & RAW != 0
}

/// One allocation.
#[derive(Clone, Debug)]
pub(super) struct Allocation {
    pub(super) len: u64,
    pub(super) uid: u32,
    /// Empty: for one client alone.
    pub(super) name: String,
    /// Device memory.
    pub(super) own: Option<OwnMemory>,
}

fn no_file(name: &str, what: &str) -> WireError {
    WireError::new(ErrorCode::Unsupported, format!("{name} has no file behind it: nothing to {what}"))
}

impl Core {
    /// Size of a file, or of raw memory, in bytes.
    pub(super) fn size_of(&self, object: u64) -> Result<u64, WireError> {
        match self.allocations.get(&object) {
            Some(a) => Ok(a.len),
            None => Ok(self.backing.fs.stat(object).map_err(|e| super::names::fs_error(&e))?.size),
        }
    }

    /// Refuses what only files can do.
    pub(super) fn must_be_file(&self, object: u64, what: &str) -> Result<(), WireError> {
        if is_raw(object) { Err(no_file(&self.memory_name(object), what)) } else { Ok(()) }
    }

    /// Refuses what raw memory cannot be done.
    pub(super) fn must_be_kept(&self, object: u64, what: &str) -> Result<(), WireError> {
        match self.allocations.get(&object) {
            Some(Allocation { own: None, .. }) => Err(no_file(&self.memory_name(object), what)),
            _ => Ok(()),
        }
    }

    /// Bytes per window of an object.
    pub(super) fn window_of(&self, object: u64) -> u64 {
        let own = self.allocations.get(&object).and_then(|a| a.own.as_ref());
        own.map_or(self.window_size, |own| own.window) as u64
    }

    /// A number that no object had.
    pub(super) fn next_object(&mut self) -> u64 {
        self.next_raw += 1;
        RAW | (self.next_raw - 1)
    }

    /// Attributes of raw memory.
    pub(super) fn raw_stat(&self, object: u64) -> Option<m::StatReply> {
        let a = self.allocations.get(&object)?;
        Some(self.with_placement(m::StatReply {
            ino: object,
            size: a.len,
            kind: m::KIND_FILE,
            mode: 0o600,
            uid: a.uid,
            links: u32::from(!a.name.is_empty()),
            ..Default::default()
        }))
    }

    /// Gets raw memory, or what this client's user has allocated under that name.
    pub(super) fn allocate(
        &mut self,
        session: &mut Session,
        request: &m::AllocateRequest,
        name: &str,
        now: u64,
    ) -> Result<(m::OpenReply, OwnedFd), WireError> {
        session.room_for_file()?;
        let uid = session.identity.uid;
        let known = match self.find_memory(uid, name) {
            Some((_, true)) => {
                let text = format!("\"{name}\" is a peer's memory and not raw: open it as that");
                return Err(WireError::new(ErrorCode::Exists, text));
            }
            Some((object, false)) => self.allocations.get_key_value(&object),
            None => None,
        };
        let object = match known {
            Some((_, a)) if ![0, a.len].contains(&request.len) => {
                let text = format!("\"{name}\" has {} bytes, not {}", a.len, request.len);
                return Err(WireError::new(ErrorCode::Exists, text));
            }
            Some((object, _)) => *object,
            None if request.len == 0 => {
                let text = format!("nobody has allocated \"{name}\"; say how many bytes it is to have");
                return Err(WireError::new(ErrorCode::NotFound, text));
            }
            None => {
                let object = self.next_object();
                let options = ObjectOptions { window_size: self.window_size, ..ObjectOptions::default() };
                self.windows.add_raw(object, request.len, options).map_err(|e| windows_error(&e))?;
                let name = name.to_owned();
                self.allocations.insert(object, Allocation { len: request.len, uid, name, own: None });
                object
            }
        };
        let opened = self.opened.entry(object).or_default();
        opened.count += 1;
        opened.without_cmb += u32::from(!session.has_cmb);
        let placed = self.place_object(object).and_then(|()| self.windows.host_fd(object, true));
        match placed {
            Ok(fd) => {
                let handle = session.add_file(OpenFile {
                    ino: object,
                    writable: true,
                    losses: 0,
                    reaches: session.has_cmb,
                });
                let size = self.size_of(object)?;
                let (cache_len, window_size) = (p2p::layout::LANE, self.window_size as u64);
                Ok((m::OpenReply { handle, ino: object, size, cache_len, window_size }, fd))
            }
            Err(e) => {
                self.close_inode(object, session.has_cmb, now);
                Err(windows_error(&e))
            }
        }
    }
}
