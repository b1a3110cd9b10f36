//! What the processor gets out of the CMB, measured: placement is not guessed.
//!
//! * [`measure`]: latency and bandwidth of reads and writes, of the CMB and of ordinary memory beside it
//! * [`Probe::readers_home`]: what that means for windows that processors read
//!
//! A CMB behind a real bus is uncached: every load of 8 bytes is a round trip. Peers do not mind, since their DMA moves long bursts; a
//! reader on the processor is often better off with a copy in host memory. An emulated CMB is ordinary memory.

use std::sync::Arc;
use std::time::Duration;

use nvme_driver::clock::Clock;
use nvme_driver::disk::CmbMemory;
use nvme_driver::mem::{MapError, Mapping, OutOfRange, PAGE};

use crate::layout::Home;
use crate::region::{Region, RegionKind};

/// What is measured: bytes of one access, and how many make one round. A round of the longest over the slowest known CMB
/// (8 MB/s, emulated MMIO under QEMU) takes 8 ms.
const ACCESSES: [(usize, u32); SIZES] = [(8, 256), (64, 128), (PAGE, 16)];
/// Sizes that are measured.
pub const SIZES: usize = 3;
/// Rounds: the fastest counts, because what disturbs a measurement only ever makes it slower.
const ROUNDS: u32 = 5;
/// Readers get the host cache when it is this many times as fast as the CMB, or faster: below, the copy is not worth its memory.
const WORTH_A_COPY: u32 = 2;

/// How long one access of so many bytes takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Its length.
    pub bytes: usize,
    /// A read, done when the bytes are here.
    pub read: Duration,
    /// A write, done when the bytes are there (device memory: with the read that flushes posted writes).
    pub write: Duration,
}

impl Access {
    /// Bytes a second of reads of this length, one after the other; 0 if it took no time that could be measured.
    pub fn read_rate(&self) -> u64 {
        rate(self.bytes, self.read)
    }

    /// The same of writes.
    pub fn write_rate(&self) -> u64 {
        rate(self.bytes, self.write)
    }
}

/// Bytes a second; 0 if the time is.
pub fn rate(bytes: usize, time: Duration) -> u64 {
    let ns = time.as_nanos();
    let rate = (bytes as u128 * 1_000_000_000).checked_div(ns).unwrap_or(0);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Whether the CMB is behind a bus ([`CmbMemory::is_device_memory`]) and not ordinary memory of an emulated device.
    pub uncached: bool,
    /// The CMB, by 8 bytes, 64 bytes and 4 KiB.
    pub cmb: [Access; SIZES],
    /// Ordinary memory, the same.
    pub host: [Access; SIZES],
}

/// Where windows for readers on the processor belong, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    /// The CMB, or the host cache.
    pub home: Home,
    /// Why, with the figures.
    pub reason: String,
}

/// Memory for the probe could not be had or reached.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// No memory to compare with.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The CMB is smaller than a page.
    #[error("the CMB is too small to be measured: {0}")]
    Memory(#[from] OutOfRange),
}

/// Measures. The first page of the CMB is overwritten, so nobody may use it yet.
pub fn measure(cmb: &CmbMemory, clock: &dyn Clock) -> Result<Probe, ProbeError> {
    let kind = if cmb.is_device_memory { RegionKind::Device { canary: 0 } } else { RegionKind::Ordinary };
    let region = Region::new(Arc::clone(&cmb.memory), 0, kind);
    let host = Region::new(Mapping::anonymous(PAGE)?, 0, RegionKind::Ordinary);
    Ok(Probe {
        uncached: cmb.is_device_memory,
        cmb: accesses(&region, clock)?,
        host: accesses(&host, clock)?,
    })
}

fn accesses(region: &Region, clock: &dyn Clock) -> Result<[Access; SIZES], OutOfRange> {
    let mut buffer = [0x5a; PAGE];
    let mut measured = [Access::default(); SIZES];
    for (access, (bytes, count)) in measured.iter_mut().zip(ACCESSES) {
        let part = &mut buffer[..bytes];
        let write = fastest(clock, count, || region.write(0, part))?;
        let read = fastest(clock, count, || region.read(0, part))?;
        *access = Access { bytes, read, write };
    }
    Ok(measured)
}

/// The time of one of `count` accesses in the fastest of the rounds.
fn fastest(
    clock: &dyn Clock,
    count: u32,
    mut access: impl FnMut() -> Result<(), OutOfRange>,
) -> Result<Duration, OutOfRange> {
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        let start = clock.now();
        for _ in 0..count {
            access()?;
        }
        best = best.min(clock.now().saturating_sub(start));
    }
    Ok(best / count)
}

