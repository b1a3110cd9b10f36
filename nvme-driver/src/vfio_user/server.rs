//! Serving a function over a Unix socket: one client at a time, the next one after it has gone.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::link::Link;
use super::session::{ClientCalls, Session};
use super::transport::Message;
use crate::pci::{PciError, PciFunction};

/// How long a client may leave a message half sent, a reply unread, or a DMA by message unanswered, before it is dropped.
const PATIENCE: Duration = Duration::from_secs(5);
/// Clients that may wait for their turn.
const BACKLOG: i32 = 128;
/// How long to leave a waiting client waiting that the system did not let us take. There is no other to serve.
const FULL_NAP: Duration = Duration::from_millis(100);
/// Steps in a row that found nothing to do, after which an idle server sleeps between looks at the doorbells.
const SPIN: u32 = 20_000;
/// Between two looks at the socket, each of which is a system call, go so many steps that found nothing to do; one that did
/// something, which may have taken long, counts for [`WORK_WEIGHT`] of them.
const STEPS_PER_LOOK: u32 = 256;
const WORK_WEIGHT: u32 = 16;

/// Serving failed.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket could not be made.
    #[error("cannot listen on {}: {source}", path.display())]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Another server listens there.
    #[error("{} is served by another process; choose another --socket", .0.display())]
    InUse(PathBuf),
    /// What is there is no vfio-user server's socket, living or dead.
    #[error("{} is {what}; choose another --socket", path.display())]
    InTheWay {
        /// The path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A wait on the sockets failed.
    #[error("waiting for clients of {}: {source}", path.display())]
    Wait {
        /// The socket's path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The function cannot be described.
    #[error(transparent)]
    Function(#[from] PciError),
}

/// A socket that listens, for a function that is still to be made: what cannot be served need not be made. The file goes away with it.
#[derive(Debug)]
pub struct ServerSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ServerSocket {
    /// Listens on `path` (mode 0600). A socket file that a dead server left behind is replaced.
    pub fn bind(path: &Path) -> Result<Self, ServeError> {
        clear_the_way(path)?;
        let listener =
            listen(path).map_err(|e| ServeError::Listen { path: path.to_owned(), source: e.into() })?;
        Ok(Self { listener, path: path.to_owned() })
    }
}

impl Drop for ServerSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// A function that listens for vfio-user clients. The socket file goes away with it.
#[derive(Debug)]
pub struct Server {
    socket: ServerSocket,
    function: Arc<dyn PciFunction>,
}

impl Server {
    /// Listens on `path`: see [`ServerSocket::bind`].
    pub fn bind(path: &Path, function: Arc<dyn PciFunction>) -> Result<Self, ServeError> {
        Ok(Self::new(ServerSocket::bind(path)?, function))
    }

    /// Serves a function on a socket that listens already.
    pub fn new(socket: ServerSocket, function: Arc<dyn PciFunction>) -> Self {
        Self { socket, function }
    }

    /// Serves clients, one after the other, until `stop`. Steps the function where it needs that.
    pub fn run(&self, stop: &Arc<AtomicBool>) -> Result<(), ServeError> {
        let (mut idle, mut since_look) = (0u32, 0u32);
        let mut client: Option<Client> = None;
        while !stop.load(Ordering::Relaxed) {
            let needs_step = self.function.needs_step() && client.is_some();
            if needs_step {
                if self.function.step() {
                    idle = 0;
                    since_look += WORK_WEIGHT;
                } else {
                    idle = idle.saturating_add(1);
                    since_look += 1;
                }
                if idle < SPIN && since_look < STEPS_PER_LOOK {
                    continue;
                }
            }
            since_look = 0;
            let wait = Timespec {
                tv_sec: 0,
                tv_nsec: if client.as_ref().is_some_and(|c| c.link.has_waiting()) {
                    0
                } else if !needs_step {
                    50_000_000
                } else if idle < SPIN {
                    0
                } else {
                    500_000
                },
            };
            let waiting =
                client.as_ref().map_or_else(|| self.socket.listener.as_fd(), |c| c.link.stream().as_fd());
            let mut fds = [PollFd::from_borrowed_fd(waiting, PollFlags::IN)];
            match poll(&mut fds, Some(&wait)) {
                Ok(0) if client.as_ref().is_some_and(|c| c.link.has_waiting()) => {}
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(e) => return Err(ServeError::Wait { path: self.socket.path.clone(), source: e.into() }),
            }
            idle = 0;
            match &mut client {
                None => client = self.accept(stop)?,
                Some(c) => {
                    if let Err(e) = c.serve_one() {
                        tracing::info!("vfio-user client of {}: {e}", self.socket.path.display());
                        client = None;
                    }
                }
            }
        }
        Ok(())
    }

    fn accept(&self, stop: &Arc<AtomicBool>) -> Result<Option<Client>, ServeError> {
        let (stream, _) = match self.socket.listener.accept() {
            Ok(accepted) => accepted,
            // It left before its turn came.
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {
                return Ok(None);
            }
            Err(e) => {
                // Out of descriptors or memory, most likely. It goes on waiting, and would wake us at once.
                tracing::warn!("a client of {} cannot be taken: {e}", self.socket.path.display());
                std::thread::sleep(FULL_NAP);
                return Ok(None);
            }
        };
        let trusted = net::sockopt::socket_peercred(&stream)
            .is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid());
        let Ok(link) = Link::new(stream, Arc::clone(stop), PATIENCE) else { return Ok(None) };
        let link = Arc::new(link);
        let calls = Arc::clone(&link) as Arc<dyn ClientCalls>;
        let session = Session::new(Arc::clone(&self.function), trusted, Some(calls))?;
        Ok(Some(Client { link, session }))
    }
}

/// Removes what a dead server left behind, and nothing else.
fn clear_the_way(path: &Path) -> Result<(), ServeError> {
    let in_the_way = |what| Err(ServeError::InTheWay { path: path.to_owned(), what });
    let Err(e) = UnixStream::connect(path) else { return Err(ServeError::InUse(path.to_owned())) };
    if e.raw_os_error() == Some(Errno::PROTOTYPE.raw_os_error()) {
        return in_the_way("a socket of another kind, such as a cmbfs server's");
    }
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => in_the_way("there already, and no socket"),
        Ok(_) if e.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|source| ServeError::Listen { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// A socket that listens on `path`. bind() makes the path with the mode of the socket: nobody else gets in at any moment.
fn listen(path: &Path) -> rustix::io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o600))?;
    net::bind(&fd, &SocketAddrUnix::new(path)?)?;
    net::listen(&fd, BACKLOG)?;
    Ok(UnixListener::from(fd))
}

/// A client that is connected.
struct Client {
    link: Arc<Link>,
    session: Session,
}

impl Client {
    /// Receives one message, if one is there, and answers it. An error means that the connection is over.
    fn serve_one(&mut self) -> Result<(), Errno> {
        let Some(Message { header, body, fds }) = self.link.next()? else { return Ok(()) };
        match self.session.handle(header, &body, fds)? {
            Some(reply) => self.link.reply(&reply),
            None => Ok(()),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // First: the session's end waits for the function, which may wait for the client.
        self.link.close();
    }
}
