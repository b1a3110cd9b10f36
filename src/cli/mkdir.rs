//! `cmbfs mkdir`: makes a directory.

use clap::Args;

use super::failure::Failure;
use super::place::{At, text};
use super::store::Store;

/// Make a directory
#[derive(Args, Debug)]
#[command(
    override_usage = "cmbfs mkdir DEVICE PATH\n       cmbfs mkdir --socket SOCK PATH",
    after_help = "Example:\n  cmbfs mkdir 'emu:disk.img?cmb=64M' /photos"
)]
pub(crate) struct Mkdir {
    #[command(flatten)]
    at: At,
}

impl Mkdir {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let (place, [path]) = self.at.take(["PATH"])?;
        let path = text(path, "PATH")?;
        let mut store = Store::open(&place)?;
        store.mkdir(&path)?;
        store.close()
    }
}
