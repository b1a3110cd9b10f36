//! CPU access to memory behind a real BAR (a CMB, a PMR).
//!
//! Such memory is uncached: every access is a transaction on the bus. An aligned access of at most 8 bytes is one transaction on
//! every platform; wider ones (vector registers, `rep movs`) may be split, reordered, or raise a fault. Stores are *posted*: they may
//! still be on their way when the next instruction runs. [`flush`] waits for them by reading back, which is needed before
//! telling anyone that the bytes are there.
#![expect(unsafe_code, reason = "volatile accesses of chosen width to a mapping")]

use std::sync::atomic::{Ordering, fence};

use crate::mem::{Access, Mapping, OutOfRange};

fn check(memory: &Mapping, offset: usize, len: usize, store: bool) -> Result<*mut u8, OutOfRange> {
    let inside = offset.checked_add(len).is_some_and(|end| end <= memory.len());
    if !inside || (store && memory.access() == Access::ReadOnly) {
        return Err(OutOfRange { offset, len, size: memory.len(), access: memory.access() });
    }
    Ok(memory.as_ptr().wrapping_add(offset))
}

/// How many bytes the next access moves: the widest of 8, 4, 2, 1 that the address is aligned to and that is left.
fn width(address: usize, left: usize) -> usize {
    [8, 4, 2].into_iter().find(|w| address.is_multiple_of(*w) && *w <= left).unwrap_or(1)
}

/// Copies `into.len()` bytes out of device memory, from `offset`.
pub fn read(memory: &Mapping, offset: usize, into: &mut [u8]) -> Result<(), OutOfRange> {
    let src = check(memory, offset, into.len(), false)?;
    let mut done = 0;
    while done < into.len() {
        let p = src.wrapping_add(done);
        let n = width(p.addr(), into.len() - done);
        let mut word = [0u8; 8];
        // SAFETY: `check` put all of the range inside the live mapping, and `width` chose a size that `p` is aligned to and that
        // does not pass the range's end. Volatile: the device may change the bytes, and each access must happen exactly once.
        unsafe {
            match n {
                8 => word = p.cast::<u64>().read_volatile().to_ne_bytes(),
                4 => word[..4].copy_from_slice(&p.cast::<u32>().read_volatile().to_ne_bytes()),
                2 => word[..2].copy_from_slice(&p.cast::<u16>().read_volatile().to_ne_bytes()),
                _ => word[0] = p.read_volatile(),
            }
        }
        into[done..done + n].copy_from_slice(&word[..n]);
        done += n;
    }
    Ok(())
}

/// Copies `from` into device memory at `offset`. The stores are posted: see [`flush`].
pub fn write(memory: &Mapping, offset: usize, from: &[u8]) -> Result<(), OutOfRange> {
    let dst = check(memory, offset, from.len(), true)?;
    let mut done = 0;
    while done < from.len() {
        let p = dst.wrapping_add(done);
        let n = width(p.addr(), from.len() - done);
        let mut word = [0u8; 8];
        word[..n].copy_from_slice(&from[done..done + n]);
        let [a, b, c, d, ..] = word;
        // SAFETY: as in `read`, and `check` refused read-only mappings.
        unsafe {
            match n {
                8 => p.cast::<u64>().write_volatile(u64::from_ne_bytes(word)),
                4 => p.cast::<u32>().write_volatile(u32::from_ne_bytes([a, b, c, d])),
                2 => p.cast::<u16>().write_volatile(u16::from_ne_bytes([a, b])),
                _ => p.write_volatile(a),
            }
        }
        done += n;
    }
    Ok(())
}

/// Returns when every earlier store of this thread to the device has arrived: a read of the same device may not pass them (PCIe base
/// specification, ordering rules). Gives back the word it read at `offset` (rounded down to 4 bytes): all ones may mean removal.
pub fn flush(memory: &Mapping, offset: usize) -> Result<u32, OutOfRange> {
    fence(Ordering::SeqCst);
    let mut word = [0u8; 4];
    read(memory, offset & !3, &mut word)?;
    fence(Ordering::SeqCst);
    Ok(u32::from_ne_bytes(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_offset_and_length_arrives() {
        let memory = Mapping::memfd("device-memory", 4096).unwrap();
        let pattern: Vec<u8> = (0..64).map(|i| i as u8 ^ 0x5a).collect();
        for offset in 0..17 {
            for len in 0..40 {
                memory.zero(0, 128).unwrap();
                write(&memory, offset, &pattern[..len]).unwrap();
                let mut all = [0u8; 64];
                memory.read(0, &mut all).unwrap();
                assert_eq!(&all[offset..offset + len], &pattern[..len]);
                assert!(all[..offset].iter().chain(&all[offset + len..]).all(|b| *b == 0));
                let mut back = vec![0u8; len];
                read(&memory, offset, &mut back).unwrap();
                assert_eq!(back, &pattern[..len]);
            }
        }
        write(&memory, 8, &[1, 2, 3, 4]).unwrap();
        assert_eq!(flush(&memory, 11).unwrap(), u32::from_ne_bytes([1, 2, 3, 4]));
    }

    #[test]
    fn accesses_are_aligned_and_at_most_eight_bytes() {
        for address in 0..16 {
            for left in 1..32 {
                let n = width(address, left);
                assert!(n <= 8 && n <= left && address % n == 0, "{address} {left} {n}");
            }
        }
        assert_eq!(width(16, 100), 8);
    }

    #[test]
    fn outside_is_refused() {
        let memory = Mapping::memfd("device-memory", 4096).unwrap();
        assert!(read(&memory, 4090, &mut [0; 8]).is_err());
        assert!(write(&memory, usize::MAX, &[0; 8]).is_err());
        assert!(flush(&memory, 4096).is_err());
    }
}
