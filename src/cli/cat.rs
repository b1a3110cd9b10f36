//! `cmbfs cat`: a file to standard output.

use std::io::{self, Write};

use clap::Args;

use super::failure::Failure;
use super::place::{At, text};
use super::store::Store;

/// Write a file to standard output
#[derive(Args, Debug)]
#[command(
    override_usage = "cmbfs cat DEVICE PATH\n       cmbfs cat --socket SOCK PATH",
    after_help = "Examples:\n  cmbfs cat 'emu:disk.img?cmb=64M' /notes.txt\n  cmbfs cat --socket /tmp/s /log | tail"
)]
pub(crate) struct Cat {
    #[command(flatten)]
    at: At,
}

impl Cat {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let (place, [path]) = self.at.take(["PATH"])?;
        let path = text(path, "PATH")?;
        let mut store = Store::open(&place)?;
        let mut out = io::stdout().lock();
        store.read_file(&path, &mut |bytes| Ok(out.write_all(bytes)?))?;
        out.flush()?;
        store.close()
    }
}
