//! Finding and enabling the CMB (Base Specification, "Controller Memory Buffer"): CRE, then CMBLOC and CMBSZ, then
//! CBA and CMSE, then CMBSTS.CBAI.
//!
//! A controller without CAP.CMBS is refused (none is used): CMBs of before NVMe 1.4 answer to the BAR's bus address,
//! which user space does not control.

use std::sync::Arc;

use crate::disk::CmbMemory;
use crate::iova::IovaAllocator;
use crate::mem::{Mapping, PAGE};
use crate::pci::{PciError, PciFunction};
use crate::spec::regs::{self, Cap, Cmbloc, Cmbmsc, Cmbsts, Cmbsz};

/// The CMB is aligned to this in I/O virtual address space, so that peers can map it with large pages.
const CBA_ALIGN: u64 = 2 << 20;

/// An enabled CMB.
#[derive(Clone, Debug)]
pub struct Cmb {
    /// The part for data: all of it but [`queues`](Self::queues).
    pub data: CmbMemory,
    /// The part set aside for submission queues and PRP lists, with its bus address.
    pub queues: Option<(Arc<Mapping>, u64)>,
    /// Size in bytes as enabled: a multiple of 4 KiB, inside the BAR.
    pub size: u64,
    /// The BAR that holds it (CMBLOC.BIR).
    pub bar: u8,
    /// Its offset there in bytes (CMBLOC.OFST times the size unit).
    pub bar_offset: u64,
    /// CMBLOC as read.
    pub cmbloc: Cmbloc,
    /// CMBSZ as read.
    pub cmbsz: Cmbsz,
}

/// Whether there is a CMB, and if not, why.
#[derive(Clone, Debug)]
pub enum CmbStatus {
    /// Enabled and mapped.
    Enabled(Arc<Cmb>),
    /// None is used; the reason, for people.
    Absent(String),
}

impl CmbStatus {
    /// The CMB, if enabled.
    pub fn cmb(&self) -> Option<&Arc<Cmb>> {
        match self {
            Self::Enabled(cmb) => Some(cmb),
            Self::Absent(_) => None,
        }
    }
}

/// Where the CMB lies in its BAR.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    bar: u8,
    offset: u64,
    size: u64,
}

/// Reads the place out of the registers, bounded by the BAR; the error says why there is no usable one.
fn place(loc: Cmbloc, sz: Cmbsz, bar_size: u64) -> Result<Place, String> {
    let unit = sz.unit().ok_or_else(|| format!("CMBSZ.SZU is reserved ({})", sz.szu()))?;
    if !matches!(loc.bir(), 0 | 2..=5) {
        return Err(format!("CMBLOC.BIR is reserved ({})", loc.bir()));
    }
    // Both are 20-bit counts of a unit of at most 64 GiB: no overflow.
    let offset = u64::from(loc.ofst()) * unit;
    let size = u64::from(sz.sz()) * unit;
    if size == 0 {
        return Err("CMBSZ.SZ is 0".to_owned());
    }
    if offset >= bar_size {
        return Err(format!("CMBLOC puts it at {offset:#x}, outside a BAR of {bar_size:#x} bytes"));
    }
    let size = size.min(bar_size - offset) & !(PAGE as u64 - 1);
    if size == 0 {
        return Err("less than 4 KiB of it is inside its BAR".to_owned());
    }
    Ok(Place { bar: loc.bir(), offset, size })
}

