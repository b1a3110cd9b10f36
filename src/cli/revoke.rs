//! `cmbfs revoke`: takes CMB memory back.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::failure::Failure;
use super::place::text;
use super::serve::size;
use super::server::Timeout;
use super::units::{Bytes, Count, Took};

/// Move a file, part of one, a client's windows or everything out of the CMB: readers carry on from the host cache
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  cmbfs revoke --socket /tmp/cmbfs.sock /photo.jpg\n  cmbfs revoke --socket /tmp/cmbfs.sock /photo.jpg --offset 1M --len 64K\n  cmbfs revoke --socket /tmp/cmbfs.sock --client 3    # its number in the status\n  cmbfs revoke --socket /tmp/cmbfs.sock --peer 1      # its number in `cmbfs peers --socket`\n  cmbfs revoke --socket /tmp/cmbfs.sock               # everything"
)]
pub(crate) struct Revoke {
    /// The server's socket
    #[arg(long, value_name = "SOCK")]
    socket: PathBuf,
    #[command(flatten)]
    timeout: Timeout,
    /// The file; everything when left out
    path: Option<OsString>,
    /// Only the windows from this byte of the file on
    #[arg(long, value_name = "BYTES", requires = "path", value_parser = size)]
    offset: Option<u64>,
    /// Only the windows over so many bytes
    #[arg(long, value_name = "BYTES", requires = "path", value_parser = size)]
    len: Option<u64>,
    /// Everything that this client holds; it maps nothing more
    // A part of a file is named beside them: clap asks for no PATH where one would be in conflict.
    #[arg(long, value_name = "NUMBER", conflicts_with_all = ["path", "offset", "len", "peer"])]
    client: Option<u32>,
    /// Every mapping of this peer; windows stay where they are
    #[arg(long, value_name = "NUMBER", conflicts_with_all = ["path", "offset", "len"])]
    peer: Option<u32>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Revoke {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let path = self.path.map(|p| text(p, "PATH")).transpose()?;
        let client = self.timeout.on(self.socket).connect()?;
        let report = match (&path, self.client, self.peer) {
            (Some(path), ..) if self.offset.is_some() || self.len.is_some() => {
                client.revoke_range(path, self.offset.unwrap_or(0), self.len.unwrap_or(u64::MAX))?
            }
            (Some(path), ..) => client.revoke(path)?,
            (None, Some(number), _) => client.revoke_client(number)?,
            (None, None, Some(number)) => client.revoke_peer(number)?,
            (None, None, None) => client.revoke_all()?,
        };
        let mut out = io::stdout().lock();
        if self.json {
            serde_json::to_writer_pretty(&mut out, &report)?;
            return Ok(writeln!(out)?);
        }
        let pages = |n: u64| Bytes(n.saturating_mul(4096));
        writeln!(
            out,
            "{} moved in {}: {} of the CMB freed, {} quarantined, {} fenced",
            Count(report.windows, "window"),
            Took(Duration::from_nanos(report.nanoseconds)),
            pages(report.freed_pages),
            pages(report.quarantined_pages),
            Count(report.fenced, "write section")
        )?;
        Ok(())
    }
}
