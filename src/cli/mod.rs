//! The command line: one file a subcommand, and what they share.
//!
//! * `place`, `device`, `server`, `store`: a device opened directly, or a server on a socket, and the files in either
//! * `failure`, `hints`: errors as one readable line and what to do about it
//! * `units`, `progress`, `waiting`: sizes and times as people read them, progress bars, what is waited for
//! * `demo`: the whole mission in one run
mod bind;
mod cat;
mod check;
mod copy;
mod demo;
mod device;
mod devices;
mod emulate;
mod failure;
mod get;
mod hints;
mod identify;
mod ls;
mod mkdir;
mod mkfs;
mod mv;
mod peers;
mod place;
mod placement;
mod probe;
mod progress;
mod put;
mod revoke;
mod rm;
mod serve;
mod server;
mod stat;
mod status;
mod store;
mod units;
mod waiting;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use failure::Failure;

const ABOUT: &str = "Files on an NVMe drive as shared memory, straight from its Controller Memory Buffer";

// Lines that belong together are one line here: they are broken where the terminal ends.
const AFTER_HELP: &str = "\
Devices:
  emu:disk.img?cmb=64M&size=1G   an emulated NVMe drive on an image file
  emu:ram?cmb=64M&size=1G        the same, in memory: gone when the command ends
  file:/dev/nvme0n1              a block device or a file through io_uring; no CMB
  pci:0000:01:00.0               a drive bound to vfio-pci
  vfio-user:/run/n.sock          a drive served by another process

Parameters of emu:, each with what it is when left out:
  size=1G     the drive's size; an image that is there keeps its own
  cmb=64M     Controller Memory Buffer (0: none)
  pmr=0       Persistent Memory Region: a power of two, kept beside the image as disk.img.pmr (0: none)
  lba=4096    bytes per block (or 512)
  cache=on    volatile until flushed (off: none; lossy: a killed command is a power cut)
mkfs and emulate make an image that is not there; everything else refuses.

Exit status: 0 done, 1 failed, 2 wrong arguments, 3 damage or a difference found, 141 nobody read the output.
Set CMBFS_LOG=debug to see what the layers underneath do.

Try: cmbfs demo";

#[derive(Parser, Debug)]
#[command(name = "cmbfs", version, about = ABOUT, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Mkfs(mkfs::Mkfs),
    Identify(identify::Identify),
    Devices(devices::Devices),
    Peers(peers::Peers),
    Probe(probe::Probe),
    Bind(bind::Bind),
    Unbind(bind::Unbind),
    Emulate(emulate::Emulate),
    Put(put::Put),
    Get(get::Get),
    Copy(copy::Copy),
    Ls(ls::Ls),
    Cat(cat::Cat),
    Stat(stat::Stat),
    Rm(rm::Rm),
    Mkdir(mkdir::Mkdir),
    Mv(mv::Mv),
    Serve(serve::Serve),
    Status(status::Status),
    Revoke(revoke::Revoke),
    Placement(placement::Placement),
    Check(check::Check),
    Demo(demo::Demo),
    #[command(hide = true)]
    DemoPart(demo::Part),
}

/// Parses the arguments, runs the command, reports what went wrong.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse(); // exits with status 2 by itself when the arguments are wrong
    let filter = EnvFilter::try_from_env("CMBFS_LOG").unwrap_or_else(|_| EnvFilter::new("error"));
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    log.with_ansi(colours).without_time().init();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Mkfs(c) => c.run(),
        Command::Identify(c) => c.run(),
        Command::Devices(c) => c.run(),
        Command::Peers(c) => c.run(),
        Command::Probe(c) => c.run(),
        Command::Bind(c) => c.run(),
        Command::Unbind(c) => c.run(),
        Command::Emulate(c) => c.run(),
        Command::Put(c) => c.run(),
        Command::Get(c) => c.run(),
        Command::Copy(c) => c.run(),
        Command::Ls(c) => c.run(),
        Command::Cat(c) => c.run(),
        Command::Stat(c) => c.run(),
        Command::Rm(c) => c.run(),
        Command::Mkdir(c) => c.run(),
        Command::Mv(c) => c.run(),
        Command::Serve(c) => c.run(),
        Command::Status(c) => c.run(),
        Command::Revoke(c) => c.run(),
        Command::Placement(c) => c.run(),
        Command::Check(c) => c.run(),
        Command::Demo(c) => c.run(),
        Command::DemoPart(c) => c.run(),
    }
}
