//! Copies to and from memory that someone else may be changing at the same moment.
//!
//! A Rust reference or an ordinary `memcpy` of such memory is a data race, and the compiler may use that
//! against us (read twice, tear, invent stores). The copies here are opaque to it: one assembly block on
//! x86-64, volatile words elsewhere. They promise nothing about *order*: callers bring their own fences.
#![expect(unsafe_code, reason = "raw copies are what this module is for")]

/// Copies `len` bytes from memory that others may write into memory that is ours.
///
/// # Safety
/// `src` must be mapped and readable for `len` bytes, `dst` writable for `len` bytes, and the two must not overlap.
#[inline]
pub unsafe fn from_shared(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promise, passed on.
    unsafe { racing_copy(src, dst, len) }
}

/// Copies `len` bytes from memory that is ours into memory that others may read or write.
///
/// # Safety
/// `src` must be readable for `len` bytes, `dst` mapped and writable for `len` bytes, and the two must not overlap.
#[inline]
pub unsafe fn to_shared(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promise, passed on.
    unsafe { racing_copy(src, dst, len) }
}

#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn racing_copy(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: `rep movsb` touches exactly `[src, src + len)` and `[dst, dst + len)`, which the caller vouches
    // for; the direction flag is clear on entry to any asm block (Rust reference, inline assembly rules).
    unsafe {
        core::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") src => _,
            inout("rdi") dst => _,
            options(nostack, preserves_flags)
        );
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline]
unsafe fn racing_copy(src: *const u8, dst: *mut u8, len: usize) {
    let mut done = 0;
    if (src as usize) % 8 == (dst as usize) % 8 {
        while done < len && (src as usize + done) % 8 != 0 {
            // SAFETY: `done < len`, inside both ranges.
            unsafe { dst.add(done).write_volatile(src.add(done).read_volatile()) };
            done += 1;
        }
        while done + 8 <= len {
            // SAFETY: 8 bytes at `done` are inside both ranges, and both addresses are 8-byte aligned here.
            unsafe {
                dst.add(done).cast::<u64>().write_volatile(src.add(done).cast::<u64>().read_volatile())
            };
            done += 8;
        }
    }
    while done < len {
        // SAFETY: `done < len`, inside both ranges.
        unsafe { dst.add(done).write_volatile(src.add(done).read_volatile()) };
        done += 1;
    }
}
