//! Parts of QEMU's CMB as dma-bufs: offered by kernel 7.3, refused by 6.1.

use std::os::fd::AsFd;

use nvme_driver::cmb::ExportError;
use nvme_driver::controller::ControllerOptions;
use nvme_driver::mem::{Access, Mapping, PAGE};
use nvme_driver::pci::PciError;
use nvme_driver::vfio;
use rustix::fs::{SeekFrom, seek};

use crate::driver::{Io, controller};
use crate::lab::{Case, Outcome, addresses, expect, node_of};

pub(crate) const CASES: &[(&str, Case)] = &[("dma-buf", dma_buf)];

/// Whether this kernel's vfio-pci exports dma-bufs: from 6.19 on.
fn offered() -> Outcome<bool> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let mut next = || Ok::<_, Box<dyn std::error::Error>>(numbers.next().ok_or("no version")??);
    Ok((next()?, next()?) >= (6, 19))
}

fn size(fd: impl AsFd) -> Outcome<u64> {
    Ok(seek(fd, SeekFrom::End(0))?)
}

/// Exactly the range that was asked for, not for the CPU, made again after a reset, and gone for good when the function is closed.
fn dma_buf() -> Outcome {
    let address = addresses()?[0];
    let controller = controller(0, ControllerOptions { cmb_queue_bytes: 1 << 20, ..Default::default() })?;
    let (at, len) = (2 << 20, 1 << 20);
    let export = controller.export_cmb(at, len);
    if !offered()? {
        println!("{export:?}");
        let said = matches!(&export, Err(e @ ExportError::Pci(PciError::Unsupported { .. })) if e.to_string().contains("6.19"));
        return expect(said, "expected a refusal that says which kernels can");
    }
    let export = export?;
    expect(size(&export)? == len && export.is_current(&controller), "not exactly the range")?;
    let fd = |export: &dyn AsFd| export.as_fd().try_clone_to_owned();
    let mapped = Mapping::from_fd(fd(&export)?, 0, PAGE, Access::ReadWrite);
    println!("mapped for the CPU: {mapped:?}");
    expect(mapped.is_err_and(|e| e.source.raw_os_error() == Some(22)), "mmap is not refused with EINVAL")?;
    let page = PAGE as u64;
    let data = (63 << 20) as u64;
    for (at, len) in [(0, page), (data - page, page), (0, data)] {
        expect(size(controller.export_cmb(at, len)?)? == len, format!("{len} bytes at {at:#x}"))?;
    }
    // The queues' part is not given away; what is no range of the BAR does not even reach the kernel.
    for (at, len) in [(data, page), (0, 0), (100, page), (0, 100)] {
        let refused = controller.export_cmb(at, len);
        expect(matches!(refused, Err(ExportError::OutOfRange { .. })), format!("{refused:?}"))?;
    }
    let f = controller.function();
    for (bar, at, len) in [(2, 64 << 20, page), (2, 0, 65 << 20), (5, 0, page), (6, 0, page), (2, 1, page)] {
        let refused = f.export_dma_buf(bar, at, len);
        expect(matches!(refused, Err(PciError::OutOfRange { .. })), format!("{refused:?}"))?;
    }
    // A reset: what was exported is stale, and can be exported again.
    let mut io = Io::new(&controller, PAGE)?;
    f.reset()?;
    io.queue.recover(|_| ())?;
    expect(!export.is_current(&controller), "an export from before a reset passes for a good one")?;
    let again = controller.export_cmb(at, len)?;
    expect(size(&again)? == len && again.is_current(&controller), "not made again after a reset")?;
    // vfio-pci lets go of a function only when no dma-buf refers to it any more: closing it has to have revoked both buffers,
    // which are still open here, or this would wait for ever.
    drop((io, controller));
    vfio::unbind(address)?;
    println!("the kernel has it again: {}", node_of(address)?);
    expect(size(&export)? == len && size(&again)? == len, "the descriptors changed")
}
