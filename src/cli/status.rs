//! `cmbfs status`: what a server has done, by which path and why.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use cmbfs::shm_api::client::PeerInfo;
use cmbfs::{DeviceState, ServerInfo, Status as Counters};
use serde::Serialize;

use super::failure::{Failure, one_line};
use super::peers;
use super::server::Timeout;
use super::units::{Bytes, Count};

/// Show what a server holds and has done: clients, windows, bytes by path and the reasons
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  cmbfs status --json --socket /tmp/cmbfs.sock")]
pub(crate) struct Status {
    /// The server's socket
    #[arg(long, value_name = "SOCK")]
    socket: PathBuf,
    #[command(flatten)]
    timeout: Timeout,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    server: ServerInfo,
    status: Counters,
    peers: Vec<PeerInfo>,
}

impl Status {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let client = self.timeout.on(self.socket).connect()?;
        let report =
            Report { server: client.info()?, status: client.status()?, peers: client.peers()?.peers };
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
    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let (server, s) = (&self.server, &self.status);
        writeln!(out, "device       {}", one_line(&server.device))?;
        if let Some(why) = &s.device_trouble {
            let what = match s.device_state {
                DeviceState::Failed => {
                    "failed: what is not in memory cannot be read, and nothing can be committed"
                }
                _ => "read-only: nothing can be committed",
            };
            writeln!(out, "             {what}: {}", one_line(why))?;
        }
        writeln!(
            out,
            "server       process {}, uid {}, grace {} ms",
            server.pid, server.uid, server.grace_ms
        )?;
        writeln!(out, "space        {} free of {}", Bytes(server.free_bytes), Bytes(server.bytes))?;
        // This very connection is one of them.
        writeln!(
            out,
            "clients      {} and this command, {}",
            s.clients.saturating_sub(1),
            Count(s.open_files, "open file")
        )?;
        let (used, quarantined) = (Bytes(s.cmb_used), Bytes(s.cmb_quarantined));
        writeln!(out, "CMB          {used} used of {}, {quarantined} quarantined", Bytes(s.cmb_bytes))?;
        let (used, spare) = (Bytes(s.host_bytes), Bytes(s.spare_bytes));
        writeln!(
            out,
            "host cache   {used} used of {}, {spare} of it kept for windows in the CMB",
            Bytes(s.host_limit)
        )?;
        writeln!(out, "windows      {} in the CMB, {} in the host cache", s.cmb_windows, s.host_windows)?;
        if s.memory_bytes > 0 {
            let windows = Count(s.memory_windows, "window");
            writeln!(
                out,
                "memory       {} of devices (PMR, peers) to open, {windows} there",
                Bytes(s.memory_bytes)
            )?;
        }
        writeln!(out, "revocations  {}, {} fenced", s.revocations, Count(s.fenced, "write section"))?;
        let auto = match s.auto_reads_cmb {
            true => "the CMB",
            false if s.cmb_bytes == 0 => "the host cache: there is no CMB",
            false => "the host cache: the CMB is slow for them",
        };
        writeln!(out, "placement    {}; auto has readers in {auto}", s.placement)?;
        writeln!(out, "commits      {}", s.commits)?;
        writeln!(out, "lost         {} died, {} expelled", Count(s.died, "client"), s.expelled)?;
        if s.resets > 0 {
            let lost = Bytes(s.lost_bytes);
            writeln!(out, "resets       {} of the device; {lost} not committed went with its CMB", s.resets)?;
        }
        writeln!(out, "generation   {}", s.device_generation)?;
        writeln!(out)?;
        writeln!(out, "{:<10} {:>8} {:>8} {:>8}", "client", "process", "uid", "windows")?;
        for c in &s.people {
            writeln!(out, "{:<10} {:>8} {:>8} {:>8}", c.client, c.pid, c.uid, c.windows)?;
        }
        if !self.peers.is_empty() {
            writeln!(out)?;
            peers::print_peers(&self.peers, out)?;
        }
        if !s.paths.is_empty() {
            writeln!(out)?;
            writeln!(out, "{:<10} {:>8} {:>11}  reason", "path", "count", "bytes")?;
            for line in &s.paths {
                let (path, reason) = (one_line(&line.path), one_line(&line.reason));
                writeln!(out, "{path:<10} {:>8} {:>11}  {reason}", line.count, Bytes(line.bytes))?;
            }
        }
        Ok(())
    }
}
