//! `cmbfs peers`: which devices reach which, and why.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use cmbfs::nvme_driver::pci::PciAddress;
use cmbfs::nvme_driver::topology::{Answer, Fence, Hop, Route, Topology, Verdict};
use cmbfs::shm_api::client::{DriveState, PeerInfo};
use cmbfs::{DeviceUrl, PeerList};
use serde::Serialize;

use super::failure::{Failure, one_line};
use super::place::text;
use super::server::{Server, Timeout};
use super::units::Bytes;

/// List a server's peers and what they reach, or explain the way between two devices
///
/// --explain says whether one device's DMA reaches another's memory, by which way, and what takes it back: of any two PCI functions,
/// drives or not. It reads sysfs and config space; run it as root to see the Access Control Services (ACS). Nothing is opened or changed.
#[derive(Args, Debug)]
#[command(
    override_usage = "cmbfs peers --socket SOCK [PATH]\n       cmbfs peers --explain DEVICE DEVICE",
    after_help = "Examples:\n  cmbfs peers --socket /tmp/cmbfs.sock\n  cmbfs peers --socket /tmp/cmbfs.sock /photo.jpg    # who reaches this file\n  cmbfs peers --explain pci:0000:01:00.0 pci:0000:02:00.0"
)]
pub(crate) struct Peers {
    /// The server's socket
    #[arg(long, value_name = "SOCK", required_unless_present = "explain", conflicts_with = "explain")]
    socket: Option<PathBuf>,
    #[command(flatten)]
    timeout: Timeout,
    /// Mappings of this file only
    #[arg(requires = "socket")]
    path: Option<OsString>,
    /// Two devices: the one whose DMA it is, and the one whose memory (CMB) is to be reached
    #[arg(long, num_args = 2, value_names = ["DEVICE", "DEVICE"])]
    explain: Vec<OsString>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    requester: String,
    owner: String,
    /// "yes", "try" or "no".
    answer: &'static str,
    /// "unmap" or "queue".
    fence: &'static str,
    reason: String,
    advice: Option<String>,
    requester_route: Vec<HopReport>,
    owner_route: Vec<HopReport>,
}

#[derive(Serialize)]
struct HopReport {
    address: String,
    port: String,
    acs: String,
    /// Whether peer requests are sent up to the IOMMU here.
    redirects: bool,
}

impl Peers {
    pub(crate) fn run(self) -> Result<(), Failure> {
        match self.socket {
            Some(socket) => list(&self.timeout.on(socket), self.path, self.json),
            None => explain(self.explain, self.json),
        }
    }
}

/// What a server's peers reach; of one file, if one is named.
fn list(server: &Server, path: Option<OsString>, json: bool) -> Result<(), Failure> {
    let client = server.connect()?;
    let list = match path {
        Some(path) => client.peers_of(client.stat(&text(path, "PATH")?)?.ino)?,
        None => client.peers()?,
    };
    let mut out = io::BufWriter::new(io::stdout().lock());
    if json {
        serde_json::to_writer_pretty(&mut out, &list)?;
        writeln!(out)?;
    } else {
        print_list(&list, &mut out)?;
    }
    Ok(out.flush()?)
}

/// Peers, with what they moved.
pub(crate) fn print_peers(peers: &[PeerInfo], out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "{:<5} {:>9} {:>11} {:>11}  name", "peer", "mappings", "by DMA", "by copying")?;
    for peer in peers {
        let (direct, bounced) = (Bytes(peer.direct_bytes).to_string(), Bytes(peer.bounced_bytes).to_string());
        let name = one_line(&peer.name);
        let about = peer.drive.map(about_drive).unwrap_or_default();
        writeln!(out, "{:<5} {:>9} {direct:>11} {bounced:>11}  {name}{about}", peer.peer, peer.mappings)?;
    }
    Ok(())
}

fn about_drive(drive: DriveState) -> String {
    let blocks = if drive.writable { "its blocks may be read and written" } else { "its blocks may be read" };
    let way = if drive.direct { "" } else { ", no way to the CMB" };
    let state = if drive.failed { ", failed" } else { "" };
    format!(" ({blocks}{way}{state})")
}

fn print_list(list: &PeerList, out: &mut impl Write) -> io::Result<()> {
    if list.peers.is_empty() {
        return writeln!(out, "no peers");
    }
    print_peers(&list.peers, out)?;
    if !list.mappings.is_empty() {
        writeln!(out)?;
        writeln!(
            out,
            "{:<5} {:>8} {:>14} {:>9} {:>16}  access",
            "peer", "inode", "offset", "length", "IOVA"
        )?;
    }
    for m in &list.mappings {
        let access = if m.writable { "read, write" } else { "read" };
        let (length, iova) = (Bytes(m.len).to_string(), format!("{:#x}", m.iova));
        writeln!(out, "{:<5} {:>8} {:>14} {length:>9} {iova:>16}  {access}", m.peer, m.ino, m.offset)?;
    }
    Ok(())
}

