//! The server's one thread: sockets, rings, deaths, and the steps of whatever takes longer than one turn.
//!
//! It waits for nobody. What cannot be answered now becomes a job that later turns move on; what cannot be sent now waits in an
//! outbox. With nothing to do it sleeps in `poll` and costs nothing, but for a look once a second while somebody may write.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use p2p::layout;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::ServerError;
use super::core::Core;
use super::session::Session;
use super::stop::StopHandle;
use crate::protocol::{ErrorCode, Message, Op, WireError};
use crate::transport::listener::Listener;
use crate::transport::peer;
use crate::transport::server_word::ServerWord;
use crate::transport::socket::Socket;

/// Most clients at one time, those included that are gone but not dead.
const MAX_CLIENTS: usize = 1024;
/// Messages taken from one client before the next one's turn.
const MESSAGES_PER_TURN: usize = 16;
/// Ring entries taken from one client before the next one's turn.
const ENTRIES_PER_TURN: usize = 64;
/// Looks at rings and moves, after the last work, before going to sleep: some tens of microseconds.
const SPINS: u32 = 200;
/// How long to leave waiting clients waiting when the process has run out of descriptors.
const FULL_NAP: Duration = Duration::from_millis(100);
/// Clients beyond the limit that are still to be told so, at most, and how long each may take to say hello: a socket that is closed
/// with something unread in it takes what was sent over it along.
const TURNED_AWAY: (usize, Duration) = (64, Duration::from_secs(1));
/// First sleep while a move is under way: its progress shows in client memory, which wakes nobody.
const SHORT_NAP: Duration = Duration::from_micros(100);
/// Longest sleep while somebody waits for a move, and while nobody does (pages in quarantine).
const LONG_NAPS: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// A client whose connection is gone but whose process lives: it may still touch what it had mapped.
#[derive(Debug)]
struct Ghost {
    session: Session,
}

/// A client for which there was no room. It is told so in answer to its hello.
#[derive(Debug)]
struct TurnedAway {
    socket: Socket,
    until: u64,
}

pub(crate) struct Reactor {
    listener: Listener,
    core: Core,
    sessions: BTreeMap<u32, Session>,
    ghosts: Vec<Ghost>,
    turned_away: Vec<TurnedAway>,
    stop: StopHandle,
    signals: Option<OwnedFd>,
    started: Instant,
    next_id: u32,
    /// No clients are taken before this time: the last one could not be, for want of descriptors.
    full_until: u64,
}

/// Why a client is let go.
#[derive(Debug)]
enum Farewell {
    /// It closed its socket or died.
    Gone,
    /// It broke the rules, and is told which.
    Expelled(WireError),
}

impl Reactor {
    pub(crate) fn new(core: Core, listener: Listener, stop: StopHandle, signals: Option<OwnedFd>) -> Self {
        Self {
            listener,
            core,
            sessions: BTreeMap::new(),
            ghosts: Vec::new(),
            turned_away: Vec::new(),
            stop,
            signals,
            started: Instant::now(),
            next_id: 1,
            full_until: 0,
        }
    }

    fn now(&self) -> u64 {
        nanoseconds(self.started)
    }

    /// Serves until told to stop, then writes back, syncs and unmounts.
    pub(crate) fn run(mut self) -> Result<(), ServerError> {
        more_descriptors();
        // Held by this thread from here to its end, however it ends.
        let word = ServerWord::hold(self.core.control_memory(), layout::header::SERVER)
            .map_err(|source| ServerError::System { what: "hold the server word", source })?;
        let mut idle = 0;
        let mut wait = Duration::ZERO;
        loop {
            let stopping = self.look(wait)?;
            if stopping {
                break;
            }
            let busy = self.turn();
            idle = if busy { 0 } else { idle + 1 };
            wait = if idle < SPINS { Duration::ZERO } else { self.may_sleep(idle - SPINS) };
        }
        self.farewell();
        // From here on clients know that what they store may be lost. What they stored before is written back now.
        drop(word);
        let started = self.started;
        let clock = move || nanoseconds(started);
        drop(self.listener);
        self.core.shut_down(&clock)
    }

    /// How long the next poll may wait.
    fn may_sleep(&mut self, naps: u32) -> Duration {
        // In this order: a client that puts a request after our look finds the flag set, and kicks us.
        let all_quiet = self
            .sessions
            .values()
            .all(|s| s.ring.as_ref().is_none_or(|ring| ring.about_to_sleep().unwrap_or(false)));
        if !all_quiet {
            return Duration::ZERO;
        }
        if !self.core.is_moving() {
            let until = |at: u64| Duration::from_nanos(at.saturating_sub(self.now())).max(SHORT_NAP);
            return self.core.deadline().map_or(Duration::MAX, until);
        }
        let longest = if self.core.has_jobs() { LONG_NAPS.0 } else { LONG_NAPS.1 };
        SHORT_NAP.saturating_mul(1 << naps.min(10)).min(longest)
    }

