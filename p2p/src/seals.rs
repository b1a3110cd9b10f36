//! Seals on memfds, and read-only descriptors of them.

use std::os::fd::{AsRawFd, OwnedFd};

use nvme_driver::mem::Mapping;
use rustix::fs::{Mode, OFlags, SealFlags, fcntl_add_seals, open};

use crate::control::ControlError;

/// No other process may map or write it for writing (this mapping may), nor change its size, nor its seals.
pub(crate) fn seal_control(memory: &Mapping) -> Result<(), ControlError> {
    add(memory, SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
}

/// Its size and its seals stay as they are, so nobody can make us fault by shrinking it.
pub(crate) fn seal_size(memory: &Mapping) -> Result<(), ControlError> {
    add(memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
}

fn add(memory: &Mapping, seals: SealFlags) -> Result<(), ControlError> {
    let (fd, _) = memory.fd().ok_or_else(no_file)?;
    fcntl_add_seals(fd, seals)
        .map_err(|e| ControlError::Seal { what: "seal a memory file", source: e.into() })
}

/// A descriptor of the same file that cannot write.
pub(crate) fn reopen_read_only(memory: &Mapping) -> Result<OwnedFd, ControlError> {
    let (fd, _) = memory.fd().ok_or_else(no_file)?;
    reopen_fd(fd.as_raw_fd())
}

/// As [`reopen_read_only`], by descriptor number.
pub(crate) fn reopen_fd(fd: i32) -> Result<OwnedFd, ControlError> {
    // A duplicate would share the open file's write permission; only opening it anew drops that.
    open(format!("/proc/self/fd/{fd}"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| ControlError::Seal { what: "reopen a memory file for reading", source: e.into() })
}

fn no_file() -> ControlError {
    ControlError::Seal {
        what: "share memory that has no file",
        source: std::io::ErrorKind::InvalidInput.into(),
    }
}
