//! Whether a drive's DMA to another device's memory arrives: tried before it is relied on.
//!
//! A DMA that the IOMMU or the fabric refused is not always reported: some controllers complete the command with success. So the bytes
//! decide. What is on the drive stays what it is: nothing is assumed to be free there.

use std::sync::Arc;

use nvme_driver::disk::{CmbMemory, Disk, DiskError};
use nvme_driver::mem::{OutOfRange, PAGE};
use nvme_driver::pci::DmaAccess;

use crate::counters::Reason;
use crate::drive_copy::Obstacle;
use crate::region::{Region, RegionKind};

/// Has `disk` read its last 4 KiB into the first page of `cmb`, another device's, which nobody else may use meanwhile, and compares them
/// with what it reads into host memory. With `writes` it also writes them back from there, the same bytes to the same place; should
/// others have arrived, the right ones are written again at once, through host memory. The error says what is in the way.
pub fn try_out(disk: &mut dyn Disk, cmb: &CmbMemory, writes: bool) -> Result<(), Obstacle> {
    let name = disk.name().to_owned();
    let failed = |e: DiskError| Obstacle::new(Reason::Drive, e.to_string());
    let refused = |e: DiskError| Obstacle::new(Reason::MapRefused, e.to_string());
    let outside = |e: OutOfRange| Obstacle::new(Reason::TooLarge, e.to_string());
    let lost = |what: &str| {
        Obstacle::new(
            Reason::Untrusted,
            format!("{name} says that it {what} the other drive's CMB, but the bytes did not arrive"),
        )
    };
    let block = u64::from(disk.geometry().block_size.max(1));
    let Some(lba) = disk.geometry().blocks.checked_sub((PAGE as u64).div_ceil(block)) else {
        return Err(Obstacle::new(Reason::TooLarge, format!("{name} is smaller than a page")));
    };
    // The canary is of no use here: a device that is gone gives back nothing that was read from the drive.
    let kind = if cmb.is_device_memory { RegionKind::Device { canary: 0 } } else { RegionKind::Ordinary };
    let region = Region::new(Arc::clone(&cmb.memory), 0, kind);
    let (mut known, mut got) = (vec![0; PAGE], vec![0; PAGE]);
    disk.read(lba, &mut known).map_err(failed)?;
    // No byte of it is what is to arrive.
    region.write(0, &known.iter().map(|b| !b).collect::<Vec<_>>()).map_err(outside)?;
    {
        let page = disk.map_peer(&cmb.memory, 0, PAGE, DmaAccess::Write).map_err(refused)?;
        disk.read_to_peer(lba, &page, 0, PAGE).map_err(failed)?;
    }
    region.read(0, &mut got).map_err(outside)?;
    if got != known {
        return Err(lost("wrote to"));
    }
    if !writes {
        return Ok(());
    }
    let page = disk.map_peer(&cmb.memory, 0, PAGE, DmaAccess::Read).map_err(refused)?;
    let written = disk.write_from_peer(lba, &page, 0, PAGE);
    disk.read(lba, &mut got).map_err(failed)?;
    if got != known {
        disk.write(lba, &known).and_then(|()| disk.flush()).map_err(failed)?;
        return Err(lost("read from"));
    }
    written.map_err(failed)
}
