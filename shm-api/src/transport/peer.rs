//! Who is at the other end of a socket, and whether it still lives.
#![expect(unsafe_code, reason = "getsockopt for what rustix does not wrap: SO_PEERPIDFD, SO_PEERGROUPS")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags};

/// A process's identity as the kernel vouches for it, from the moment it connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Process id; 0 if it is in a namespace that cannot be seen from here.
    pub pid: i32,
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// Not in the libc crate yet (Linux 6.5).
const SO_PEERPIDFD: libc::c_int = 77;

/// Asks who connected.
pub fn identity(socket: BorrowedFd<'_>) -> io::Result<Identity> {
    let mut cred = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, the size of `cred`, which lives through the call.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &raw mut len,
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Identity { pid: cred.pid, uid: cred.uid, gid: cred.gid, groups: groups(socket) })
}

fn groups(socket: BorrowedFd<'_>) -> Vec<u32> {
    // NGROUPS_MAX on Linux; the kernel says ERANGE when it is more, and no group is then believed.
    let mut groups = vec![0 as libc::gid_t; 65_536];
    let mut len = size_of_val(groups.as_slice()) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, the size of the vector's elements.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    groups.truncate(if rc == 0 { len as usize / size_of::<libc::gid_t>() } else { 0 });
    groups
}

/// A descriptor that becomes readable when the process at the other end is dead.
pub fn pidfd(socket: BorrowedFd<'_>, pid: i32) -> io::Result<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, the size of `fd`.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    if rc == 0 && fd >= 0 {
        // SAFETY: the kernel just made this descriptor for us; nobody else owns it.
        return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    // Before Linux 6.5, by number: if the process died and its number was reused before we got here, we watch a stranger,
    // and the dead client's pages wait for that one. They are never reused too early.
    let pid = Pid::from_raw(pid).ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, "the client's process is not visible from here")
    })?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Whether the process behind a pidfd is dead.
pub fn is_dead(pidfd: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&now)).is_ok_and(|n| n > 0)
}

/// The name of a process, for messages.
pub(crate) fn command_of(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm"))
        .map_or_else(|_| "unknown".to_owned(), |name| name.trim_end().to_owned())
}
