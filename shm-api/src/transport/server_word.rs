//! The robust word: a pthread mutex in the control page that the reactor's thread holds for as long as it lives. When the thread
//! dies, however it dies, the kernel sets `FUTEX_OWNER_DIED` in its first word, and clients read that without a system call.
#![expect(unsafe_code, reason = "pthread mutexes in shared memory")]

use std::io;
use std::marker::PhantomData;
use std::sync::Arc;

use nvme_driver::mem::Mapping;

/// Holds the word. Bound to the thread that took it: only that thread's death must set the bit.
#[derive(Debug)]
pub struct ServerWord {
    memory: Arc<Mapping>,
    offset: usize,
    not_send: PhantomData<*const ()>,
}

fn check(rc: libc::c_int) -> io::Result<()> {
    if rc == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(rc)) }
}

impl ServerWord {
    /// Bytes that the mutex takes.
    pub const SIZE: usize = size_of::<libc::pthread_mutex_t>();

    /// Makes the mutex at `offset` (a multiple of 8) of shared, writable memory and locks it for this thread.
    pub fn hold(memory: &Arc<Mapping>, offset: usize) -> io::Result<Self> {
        let inside = offset.checked_add(Self::SIZE).is_some_and(|end| end <= memory.len());
        if !inside || !offset.is_multiple_of(align_of::<libc::pthread_mutex_t>()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no room for the server word"));
        }
        let mutex = memory.as_ptr().wrapping_add(offset).cast::<libc::pthread_mutex_t>();
        let mut attributes = std::mem::MaybeUninit::<libc::pthread_mutexattr_t>::uninit();
        // SAFETY: `mutex` is inside the mapping and aligned (checked above), the mapping outlives it (`memory` is kept until the
        // mutex is unlocked), nobody else stores to it (clients map the page read-only), and it is not in use yet.
        unsafe {
            check(libc::pthread_mutexattr_init(attributes.as_mut_ptr()))?;
            check(libc::pthread_mutexattr_setpshared(attributes.as_mut_ptr(), libc::PTHREAD_PROCESS_SHARED))?;
            check(libc::pthread_mutexattr_setrobust(attributes.as_mut_ptr(), libc::PTHREAD_MUTEX_ROBUST))?;
            check(libc::pthread_mutex_init(mutex, attributes.as_ptr()))?;
            libc::pthread_mutexattr_destroy(attributes.as_mut_ptr());
            check(libc::pthread_mutex_lock(mutex))?;
        }
        Ok(Self { memory: Arc::clone(memory), offset, not_send: PhantomData })
    }
}

impl Drop for ServerWord {
    fn drop(&mut self) {
        let mutex = self.memory.as_ptr().wrapping_add(self.offset).cast::<libc::pthread_mutex_t>();
        // SAFETY: initialised and locked by this thread in `hold`; the type is not Send, so this is still that thread.
        unsafe { libc::pthread_mutex_unlock(mutex) };
    }
}
