//! `cmbfs revoke`: takes CMB memory back.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use cmbfs::Client;

use super::failure::Failure;
use super::place::text;
use super::units::{Bytes, Took};

/// Move a file, or everything, out of the CMB: readers carry on from the host cache
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  cmbfs revoke --socket /tmp/cmbfs.sock /photo.jpg\n  cmbfs revoke --socket /tmp/cmbfs.sock    everything"
)]
pub(crate) struct Revoke {
    /// The server's socket
    #[arg(long, value_name = "SOCK")]
    socket: PathBuf,
    /// The file; everything when left out
    path: Option<OsString>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Revoke {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let path = self.path.map(|p| text(p, "PATH")).transpose()?;
        let client = Client::connect(&self.socket)?;
        let report = match &path {
            Some(path) => client.revoke(path)?,
            None => client.revoke_all()?,
        };
        let mut out = io::stdout().lock();
        if self.json {
            serde_json::to_writer_pretty(&mut out, &report)?;
            return Ok(writeln!(out)?);
        }
        let pages = |n: u64| Bytes(n.saturating_mul(4096));
        writeln!(
            out,
            "{} windows moved in {}: {} of the CMB free, {} quarantined, {} write sections fenced",
            report.windows,
            Took(Duration::from_nanos(report.nanoseconds)),
            pages(report.freed_pages),
            pages(report.quarantined_pages),
            report.fenced
        )?;
        Ok(())
    }
}
