//! `cmbfs mv`: renames, replacing a file that is there.

use clap::Args;

use super::failure::Failure;
use super::place::{At, text};
use super::store::{Store, say_where};

/// Rename a file or directory; an existing file at TO is replaced in one step
///
/// Into an existing directory it goes under its own name, as with mv.
#[derive(Args, Debug)]
#[command(
    override_usage = "cmbfs mv DEVICE FROM TO\n       cmbfs mv --socket SOCK FROM TO",
    after_help = "Examples:\n  cmbfs mv 'emu:disk.img?cmb=64M' /notes.txt /old-notes.txt\n  cmbfs mv --socket /tmp/s /notes.txt /archive"
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
        let new = store.rename(&from, &to)?;
        store.close()?;
        Ok(say_where(from, to.trim_end_matches('/'), new)?)
    }
}
