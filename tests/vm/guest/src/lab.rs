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

/// The block device of a function's namespace, once the kernel has found it. Which drive is nvme0 is chance.
pub(crate) fn node_of(address: PciAddress) -> Outcome<String> {
    for _ in 0..500 {
        let found = vfio::list()?.into_iter().find(|info| info.address == address);
        if let Some(name) = found.and_then(|info| info.block_devices.first().cloned()) {
            let node = format!("/dev/{name}");
            if std::path::Path::new(&node).exists() {
                return Ok(node);
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Err("the kernel did not find the namespace".into())
}
