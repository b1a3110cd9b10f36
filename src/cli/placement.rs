//! `cmbfs placement`: where a file's windows may live.

use clap::Args;
use cmbfs::{PlacedBy, Placement as Where};

use super::failure::Failure;
use super::place::{At, text};
use super::store::Store;

/// Say where a file's windows may live, or those of all files: auto, cmb, host or default
///
/// auto: where it is best by measurement. cmb: in the CMB while there is room. host: in host memory only; the file opts out of direct mapping.
/// default: no choice of its own, so that the filesystem's counts. The choice is kept with the file, through restarts and renames.
/// PATH / is the filesystem: the choice for all files that have none of their own, as mkfs --placement makes it.
/// A server that was started with serve --placement cmb or host goes by that instead. cmbfs stat says whose word counts.
#[derive(Args, Debug)]
#[command(
    override_usage = "cmbfs placement DEVICE PATH WHERE\n       cmbfs placement --socket SOCK PATH WHERE",
    after_help = "Examples:\n  cmbfs placement --socket /tmp/cmbfs.sock /photo.jpg host\n  cmbfs placement 'emu:disk.img?cmb=64M' / host    # the whole filesystem opts out"
)]
pub(crate) struct Placement {
    #[command(flatten)]
    at: At,
}

/// `None`: no choice.
fn wanted(word: &str) -> Result<Option<Where>, Failure> {
    match word {
        "default" => Ok(None),
        word => word.parse().map(Some).map_err(|_| {
            Failure::usage(format!("'{word}' is no placement")).hint("it is auto, cmb, host or default")
        }),
    }
}

impl Placement {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let (place, [path, word]) = self.at.take(["PATH", "WHERE"])?;
        let (path, wanted) = (text(path, "PATH")?, wanted(&text(word, "WHERE")?)?);
        let mut store = Store::open(&place)?;
        store.place(&path, wanted)?;
        let now = store.stat(&path)?;
        store.close()?;
        if now.placed_by == PlacedBy::Server {
            eprintln!(
                "cmbfs: kept, but this server was started with --placement {}, which goes before it",
                now.placement
            );
        }
        Ok(())
    }
}
