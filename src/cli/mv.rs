//! `cmbfs mv`: renames, replacing a file that is there.

use clap::Args;

use super::failure::Failure;
use super::place::{At, text};
use super::store::Store;

/// Rename a file or directory; an existing file at TO is replaced in one step
#[derive(Args, Debug)]
#[command(
    override_usage = "cmbfs mv DEVICE FROM TO\n       cmbfs mv --socket SOCK FROM TO",
    after_help = "Example:\n  cmbfs mv 'emu:disk.img?cmb=64M' /notes.txt /old-notes.txt"
)]
pub(crate) struct Mv {
    #[command(flatten)]
    at: At,
}

impl Mv {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let (place, [from, to]) = self.at.take(["FROM", "TO"])?;
        let (from, to) = (text(from, "FROM")?, text(to, "TO")?);
        let mut store = Store::open(&place)?;
        store.rename(&from, &to)?;
        store.close()
    }
}