/// Enables the CMB and maps it. `queue_bytes` at its end are set aside for queues, if it supports those at all.
pub(crate) fn enable(
    function: &dyn PciFunction,
    cap: Cap,
    iova: &IovaAllocator,
    queue_bytes: u64,
) -> Result<CmbStatus, PciError> {
    let absent = |reason: String| Ok(CmbStatus::Absent(reason));
    if !cap.cmbs() {
        return absent(
            "the controller has none (CAP.CMBS is 0; CMBs of before NVMe 1.4 are not used)".to_owned(),
        );
    }
    // Until CRE is set CMBLOC and CMBSZ read as 0.
    function.write64(0, regs::CMBMSC, Cmbmsc::new().with_cre(true).into())?;
    let cmbloc = Cmbloc::from(function.read32(0, regs::CMBLOC)?);
    let cmbsz = Cmbsz::from(function.read32(0, regs::CMBSZ)?);
    let at = match place(cmbloc, cmbsz, function.bar(cmbloc.bir().min(5))?.size) {
        Ok(at) => at,
        Err(reason) => return absent(reason),
    };
    let cba = match iova.take(at.size, CBA_ALIGN) {
        Ok(cba) => cba,
        Err(e) => return absent(e.to_string()),
    };
    let give_up = |reason: String| {
        function.write64(0, regs::CMBMSC, Cmbmsc::new().into())?;
        if let Err(e) = iova.give(cba, at.size) {
            tracing::error!("{}: {e}", function.name());
        }
        absent(reason)
    };
    function.write64(0, regs::CMBMSC, cmbmsc(cba).into())?;
    if Cmbsts::from(function.read32(0, regs::CMBSTS)?).cbai() {
        return give_up(format!("the controller refuses base address {cba:#x} (CMBSTS.CBAI)"));
    }
    let queue_bytes = if cmbsz.sqs() && queue_bytes < at.size { queue_bytes } else { 0 };
    let data_bytes = at.size - queue_bytes;
    let Some(memory) = function.map_bar(at.bar, at.offset, data_bytes)? else {
        return give_up(format!("BAR {} cannot be mapped", at.bar));
    };
    let queues = if queue_bytes > 0 {
        let mapped = function.map_bar(at.bar, at.offset + data_bytes, queue_bytes)?;
        mapped.map(|m| (m, cba + data_bytes))
    } else {
        None
    };
    let data = CmbMemory {
        memory,
        bus_address: cba,
        is_device_memory: function.bars_are_device_memory(),
        read_data: cmbsz.rds(),
        write_data: cmbsz.wds(),
    };
    Ok(CmbStatus::Enabled(Arc::new(Cmb {
        data,
        queues,
        size: at.size,
        bar: at.bar,
        bar_offset: at.offset,
        cmbloc,
        cmbsz,
    })))
}

fn cmbmsc(cba: u64) -> Cmbmsc {
    Cmbmsc::new().with_cre(true).with_cmse(true).with_cba(cba >> 12)
}

/// Programs the same base address again after a reset (a function level reset clears CMBMSC, a controller reset keeps it).
/// Says whether the CMB is as it was.
pub(crate) fn reenable(function: &dyn PciFunction, cmb: &Cmb) -> Result<bool, PciError> {
    function.write64(0, regs::CMBMSC, cmbmsc(cmb.data.bus_address).into())?;
    let same = function.read32(0, regs::CMBLOC)? == u32::from(cmb.cmbloc)
        && function.read32(0, regs::CMBSZ)? == u32::from(cmb.cmbsz);
    Ok(same && !Cmbsts::from(function.read32(0, regs::CMBSTS)?).cbai())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sz(szu: u8, sz: u32) -> Cmbsz {
        Cmbsz::new().with_szu(szu).with_sz(sz)
    }

    #[test]
    fn the_offset_is_scaled_by_the_size_unit() {
        let loc = Cmbloc::new().with_bir(2).with_ofst(3);
        let at = place(loc, sz(1, 16), 4 << 20).unwrap();
        assert_eq!(at, Place { bar: 2, offset: 3 * (64 << 10), size: 1 << 20 });
    }

    #[test]
    fn the_size_is_bounded_by_the_bar() {
        let loc = Cmbloc::new().with_bir(4).with_ofst(1);
        assert_eq!(place(loc, sz(2, 9), 4 << 20).unwrap().size, 3 << 20);
        assert!(place(loc, sz(2, 9), 1 << 20).unwrap_err().contains("outside a BAR"));
        assert!(place(loc, sz(0, 1 << 19), u64::MAX).is_ok());
    }

    #[test]
    fn reserved_encodings_are_no_cmb() {
        assert!(place(Cmbloc::new().with_bir(1), sz(0, 1), 1 << 20).is_err());
        assert!(place(Cmbloc::new().with_bir(2), sz(7, 1), 1 << 20).is_err());
        assert!(place(Cmbloc::new().with_bir(2), sz(0, 0), 1 << 20).is_err());
        let all_ones = (Cmbloc::from(u32::MAX), Cmbsz::from(u32::MAX));
        assert!(place(all_ones.0, all_ones.1, 1 << 20).is_err());
    }
}
