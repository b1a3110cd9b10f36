//! The socket path: bound with mode 0600, an old one of a dead server replaced, one of a living server refused.

use std::io;
use std::os::fd::OwnedFd;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::socket::Socket;

/// How long a server that is there already may take to let us in.
const KNOCK: Duration = Duration::from_secs(5);

/// The socket could not be opened for clients.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another server answers there.
    #[error("{path} is served by process {pid} ({command}); stop it or choose another --socket")]
    Taken {
        /// The path.
        path: PathBuf,
        /// The other server.
        pid: i32,
        /// Its name.
        command: String,
    },
    /// Another server has it, and does not answer.
    #[error(
        "{path} is served by a process that takes no clients, stopped or hung: end it, or choose another --socket"
    )]
    Hung {
        /// The path.
        path: PathBuf,
    },
    /// Something that is no socket is in the way.
    #[error("{path} exists and is no socket; choose another --socket or remove it")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A socket of another kind is served there.
    #[error(
        "{path} is served by another program: it is a socket of another kind, such as a vfio-user drive's; choose another --socket"
    )]
    OtherKind {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot listen on {path}: {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// A listening socket. Removes its path when dropped, if it is still its own.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    path: PathBuf,
    inode: u64,
}

impl Listener {
    /// Listens on `path`. Other users are kept out by its mode, 0600: whoever wants them changes the mode, and the
    /// permissions of each file then decide.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let fail = |source: io::Error| ListenError::Io { path: path.to_owned(), source };
        clear_the_way(path)?;
        let address = SocketAddrUnix::new(path).map_err(|e| fail(e.into()))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(|e| fail(e.into()))?;
        // bind() makes the path with the mode of the socket: it is right from the first moment on.
        rustix::fs::fchmod(&fd, rustix::fs::Mode::from_raw_mode(0o600)).map_err(|e| fail(e.into()))?;
        rustix::net::bind(&fd, &address).map_err(|e| fail(e.into()))?;
        let inode = std::fs::symlink_metadata(path).map_err(fail)?.ino();
        rustix::net::listen(&fd, 128).map_err(|e| fail(e.into()))?;
        Ok(Self { fd, path: path.to_owned(), inode })
    }

    /// The next client that is waiting, if any.
    pub fn accept(&self) -> io::Result<Option<Socket>> {
        match rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(fd) => Ok(Some(Socket::from_fd(fd))),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {
                Ok(None)
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode)
            && let Err(e) = std::fs::remove_file(&self.path)
        {
            tracing::warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}

fn clear_the_way(path: &Path) -> Result<(), ListenError> {
    let fail = |source: io::Error| ListenError::Io { path: path.to_owned(), source };
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(fail(e)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    match Socket::connect_within(path, KNOCK) {
        Ok(other) => {
            let pid =
                rustix::net::sockopt::socket_peercred(&other).map_or(0, |c| c.pid.as_raw_nonzero().get());
            Err(ListenError::Taken { path: path.to_owned(), pid, command: super::peer::command_of(pid) })
        }
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(fail),
        Err(e) if is_other_kind(&e) => Err(ListenError::OtherKind { path: path.to_owned() }),
        Err(e) if e.kind() == io::ErrorKind::TimedOut => Err(ListenError::Hung { path: path.to_owned() }),
        // Not known to be dead.
        Err(e) => Err(fail(e)),
    }
}

/// Whether the system refused a connection because somebody listens there with another kind of socket.
pub(crate) fn is_other_kind(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::PROTOTYPE.raw_os_error())
}
