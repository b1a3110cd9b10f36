//! One `mmap`ed range that others may change at any moment.
#![expect(unsafe_code, reason = "mmap, and raw access to what it returns")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use super::copy;
use super::removal::Watch;

/// What a mapping may be used for by this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Loads only; a store through the mapping is refused by [`Mapping::write`] (and would fault).
    ReadOnly,
    /// Loads and stores.
    ReadWrite,
}

/// Whose memory a mapping is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nobody else has these pages.
    Private,
    /// A file's.
    Shared,
    /// A device's own, reached through a BAR.
    Device,
}

/// Mapping memory failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot map {len} bytes of {what}: {source}")]
pub struct MapError {
    /// What was to be mapped.
    pub what: String,
    /// Its length in bytes.
    pub len: usize,
    /// The system's answer.
    pub source: io::Error,
}

/// An access reached outside a mapping, was misaligned, or stored to a read-only one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at offset {offset:#x} are not accessible in a mapping of {size:#x} bytes ({access:?})")]
pub struct OutOfRange {
    /// Offset of the refused access in bytes.
    pub offset: usize,
    /// Its length in bytes.
    pub len: usize,
    /// The mapping's size in bytes.
    pub size: usize,
    /// The mapping's access mode.
    pub access: Access,
}

/// A range of memory this process has mapped, and that devices or other processes may read and write.
///
/// No reference to its bytes is ever handed out: only copies ([`read`](Self::read), [`write`](Self::write)),
/// atomic words ([`u32_at`](Self::u32_at), [`u64_at`](Self::u64_at)) and the raw pointer for code that argues its own safety.
/// Unmapped when the last `Arc` goes; so whoever programs an address into a device keeps an `Arc`.
#[derive(Debug)]
pub struct Mapping {
    ptr: NonNull<u8>,
    len: usize,
    access: Access,
    fd: Option<OwnedFd>,
    fd_offset: u64,
    kind: Kind,
    /// Of a device's memory that may go away. Withdrawn before the range is unmapped.
    watch: Option<Watch>,
}

