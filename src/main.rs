//! The `cmbfs` command: see `cli` for what it can do and `cmbfs` (the library) for how.
use std::process::ExitCode;

mod cli;

fn main() -> ExitCode {
    cli::main()
}
