//! `cmbfs check`: verifies a filesystem, and repairs it where that is asked for.

use std::ffi::OsString;
use std::io::{self, Write};

use clap::Args;
use cmbfs::extent_fs::{self, BLOCK, CheckOptions, Finding, FsError, Outcome, Report};
use cmbfs::{Device, DeviceUrl, Filesystem, MountOptions};
use serde_json::json;

use super::device;
use super::failure::Failure;
use super::mkfs::uuid_text;
use super::store::leftover::{self, Unfinished};
use super::units::{Bytes, Count};

/// Verify a filesystem: superblocks, log, extents, directories
///
/// Exits with status 3 when something is wrong and stays wrong.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  cmbfs check 'emu:disk.img?cmb=64M'\n  cmbfs check --repair 'emu:disk.img?cmb=64M'"
)]
pub(crate) struct Check {
    /// The device's URL
    device: OsString,
    /// Repair what can be repaired without losing anything that is readable, and remove what killed puts and copies left unfinished
    #[arg(long)]
    repair: bool,
    /// With --repair: also what loses files whose metadata is unreadable
    #[arg(long, requires = "repair")]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Check {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let url = device::url(self.device)?;
        let options = CheckOptions { repair: self.repair, force: self.force };
        let device = device::open_existing(&url)?;
        let report = check_device(&device, &options)?;
        // Names mean something only in a sound filesystem.
        let unfinished =
            if report.is_clean() { unfinished(&device, self.repair)? } else { Unfinished::default() };
        let mut out = io::BufWriter::new(io::stdout().lock());
        if self.json {
            serde_json::to_writer_pretty(&mut out, &as_json(&report, unfinished))?;
            writeln!(out)?;
        } else {
            print(&report, &mut out)?;
            if unfinished.files > 0 {
                let fate = if self.repair { "removed" } else { "serve and check --repair remove them" };
                writeln!(out, "left over    {unfinished}: {fate}")?;
            }
        }
        out.flush()?;
        if report.is_clean() {
            return Ok(());
        }
        let left: Vec<_> = report.findings.iter().filter(|f| f.outcome != Outcome::Repaired).collect();
        let costs = left.iter().all(|f| f.outcome == Outcome::NeedsForce);
        let hint = match (self.repair, self.force) {
            (false, _) if !costs => "check --repair repairs what can be repaired without loss",
            (_, false) => "check --repair --force repairs the rest, and gives up what cannot be read",
            (_, true) => "copy out what can be read, and make a new filesystem",
        };
        Err(Failure::damaged(format!("{url}: {}", counted(left.len(), "fault"))).hint(hint))
    }
}

/// Checks the filesystem on a device that nobody has open.
pub(crate) fn check(url: &DeviceUrl, options: &CheckOptions) -> Result<Report, Failure> {
    check_device(&device::open_existing(url)?, options)
}

/// What killed commands left on a sound filesystem; `remove` removes it.
fn unfinished(device: &Device, remove: bool) -> Result<Unfinished, Failure> {
    let options = MountOptions { read_only: !remove, ..MountOptions::default() };
    let mut fs = Filesystem::mount(device.disk()?, options)?;
    let found = leftover::unfinished(&mut fs, remove)?;
    fs.unmount()?;
    Ok(found)
}

fn check_device(device: &Device, options: &CheckOptions) -> Result<Report, Failure> {
    let url = device.url();
    extent_fs::check(&mut device.disk()?, options).map_err(|e| match e {
        // Nothing to begin with: its advice, to check and to repair, would go round in circles here.
        FsError::Damaged { what } => Failure::damaged(format!("{url}: {what}"))
            .hint("this is beyond repair; keep a copy of the device before you make a new filesystem"),
        e => e.into(),
    })
}

/// A number of things.
fn counted(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn outcome(finding: &Finding) -> &'static str {
    match finding.outcome {
        Outcome::Found => "found",
        Outcome::Repaired => "repaired",
        Outcome::NeedsForce => "needs --force",
    }
}

fn print(report: &Report, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "filesystem   {}", uuid_text(report.uuid))?;
    writeln!(
        out,
        "log          checkpoint {}, {} after it",
        report.generation,
        Count(report.records, "record")
    )?;
    writeln!(
        out,
        "files        {} in {} (the root is one), {}",
        report.files,
        match report.directories {
            1 => "1 directory".to_owned(),
            n => format!("{n} directories"),
        },
        Count(report.extents, "extent")
    )?;
    if report.orphans > 0 {
        writeln!(out, "nameless     {} that go at the next mount", report.orphans)?;
    }
    let used = Bytes(report.used_blocks.saturating_mul(BLOCK));
    match report.free_blocks {
        Some(free) => writeln!(out, "space        {used} used, {} free", Bytes(free.saturating_mul(BLOCK)))?,
        None => writeln!(out, "space        {used} used")?,
    }
    for finding in &report.findings {
        writeln!(out, "fault        {} ({})", finding.fault, outcome(finding))?;
    }
    match report.findings.len() {
        0 => writeln!(out, "sound")?,
        n if report.is_clean() => writeln!(out, "sound       {} repaired", counted(n, "fault"))?,
        _ => {}
    }
    Ok(())
}

fn as_json(report: &Report, unfinished: Unfinished) -> serde_json::Value {
    let findings: Vec<_> = report
        .findings
        .iter()
        .map(|f| json!({ "fault": f.fault.to_string(), "outcome": outcome(f) }))
        .collect();
    json!({
        "uuid": uuid_text(report.uuid),
        "checkpoint": report.generation,
        "records": report.records,
        "files": report.files,
        "directories": report.directories,
        "nameless": report.orphans,
        "extents": report.extents,
        "used_bytes": report.used_blocks.saturating_mul(BLOCK),
        "free_bytes": report.free_blocks.map(|b| b.saturating_mul(BLOCK)),
        "unfinished": unfinished.files,
        "clean": report.is_clean(),
        "findings": findings,
    })
}
