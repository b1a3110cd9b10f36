//! `cmbfs placement`: where a file's windows may live.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use cmbfs::{Client, Placement as Where};

use super::failure::Failure;
use super::place::text;

/// Say where a file's windows may live: auto, cmb (while there is room) or host (it opts out of the CMB)
///
/// Goes before the server's own --placement, until the server ends. `cmbfs stat --socket` shows it.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  cmbfs placement --socket /tmp/cmbfs.sock /photo.jpg host")]
pub(crate) struct Placement {
    /// The server's socket
    #[arg(long, value_name = "SOCK")]
    socket: PathBuf,
    /// The file
    path: OsString,
    /// auto, cmb or host
    #[arg(value_name = "WHERE")]
    wanted: Where,
}

impl Placement {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let path = text(self.path, "PATH")?;
        Client::connect(&self.socket)?.set_placement(&path, self.wanted)?;
        Ok(())
    }
}
