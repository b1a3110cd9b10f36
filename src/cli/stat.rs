//! `cmbfs stat`: what is known of one file.

use std::io::{self, Write};

use clap::Args;

use super::failure::{Failure, one_line};
use super::place::{At, text};
use super::store::{Store, mode_text, time_text};
use super::units::{Bytes, Count};

/// Show what is known of a file or directory
#[derive(Args, Debug)]
#[command(
    override_usage = "cmbfs stat [--json] DEVICE PATH\n       cmbfs stat [--json] --socket SOCK PATH",
    after_help = "Example:\n  cmbfs stat --json 'emu:disk.img?cmb=64M' /notes.txt"
)]
pub(crate) struct Stat {
    #[command(flatten)]
    at: At,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Stat {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let (place, [path]) = self.at.take(["PATH"])?;
        let path = text(path, "PATH")?;
        let mut store = Store::open(&place)?;
        let entry = store.stat(&path)?;
        store.close()?;
        let mut out = io::stdout().lock();
        if self.json {
            serde_json::to_writer_pretty(&mut out, &entry)?;
            writeln!(out)?;
            return Ok(());
        }
        writeln!(out, "path      {}", one_line(&path))?;
        writeln!(out, "kind      {}", entry.kind)?;
        writeln!(out, "size      {} ({} bytes)", Bytes(entry.size), entry.size)?;
        writeln!(out, "on disk   {}", Bytes(entry.allocated))?;
        writeln!(out, "mode      {} ({:04o})", mode_text(&entry), entry.mode & 0o7777)?;
        writeln!(out, "owner     uid {}, gid {}", entry.uid, entry.gid)?;
        writeln!(out, "inode     {}, {}", entry.inode, Count(entry.links.into(), "link"))?;
        writeln!(out, "modified  {}", time_text(entry.modified_ns))?;
        writeln!(out, "changed   {}", time_text(entry.changed_ns))?;
        writeln!(out, "placement {} ({})", entry.placement, entry.placed_by)?;
        Ok(())
    }
}
