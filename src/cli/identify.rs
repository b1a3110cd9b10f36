//! `cmbfs identify`: what a controller says of itself.

use std::ffi::OsString;
use std::io::{self, Write};

use clap::Args;
use cmbfs::nvme_driver::cmb::CmbStatus;
use cmbfs::nvme_driver::controller::Controller;
use cmbfs::nvme_driver::disk::Geometry;
use serde::Serialize;

use super::device;
use super::failure::Failure;
use super::units::Bytes;

/// Show what a controller says of itself, its namespaces and its CMB
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  cmbfs identify 'emu:ram?cmb=64M&size=1G'\n  cmbfs identify --json pci:0000:01:00.0"
)]
pub(crate) struct Identify {
    /// The device's URL
    device: OsString,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    device: String,
    bytes: u64,
    block_size: u32,
    volatile_write_cache: bool,
    can_deallocate: bool,
    max_transfer: usize,
    /// None where the device is no NVMe controller (`file:`).
    controller: Option<ControllerReport>,
    cmb: Option<CmbReport>,
    /// Why there is no CMB.
    no_cmb: Option<String>,
}

#[derive(Serialize)]
struct ControllerReport {
    model: String,
    serial: String,
    firmware: String,
    subnqn: String,
    nvme_version: String,
    vendor_id: u16,
    io_queues: u16,
    max_queue_entries: u32,
    sgls: bool,
    namespaces: Vec<NamespaceReport>,
}

#[derive(Serialize)]
struct NamespaceReport {
    nsid: u32,
    bytes: u64,
    blocks: u64,
    block_size: u32,
    unusable: Option<String>,
}

#[derive(Serialize)]
struct CmbReport {
    bytes: u64,
    bar: u8,
    bar_offset: u64,
    bus_address: u64,
    read_data: bool,
    write_data: bool,
    submission_queues: bool,
    completion_queues: bool,
    lists: bool,
    uncached: bool,
}

impl Identify {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let device = device::open_existing(&device::url(self.device)?)?;
        let disk = device.disk()?;
        let mut report = Report::new(&device.url().to_string(), disk.geometry());
        if let Some(controller) = device.controller() {
            report.add(controller);
        } else {
            report.no_cmb = Some("not an NVMe controller".to_owned());
        }
        let mut out = io::BufWriter::new(io::stdout().lock());
        if self.json {
            serde_json::to_writer_pretty(&mut out, &report)?;
            writeln!(out)?;
        } else {
            report.print(&mut out)?;
        }
        Ok(out.flush()?)
    }
}

impl Report {
    fn new(device: &str, geometry: &Geometry) -> Self {
        Self {
            device: device.to_owned(),
            bytes: geometry.bytes(),
            block_size: geometry.block_size,
            volatile_write_cache: geometry.volatile_cache,
            can_deallocate: geometry.can_deallocate,
            max_transfer: geometry.max_transfer,
            controller: None,
            cmb: None,
            no_cmb: None,
        }
    }

    fn add(&mut self, controller: &Controller) {
        let identity = controller.identity();
        let namespaces = identity.namespaces.iter().map(|n| NamespaceReport {
            nsid: n.nsid,
            bytes: n.bytes(),
            blocks: n.blocks,
            block_size: n.block_size,
            unusable: n.unusable.clone(),
        });
        self.controller = Some(ControllerReport {
            model: identity.model(),
            serial: identity.serial(),
            firmware: identity.firmware(),
            subnqn: identity.subnqn(),
            nvme_version: format!(
                "{}.{}.{}",
                identity.version.major(),
                identity.version.minor(),
                identity.version.tertiary()
            ),
            vendor_id: identity.controller.vid,
            io_queues: identity.io_queues,
            max_queue_entries: u32::from(identity.cap.mqes()) + 1,
            sgls: identity.controller.sgls & 3 != 0,
            namespaces: namespaces.collect(),
        });
        match controller.cmb() {
            CmbStatus::Absent(reason) => self.no_cmb = Some(reason.clone()),
            CmbStatus::Enabled(cmb) => {
                self.cmb = Some(CmbReport {
                    bytes: cmb.size,
                    bar: cmb.bar,
                    bar_offset: cmb.bar_offset,
                    bus_address: cmb.data.bus_address,
                    read_data: cmb.data.read_data,
                    write_data: cmb.data.write_data,
                    submission_queues: cmb.cmbsz.sqs(),
                    completion_queues: cmb.cmbsz.cqs(),
                    lists: cmb.cmbsz.lists(),
                    uncached: cmb.data.is_device_memory,
                });
            }
        }
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let yes = |b: bool| if b { "yes" } else { "no" };
        writeln!(out, "device        {}", self.device)?;
        if let Some(c) = &self.controller {
            writeln!(out, "model         {}", c.model)?;
            writeln!(
                out,
                "serial        {}, firmware {}, vendor {:#06x}",
                c.serial, c.firmware, c.vendor_id
            )?;
            writeln!(out, "NQN           {}", c.subnqn)?;
            writeln!(out, "NVMe          {}", c.nvme_version)?;
            writeln!(
                out,
                "queues        {} I/O queue pairs of up to {} entries",
                c.io_queues, c.max_queue_entries
            )?;
            writeln!(out, "SGLs          {}", yes(c.sgls))?;
        }
        writeln!(out, "transfer      up to {} a command", Bytes(self.max_transfer as u64))?;
        writeln!(
            out,
            "write cache   {}",
            if self.volatile_write_cache { "volatile: a flush makes writes durable" } else { "none" }
        )?;
        writeln!(out, "deallocate    {}", yes(self.can_deallocate))?;
        match &self.controller {
            None => writeln!(
                out,
                "capacity      {} in blocks of {}",
                Bytes(self.bytes),
                Bytes(self.block_size.into())
            )?,
            Some(c) => {
                for n in &c.namespaces {
                    write!(
                        out,
                        "namespace {:<3} {} in blocks of {}",
                        n.nsid,
                        Bytes(n.bytes),
                        Bytes(n.block_size.into())
                    )?;
                    match &n.unusable {
                        None => writeln!(out)?,
                        Some(why) => writeln!(out, "; not usable: {why}")?,
                    }
                }
            }
        }
        let Some(cmb) = &self.cmb else {
            let why = self.no_cmb.as_deref().unwrap_or("unknown reason");
            return writeln!(out, "CMB           none: {why}");
        };
        let memory = if cmb.uncached { "uncached" } else { "ordinary memory" };
        writeln!(
            out,
            "CMB           {} at {:#x} of BAR{}, bus address {:#x}, {memory}",
            Bytes(cmb.bytes),
            cmb.bar_offset,
            cmb.bar,
            cmb.bus_address
        )?;
        let uses = [
            (cmb.read_data, "read data"),
            (cmb.write_data, "write data"),
            (cmb.submission_queues, "submission queues"),
            (cmb.completion_queues, "completion queues"),
            (cmb.lists, "lists"),
        ];
        let uses: Vec<_> = uses.iter().filter(|u| u.0).map(|u| u.1).collect();
        writeln!(out, "CMB holds     {}", uses.join(", "))
    }
}
