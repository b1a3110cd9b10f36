//! The PCI function over VFIO, without a driver on top.

use nvme_driver::mem::{Mapping, PAGE};
use nvme_driver::pci::{DmaAccess, PciError, PciFunction};
use nvme_driver::spec::regs;
use nvme_driver::vfio::{self, VfioError, VfioFunction, device_memory};
use rustix::fs::{Mode, OFlags};

use crate::lab::{Case, Outcome, addresses, expect, node_of, open, pattern};

pub(crate) const CASES: &[(&str, Case)] = &[
    ("boots", boots),
    ("scan", scan),
    ("bind-refuses-busy", bind_refuses_busy),
    ("bind-unbind", bind_unbind),
    ("open-errors", open_errors),
    ("config-and-bars", config_and_bars),
    ("iova-ranges", iova_ranges),
    ("dma-map-errors", dma_map_errors),
    ("memlock", memlock),
    ("cmb-by-cpu", cmb_by_cpu),
    ("function-reset", function_reset),
];

/// The lab itself: the IOMMU is on.
fn boots() -> Outcome {
    let groups = std::fs::read_dir("/sys/kernel/iommu_groups")?.count();
    expect(groups > 2, format!("{groups} IOMMU groups"))
}

fn scan() -> Outcome {
    let [a, b] = addresses()?;
    expect(node_of(a)? != node_of(b)?, "one block device for two drives")?;
    let found = vfio::list()?;
    println!("{found:#?}");
    expect(found.len() == 2, "expected two functions")?;
    for info in &found {
        expect((info.vendor, info.device) == (0x1b36, 0x0010), "expected QEMU's ids")?;
        expect(info.driver.as_deref() == Some("nvme"), "expected the kernel's driver")?;
        expect(info.iommu_group.is_some(), "expected an IOMMU group")?;
        expect(info.block_devices.len() == 1, "expected one namespace")?;
    }
    expect(found[0].iommu_group != found[1].iommu_group, "expected separate groups")
}

/// A namespace that someone holds exclusively is not taken away.
fn bind_refuses_busy() -> Outcome {
    let address = addresses()?[0];
    let holder = rustix::fs::open(node_of(address)?, OFlags::RDONLY | OFlags::EXCL, Mode::empty())?;
    let refused = vfio::bind(address);
    println!("{refused:?}");
    expect(matches!(refused, Err(VfioError::InUse { .. })), "expected InUse")?;
    expect(vfio::list()?[0].driver.as_deref() == Some("nvme"), "the driver changed")?;
    drop(holder);
    Ok(())
}

fn bind_unbind() -> Outcome {
    let address = addresses()?[0];
    vfio::bind(address)?;
    vfio::bind(address)?;
    expect(vfio::list()?[0].driver.as_deref() == Some("vfio-pci"), "not bound")?;
    let held = VfioFunction::open(address)?;
    let refused = vfio::unbind(address);
    println!("{refused:?}");
    expect(matches!(refused, Err(VfioError::Busy { .. })), "expected Busy")?;
    drop(held);
    vfio::unbind(address)?;
    expect(vfio::list()?[0].driver.as_deref() == Some("nvme"), "not given back")
}

fn open_errors() -> Outcome {
    let address = addresses()?[1];
    let refused = VfioFunction::open(address);
    println!("{refused:?}");
    expect(matches!(refused, Err(VfioError::NotBound { .. })), "expected NotBound")?;
    let held = open(1)?;
    let refused = VfioFunction::open(address);
    println!("{refused:?}");
    expect(matches!(refused, Err(VfioError::Busy { .. })), "expected Busy")?;
    drop(held);
    VfioFunction::open(address)?;
    let refused = VfioFunction::open("00:00.0".parse()?);
    println!("{refused:?}");
    expect(matches!(refused, Err(VfioError::NotNvme { .. })), "expected NotNvme")
}

