//! Requests over the socket: decoded, handed to whoever does them, answered.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nvme_driver::mem::Mapping;

use super::core::{Core, windows_error};
use super::jobs::{Answer, Work};
use super::names::{fs_error, stat_reply};
use super::outbox::SendError;
use super::session::{ReplyTo, Session};
use crate::protocol::messages as m;
use crate::protocol::records::{self, PathCount};
use crate::protocol::wire::Wire;
use crate::protocol::{ErrorCode, Message, Op, VERSION, WireError};
use crate::transport::ring::{RingError, RingReply, ServerRing};

/// What a request comes to at once.
pub(super) enum Outcome {
    /// A reply: its body, what follows, descriptors.
    Reply(Vec<u8>, Vec<u8>, Vec<OwnedFd>),
    /// A job answers later.
    Later,
}

fn reply<T: Wire>(body: &T) -> Outcome {
    Outcome::Reply(body.to_bytes(), Vec::new(), Vec::new())
}

pub(super) fn descriptor(memory: &Arc<Mapping>) -> Result<OwnedFd, WireError> {
    let gone = |e: std::io::Error| WireError::new(ErrorCode::Internal, format!("a descriptor: {e}"));
    let (fd, _) = memory.fd().ok_or_else(|| gone(std::io::ErrorKind::NotFound.into()))?;
    fd.try_clone_to_owned().map_err(gone)
}