    /// Waits for something to happen, then takes new clients, messages and deaths. True: it is time to stop.
    fn look(&mut self, wait: Duration) -> Result<bool, ServerError> {
        let ids: Vec<u32> = self.sessions.keys().copied().collect();
        let mut fds = Vec::with_capacity(3 + 2 * ids.len() + self.ghosts.len() + self.turned_away.len());
        let now = self.now();
        self.turned_away.retain(|client| now < client.until);
        let full = now < self.full_until || self.turned_away.len() >= TURNED_AWAY.0;
        // A listener that cannot be served would wake us for ever.
        fds.push(PollFd::new(&self.listener, if full { PollFlags::empty() } else { PollFlags::IN }));
        fds.push(PollFd::new(&self.stop, PollFlags::IN));
        if let Some(signals) = &self.signals {
            fds.push(PollFd::new(signals, PollFlags::IN));
        }
        let fixed = fds.len();
        let first_turned_away = fixed + 2 * ids.len() + self.ghosts.len();
        for session in self.sessions.values() {
            let want =
                if session.outbox.is_waiting() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            fds.push(PollFd::new(&session.socket, want));
            fds.push(PollFd::new(&session.pidfd, PollFlags::IN));
        }
        for ghost in &self.ghosts {
            fds.push(PollFd::new(&ghost.session.pidfd, PollFlags::IN));
        }
        for client in &self.turned_away {
            fds.push(PollFd::new(&client.socket, PollFlags::IN));
        }
        let wait = if full { wait.min(FULL_NAP) } else { wait };
        let wait = if self.turned_away.is_empty() { wait } else { wait.min(TURNED_AWAY.1) };
        let timeout = (wait != Duration::MAX).then(|| Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(wait.subsec_nanos()),
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(false),
            Err(e) => return Err(ServerError::System { what: "poll", source: e.into() }),
        }
        let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        drop(fds);
        let is = |index: usize| ready.get(index).is_some_and(|r| !r.is_empty());
        if (1..fixed).any(is) {
            return Ok(true);
        }
        for (nth, &id) in ids.iter().enumerate() {
            let at = fixed + 2 * nth;
            if is(at) {
                self.serve_socket(id);
            }
            if is(at + 1) {
                self.let_go(id, Farewell::Gone);
            }
        }
        let first_ghost = fixed + 2 * ids.len();
        let now = self.now();
        let mut nth = 0;
        let core = &mut self.core;
        // Ghosts that were added in this turn lie behind the ones polled.
        self.ghosts.retain_mut(|ghost| {
            nth += 1;
            let dead = is(first_ghost + nth - 1) && peer::is_dead(&ghost.session.pidfd);
            if dead {
                core.client_died(&mut ghost.session, now);
            }
            !dead
        });
        let mut nth = 0;
        self.turned_away.retain(|client| {
            nth += 1;
            let spoke = is(first_turned_away + nth - 1);
            if spoke {
                turn_away(&client.socket);
            }
            !spoke
        });
        if is(0) {
            self.accept();
        }
        Ok(false)
    }

    /// Rings and jobs. True if there was anything to do.
    fn turn(&mut self) -> bool {
        let now = self.now();
        let mut busy = false;
        let ids: Vec<u32> = self.sessions.keys().copied().collect();
        for id in ids {
            match self.serve_ring(id, now) {
                Ok(worked) => busy |= worked,
                Err(farewell) => self.let_go(id, farewell),
            }
        }
        busy |= self.core.step(&mut self.sessions, now);
        for id in self.core.take_expelled() {
            let error = WireError::new(ErrorCode::BadMessage, "replies are left unread");
            self.let_go(id, Farewell::Expelled(error));
        }
        busy
    }

    fn serve_ring(&mut self, id: u32, now: u64) -> Result<bool, Farewell> {
        let mut worked = false;
        for _ in 0..ENTRIES_PER_TURN {
            let Some(session) = self.sessions.get_mut(&id) else { break };
            let Some(ring) = session.ring.as_mut() else { break };
            let broken = |e: crate::transport::ring::RingError| {
                Farewell::Expelled(WireError::new(ErrorCode::BadMessage, e.to_string()))
            };
            if !worked {
                ring.awake().map_err(broken)?;
            }
            let Some(request) = ring.take().map_err(broken)? else { break };
            worked = true;
            self.core.ring_request(session, &request, now).map_err(Farewell::Expelled)?;
        }
        Ok(worked)
    }