// SAFETY: the pointer is to memory that lives as long as the value and is not tied to a thread; all access is by racing copies or atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent access is what the accessors are made for.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of zeroed anonymous memory that is private to this process (and its devices).
    pub fn anonymous(len: usize) -> Result<Arc<Self>, MapError> {
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice aliases nothing.
        let got = unsafe {
            mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        };
        Ok(Arc::new(Self::adopt(got, len, Access::ReadWrite, Kind::Private, None, 0)?))
    }

    /// Creates an anonymous file of `len` bytes for good (mode 0600, close-on-exec, sealed against shrinking and growing, open to
    /// further seals) and maps it shared.
    pub fn memfd(name: &str, len: usize) -> Result<Arc<Self>, MapError> {
        Self::memfd_with(name, len, MemfdFlags::empty(), false)
    }

    /// The same as the memory of an emulated device.
    pub(crate) fn device_memfd(name: &str, len: usize) -> Result<Arc<Self>, MapError> {
        Self::memfd_with(name, len, MemfdFlags::empty(), true)
    }

    /// The same on 2 MiB huge pages; `len` is a multiple of 2 MiB. Fails where the system has none to spare.
    pub fn huge_memfd(name: &str, len: usize) -> Result<Arc<Self>, MapError> {
        Self::memfd_with(name, len, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, false)
    }

    fn memfd_with(name: &str, len: usize, more: MemfdFlags, device: bool) -> Result<Arc<Self>, MapError> {
        let fail = |e: rustix::io::Errno| MapError { what: format!("memfd {name}"), len, source: e.into() };
        let cname = CString::new(name).map_err(|_| fail(rustix::io::Errno::INVAL))?;
        let fd =
            memfd_create(&cname, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | more).map_err(fail)?;
        rustix::fs::fchmod(&fd, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).map_err(fail)?;
        rustix::fs::ftruncate(&fd, len as u64).map_err(fail)?;
        // Whoever is given the descriptor could otherwise cut the file, and our next access would be a SIGBUS.
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).map_err(fail)?;
        let kind = if device { Kind::Device } else { Kind::Shared };
        let got = Self::map_shared(fd.as_fd(), 0, len, Access::ReadWrite);
        Ok(Arc::new(Self::adopt(got, len, Access::ReadWrite, kind, Some(fd), 0)?))
    }

    /// Maps `len` bytes of `fd` from `offset`, shared, readable and writable: memory of a device behind one of its BARs. If the device
    /// goes away, loads give all ones and stores go nowhere, where the kernel would end the process by SIGBUS;
    /// [`is_lost`](Self::is_lost) says so from then on. The first such mapping installs a handler for SIGBUS, which passes everything
    /// else on to the one that was there before.
    pub fn of_device(fd: OwnedFd, offset: u64, len: usize) -> Result<Arc<Self>, MapError> {
        let got = Self::map_shared(fd.as_fd(), offset, len, Access::ReadWrite);
        let mut mapping = Self::adopt(got, len, Access::ReadWrite, Kind::Device, Some(fd), offset)?;
        let watch = Watch::new(mapping.ptr.as_ptr().expose_provenance(), len);
        mapping.watch =
            Some(watch.map_err(|source| MapError { what: "device memory".to_owned(), len, source })?);
        Ok(Arc::new(mapping))
    }

    /// Whether an access found that the device behind the memory is gone.
    pub fn is_lost(&self) -> bool {
        self.watch.as_ref().is_some_and(Watch::is_lost)
    }

    /// Whether pages that go away are no SIGBUS here: see [`of_device`](Self::of_device).
    pub(crate) fn is_watched(&self) -> bool {
        self.watch.is_some()
    }

    /// Maps `len` bytes of `fd` from `offset`, shared. The caller vouches that the file is at least that long and
    /// cannot shrink (sealed, or a device): a page beyond its end would fault.
    pub fn from_fd(fd: OwnedFd, offset: u64, len: usize, access: Access) -> Result<Arc<Self>, MapError> {
        let got = Self::map_shared(fd.as_fd(), offset, len, access);
        Ok(Arc::new(Self::adopt(got, len, access, Kind::Shared, Some(fd), offset)?))
    }

    /// The same without keeping the descriptor: for whoever maps thousands of ranges that others own, and hands none of them on.
    pub fn from_borrowed_fd(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        access: Access,
    ) -> Result<Arc<Self>, MapError> {
        let got = Self::map_shared(fd, offset, len, access);
        Ok(Arc::new(Self::adopt(got, len, access, Kind::Shared, None, offset)?))
    }

    fn map_shared(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        access: Access,
    ) -> rustix::io::Result<*mut core::ffi::c_void> {
        let prot = match access {
            Access::ReadOnly => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY: a fresh mapping at an address of the kernel's choice; nobody forms references into it.
        unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, fd, offset) }
    }

    fn adopt(
        got: rustix::io::Result<*mut core::ffi::c_void>,
        len: usize,
        access: Access,
        kind: Kind,
        fd: Option<OwnedFd>,
        fd_offset: u64,
    ) -> Result<Self, MapError> {
        let what = if kind == Kind::Private { "anonymous memory" } else { "a file descriptor" };
        let fail = |source: io::Error| MapError { what: what.to_owned(), len, source };
        let ptr = got.map_err(|e| fail(e.into()))?;
        let Some(ptr) = NonNull::new(ptr.cast::<u8>()) else {
            return Err(fail(io::Error::other("the kernel returned a null mapping")));
        };
        // A forked child must not keep device or shared memory alive, nor copy it on write.
        // SAFETY: the range was just mapped by us.
        if let Err(e) = unsafe { madvise(ptr.as_ptr().cast(), len, Advice::LinuxDontFork) } {
            tracing::debug!("MADV_DONTFORK on {what}: {e}");
        }
        Ok(Self { ptr, len, access, fd, fd_offset, kind, watch: None })
    }

    /// Locks the pages into memory, so that they neither move nor get swapped out. Bounded by RLIMIT_MEMLOCK.
    pub fn lock(&self) -> io::Result<()> {
        // SAFETY: the range is a live mapping of ours.
        Ok(unsafe { rustix::mm::mlock(self.ptr.as_ptr().cast(), self.len) }?)
    }

    /// The first byte's address. Valid while this value lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the mapping is empty (it never is: the kernel refuses empty mappings).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What this process may do with it.
    pub fn access(&self) -> Access {
        self.access
    }

    /// The file behind the mapping and the mapping's offset in it, if there is one: what another process needs to map the same bytes.
    pub fn fd(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.fd.as_ref().map(|fd| (fd.as_fd(), self.fd_offset))
    }

    /// Whether it is a device's own memory and not the host's: what goes there does not pass host memory.
    pub fn is_device(&self) -> bool {
        self.kind == Kind::Device
    }

    fn check(&self, offset: usize, len: usize, store: bool) -> Result<*mut u8, OutOfRange> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        if !inside || (store && self.access == Access::ReadOnly) {
            return Err(OutOfRange { offset, len, size: self.len, access: self.access });
        }
        Ok(self.ptr.as_ptr().wrapping_add(offset))
    }

    /// Copies `into.len()` bytes out, from `offset`.
    #[inline]
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), OutOfRange> {
        let src = self.check(offset, into.len(), false)?;
        // SAFETY: `check` put the source inside the mapping; `into` is ours and cannot overlap it (no references into mappings exist).
        unsafe { copy::from_shared(src, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies `from` in, at `offset`.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), OutOfRange> {
        let dst = self.check(offset, from.len(), true)?;
        // SAFETY: `check` put the destination inside a writable mapping; `from` is ours and cannot overlap it.
        unsafe { copy::to_shared(from.as_ptr(), dst, from.len()) };
        Ok(())
    }

    /// Sets `len` bytes from `offset` to zero.
    pub fn zero(&self, offset: usize, len: usize) -> Result<(), OutOfRange> {
        self.check(offset, len, true)?;
        let zeros = [0u8; super::PAGE];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(zeros.len());
            self.write(offset + done, &zeros[..n])?;
            done += n;
        }
        Ok(())
    }

    /// Sets `len` bytes from `offset` to zero, giving whole pages of private memory back to the system: quick where
    /// there is nothing to give back.
    pub fn discard(&self, offset: usize, len: usize) -> Result<(), OutOfRange> {
        self.check(offset, len, true)?;
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(super::PAGE), end - end % super::PAGE);
        // Shared memory is not ours alone to give back.
        if self.kind != Kind::Private || first >= last {
            return self.zero(offset, len);
        }
        let pages = self.ptr.as_ptr().wrapping_add(first).cast();
        // SAFETY: whole pages inside a private anonymous mapping of ours; nobody holds references into it, and racing
        // copies see old bytes or zeros.
        if unsafe { madvise(pages, last - first, Advice::LinuxDontNeed) }.is_err() {
            return self.zero(offset, len);
        }
        self.zero(offset, first - offset)?;
        self.zero(last, end - last)
    }

    /// Asks for the cache lines of `len` bytes from `offset`, without waiting for them; nothing happens if they are outside.
    #[inline]
    pub fn prefetch(&self, offset: usize, len: usize) {
        if let Ok(first) = self.check(offset, len, false) {
            copy::prefetch(first, len);
        }
    }

    /// Copies `len` bytes between two mappings (or within one, if the ranges do not overlap).
    pub fn copy_to(&self, offset: usize, to: &Self, to_offset: usize, len: usize) -> Result<(), OutOfRange> {
        let src = self.check(offset, len, false)?;
        let dst = to.check(to_offset, len, true)?;
        let (a, b) = (src as usize, dst as usize);
        if a < b + len && b < a + len {
            return Err(OutOfRange { offset: to_offset, len, size: to.len, access: to.access });
        }
        // SAFETY: both ranges are inside live mappings, the destination writable, and they do not overlap (just checked).
        unsafe { copy::from_shared(src, dst, len) };
        Ok(())
    }

    /// The aligned 32-bit word at `offset` as an atomic.
    #[inline]
    pub fn u32_at(&self, offset: usize) -> Result<&AtomicU32, OutOfRange> {
        let p = self.aligned(offset, 4)?;
        // SAFETY: in range, aligned, alive as long as `self`; atomics may race with anyone. Loads only if read-only: a store would fault, not corrupt.
        Ok(unsafe { AtomicU32::from_ptr(p.cast()) })
    }

    /// The aligned 64-bit word at `offset` as an atomic.
    #[inline]
    pub fn u64_at(&self, offset: usize) -> Result<&AtomicU64, OutOfRange> {
        let p = self.aligned(offset, 8)?;
        // SAFETY: as in `u32_at`.
        Ok(unsafe { AtomicU64::from_ptr(p.cast()) })
    }

    fn aligned(&self, offset: usize, size: usize) -> Result<*mut u8, OutOfRange> {
        let p = self.check(offset, size, false)?;
        if p.addr() % size != 0 {
            return Err(OutOfRange { offset, len: size, size: self.len, access: self.access });
        }
        Ok(p)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.watch = None;
        // SAFETY: we mapped exactly this range and nobody can hold a pointer they vouched for beyond our life.
        if let Err(e) = unsafe { munmap(self.ptr.as_ptr().cast(), self.len) } {
            tracing::error!("munmap of {} bytes: {e}", self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_was_written_and_refuses_the_rest() {
        let m = Mapping::memfd("test", 8192).unwrap();
        m.write(4090, b"across the page").unwrap();
        let mut got = [0u8; 15];
        m.read(4090, &mut got).unwrap();
        assert_eq!(&got, b"across the page");
        assert!(m.write(8190, b"abc").is_err());
        assert!(m.read(usize::MAX, &mut got).is_err());
        assert!(m.u64_at(4).is_err());
        assert!(m.copy_to(0, &m, 4, 8).is_err());
    }

    #[test]
    fn nobody_can_cut_a_memfd_under_its_mapping() {
        let m = Mapping::memfd("test", 8192).unwrap();
        let fd = m.fd().unwrap().0.try_clone_to_owned().unwrap();
        for len in [0, 4096, 8191, 8193, 1 << 20] {
            assert_eq!(rustix::fs::ftruncate(&fd, len), Err(rustix::io::Errno::PERM), "{len}");
        }
        m.write(8191, b"x").unwrap();
    }

    #[test]
    fn shared_memory_is_zeroed_by_discard_whoever_keeps_the_descriptor() {
        let m = Mapping::memfd("test", 8192).unwrap();
        let other = Mapping::from_borrowed_fd(m.fd().unwrap().0, 0, 8192, Access::ReadWrite).unwrap();
        assert!(other.fd().is_none());
        for shared in [&m, &other] {
            m.write(0, &[7; 8192]).unwrap();
            shared.discard(0, 8192).unwrap();
            let mut got = [1u8; 8192];
            m.read(0, &mut got).unwrap();
            assert_eq!(got, [0; 8192]);
        }
    }

    #[test]
    fn a_read_only_mapping_refuses_stores() {
        let m = Mapping::memfd("test", 4096).unwrap();
        let fd = m.fd().unwrap().0.try_clone_to_owned().unwrap();
        let ro = Mapping::from_fd(fd, 0, 4096, Access::ReadOnly).unwrap();
        assert!(ro.write(0, b"x").is_err());
        m.write(0, b"x").unwrap();
        let mut got = [0u8];
        ro.read(0, &mut got).unwrap();
        assert_eq!(&got, b"x");
    }
}