/// An answer could not be delivered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnswerError {
    #[error(transparent)]
    Send(#[from] SendError),
    #[error(transparent)]
    Ring(#[from] RingError),
}

impl Session {
    /// Answers a request that was not answered at once.
    pub(super) fn answer(
        &mut self,
        to: ReplyTo,
        result: Result<Answer, WireError>,
    ) -> Result<(), AnswerError> {
        match to {
            ReplyTo::Ring(request) => {
                let reply = match result {
                    Ok(Answer::Fault(f)) => RingReply {
                        request,
                        slot: f.slot,
                        incarnation: f.incarnation,
                        place: f.place,
                        ..Default::default()
                    },
                    Ok(_) => RingReply { request, ..Default::default() },
                    Err(error) => RingReply { request, status: error.code as u32, ..Default::default() },
                };
                Ok(self.reply_ring(&reply)?)
            }
            ReplyTo::Socket(op, request) => Ok(match result {
                Ok(Answer::Nothing) => self.reply(op, request, &m::Empty {}, &[], Vec::new()),
                Ok(Answer::Open(body, fd)) => self.reply(op, request, &body, &[], vec![fd]),
                Ok(Answer::Fault(body)) => self.reply(op, request, &body, &[], Vec::new()),
                Ok(Answer::Revoke(body)) => self.reply(op, request, &body, &[], Vec::new()),
                Ok(Answer::Commit(body)) => self.reply(op, request, &body, &[], Vec::new()),
                Ok(Answer::PeerMap(body)) => self.reply(op, request, &body, &[], Vec::new()),
                Ok(Answer::PeerDma(body)) => self.reply(op, request, &body, &[], Vec::new()),
                Ok(Answer::PeerCopy(body)) => self.reply(op, request, &body, &[], Vec::new()),
                Ok(Answer::Layout(granted)) => {
                    self.reply(op, request, &granted.body, &granted.extents, Vec::new())
                }
                Ok(Answer::LayoutCommit(body)) => self.reply(op, request, &body, &[], Vec::new()),
                Err(error) => self.reply_error(op, request, &error),
            }?),
        }
    }
}

/// Longest text about a device in trouble, in bytes.
const MAX_TROUBLE: usize = 1024;

impl Core {
    /// Takes one request. An error: the client breaks the protocol and is let go.
    pub(crate) fn request(
        &mut self,
        session: &mut Session,
        message: &Message,
        now: u64,
    ) -> Result<(), WireError> {
        let (op, request) = (message.op, message.request);
        let outcome = if (op == Op::Hello) == session.client.is_some() {
            let text = if op == Op::Hello { "a second hello" } else { "a request before hello" };
            Err(WireError::new(ErrorCode::BadState, text))
        } else {
            self.dispatch(session, message, now)
        };
        let sent = match outcome {
            Ok(Outcome::Later) => Ok(()),
            Ok(Outcome::Reply(body, tail, fds)) => {
                session.reply(op, request, &m::Empty {}, &[body, tail].concat(), fds)
            }
            Err(error) if error.code == ErrorCode::BadMessage => return Err(error),
            Err(error) => session.reply_error(op, request, &error),
        };
        sent.map_err(|e| WireError::new(ErrorCode::BadMessage, e.to_string()))
    }

    fn dispatch(&mut self, session: &mut Session, message: &Message, now: u64) -> Result<Outcome, WireError> {
        let (op, id) = (message.op, message.request);
        let done = || Ok(reply(&m::Empty {}));
        match op {
            Op::Hello => self.hello(session, &message.body_only()?),
            Op::Kick => done(),
            Op::Info => {
                message.body_only::<m::Empty>()?;
                Ok(self.info())
            }
            Op::Status => {
                message.body_only::<m::Empty>()?;
                Ok(self.status())
            }
            Op::Open => {
                let (body, path) = message.body::<m::OpenRequest>()?;
                let path = records::one_text(path)?;
                let (reply, fd) = self.open(session, &body, &path, now)?;
                if body.flags & m::OPEN_TRUNCATE == 0 || reply.size == 0 {
                    return Ok(Outcome::Reply(reply.to_bytes(), Vec::new(), vec![fd]));
                }
                let cut = m::TruncateRequest { handle: reply.handle, size: 0 };
                match self.start_truncate(session, &cut, now) {
                    Ok(Some(Work::Truncate { ino, size, excluded, ticket, .. })) => {
                        let opened = Some((reply, fd));
                        let work = Work::Truncate { ino, size, excluded, ticket, opened };
                        self.later(session, op, id, work)
                    }
                    Ok(_) => Ok(Outcome::Reply(reply.to_bytes(), Vec::new(), vec![fd])),
                    Err(e) => {
                        self.close(session, reply.handle, now)?;
                        Err(e)
                    }
                }
            }
            Op::Close => {
                let body: m::HandleRequest = message.body_only()?;
                self.close(session, body.handle, now)?;
                done()
            }
            Op::Stat => {
                let (_, path) = message.body::<m::Empty>()?;
                let path = records::one_text(path)?;
                let stat = self.view(session).stat(&path)?;
                Ok(reply(&self.with_placement(stat)))
            }
            Op::FileStat => {
                let body: m::HandleRequest = message.body_only()?;
                let file = session.file(body.handle)?;
                if let Some(stat) = self.raw_stat(file.ino) {
                    return Ok(reply(&stat));
                }
                let stat = self.backing.fs.stat(file.ino).map_err(|e| fs_error(&e))?;
                Ok(reply(&self.with_placement(stat_reply(&stat))))
            }
            Op::List => {
                let (body, tail) = message.body::<m::ListRequest>()?;
                let (path, after) = records::two_texts(tail, body.path_len, body.after_len)?;
                let (entries, more) = self.view(session).list(&path, &after)?;
                let mut tail = Vec::new();
                entries.iter().for_each(|entry| records::put_dir_entry(entry, &mut tail));
                let count = u32::try_from(entries.len()).unwrap_or(0);
                let body = m::ListReply { count, more: u32::from(more) };
                Ok(Outcome::Reply(body.to_bytes(), tail, Vec::new()))
            }
            Op::Mkdir => {
                let (body, path) = message.body::<m::MkdirRequest>()?;
                let path = records::one_text(path)?;
                self.view(session).mkdir(&path, body.mode)?;
                done()
            }
            Op::Unlink => {
                let (_, path) = message.body::<m::Empty>()?;
                let path = records::one_text(path)?;
                self.unlink(session, &path, now)?;
                done()
            }
            Op::Rmdir => {
                let (_, path) = message.body::<m::Empty>()?;
                let path = records::one_text(path)?;
                self.view(session).rmdir(&path)?;
                done()
            }
            Op::Rename => {
                let (body, tail) = message.body::<m::RenameRequest>()?;
                let (from, to) = records::two_texts(tail, body.from_len, body.to_len)?;
                self.rename(session, &from, &to, now)?;
                done()
            }
            Op::Sync => {
                self.backing.fs.sync_all().map_err(|e| fs_error(&e))?;
                done()
            }
            Op::SetAttr => {
                let (body, path) = message.body::<m::SetAttrRequest>()?;
                let path = records::one_text(path)?;
                self.view(session).set_attr(&path, &body)?;
                done()
            }
            Op::Truncate => match self.start_truncate(session, &message.body_only()?, now)? {
                None => done(),
                Some(work) => self.later(session, op, id, work),
            },
            Op::Map => {
                let (body, tail) = self.map(session, &message.body_only()?, now)?;
                Ok(Outcome::Reply(body.to_bytes(), tail, Vec::new()))
            }
            Op::Unmap => {
                let body: m::UnmapRequest = message.body_only()?;
                self.unmap(session, body.map)?;
                done()
            }
            Op::Fault => match self.start_fault(session, &message.body_only()?, now)? {
                Ok(Answer::Fault(body)) => Ok(reply(&body)),
                Ok(_) => done(),
                Err(work) => self.later(session, op, id, work),
            },
            Op::Read => {
                let (body, bytes) = self.read(session, &message.body_only()?)?;
                Ok(Outcome::Reply(body.to_bytes(), bytes, Vec::new()))
            }
            Op::Commit => {
                let work = self.start_commit(session, &message.body_only()?)?;
                self.later(session, op, id, work)
            }
            Op::Revoke => {
                let (body, path) = message.body::<m::RevokeRequest>()?;
                let path = records::one_text(path)?;
                let work = self.start_revoke(session, &body, &path, now)?;
                self.later(session, op, id, work)
            }
            Op::Allocate => {
                let (body, name) = message.body::<m::AllocateRequest>()?;
                let name = records::one_text(name)?;
                let (reply, fd) = self.allocate(session, &body, &name, now)?;
                Ok(Outcome::Reply(reply.to_bytes(), Vec::new(), vec![fd]))
            }
            Op::Memory => {
                let (body, name) = message.body::<m::MemoryRequest>()?;
                let name = records::one_text(name)?;
                let (reply, text, fds) = self.open_memory(session, &body, &name, now)?;
                Ok(Outcome::Reply(reply.to_bytes(), text.into_bytes(), fds))
            }
            Op::SetPlacement => {
                let (body, path) = message.body::<m::SetPlacementRequest>()?;
                let path = records::one_text(path)?;
                let work = self.set_placement(session, &body, &path, now)?;
                self.later(session, op, id, work)
            }
            Op::LayoutMap => {
                let work = self.start_layout(session, &message.body_only()?, now)?;
                self.later(session, op, id, work)
            }
            Op::LayoutShare => {
                let granted = self.share_layout(session, &message.body_only()?)?;
                Ok(Outcome::Reply(granted.body.to_bytes(), granted.extents, Vec::new()))
            }
            Op::LayoutCommit => {
                let work = self.start_layout_commit(session, message, now)?;
                self.later(session, op, id, work)
            }
            Op::LayoutRelease => {
                self.release_layout(session, &message.body_only()?)?;
                done()
            }
            Op::LayoutRecalls => {
                message.body_only::<m::Empty>()?;
                let (body, tail) = self.layout_recalls(session);
                Ok(Outcome::Reply(body.to_bytes(), tail, Vec::new()))
            }
            Op::PeerAttach => {
                let (body, fd) = self.attach_peer(session, &message.body_only()?)?;
                Ok(Outcome::Reply(body.to_bytes(), Vec::new(), vec![fd]))
            }
            Op::PeerMap => {
                let work = self.start_peer_map(session, &message.body_only()?, now)?;
                self.later(session, op, id, work)
            }
            Op::PeerDma => {
                let work = self.start_peer_dma(session, &message.body_only()?)?;
                self.later(session, op, id, work)
            }
            Op::PeerList => {
                let (body, tail) = self.list_peers(session, &message.body_only()?)?;
                Ok(Outcome::Reply(body.to_bytes(), tail, Vec::new()))
            }
            Op::PeerRead | Op::PeerWrite => {
                let out = op == Op::PeerWrite;
                let work = self.start_peer_copy(session, &message.body_only()?, out, now)?;
                self.later(session, op, id, work)
            }
            Op::PeerRevoke => {
                let body: m::PeerRequest = message.body_only()?;
                let work = self.start_peer_revoke(session, body.peer, now)?;
                self.later(session, op, id, work)
            }
            Op::PeerOpen => {
                let (_, name) = message.body::<m::Empty>()?;
                let name = records::one_text(name)?;
                Ok(reply(&self.open_drive(session, &name)?))
            }
            Op::PeerFlush => {
                let body: m::PeerRequest = message.body_only()?;
                let work = self.start_drive_flush(session, body.peer)?;
                self.later(session, op, id, work)
            }
            Op::PeerDetach => {
                let body: m::PeerRequest = message.body_only()?;
                let peer = session.peer(body.peer)?;
                session.peers.remove(&body.peer);
                self.detach_peer(peer, now);
                done()
            }
        }
    }

    fn hello(&mut self, session: &mut Session, request: &m::HelloRequest) -> Result<Outcome, WireError> {
        if !(request.min_version..=request.max_version).contains(&VERSION) {
            return Err(WireError::new(
                ErrorCode::BadVersion,
                format!(
                    "the client speaks versions {} to {}, this server speaks {VERSION}",
                    request.min_version, request.max_version
                ),
            ));
        }
        let internal = |e: RingError| WireError::new(ErrorCode::Internal, e.to_string());
        let ring = ServerRing::create().map_err(internal)?;
        let control = self.windows.control_fd().map_err(|e| windows_error(&e))?;
        let (client, region) = self.windows.attach().map_err(|e| windows_error(&e))?;
        session.client = Some(client);
        let pid = u32::try_from(session.identity.pid).unwrap_or(0);
        self.people.insert(client, (pid, session.identity.uid));
        let mut fds = vec![control, descriptor(region.memory())?, descriptor(ring.memory())?];
        let (cmb_reason, text) = self.cmb_for(session, &mut fds)?;
        let given = cmb_reason == m::CMB_GIVEN;
        session.has_cmb = given;
        let cmb = self.windows.cmb().filter(|_| given);
        let body = m::HelloReply {
            control_len: self.windows.control().memory().len() as u64,
            slots_len: region.memory().len() as u64,
            ring_len: ring.memory().len() as u64,
            cmb_len: cmb.map_or(0, |c| c.memory.len() as u64),
            cmb_offset: cmb.and_then(|c| c.memory.fd()).map_or(0, |(_, offset)| offset),
            uuid: self.backing.fs.uuid(),
            version: VERSION,
            reserved: 0,
            cmb_reason,
            uid: session.identity.uid,
            client: client.0,
        };
        session.ring = Some(ring);
        Ok(Outcome::Reply(body.to_bytes(), text.into_bytes(), fds))
    }

    /// Hands out the CMB, or says why not. A mapping of it reaches the bytes of every file that lives there: so it goes
    /// to the server's own uid, which can reach them anyway, and to nobody else (P8).
    fn cmb_for(&self, session: &Session, fds: &mut Vec<OwnedFd>) -> Result<(u32, String), WireError> {
        let Some(cmb) = self.windows.cmb() else {
            return Ok((m::CMB_NONE, "the device has no CMB".to_owned()));
        };
        if session.identity.uid != self.server_uid {
            let text = format!(
                "a mapping of the CMB reaches every file's bytes: it is given to the server's own uid {} only, not to {}; the host cache serves instead",
                self.server_uid, session.identity.uid
            );
            return Ok((m::CMB_OTHER_UID, text));
        }
        if cmb.memory.fd().is_none() {
            return Ok((
                m::CMB_NONE,
                "the CMB of this device cannot be mapped by other processes".to_owned(),
            ));
        }
        fds.push(descriptor(&cmb.memory)?);
        Ok((m::CMB_GIVEN, String::new()))
    }

    fn info(&self) -> Outcome {
        let fs = self.backing.fs.statfs();
        let body = m::InfoReply {
            bytes: fs.blocks.saturating_mul(extent_fs::BLOCK),
            free_bytes: (fs.free + fs.pending).saturating_sub(fs.reserved).saturating_mul(extent_fs::BLOCK),
            cmb_bytes: self.windows.cmb_bytes().1 as u64,
            device_generation: self.windows.control().device_generation(),
            uuid: self.backing.fs.uuid(),
            pid: std::process::id(),
            uid: self.server_uid,
            clients: u32::try_from(self.counts.clients).unwrap_or(u32::MAX),
            grace_ms: u32::try_from(self.grace / 1_000_000).unwrap_or(u32::MAX),
        };
        let name = self.backing.fs.disk().name().as_bytes().to_vec();
        Outcome::Reply(body.to_bytes(), name, Vec::new())
    }

    /// How the device is, and why.
    fn device_state(&self) -> (u32, String) {
        let fs = &self.backing.fs;
        match (fs.disk().failure(), fs.read_only_reason()) {
            (Some(why), _) => (m::DEVICE_FAILED, why),
            (None, Some(why)) => (m::DEVICE_READ_ONLY, why.to_owned()),
            (None, None) => (m::DEVICE_WORKS, String::new()),
        }
    }

    fn status(&self) -> Outcome {
        use p2p::layout::Home;
        let (mut cmb_windows, mut host_windows, mut memory_windows) = (0, 0, 0);
        for (_, window) in self.windows.iter() {
            match window.home {
                Home::Cmb if self.windows.has_memory(window.object) => memory_windows += 1,
                Home::Cmb => cmb_windows += 1,
                Home::Host => host_windows += 1,
                Home::None => {}
            }
        }
        let quarantined: usize = self
            .windows
            .quarantine()
            .filter(|q| q.home == Home::Cmb && !self.windows.has_memory(q.object))
            .map(|q| q.len)
            .sum();
        let (free, size) = self.windows.cmb_bytes();
        let counters = self.windows.counters();
        let mut tail = Vec::new();
        let mut reasons = 0;
        for (path, reason, count) in counters.iter() {
            reasons += 1;
            let line = PathCount {
                path: path.to_string(),
                reason: reason.to_string(),
                count: count.transfers,
                bytes: count.bytes,
            };
            records::put_path_count(&line, &mut tail);
        }
        let mut listed = 0;
        for (client, windows) in self.windows.clients() {
            let (pid, uid) = self.people.get(&client).copied().unwrap_or_default();
            let windows = u32::try_from(windows).unwrap_or(u32::MAX);
            records::ClientRecord { client: client.0, pid, uid, windows }.put(&mut tail);
            listed += 1;
        }
        let (device, mut trouble) = self.device_state();
        trouble.truncate(trouble.floor_char_boundary(MAX_TROUBLE));
        let body = m::StatusReply {
            clients: self.counts.clients,
            open_files: self.opened.values().map(|o| u64::from(o.count)).sum(),
            cmb_windows,
            host_windows,
            cmb_bytes: size as u64,
            cmb_used: (size - free) as u64,
            cmb_quarantined: quarantined as u64,
            revocations: counters.moves,
            fenced: counters.fenced,
            commits: self.counts.commits,
            expelled: self.counts.expelled,
            died: self.counts.died,
            device_generation: self.windows.control().device_generation(),
            host_bytes: self.windows.host_bytes().0,
            host_limit: self.windows.host_bytes().1,
            resets: counters.resets,
            lost_bytes: counters.lost_bytes,
            spare_bytes: self.windows.spare_bytes(),
            memory_bytes: self.windows.memory_bytes(),
            memory_windows,
            reasons,
            listed,
            placement: u32::from(self.placement_of(extent_fs::ROOT).0.number()),
            readers: match self.auto {
                p2p::windows::Placement::PeersFirst => m::PLACE_HOST,
                _ if self.windows.cmb().is_none() => m::PLACE_HOST,
                _ => m::PLACE_CMB,
            },
            device,
            trouble_len: u32::try_from(trouble.len()).unwrap_or(0),
        };
        tail.extend_from_slice(trouble.as_bytes());
        Outcome::Reply(body.to_bytes(), tail, Vec::new())
    }
}
