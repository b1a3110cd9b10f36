//! The host cache of one object: a sparse file in memory, filled by `pwrite` and emptied by punching holes.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{
    FallocateFlags, MemfdFlags, Mode, SealFlags, fallocate, fchmod, fcntl_add_seals, ftruncate, memfd_create,
};

use crate::control::ControlError;
use crate::layout::{LANE, LANES};
use crate::seals;

/// One object's host-cache file. Never mapped by the server, and never for a device: a punched page that a device had pinned
/// would live on as an orphan.
#[derive(Debug)]
pub(crate) struct HostFile {
    fd: OwnedFd,
}

impl HostFile {
    pub(crate) fn create(object: u64) -> Result<Self, ControlError> {
        let fail =
            |e: rustix::io::Errno| ControlError::Seal { what: "create a host-cache file", source: e.into() };
        let fd =
            memfd_create(format!("cmbfs-cache-{object}"), MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
                .map_err(fail)?;
        fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(fail)?;
        ftruncate(&fd, LANE * LANES).map_err(fail)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(fail)?;
        Ok(Self { fd })
    }

    /// A descriptor for a client.
    pub(crate) fn client_fd(&self, writable: bool) -> Result<OwnedFd, ControlError> {
        if writable {
            self.fd
                .try_clone()
                .map_err(|source| ControlError::Seal { what: "duplicate a host-cache file", source })
        } else {
            seals::reopen_fd(self.fd.as_raw_fd())
        }
    }

    pub(crate) fn write(&self, mut offset: u64, mut from: &[u8]) -> io::Result<()> {
        while !from.is_empty() {
            match rustix::io::pwrite(&self.fd, from, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    from = &from[n..];
                    offset += n as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    pub(crate) fn read(&self, mut offset: u64, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            match rustix::io::pread(&self.fd, &mut *into, offset) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    into = &mut into[n..];
                    offset += n as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Removes the pages from every process's mapping.
    pub(crate) fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        fallocate(&self.fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
            .map_err(Into::into)
    }

    /// Bytes of memory that the file takes now.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(&self.fd)?.st_blocks as u64 * 512)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_get_no_write_access_and_holes_read_as_zeros() {
        let f = HostFile::create(7).unwrap();
        f.write(LANE + 8192, &[5; 4096]).unwrap();
        assert_eq!(f.bytes().unwrap(), 4096);
        let ro = f.client_fd(false).unwrap();
        assert!(rustix::io::pwrite(&ro, b"x", 0).is_err());
        f.punch(LANE + 8192, 4096).unwrap();
        let mut got = [1; 8];
        f.read(LANE + 8192, &mut got).unwrap();
        assert_eq!((got, f.bytes().unwrap()), ([0; 8], 0));
        assert!(ftruncate(&f.fd, 4096).is_err(), "sealed");
    }
}
