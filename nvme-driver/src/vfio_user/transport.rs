//! Whole messages over a stream socket, descriptors included.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::protocol::{HEADER, Header, MAX_FDS};

/// One message as it came.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) header: Header,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// Receives one message, at the latest at `deadline` (the socket's own timeout later, if the peer sends a byte now and then): EAGAIN.
/// The peer's hanging up is EPIPE; an impossible size or too many descriptors are EPROTO.
pub(super) fn receive(stream: &UnixStream, deadline: Instant) -> Result<Message, Errno> {
    let mut fds = Vec::new();
    let mut head = [0; HEADER];
    fill(stream, &mut head, &mut fds, deadline)?;
    let header = Header::parse(&head);
    let mut body = vec![0; header.body_len().ok_or(Errno::PROTO)?];
    fill(stream, &mut body, &mut fds, deadline)?;
    Ok(Message { header, body, fds })
}

/// Fills `into`, collecting the descriptors that come along.
fn fill(
    stream: &UnixStream,
    into: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    deadline: Instant,
) -> Result<(), Errno> {
    let mut done = 0;
    while done < into.len() {
        if Instant::now() >= deadline {
            return Err(Errno::AGAIN);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut rest = [IoSliceMut::new(&mut into[done..])];
        let got = match recvmsg(stream, &mut rest, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(got) => got,
            Err(Errno::INTR) => continue,
            Err(e) => return Err(e),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                fds.extend(more);
            }
        }
        if got.bytes == 0 {
            return Err(Errno::PIPE);
        }
        if got.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
            return Err(Errno::PROTO);
        }
        done += got.bytes;
    }
    Ok(())
}

/// Sends all of `bytes`, with descriptors, at the latest at `deadline` (as above).
pub(super) fn send<F: AsFd>(
    stream: &UnixStream,
    bytes: &[u8],
    fds: &[F],
    deadline: Instant,
) -> Result<(), Errno> {
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(Errno::MSGSIZE);
    }
    let mut done = 0;
    while done < bytes.len() {
        if Instant::now() >= deadline {
            return Err(Errno::AGAIN);
        }
        match sendmsg(stream, &[IoSlice::new(&bytes[done..])], &mut control, SendFlags::NOSIGNAL) {
            Ok(n) => {
                done += n;
                control.clear(); // the descriptors went with the first bytes
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
