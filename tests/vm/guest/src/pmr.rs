//! The Persistent Memory Region of QEMU's NVMe (drive 0 has one of 16 MiB).

use nvme_driver::controller::ControllerOptions;
use nvme_driver::pmr::{Health, Pmr, PmrError};
use nvme_driver::queue::Data;
use nvme_driver::spec::regs;

use crate::driver::{Io, controller};
use crate::lab::{Case, Outcome, expect, pattern};

pub(crate) const CASES: &[(&str, Case)] = &[("pmr", pmr)];

const SIZE: usize = 16 << 20;

/// Bytes stored by the CPU and by DMA, taken from it by DMA, and still there when it has been off.
fn pmr() -> Outcome {
    let none = Pmr::enable(&controller(1, ControllerOptions::default())?);
    expect(matches!(none, Err(PmrError::Absent { .. })), format!("drive 1 has a PMR: {none:?}"))?;
    let bytes = pattern(41, 64 << 10);
    let controller = controller(0, ControllerOptions::default())?;
    let mut io = Io::new(&controller, bytes.len())?;
    {
        let pmr = Pmr::enable(&controller)?;
        println!("{} bytes, bus address {:x?}, health {:?}", pmr.size(), pmr.bus_address(), pmr.health());
        expect(pmr.size() == SIZE && pmr.health() == Health::Normal, "size and health")?;
        expect(pmr.takes_read_data() && pmr.gives_write_data(), "RDS and WDS")?;
        let at = pmr.bus_address().ok_or("the PMR has no bus address")?;
        // CPU -> PMR -> drive -> host.
        pmr.write(4096, &bytes)?;
        pmr.barrier()?;
        io.write(100, Data { address: at + 4096, len: bytes.len() })?;
        expect(io.get(100, bytes.len())? == bytes, "what the drive took from the PMR differs")?;
        // Drive -> PMR -> CPU.
        io.read(100, Data { address: at + (8 << 20), len: bytes.len() })?;
        pmr.barrier()?;
        let mut got = vec![0; bytes.len()];
        pmr.read(8 << 20, &mut got)?;
        expect(got == bytes, "what the drive put into the PMR differs")?;
        // A controller reset leaves it alone.
        controller.reset(controller.epoch())?;
        pmr.barrier()?;
        pmr.read(4096, &mut got)?;
        expect(got == bytes, "the PMR's bytes are gone after a controller reset")?;
        expect(matches!(Pmr::enable(&controller), Err(PmrError::InUse(_))), "two handles")?;
        // A function level reset leaves it on or off, as the function likes; its bytes are there, and so is it.
        controller.function().reset()?;
        controller.reset(controller.epoch())?;
        match pmr.barrier() {
            Ok(()) => println!("the function level reset left the PMR on"),
            Err(PmrError::Interrupted(_)) => println!("the function level reset turned the PMR off"),
            Err(e) => return Err(e.into()),
        }
        // Turned off behind the driver's back it is on again with the next barrier, which says so.
        controller.function().write32(0, regs::PMRMSCL, 0)?;
        controller.function().write32(0, regs::PMRCTL, 0)?;
        let told = pmr.barrier();
        expect(matches!(told, Err(PmrError::Interrupted(_))), format!("it was off, and {told:?}"))?;
        pmr.barrier()?;
        pmr.read(4096, &mut got)?;
        expect(got == bytes, "the PMR's bytes are gone after it was off")?;
        let mut io = Io::new(&controller, bytes.len())?;
        io.write(200, Data { address: at + 4096, len: bytes.len() })?;
        expect(io.get(200, bytes.len())? == bytes, "what the drive took from the PMR after that differs")?;
    }
    let pmr = Pmr::enable(&controller)?;
    for at in [4096, 8 << 20] {
        let mut got = vec![0; bytes.len()];
        pmr.read(at, &mut got)?;
        expect(got == bytes, format!("the bytes at {at:#x} are gone after it was off"))?;
    }
    Ok(())
}
