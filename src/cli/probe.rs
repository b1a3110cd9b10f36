//! `cmbfs probe`: what the processor, the drive and another drive get out of a CMB.

use std::ffi::OsString;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use cmbfs::nvme_driver::clock::{Clock, SystemClock};
use cmbfs::nvme_driver::disk::{CmbMemory, DiskError};
use cmbfs::nvme_driver::pci::DmaAccess;
use cmbfs::p2p::layout::Home;
use cmbfs::p2p::probe::{self, Access, Probe as Measured};
use serde::Serialize;

use super::device::{self, AnyDisk};
use super::failure::Failure;
use super::units::{Bytes, Took};

/// Bytes of one transfer by DMA, and how often it is timed: the fastest counts.
const TRANSFER: usize = 1 << 20;
const ROUNDS: usize = 5;

/// Measure a drive's CMB: the processor's access to it and to host memory, and the drives' DMA
///
/// Reads from the drives, and overwrites their CMB, which nobody else may use meanwhile; nothing on the drives changes. Ends with where
/// `auto` puts windows for readers on the processor. A server measures the same when it starts.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  cmbfs probe 'emu:disk.img?cmb=64M'\n  cmbfs probe pci:0000:01:00.0 --peer pci:0000:02:00.0"
)]
pub(crate) struct Probe {
    /// The device whose CMB it is
    device: OsString,
    /// Another drive, which is to read into that CMB
    #[arg(long, value_name = "DEVICE")]
    peer: Option<OsString>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    device: String,
    access: Vec<Row>,
    dma: Vec<Dma>,
    /// Where `auto` puts windows for readers on the processor: "CMB" or "host cache".
    auto: &'static str,
    reason: String,
}

#[derive(Serialize)]
struct Row {
    memory: &'static str,
    bytes: usize,
    read_ns: u64,
    write_ns: u64,
    read_bytes_per_second: u64,
    write_bytes_per_second: u64,
}

#[derive(Serialize)]
struct Dma {
    what: String,
    bytes_per_second: Option<u64>,
    /// Why it could not be measured.
    why_not: Option<String>,
}

impl Probe {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let url = device::url(self.device)?;
        let peer_url = self.peer.map(device::url).transpose()?;
        if let Some(peer) = peer_url.as_ref().filter(|peer| device::is_same(&url, peer)) {
            return Err(Failure::usage(format!("{url} and {peer} are the same device"))
                .hint("--peer is another drive, which is to read into this one's CMB"));
        }
        let device = device::open_existing(&url)?;
        let mut disk = device.disk()?;
        let Some(cmb) = disk.cmb().cloned() else {
            return Err(Failure::new(format!("{url} has no CMB to measure"))
                .hint("cmbfs identify says why; windows of such a drive live in the host cache"));
        };
        let clock = SystemClock::new();
        let measured = probe::measure(&cmb, &clock)?;
        let mut dma = vec![
            into_cmb(&mut disk, &cmb, &clock, "the drive into its CMB"),
            into_host(&mut disk, &clock, "the drive into host memory"),
        ];
        if let Some(peer_url) = peer_url {
            let other = device::open_existing(&peer_url)?;
            let mut other = other.disk()?;
            dma.push(into_peer(&mut other, &cmb, &clock, &format!("{peer_url} into that CMB")));
            dma.push(into_host(&mut other, &clock, &format!("{peer_url} into host memory")));
        }
        let report = Report::new(url.to_string(), &measured, dma);
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

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// How much can be moved between a drive and a CMB at a time.
fn len(disk: &AnyDisk, cmb: &CmbMemory) -> usize {
    let most = TRANSFER.min(cmb.memory.len());
    usize::try_from(disk.geometry().bytes()).map_or(most, |bytes| most.min(bytes)) & !4095
}

fn into_cmb(disk: &mut AnyDisk, cmb: &CmbMemory, clock: &dyn Clock, what: &str) -> Dma {
    let bytes = len(disk, cmb);
    timed(what, bytes, clock, || disk.read_to_cmb(0, 0, bytes))
}

fn into_host(disk: &mut AnyDisk, clock: &dyn Clock, what: &str) -> Dma {
    let bytes = usize::try_from(disk.geometry().bytes()).map_or(TRANSFER, |b| TRANSFER.min(b)) & !4095;
    let mut buffer = vec![0; bytes];
    timed(what, bytes, clock, || disk.read(0, &mut buffer))
}

fn into_peer(disk: &mut AnyDisk, cmb: &CmbMemory, clock: &dyn Clock, what: &str) -> Dma {
    let bytes = len(disk, cmb);
    match disk.map_peer(&Arc::clone(&cmb.memory), 0, bytes, DmaAccess::Write) {
        Ok(memory) => timed(what, bytes, clock, || disk.read_to_peer(0, &memory, 0, bytes)),
        Err(e) => Dma { what: what.to_owned(), bytes_per_second: None, why_not: Some(e.to_string()) },
    }
}

fn timed(
    what: &str,
    bytes: usize,
    clock: &dyn Clock,
    mut transfer: impl FnMut() -> Result<(), DiskError>,
) -> Dma {
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        let start = clock.now();
        if let Err(e) = transfer() {
            return Dma { what: what.to_owned(), bytes_per_second: None, why_not: Some(e.to_string()) };
        }
        best = best.min(clock.now().saturating_sub(start));
    }
    Dma { what: what.to_owned(), bytes_per_second: Some(probe::rate(bytes, best)), why_not: None }
}

impl Report {
    fn new(device: String, measured: &Measured, dma: Vec<Dma>) -> Self {
        let row = |memory, access: &Access| Row {
            memory,
            bytes: access.bytes,
            read_ns: nanoseconds(access.read),
            write_ns: nanoseconds(access.write),
            read_bytes_per_second: access.read_rate(),
            write_bytes_per_second: access.write_rate(),
        };
        let cmb = measured.cmb.iter().map(|a| row("CMB", a));
        let host = measured.host.iter().map(|a| row("host memory", a));
        let advice = measured.readers_home();
        let auto = if advice.home == Home::Cmb { "CMB" } else { "host cache" };
        Self { device, access: cmb.chain(host).collect(), dma, auto, reason: advice.reason }
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let time = |ns| Took(Duration::from_nanos(ns)).to_string();
        let rate = |bytes| format!("{}/s", Bytes(bytes));
        writeln!(out, "{}\n", self.device)?;
        writeln!(
            out,
            "{:<12} {:>8} {:>10} {:>14} {:>10} {:>14}",
            "memory", "access", "read", "", "write", ""
        )?;
        for row in &self.access {
            writeln!(
                out,
                "{:<12} {:>8} {:>10} {:>14} {:>10} {:>14}",
                row.memory,
                Bytes(row.bytes as u64).to_string(),
                time(row.read_ns),
                rate(row.read_bytes_per_second),
                time(row.write_ns),
                rate(row.write_bytes_per_second)
            )?;
        }
        writeln!(out)?;
        for dma in &self.dma {
            let why = || format!("not possible: {}", dma.why_not.as_deref().unwrap_or("unknown"));
            writeln!(out, "{:<40} {:>14}", dma.what, dma.bytes_per_second.map_or_else(why, rate))?;
        }
        writeln!(out, "\nauto: {} ({})", self.auto, self.reason)
    }
}
