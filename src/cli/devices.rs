//! `cmbfs devices`: the NVMe functions of this machine.

use std::io::{self, Write};

use clap::Args;
use cmbfs::nvme_driver::vfio::{self, FunctionInfo};
use serde::Serialize;

use super::failure::Failure;
use super::units::Bytes;

/// List the NVMe functions of this machine: who drives them, and what can be used
///
/// The size of a CMB is shown where the kernel's nvme driver tells it; `cmbfs identify` asks a drive that is bound to vfio-pci.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  cmbfs devices\n  cmbfs devices --json")]
pub(crate) struct Devices {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row {
    address: String,
    /// What the other commands take, once the function is bound to vfio-pci.
    url: String,
    vendor_id: u16,
    device_id: u16,
    driver: Option<String>,
    iommu_group: Option<u32>,
    cmb_bytes: Option<u64>,
    /// The kernel's block devices on it.
    block_devices: Vec<String>,
}

impl From<FunctionInfo> for Row {
    fn from(info: FunctionInfo) -> Self {
        Self {
            address: info.address.to_string(),
            url: format!("pci:{}", info.address),
            vendor_id: info.vendor,
            device_id: info.device,
            driver: info.driver,
            iommu_group: info.iommu_group,
            cmb_bytes: info.cmb_bytes,
            block_devices: info.block_devices,
        }
    }
}

impl Devices {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let rows: Vec<Row> = vfio::list()?.into_iter().map(Row::from).collect();
        let mut out = io::BufWriter::new(io::stdout().lock());
        if self.json {
            serde_json::to_writer_pretty(&mut out, &rows)?;
            writeln!(out)?;
        } else {
            print(&rows, &mut out)?;
        }
        Ok(out.flush()?)
    }
}

fn print(rows: &[Row], out: &mut impl Write) -> io::Result<()> {
    if rows.is_empty() {
        return writeln!(out, "this machine has no NVMe function; an emulated one: emu:disk.img?size=1G");
    }
    writeln!(
        out,
        "{:<14} {:<10} {:<6} {:<11} {:<9} block devices",
        "address", "driver", "IOMMU", "id", "CMB"
    )?;
    for row in rows {
        writeln!(
            out,
            "{:<14} {:<10} {:<6} {:<11} {:<9} {}",
            row.address,
            row.driver.as_deref().unwrap_or("none"),
            row.iommu_group.map_or("none".to_owned(), |group| group.to_string()),
            format!("{:04x}:{:04x}", row.vendor_id, row.device_id),
            row.cmb_bytes.map_or("unknown".to_owned(), |bytes| Bytes(bytes).to_string()),
            if row.block_devices.is_empty() { "none".to_owned() } else { row.block_devices.join(" ") },
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unknown_is_said_so() {
        let row = Row {
            address: "0000:01:00.0".to_owned(),
            url: "pci:0000:01:00.0".to_owned(),
            vendor_id: 0x1b36,
            device_id: 0x10,
            driver: None,
            iommu_group: Some(7),
            cmb_bytes: Some(64 << 20),
            block_devices: vec![],
        };
        let mut out = Vec::new();
        print(&[row], &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let words: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(words, ["0000:01:00.0", "none", "7", "1b36:0010", "64", "MiB", "none"]);
        let mut out = Vec::new();
        print(&[], &mut out).unwrap();
        assert!(String::from_utf8(out).unwrap().contains("no NVMe function"));
    }
}