fn explain(devices: Vec<OsString>, json: bool) -> Result<(), Failure> {
    let [requester, owner] =
        <[OsString; 2]>::try_from(devices).map_err(|_| Failure::usage("--explain takes two devices"))?;
    let (requester, owner) = (text(requester, "DEVICE")?, text(owner, "DEVICE")?);
    let mut out = io::BufWriter::new(io::stdout().lock());
    let (Some(a), Some(b)) = (address(&requester)?, address(&owner)?) else {
        return Err(Failure::new(format!(
            "{requester} and {owner} are not both PCI functions: there is no fabric between them to explain"
        ))
        .hint("emulated and vfio-user drives reach each other's memory as a file descriptor; cmbfs copy --peer says whether it worked"));
    };
    let report = Report::new(Topology::default().between(a, b)?);
    if json {
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
    } else {
        report.print(&mut out)?;
    }
    Ok(out.flush()?)
}

/// The PCI address that a device's name stands for, if it does; with or without `pci:`.
fn address(name: &str) -> Result<Option<PciAddress>, Failure> {
    if let Ok(address) = name.parse() {
        return Ok(Some(address));
    }
    match name.parse::<DeviceUrl>().map_err(Failure::usage)? {
        DeviceUrl::Pci(address) => Ok(Some(address)),
        _ => Ok(None),
    }
}

fn hops(route: &Route) -> Vec<HopReport> {
    let report = |hop: &Hop| HopReport {
        address: hop.address.to_string(),
        port: hop.port.to_string(),
        acs: hop.acs.to_string(),
        redirects: hop.acs.redirects(),
    };
    route.hops.iter().map(report).collect()
}

impl Report {
    fn new(verdict: Verdict) -> Self {
        let name = |route: &Route| route.hops.last().map(|hop| hop.address.to_string()).unwrap_or_default();
        Self {
            requester: name(&verdict.requester),
            owner: name(&verdict.owner),
            answer: match verdict.answer {
                Answer::Yes => "yes",
                Answer::Try => "try",
                Answer::No => "no",
            },
            fence: match verdict.fence {
                Fence::Unmap => "unmap",
                Fence::Queue => "queue",
            },
            reason: verdict.reason,
            advice: verdict.advice,
            requester_route: hops(&verdict.requester),
            owner_route: hops(&verdict.owner),
        }
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let (requester, owner) = (&self.requester, &self.owner);
        let verdict = match self.answer {
            "yes" => format!("{requester} can reach the memory of {owner}"),
            "try" => {
                format!("{requester} may reach the memory of {owner}; it is tried before it is relied on")
            }
            _ => format!("{requester} is not let at the memory of {owner}: bytes go through host memory"),
        };
        writeln!(out, "{verdict}")?;
        writeln!(out, "why    {}", self.reason)?;
        if self.answer != "no" {
            let fence = match self.fence {
                "unmap" => "unmapping in the IOMMU",
                _ => "unmapping, and deleting the peer's queue or resetting it",
            };
            writeln!(out, "fence  {fence}")?;
        }
        if let Some(advice) = &self.advice {
            writeln!(out, "do     {advice}")?;
        }
        for (what, route) in [("from", &self.requester_route), ("to", &self.owner_route)] {
            writeln!(out)?;
            writeln!(out, "{what:<4} {:<14} {:<28} ACS", "function", "kind")?;
            for hop in route {
                writeln!(out, "     {:<14} {:<28} {}", hop.address, hop.port, hop.acs)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// Two drives behind two root ports: a machine with nothing in its config space but what kind of port it is.
    fn machine() -> (tempfile::TempDir, Topology) {
        let dir = tempfile::tempdir().unwrap();
        let by_address = dir.path().join("bus/pci/devices");
        fs::create_dir_all(&by_address).unwrap();
        for (port, drive) in [("0000:00:01.0", "0000:01:00.0"), ("0000:00:02.0", "0000:02:00.0")] {
            let folder = dir.path().join("devices/pci0000:00").join(port);
            for (folder, name, kind) in [(folder.clone(), port, 4u8), (folder.join(drive), drive, 0)] {
                fs::create_dir_all(&folder).unwrap();
                let mut config = vec![0; 256];
                (config[6], config[0x34], config[0x40], config[0x42]) = (0x10, 0x40, 0x10, 2 | kind << 4);
                fs::write(folder.join("config"), config).unwrap();
                symlink(folder, by_address.join(name)).unwrap();
            }
        }
        let topology = Topology::at(dir.path());
        (dir, topology)
    }

    #[test]
    fn the_verdict_its_reason_and_each_function_on_the_way_are_shown() {
        let (_dir, topology) = machine();
        let verdict = topology.between("01:00.0".parse().unwrap(), "02:00.0".parse().unwrap()).unwrap();
        let report = Report::new(verdict);
        assert_eq!((report.answer, report.fence), ("try", "queue"));
        let mut out = Vec::new();
        report.print(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        for part in
            ["0000:01:00.0 may reach", "root complex", "deleting", "0000:00:02.0", "root port", "no ACS"]
        {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }

    #[test]
    fn a_device_is_named_by_its_address_or_its_url() {
        let expected = "0000:01:00.0".parse().ok();
        assert_eq!(address("01:00.0").unwrap(), expected);
        assert_eq!(address("pci:0000:01:00.0").unwrap(), expected);
        assert_eq!(address("emu:ram").unwrap(), None);
        assert!(address("nonsense").is_err());
    }
}
