//! `cmbfs copy`: a file from one device to another.

use std::ffi::OsString;
use std::io::{self, Write};
use std::time::Instant;

use clap::Args;
use cmbfs::DeviceUrl;
use cmbfs::nvme_driver::topology::{Answer, Topology};
use cmbfs::p2p::counters::Reason;
use cmbfs::p2p::drive_copy::{DriveCopy, Obstacle};
use serde::Serialize;

use super::failure::{Failure, one_line};
use super::place::text;
use super::store::across::{self, Copied, Place, Route};
use super::store::say_where;
use super::units::{Bytes, Took};
use super::{device, progress};

/// Copy a file from a filesystem on one device to one on another
///
/// With --peer the source drive reads into its own memory (its CMB) and the destination drive writes from there: no byte passes
/// host memory. Where the devices, the kernel or the way between them do not allow that, the bytes go through host memory, and it is
/// said why. TO_PATH is replaced in one step once everything is durable; into a directory the file goes under its own name, as with cp.
/// Holes stay holes.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  cmbfs copy --peer 'emu:a.img?cmb=64M' /photo.jpg emu:b.img /photo.jpg\n  cmbfs copy --peer pci:0000:01:00.0 /data pci:0000:02:00.0 /data\n  cmbfs copy emu:a.img /photo.jpg vfio-user:run/cntrl /photo.jpg"
)]
pub(crate) struct Copy {
    /// From drive to drive, with no byte through host memory, where that is possible
    #[arg(long)]
    peer: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The device that has the file
    #[arg(value_name = "DEVICE")]
    from: OsString,
    /// The file
    #[arg(value_name = "PATH")]
    from_path: OsString,
    /// The device that gets it
    #[arg(value_name = "TO_DEVICE")]
    to: OsString,
    /// Where it goes there
    #[arg(value_name = "TO_PATH")]
    to_path: OsString,
}

#[derive(Serialize)]
struct Report {
    /// Where it went.
    to_path: String,
    size: u64,
    bytes: u64,
    nanoseconds: u64,
    #[serde(flatten)]
    route: Route,
}

impl Copy {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let (from, to) = (device::url(self.from)?, device::url(self.to)?);
        let (from_path, to_path) = (text(self.from_path, "PATH")?, text(self.to_path, "TO_PATH")?);
        if device::is_same(&from, &to) {
            return Err(Failure::usage(format!("{from} and {to} are the same device"))
                .hint("copy goes from one device to another; within one, use get and put"));
        }
        let peer = self.peer;
        let bar = progress::bar(&to_path, 0);
        let start = Instant::now();
        let result = across::copy(
            Place { device: &from, path: &from_path },
            Place { device: &to, path: &to_path },
            |source, sink, scratch| match obstacle(peer, &to, &from) {
                None => DriveCopy::direct(source, sink, scratch),
                Some(obstacle) => DriveCopy::bounce(obstacle),
            },
            &mut |size| bar.set_length(size),
            &mut |bytes| bar.inc(bytes),
        );
        bar.finish_and_clear();
        let copied = result.map_err(|f| f.doing(format!("cannot copy {from_path} to {to_path}")))?;
        let took = start.elapsed();
        let mut out = io::stdout().lock();
        if self.json {
            let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
            let Copied { path: to_path, size, bytes, route } = copied;
            serde_json::to_writer_pretty(&mut out, &Report { to_path, size, bytes, nanoseconds, route })?;
            return Ok(writeln!(out)?);
        }
        say_where(from_path, to_path, &copied.path)?;
        writeln!(out, "{} in {}", Bytes(copied.size), Took(took))?;
        Ok(print(&copied, &from.to_string(), &to.to_string(), &mut out)?)
    }
}

/// What is known to be in the way before anything is tried.
fn obstacle(peer: bool, requester: &DeviceUrl, owner: &DeviceUrl) -> Option<Obstacle> {
    if !peer {
        return Some(Obstacle::new(Reason::Asked, "--peer was not given"));
    }
    let (DeviceUrl::Pci(requester), DeviceUrl::Pci(owner)) = (requester, owner) else { return None };
    match Topology::default().between(*requester, *owner) {
        Ok(verdict) if verdict.answer == Answer::No => Some(Obstacle::new(Reason::Topology, verdict.reason)),
        Ok(_) => None,
        Err(e) => Some(Obstacle::new(Reason::Topology, e.to_string())),
    }
}

fn print(copied: &Copied, from: &str, to: &str, out: &mut impl Write) -> io::Result<()> {
    let route = &copied.route;
    if route.peer_bytes > 0 {
        let bytes = Bytes(route.peer_bytes);
        writeln!(
            out,
            "peer to peer: {bytes}: {} read into its CMB, {} wrote from there",
            one_line(from),
            one_line(to)
        )?;
    }
    if let (Some(reason), Some(why)) = (&route.reason, &route.why) {
        let bytes = Bytes(route.bounce_bytes);
        writeln!(out, "through host memory: {bytes} ({reason}: {})", one_line(why))?;
    }
    if let Some(c) = &route.counted {
        writeln!(
            out,
            "counted by the drives: {} into the CMB, {} out of it, {} through host memory",
            Bytes(c.source_to_cmb),
            Bytes(c.cmb_to_destination),
            Bytes(c.through_host)
        )?;
    }
    Ok(())
}