impl Probe {
    /// What `auto` means for readers on the processor: the CMB, unless it is uncached and the host cache at least twice as fast at
    /// 4 KiB. (Peers get the CMB in any case.)
    pub fn readers_home(&self) -> Advice {
        let (cmb, host) = (self.cmb[SIZES - 1], self.host[SIZES - 1]);
        // Ordinary memory is as fast as ordinary memory: what was measured differently was noise.
        let slow = self.uncached && !host.read.is_zero() && cmb.read >= host.read * WORTH_A_COPY;
        let (cmb, host) = (cmb.read.as_nanos(), host.read.as_nanos());
        let figures = format!("a read of 4 KiB takes {cmb} ns from the CMB and {host} ns from host memory");
        if slow {
            Advice {
                home: Home::Host,
                reason: format!("{figures}: readers get the host cache, peers the CMB"),
            }
        } else {
            Advice { home: Home::Cmb, reason: format!("{figures}: readers get the CMB too") }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    fn probe(uncached: bool, cmb_ns: u64, host_ns: u64) -> Probe {
        let all = |ns| {
            let time = Duration::from_nanos(ns);
            [Access { bytes: PAGE, read: time, write: time }; SIZES]
        };
        Probe { uncached, cmb: all(cmb_ns), host: all(host_ns) }
    }

    #[test]
    fn readers_get_the_host_cache_where_the_cmb_is_slow_and_only_there() {
        for (cmb, host, home) in [
            (400_000, 60, Home::Host),
            (120, 60, Home::Host),
            (119, 60, Home::Cmb),
            (60, 60, Home::Cmb),
            (30, 60, Home::Cmb),
            // A clock too coarse to tell: nothing is known against the CMB.
            (0, 0, Home::Cmb),
        ] {
            let advice = probe(true, cmb, host).readers_home();
            assert_eq!(advice.home, home, "{cmb} {host}: {}", advice.reason);
            assert_eq!(probe(false, cmb, host).readers_home().home, Home::Cmb, "ordinary memory");
            assert!(advice.reason.contains(&format!("{cmb} ns from the CMB")), "{}", advice.reason);
        }
    }

    #[test]
    fn rates_are_bytes_a_second() {
        assert_eq!(rate(4096, Duration::from_nanos(1000)), 4_096_000_000);
        assert_eq!(rate(8, Duration::from_secs(2)), 4);
        assert_eq!(rate(8, Duration::ZERO), 0);
    }

    /// A clock that is read twice a round, and whose rounds take one after the other the times given.
    #[derive(Debug)]
    struct Scripted(AtomicU64, [u64; ROUNDS as usize]);

    impl Clock for Scripted {
        fn now(&self) -> Duration {
            let calls = self.0.fetch_add(1, Ordering::Relaxed);
            let whole: u64 = self.1.iter().sum();
            let rounds = calls / 2;
            let begun: u64 = self.1.iter().take((rounds % u64::from(ROUNDS)) as usize).sum();
            let length = self.1[(rounds % u64::from(ROUNDS)) as usize];
            let start = rounds / u64::from(ROUNDS) * whole + begun;
            Duration::from_nanos(if calls.is_multiple_of(2) { start } else { start + length })
        }
        fn pause(&self, _: Duration) {}
    }

    #[test]
    fn the_fastest_round_counts() {
        let memory = Mapping::memfd("cmb", PAGE).unwrap();
        for is_device_memory in [false, true] {
            let cmb = CmbMemory {
                memory: Arc::clone(&memory),
                bus_address: 0,
                is_device_memory,
                read_data: true,
                write_data: true,
            };
            let clock = Scripted(AtomicU64::new(0), [90_000, 25_600, 70_000, 51_200, 60_000]);
            let probe = measure(&cmb, &clock).unwrap();
            assert_eq!(probe.uncached, is_device_memory);
            let expected = [(8, 100), (64, 200), (4096, 1600)];
            for (access, (bytes, ns)) in probe.cmb.iter().chain(&probe.host).zip(expected.iter().cycle()) {
                let time = Duration::from_nanos(*ns);
                assert_eq!(*access, Access { bytes: *bytes, read: time, write: time });
            }
        }
    }

    #[test]
    fn a_cmb_below_a_page_is_an_error() {
        let memory = Mapping::memfd("cmb", 64).unwrap();
        let cmb =
            CmbMemory { memory, bus_address: 0, is_device_memory: false, read_data: true, write_data: true };
        assert!(measure(&cmb, &nvme_driver::clock::ManualClock::new()).is_err());
    }
}
