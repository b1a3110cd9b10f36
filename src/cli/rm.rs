//! `cmbfs rm`: removes a file or an empty directory.

use clap::Args;

use super::failure::Failure;
use super::place::{At, text};
use super::store::Store;

/// Remove a file or an empty directory
#[derive(Args, Debug)]
#[command(
    override_usage = "cmbfs rm DEVICE PATH\n       cmbfs rm --socket SOCK PATH",
    after_help = "Example:\n  cmbfs rm 'emu:disk.img?cmb=64M' /notes.txt"
)]
pub(crate) struct Rm {
    #[command(flatten)]
    at: At,
}

impl Rm {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let (place, [path]) = self.at.take(["PATH"])?;
        let path = text(path, "PATH")?;
        let mut store = Store::open(&place)?;
        store.remove(&path)?;
        store.close()
    }
}
