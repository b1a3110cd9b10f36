//! A guest that is not as one would wish: no interrupt remapping, an IOMMU of 39 bits, and two controllers in one group. Drive 0 has blocks
//! of 4 KiB; drive 1 has a namespace with metadata, then one with an unreadable block.

use std::fs;

use nvme_driver::controller::ControllerOptions;
use nvme_driver::disk::{Disk, DiskError};
use nvme_driver::nvme_disk::NvmeDisk;
use nvme_driver::vfio::{self, VfioError, VfioFunction};

use crate::driver::controller;
use crate::lab::{Case, Outcome, addresses, expect, open, pattern};

/// In this order: each leaves the guest as the next one needs it.
pub(crate) const CASES: &[(&str, Case)] = &[
    ("not-viable", not_viable),
    ("no-interrupt-remapping", no_interrupt_remapping),
    ("no-vfio", no_vfio),
    ("no-permission", no_permission),
    ("narrow-iommu", narrow_iommu),
    ("large-blocks", large_blocks),
    ("metadata-and-media-error", metadata_and_media_error),
];

/// The refusal, which has to contain all of `words`.
fn refused(index: usize, words: &[&str]) -> Outcome<VfioError> {
    let error = VfioFunction::open(addresses()?[index]).err().ok_or("it was opened")?;
    println!("{error}");
    for word in words {
        expect(error.to_string().contains(word), format!("the error does not say {word:?}"))?;
    }
    Ok(error)
}

/// One function of a group bound to us, the other still the kernel's.
fn not_viable() -> Outcome {
    let [a, b] = addresses()?;
    let found = vfio::list()?;
    expect(found[0].iommu_group == found[1].iommu_group, format!("two groups: {found:?}"))?;
    vfio::bind(a)?;
    let error = refused(0, &[&b.to_string(), "(nvme)", "bind them too"])?;
    expect(matches!(error, VfioError::NotViable { .. }), "expected NotViable")?;
    vfio::bind(b).map_err(Into::into)
}

fn no_interrupt_remapping() -> Outcome {
    let error = refused(0, &["interrupt remapping", "allow_unsafe_interrupts=1"])?;
    expect(matches!(error, VfioError::NoInterruptRemapping(_)), "expected NoInterruptRemapping")?;
    // What the error says helps.
    fs::write("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y")?;
    drop(open(0)?);
    Ok(())
}

fn no_vfio() -> Outcome {
    fs::rename("/dev/vfio", "/dev/vfio.away")?;
    let error = refused(0, &["/dev/vfio/vfio", "modprobe vfio-pci"]);
    fs::rename("/dev/vfio.away", "/dev/vfio")?;
    expect(matches!(error?, VfioError::NoVfio(_)), "expected NoVfio")?;
    drop(open(0)?);
    Ok(())
}

fn no_permission() -> Outcome {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities, set_thread_uid};
    set_thread_uid(rustix::process::Uid::from_raw(1000))?;
    let mut sets = capabilities(None)?;
    sets.effective = CapabilitySet::empty();
    set_capabilities(None, sets)?;
    let error = refused(0, &["/dev/vfio/", "chown"])?;
    expect(matches!(error, VfioError::Permission(_)), "expected Permission")
}

/// 39 bits of I/O virtual addresses; and a group is one process' and one container's.
fn narrow_iommu() -> Outcome {
    let f = open(0)?;
    let ranges = f.iova_ranges();
    println!("{ranges:x?}");
    let contains = |address: u64| ranges.iter().any(|r| r.contains(&address));
    expect(contains((1 << 38) + 4096) && !contains(1 << 39), "expected 39 bits")?;
    let error = refused(1, &["in use"])?;
    expect(matches!(error, VfioError::Busy { .. }), "expected Busy")
}

fn disk(index: usize) -> Outcome<NvmeDisk> {
    Ok(NvmeDisk::new(&controller(index, ControllerOptions::default())?)?)
}

fn large_blocks() -> Outcome {
    let mut disk = disk(0)?;
    expect(disk.geometry().block_size == 4096, format!("{:?}", disk.geometry()))?;
    let bytes = pattern(51, 2 << 20);
    disk.write(3, &bytes)?;
    disk.flush()?;
    let mut got = vec![0; bytes.len()];
    disk.read(3, &mut got)?;
    expect(got == bytes, "2 MiB differ")?;
    let end = disk.geometry().blocks;
    let beyond = disk.read(end - 1, &mut got[..8192]);
    expect(matches!(beyond, Err(DiskError::BadRange { .. })), format!("{beyond:?}"))?;
    expect(disk.read(0, &mut got[..512]).is_err(), "read half a block")
}

/// A namespace with metadata is passed over, with the reason; a block that cannot be read fails its own read and no other.
fn metadata_and_media_error() -> Outcome {
    let controller = controller(1, ControllerOptions::default())?;
    let namespaces = &controller.identity().namespaces;
    let unusable = namespaces.first().and_then(|n| n.unusable.clone()).ok_or("namespace 1 is usable")?;
    println!("namespace 1: {unusable}");
    expect(unusable.contains("metadata"), "the reason is another one")?;
    expect(controller.namespace()?.nsid == 2, "expected namespace 2")?;
    let mut disk = NvmeDisk::new(&controller)?;
    let mut got = vec![0; 64 << 10];
    // Sector 2048 of the image, so that is where reads fail; 32 commands around it are in flight together.
    for lba in [1920, 1984, 2048] {
        let read = disk.read(lba, &mut got);
        println!("{lba}: {read:?}");
        let bad = (lba..lba + 128).contains(&2048);
        match read {
            Ok(()) => expect(!bad, "the bad block was read")?,
            Err(DiskError::Device { lba: at, .. }) => expect(bad && at <= 2048, format!("LBA {at}"))?,
            Err(other) => return Err(other.into()),
        }
    }
    let mut all = vec![0; 4 << 20];
    let read = disk.read(0, &mut all);
    expect(matches!(read, Err(DiskError::Device { .. })), format!("{read:?}"))?;
    let bytes = pattern(52, 64 << 10);
    disk.write(4096, &bytes)?;
    disk.read(4096, &mut got)?;
    expect(got == bytes, "what lies elsewhere differs")
}
