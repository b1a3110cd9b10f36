//! Datagrams with descriptors over a connected Unix seqpacket socket.
//!
//! Both sides always say `MSG_DONTWAIT` or poll first: the file's own O_NONBLOCK can be changed by whoever shares the description.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::protocol::{MAX_FDS, MAX_MESSAGE};

/// Longest wait for a connection.
const LONGEST_WAIT: Duration = Duration::from_secs(365 * 24 * 3600);

/// A connected socket.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
}

/// What came in one datagram.
#[derive(Debug)]
pub struct Datagram {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Descriptors that came with it; dropping this closes them.
    pub fds: Vec<OwnedFd>,
    /// Part of it did not fit and is lost: it broke the limits.
    pub truncated: bool,
}

impl Socket {
    /// Connects to the server at `path`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Self::connect_within(path, LONGEST_WAIT)
    }

    /// The same. A server that has as many waiting clients as it may have, and takes none of them, is waited for no longer than `patience`: then
    /// the error is `TimedOut`.
    pub fn connect_within(path: &Path, patience: Duration) -> io::Result<Self> {
        let fd =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // A connection counts as sending. Messages are sent without waiting anyway. (0 would be no limit.)
        let patience = patience.clamp(Duration::from_millis(1), LONGEST_WAIT);
        set_socket_timeout(&fd, Timeout::Send, Some(patience))?;
        match rustix::net::connect(&fd, &SocketAddrUnix::new(path)?) {
            Err(rustix::io::Errno::AGAIN) => Err(io::ErrorKind::TimedOut.into()),
            connected => Ok(connected.map(|()| Self { fd })?),
        }
    }

    /// Takes over a connected socket.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Sends one datagram, without waiting. `WouldBlock`: the other side has to read first.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one message"));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = rustix::net::sendmsg(&self.fd, &[IoSlice::new(bytes)], &mut control, flags)?;
        if sent == bytes.len() {
            Ok(())
        } else {
            Err(io::Error::other(format!("only {sent} of {} bytes were sent", bytes.len())))
        }
    }

    /// Receives one datagram, without waiting. `Ok(None)`: the other side closed.
    pub fn receive(&self) -> io::Result<Option<Datagram>> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(&self.fd, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if got.bytes == 0 && fds.is_empty() {
            return Ok(None);
        }
        bytes.truncate(got.bytes);
        let truncated = got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
        Ok(Some(Datagram { bytes, fds, truncated }))
    }

    /// Ends the conversation in both directions; the descriptor stays.
    pub fn hang_up(&self) {
        if let Err(e) = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both) {
            tracing::debug!("shutdown of a socket: {e}");
        }
    }

    /// Waits until a datagram is there, the other side is gone, or `milliseconds` have passed. Returns whether there is anything to receive.
    pub fn wait_readable(&self, milliseconds: u32) -> io::Result<bool> {
        self.wait(PollFlags::IN, milliseconds)
    }

    /// Waits until a datagram can be sent, or `milliseconds` have passed.
    pub fn wait_writable(&self, milliseconds: u32) -> io::Result<bool> {
        self.wait(PollFlags::OUT, milliseconds)
    }

    fn wait(&self, what: PollFlags, milliseconds: u32) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.fd, what)];
        let timeout = Timespec {
            tv_sec: i64::from(milliseconds / 1000),
            tv_nsec: i64::from(milliseconds % 1000) * 1_000_000,
        };
        match poll(&mut fds, Some(&timeout)) {
            Ok(n) => Ok(n > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