    fn serve_socket(&mut self, id: u32) {
        let now = self.now();
        for _ in 0..MESSAGES_PER_TURN {
            let Some(session) = self.sessions.get_mut(&id) else { return };
            if session.outbox.flush(&session.socket).is_err() {
                return self.let_go(id, Farewell::Gone);
            }
            let datagram = match session.socket.receive() {
                Ok(Some(datagram)) => datagram,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Ok(None) | Err(_) => return self.let_go(id, Farewell::Gone),
            };
            // No request carries descriptors: what came is closed when the datagram is dropped.
            let unexpected = datagram.fds.len();
            let decoded = if datagram.truncated {
                Err(WireError::new(ErrorCode::BadMessage, "message longer than the limit"))
            } else if unexpected > 0 {
                Err(WireError::new(
                    ErrorCode::BadMessage,
                    format!("{unexpected} descriptors that nobody asked for"),
                ))
            } else {
                Message::decode(&datagram.bytes)
            };
            let result = match decoded {
                Ok(message) if message.reply => {
                    Err(WireError::new(ErrorCode::BadMessage, "a reply where a request was expected"))
                }
                Ok(message) if message.op == Op::Kick => Ok(()),
                Ok(message) => self.core.request(session, &message, now),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                return self.let_go(id, Farewell::Expelled(error));
            }
        }
    }

    fn accept(&mut self) {
        while self.turned_away.len() < TURNED_AWAY.0 {
            match self.listener.accept() {
                Ok(Some(socket)) => self.welcome(socket),
                Ok(None) => return,
                Err(e) => {
                    tracing::warn!("a client cannot be taken: {e}");
                    self.full_until = self.now().saturating_add(FULL_NAP.as_nanos() as u64);
                    return;
                }
            }
        }
    }

    fn welcome(&mut self, socket: Socket) {
        if self.sessions.len() + self.ghosts.len() >= MAX_CLIENTS {
            let until = self.now().saturating_add(TURNED_AWAY.1.as_nanos() as u64);
            self.turned_away.push(TurnedAway { socket, until });
            return;
        }
        let known =
            peer::identity(socket.as_fd()).and_then(|who| Ok((peer::pidfd(socket.as_fd(), who.pid)?, who)));
        match known {
            Ok((pidfd, identity)) => {
                let id = self.next_id;
                self.next_id = self.next_id.wrapping_add(1).max(1);
                tracing::debug!(id, pid = identity.pid, uid = identity.uid, "client connected");
                self.sessions.insert(id, Session::new(id, socket, identity, pidfd));
            }
            Err(e) => tracing::warn!("a client that cannot be watched is refused: {e}"),
        }
    }

    fn let_go(&mut self, id: u32, why: Farewell) {
        let now = self.now();
        let Some(mut session) = self.sessions.remove(&id) else { return };
        let dead = peer::is_dead(&session.pidfd);
        match why {
            Farewell::Expelled(error) => {
                tracing::warn!(id, pid = session.identity.pid, "client expelled: {error}");
                self.core.count_expelled();
                // Best effort: a client that breaks the rules may not be reading either.
                let _ = session.reply_error(Op::Hello, 0, &error);
            }
            Farewell::Gone => tracing::debug!(id, dead, "client gone"),
        }
        if dead {
            self.core.client_died(&mut session, now);
        } else if self.core.client_left(&mut session, now) {
            session.socket.hang_up();
            session.ring = None;
            self.ghosts.push(Ghost { session });
        }
    }

    /// Tells everybody that it is over.
    fn farewell(&mut self) {
        let error = WireError::new(ErrorCode::ShuttingDown, "the server is shutting down");
        for session in self.sessions.values_mut() {
            // Best effort: the closed socket and the server word say the same.
            let _ = session.reply_error(Op::Hello, 0, &error);
        }
    }
}

/// Answers a hello for which there is no room.
fn turn_away(socket: &Socket) {
    let text = format!(
        "{MAX_CLIENTS} clients are connected already, which is the limit; try again when one has gone"
    );
    let error = WireError::new(ErrorCode::TooMany, text);
    let hello = socket.receive().ok().flatten().and_then(|datagram| Message::decode(&datagram.bytes).ok());
    // Number 0 is a farewell, for those who said something else.
    let request = hello.map_or(0, |message| message.request);
    // It may not be reading any more: then there is nobody to tell.
    let _ = socket.send(&crate::protocol::header::encode_error(Op::Hello, request, &error), &[]);
}

/// Asks for as many descriptors as this process may have: a client takes four, an open file one.
fn more_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::debug!("the limit of descriptors stays at {:?}: {e}", limit.current);
    }
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
