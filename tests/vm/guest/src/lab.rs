//! Finding the guest's drives and taking them from the kernel.

use std::error::Error;
use std::sync::Arc;

use nvme_driver::pci::{PciAddress, PciFunction};
use nvme_driver::vfio::{self, VfioFunction};

pub(crate) type Outcome<T = ()> = Result<T, Box<dyn Error>>;
pub(crate) type Case = fn() -> Outcome;

/// Fails the case with a message unless `holds`.
pub(crate) fn expect(holds: bool, what: impl Into<String>) -> Outcome {
    if holds { Ok(()) } else { Err(what.into().into()) }
}

/// Both drives' addresses, drive 0 first.
pub(crate) fn addresses() -> Outcome<[PciAddress; 2]> {
    let found = vfio::list()?;
    match found[..] {
        [ref a, ref b] => Ok([a.address, b.address]),
        _ => Err(format!("expected two NVMe functions, found {found:?}").into()),
    }
}

/// Drive `index` (0 or 1), bound to vfio-pci and opened.
pub(crate) fn open(index: usize) -> Outcome<Arc<dyn PciFunction>> {
    let address = addresses()?[index];
    vfio::bind(address)?;
    Ok(VfioFunction::open(address)?)
}

/// `len` bytes that differ from one seed to the next.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

/// Tries every 10 ms for 5 s: the kernel finds its drives beside us.
fn in_time<T>(mut attempt: impl FnMut() -> Outcome<T>) -> Outcome<T> {
    for _ in 0..500 {
        if let Ok(found) = attempt() {
            return Ok(found);
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    attempt()
}

/// Waits until a block device can be opened: its node is there a moment before the disk behind it, and until then that is
/// ENXIO.
pub(crate) fn wait_for(node: &str) -> Outcome {
    in_time(|| std::fs::File::open(node).map(drop).map_err(|e| format!("{node}: {e}").into()))
}

/// The block device of a function's namespace, once the kernel has found it and lets it be opened. Which drive is nvme0 is
/// chance.
pub(crate) fn node_of(address: PciAddress) -> Outcome<String> {
    let name = in_time(|| {
        let found = vfio::list()?.into_iter().find(|info| info.address == address);
        found
            .and_then(|info| info.block_devices.first().cloned())
            .ok_or_else(|| "the kernel did not find the namespace".into())
    })?;
    let node = format!("/dev/{name}");
    wait_for(&node)?;
    Ok(node)
}
