//! Whole messages over a stream socket, descriptors included.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::protocol::MAX_FDS;

/// Fills `into`, collecting the descriptors that come along. The peer's hanging up is EPIPE; too many descriptors are EPROTO.
pub(super) fn receive(stream: &UnixStream, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<(), Errno> {
    let mut done = 0;
    while done < into.len() {
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

/// Sends all of `bytes`, with descriptors.
pub(super) fn send<F: AsFd>(stream: &UnixStream, bytes: &[u8], fds: &[F]) -> Result<(), Errno> {
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(Errno::MSGSIZE);
    }
    let mut done = 0;
    while done < bytes.len() {
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
