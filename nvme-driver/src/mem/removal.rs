//! Mapped device memory whose device is gone: an access to it raises SIGBUS, which would end the process.
//!
//! [`Watch`] makes such an access behave as it does on a bus where nobody answers: loads give all ones, stores go nowhere. A
//! handler for SIGBUS, installed once, looks the address up among the watched ranges; if it is there, it puts an ordinary page of
//! ones in that place, notes that the range is lost ([`Watch::is_lost`]), and lets the access run again. Everything above sees
//! what it sees when registers read as ones, and says "removed". Any other SIGBUS goes to the handler that was there before
//! (Rust's own, an application's, or the end of the process), as if this one did not exist.
//!
//! # What the handler may do
//! It runs in the middle of anything: no lock, no allocation, no code that might hold either. The ranges are in a list that only
//! grows; entries are claimed, published and withdrawn by atomic words. A faulting access is one of this process to a mapping that is
//! alive, so the entry it looks for does not change while it looks; others may, and are read so that a torn one is passed over.
//! `mmap` and `sigaction` are single system calls here, and `errno` is put back.
//!
//! An application that installs a handler of its own *later* has to pass on what it does not know, as this one does.
#![expect(unsafe_code, reason = "a signal handler, and replacing pages under a faulting access")]

use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use super::PAGE;

/// One watched range. `end` is 0 while it is not in force.
#[derive(Debug, Default)]
struct Entry {
    taken: AtomicBool,
    start: AtomicUsize,
    end: AtomicUsize,
    lost: AtomicBool,
    next: AtomicPtr<Entry>,
}

/// All entries there ever were; never freed, used again.
static ENTRIES: AtomicPtr<Entry> = AtomicPtr::new(ptr::null_mut());
/// What SIGBUS did before us; never freed.
static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

fn entries() -> impl Iterator<Item = &'static Entry> {
    let mut at = ENTRIES.load(Ordering::Acquire);
    std::iter::from_fn(move || {
        // SAFETY: null, or an entry that was leaked before it was put into the list.
        let entry = unsafe { at.as_ref() }?;
        at = entry.next.load(Ordering::Acquire);
        Some(entry)
    })
}

impl Entry {
    /// Whether it covers `address` now.
    fn covers(&self, address: usize) -> bool {
        let end = self.end.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Acquire);
        // Withdrawn or changed in between: not the range of an access that is going on.
        let same = end == self.end.load(Ordering::Acquire);
        same && (start..end).contains(&address)
    }
}

/// A range of addresses in which SIGBUS means that the device is gone. Withdrawn when dropped, which has to be before the range is
/// unmapped.
#[derive(Debug)]
pub(super) struct Watch(&'static Entry);

impl Watch {
    /// Watches whole pages that are mapped, readable and writable, and stay so until the value is dropped.
    pub(super) fn new(start: usize, len: usize) -> io::Result<Self> {
        static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
        let installed = INSTALLED.get_or_init(|| install().map_err(|e| e.raw_os_error().unwrap_or(0)));
        installed.map_err(io::Error::from_raw_os_error)?;
        let claim = |entry: &Entry| !entry.taken.swap(true, Ordering::AcqRel);
        let entry = entries().find(|entry| claim(entry)).unwrap_or_else(|| {
            let entry: &'static Entry =
                Box::leak(Box::new(Entry { taken: AtomicBool::new(true), ..Entry::default() }));
            let mut first = ENTRIES.load(Ordering::Acquire);
            loop {
                entry.next.store(first, Ordering::Release);
                let new = ptr::from_ref(entry).cast_mut();
                match ENTRIES.compare_exchange_weak(first, new, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => break entry,
                    Err(now) => first = now,
                }
            }
        });
        entry.lost.store(false, Ordering::Release);
        entry.start.store(start, Ordering::Release);
        entry.end.store(start.saturating_add(len), Ordering::Release);
        Ok(Self(entry))
    }

    /// Whether an access found that the device is gone.
    pub(super) fn is_lost(&self) -> bool {
        self.0.lost.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.end.store(0, Ordering::Release);
        self.0.taken.store(false, Ordering::Release);
    }
}

fn install() -> io::Result<()> {
    // SAFETY: all zeros is a `sigaction` (no handler, no flags, an empty mask); the calls fill in and read structures of ours, which
    // are leaked, because the handler may look at them for ever.
    unsafe {
        let before: &mut libc::sigaction = Box::leak(Box::new(std::mem::zeroed()));
        if libc::sigaction(libc::SIGBUS, ptr::null(), before) != 0 {
            return Err(io::Error::last_os_error());
        }
        // Known before our handler can run.
        BEFORE.store(before, Ordering::Release);
        let mut ours: libc::sigaction = std::mem::zeroed();
        ours.sa_sigaction = on_sigbus as *const () as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut ours.sa_mask);
        if libc::sigaction(libc::SIGBUS, &raw const ours, ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid `siginfo_t` to a handler that was installed with SA_SIGINFO.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    // From the kernel, for an access: not sent by a process, and no memory error of the host.
    let entry = if code == libc::BUS_ADRERR { entries().find(|entry| entry.covers(address)) } else { None };
    if let Some(entry) = entry {
        // First, so that whoever sees such a page can know.
        entry.lost.store(true, Ordering::SeqCst);
        if put_ones(address & !(PAGE - 1)) {
            return;
        }
    }
    pass_on(signal, info, context);
}

/// Puts a page of ones in the place of a page that is gone.
fn put_ones(page: usize) -> bool {
    // SAFETY: `page` lies in a watched range: mapped memory of a `Mapping`, to which no reference exists and which is not unmapped
    // before the range is withdrawn. Replacing the page changes what racing copies read, as the device may at any time. The page
    // is written through the address that was just mapped, readable and writable. `errno` is this thread's, and put back.
    unsafe {
        let errno = *libc::__errno_location();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let at = ptr::with_exposed_provenance_mut::<libc::c_void>(page);
        let got = libc::mmap(at, PAGE, prot, flags, -1, 0);
        if got != libc::MAP_FAILED {
            ptr::write_bytes(got.cast::<u8>(), 0xff, PAGE);
        }
        *libc::__errno_location() = errno;
        got != libc::MAP_FAILED
    }
}

/// Does what would have been done without us.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: set before the handler was installed, and never freed.
    let before = unsafe { BEFORE.load(Ordering::Acquire).as_ref() };
    let handler = before.map_or(libc::SIG_DFL, |before| before.sa_sigaction);
    // SAFETY: `handler` is what `sigaction` gave as the handler of SIGBUS: of the type its flags say, or one of the two constants. With the
    // default action restored, returning repeats the access, which then ends the process as it would have.
    unsafe {
        if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
            let mut default: libc::sigaction = std::mem::zeroed();
            default.sa_sigaction = libc::SIG_DFL;
            libc::sigaction(signal, &raw const default, ptr::null_mut());
        } else if before.is_some_and(|before| before.sa_flags & libc::SA_SIGINFO != 0) {
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                std::mem::transmute(handler);
            handler(signal, info, context);
        } else {
            let handler: extern "C" fn(libc::c_int) = std::mem::transmute(handler);
            handler(signal);
        }
    }
}