fn config_and_bars() -> Outcome {
    let f = open(0)?;
    expect(f.config_read(0, 4)? == 0x0010_1b36, "vendor and device id")?;
    expect(f.config_read(0, 2)? == 0x1b36 && f.config_read(2, 2)? == 0x10, "ids by halves")?;
    for (index, bar) in (0..6).map(|i| (i, f.bar(i))) {
        println!("BAR{index}: {bar:x?}");
    }
    let cmb = f.bar(2)?;
    expect(cmb.size == 64 << 20 && cmb.is_64bit && cmb.bus_address.is_some(), "BAR2 is the CMB")?;
    let version = f.read32(0, regs::VS)?;
    expect(version == 0x0001_0400, format!("version {version:#x}"))?;
    let cap = f.read64(0, regs::CAP)?;
    expect(regs::Cap::from(cap).cmbs(), format!("CAP {cap:#x} has no CMBS"))?;
    for refused in
        [f.read32(0, 1 << 40), f.read32(0, 2), f.read32(5, 0), f.config_read(0, 3), f.config_read(4095, 4)]
    {
        expect(matches!(refused, Err(PciError::OutOfRange { .. })), format!("{refused:?}"))?;
    }
    let page = f.map_bar(0, 0, PAGE as u64)?.ok_or("BAR0 cannot be mapped")?;
    let mapped = page.u32_at(regs::VS as usize)?.load(std::sync::atomic::Ordering::Relaxed);
    expect(mapped == version, "the mapped BAR shows other registers")?;
    expect(f.map_bar(0, 0, 1 << 30).is_err(), "mapped more than the BAR")
}

fn iova_ranges() -> Outcome {
    let f = open(0)?;
    let ranges = f.iova_ranges();
    for range in &ranges {
        println!("{:#x} to {:#x}", range.start(), range.end());
    }
    let contains = |address: u64| ranges.iter().any(|r| r.contains(&address));
    expect(!contains(0xfee0_0000), "the interrupt window is offered")?;
    expect(contains((1 << 47) + 4096) && !contains(1 << 48), "expected 48 bits")?;
    for (i, bar) in (0..6).filter_map(|i| Some((i, f.bar(i).ok()?.bus_address?))) {
        expect(!contains(bar), format!("BAR{i} at {bar:#x} is offered"))?;
    }
    // The windows of the root port that drive 1 is behind, as the kernel lists them.
    let windows = std::fs::read_to_string("/proc/iomem")?;
    let windows: Vec<_> = windows.lines().filter(|line| line.contains("PCI Bus 0000:01")).collect();
    println!("{windows:#?}");
    expect(!windows.is_empty(), "the root port has no window")?;
    for line in windows {
        let (range, _) = line.split_once(':').ok_or("no range")?;
        for end in range.split('-') {
            let end = u64::from_str_radix(end.trim(), 16)?;
            expect(end != 0 && !contains(end), format!("{end:#x} in a bridge window is offered"))?;
        }
    }
    Ok(())
}

fn dma_map_errors() -> Outcome {
    let f = open(0)?;
    let memory = Mapping::anonymous(16 * PAGE)?;
    let iova = 0x1_0000_0000;
    f.dma_map(&memory, 0, 4 * PAGE, iova, DmaAccess::ReadWrite)?;
    let overlap = f.dma_map(&memory, 0, PAGE, iova + PAGE as u64, DmaAccess::Read);
    println!("{overlap:?}");
    expect(matches!(overlap, Err(PciError::DmaMap { .. })), "mapped twice")?;
    let outside = f.dma_map(&memory, 0, PAGE, 1 << 52, DmaAccess::Read);
    println!("{outside:?}");
    expect(matches!(outside, Err(PciError::DmaMap { .. })), "mapped beyond the address width")?;
    let unaligned = f.dma_map(&memory, 8, PAGE, iova + (1 << 20), DmaAccess::Read);
    expect(matches!(unaligned, Err(PciError::Memory(_))), "mapped an unaligned offset")?;
    let long = f.dma_map(&memory, 0, 17 * PAGE, iova + (1 << 20), DmaAccess::Read);
    expect(matches!(long, Err(PciError::Memory(_))), "mapped more than there is")?;
    for (at, len) in [(iova, PAGE), (iova + PAGE as u64, PAGE), (iova, 8 * PAGE), (0, PAGE)] {
        let refused = f.dma_unmap(at, len);
        expect(matches!(refused, Err(PciError::DmaUnmap { .. })), format!("unmapped {len} at {at:#x}"))?;
    }
    f.dma_unmap(iova, 4 * PAGE)?;
    f.dma_map(&memory, 0, PAGE, iova + PAGE as u64, DmaAccess::Read)?;
    Ok(())
}

