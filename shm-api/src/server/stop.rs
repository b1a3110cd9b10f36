//! Ending a server from outside its thread: an eventfd that the reactor polls, and signals turned into one more descriptor.
#![expect(unsafe_code, reason = "sigprocmask and signalfd, which rustix does not wrap")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

/// Tells a running server to end. Clones work from any thread.
#[derive(Clone, Debug)]
pub struct StopHandle {
    event: Arc<OwnedFd>,
}

impl StopHandle {
    pub(crate) fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { event: Arc::new(event) })
    }

    /// Has the server end in an orderly way: what was written is written back and durable, then it unmounts.
    pub fn stop(&self) {
        // An eventfd write fails only when the counter is full: then it is readable, which is all we want.
        let _ = rustix::io::write(&*self.event, &1u64.to_ne_bytes());
    }
}

impl AsFd for StopHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// Blocks SIGTERM and SIGINT in this thread (and those it starts) and returns a descriptor that is readable when one came.
/// To be called before other threads are started: one that does not block them would be ended by them.
pub(crate) fn signals() -> io::Result<OwnedFd> {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `set` is initialised by sigemptyset before anything reads it, and lives through the calls.
    let fd = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
        libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
        let rc = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        if rc != 0 {
            return Err(io::Error::from_raw_os_error(rc));
        }
        libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
