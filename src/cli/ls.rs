//! `cmbfs ls`: what is in a directory.

use std::io::{self, Write};

use clap::Args;

use super::failure::{Failure, one_line};
use super::place::{At, text};
use super::store::{Entry, Store, mode_text, time_text};
use super::units::Bytes;

/// List a directory
#[derive(Args, Debug)]
#[command(
    override_usage = "cmbfs ls [-l] [--json] DEVICE PATH\n       cmbfs ls [-l] [--json] --socket SOCK PATH",
    after_help = "Examples:\n  cmbfs ls 'emu:disk.img?cmb=64M' /\n  cmbfs ls -l --socket /tmp/s /photos"
)]
pub(crate) struct Ls {
    #[command(flatten)]
    at: At,
    /// Show mode, owner, size and time of change
    #[arg(short, long)]
    long: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Ls {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let (place, [path]) = self.at.take(["PATH"])?;
        let path = text(path, "PATH")?;
        let mut store = Store::open(&place)?;
        let entry = store.stat(&path)?;
        let mut entries = if entry.is_directory() { store.list(&path)? } else { vec![entry] };
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        store.close()?;
        let mut out = io::BufWriter::new(io::stdout().lock());
        if self.json {
            serde_json::to_writer_pretty(&mut out, &entries)?;
            writeln!(out)?;
        } else {
            for entry in &entries {
                line(&mut out, entry, self.long)?;
            }
        }
        Ok(out.flush()?)
    }
}

fn line(out: &mut impl Write, entry: &Entry, long: bool) -> io::Result<()> {
    let mark = if entry.is_directory() { "/" } else { "" };
    let name = one_line(&entry.name);
    if !long {
        return writeln!(out, "{name}{mark}");
    }
    let (mode, time) = (mode_text(entry), time_text(entry.modified_ns));
    let owner = format!("{}:{}", entry.uid, entry.gid);
    writeln!(out, "{mode} {owner:>11} {:>10} {time} {name}{mark}", Bytes(entry.size))
}
