//! `cmbfs demo`: the whole mission in one run.
//!
//! * `story`: what happens, step by step; `acts`: the steps while the server runs
//! * `scene`: the folder and the processes, and that nothing of them stays
//! * `server`, `reader`: what those processes do
//! * `expected`: the bytes that must be there
//! * `sample`, `latency`: the file made when none is given; checksums; how long reads took
mod acts;
mod expected;
mod latency;
mod reader;
mod sample;
mod scene;
mod server;
mod story;

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::failure::Failure;

/// See the whole mission on an emulated drive, with a file of yours
///
/// Makes a drive image in a temporary folder, starts a server and clients as processes, and compares every byte.
/// Leaves nothing behind. Exits with status 3 if a byte differs.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  cmbfs demo\n  cmbfs demo ~/photo.jpg")]
pub(crate) struct Demo {
    /// The file to share; one is made when this is left out
    file: Option<PathBuf>,
}

impl Demo {
    pub(crate) fn run(self) -> Result<(), Failure> {
        story::tell(self.file.as_deref())
    }
}

/// A process of the demo.
#[derive(Args, Debug)]
pub(crate) struct Part {
    /// The demo's process id
    #[arg(long)]
    parent: u32,
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand, Debug)]
enum Role {
    Server(server::Server),
    Reader(reader::Reader),
}

impl Part {
    pub(crate) fn run(self) -> Result<(), Failure> {
        scene::end_with_parent(self.parent)?;
        match self.role {
            Role::Server(server) => server.run(),
            Role::Reader(reader) => reader.run(),
        }
    }
}