/// Too little lockable memory is said, with what to do.
fn memlock() -> Outcome {
    use rustix::process::{Resource, Rlimit, setrlimit};
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let f = open(0)?;
    setrlimit(Resource::Memlock, Rlimit { current: Some(64 * 1024), maximum: Some(64 * 1024) })?;
    let mut sets = capabilities(None)?;
    sets.effective.remove(CapabilitySet::IPC_LOCK);
    set_capabilities(None, sets)?;
    let memory = Mapping::anonymous(1 << 20)?;
    let refused = f.dma_map(&memory, 0, 1 << 20, 0x1_0000_0000, DmaAccess::ReadWrite);
    println!("{refused:?}");
    expect(
        matches!(&refused, Err(e) if e.to_string().contains("64 KiB") && e.to_string().contains("ulimit -l")),
        "no advice",
    )?;
    f.dma_map(&memory, 0, 32 * 1024, 0x1_0000_0000, DmaAccess::ReadWrite)?;
    Ok(())
}

/// Switches the CMB on (base specification, "Controller Memory Buffer") and gives back the BAR that holds it.
fn enable_cmb(f: &dyn PciFunction, address: u64) -> Outcome<std::sync::Arc<Mapping>> {
    // A kernel with PCI_P2PDMA has used it before us, and QEMU's reset keeps CMBMSC.
    f.write64(0, regs::CMBMSC, 0)?;
    expect(f.read32(0, regs::CMBSZ)? == 0, "CMBSZ is visible before CRE")?;
    f.write64(0, regs::CMBMSC, address | 0b11)?;
    let (loc, size) = (f.read32(0, regs::CMBLOC)?, f.read32(0, regs::CMBSZ)?);
    expect(loc & 7 == 2 && size != 0, format!("CMBLOC {loc:#x}, CMBSZ {size:#x}"))?;
    expect(f.read32(0, regs::CMBSTS)? & 1 == 0, "CMBSTS.CBAI")?;
    Ok(f.map_bar(2, 0, f.bar(2)?.size)?.ok_or("the CMB cannot be mapped")?)
}

fn cmb_by_cpu() -> Outcome {
    let f = open(0)?;
    let cmb = enable_cmb(&*f, 0x10_0000_0000)?;
    for (offset, len) in [(0, 4096), (1, 31), (8191, 3), ((64 << 20) - 4096, 4096)] {
        let bytes = pattern(offset as u64 + 1, len);
        device_memory::write(&cmb, offset, &bytes)?;
        let word = device_memory::flush(&cmb, offset)?;
        expect(word != u32::MAX, "reads as removed")?;
        let mut back = vec![0; len];
        device_memory::read(&cmb, offset, &mut back)?;
        expect(back == bytes, format!("{len} bytes at {offset:#x} differ"))?;
    }
    Ok(())
}

fn function_reset() -> Outcome {
    let f = open(0)?;
    let memory = Mapping::anonymous(PAGE)?;
    f.dma_map(&memory, 0, PAGE, 0x1_0000_0000, DmaAccess::ReadWrite)?;
    f.set_bus_master(true)?;
    expect(f.config_read(4, 2)? & 4 != 0, "bus mastering is off")?;
    f.write32(0, regs::AQA, 0x001f_001f)?;
    f.write64(0, regs::ASQ, 0x1_0000_0000)?;
    f.write64(0, regs::ACQ, 0x1_0000_0000)?;
    f.write32(0, regs::CC, 0x0046_0001)?;
    // QEMU is ready at once; AQA, ASQ and ACQ survive its reset (they should not survive a function level one).
    expect(f.read32(0, regs::CSTS)? & 1 != 0, "the controller is not ready")?;
    f.reset()?;
    expect(f.read32(0, regs::CSTS)? & 1 == 0, "the controller is ready after a reset")?;
    expect(f.read32(0, regs::CC)? & 1 == 0, "the controller is enabled after a reset")?;
    expect(f.config_read(4, 2)? & 4 == 0, "bus mastering survived the reset")?;
    f.dma_unmap(0x1_0000_0000, PAGE)?;
    Ok(())
}
