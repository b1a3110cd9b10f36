//! `cmbfs serve`: shares a filesystem with other processes.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use cmbfs::nvme_driver::pmr::Pmr;
use cmbfs::nvme_driver::url::{format_size, parse_size};
use cmbfs::{Device, Placement, Server, ServerOptions};

use super::device;
use super::failure::{Failure, one_line};
use super::store::leftover;
use super::units::Bytes;

/// Share a filesystem with other processes until SIGINT or SIGTERM
///
/// A drive with a Persistent Memory Region has it enabled, for clients to open.
/// Prints one line that starts with "serving" once clients can connect. Ends with everything written back and durable.
/// Begins by removing what killed puts and copies left unfinished: files named as .NAME.put-1a2b-345, which nobody else should be.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  cmbfs serve 'emu:disk.img?cmb=64M' --socket /tmp/cmbfs.sock\n  cmbfs serve pci:0000:01:00.0 --socket /run/cmbfs.sock --window 64K --host-cache 4G"
)]
pub(crate) struct Serve {
    /// The device's URL
    device: OsString,
    /// Where to listen: a Unix socket, created here
    #[arg(long, value_name = "SOCK")]
    socket: PathBuf,
    /// Milliseconds that a silent client may hold up a revocation before it is fenced
    #[arg(long, value_name = "MS", default_value_t = 20)]
    grace_ms: u64,
    /// Bytes per window: what is moved and taken back as one; a power of two from 4K
    #[arg(long, value_name = "BYTES", default_value = "256K", value_parser = window_size)]
    window: usize,
    /// Bytes of host memory for the cache behind the CMB: two windows at least
    #[arg(long, value_name = "BYTES", default_value = "1G", value_parser = size)]
    host_cache: u64,
    /// Where windows may live, whatever files say: cmb (while there is room) or host (never in the CMB). auto leaves it to each file and to
    /// the filesystem (`cmbfs placement`, `mkfs --placement`), and else to what was measured
    #[arg(long, value_name = "WHERE", default_value_t = Placement::Auto)]
    placement: Placement,
}

pub(crate) fn size(text: &str) -> Result<u64, String> {
    parse_size(text).ok_or_else(|| "a size is digits and maybe K, M, G or T".to_owned())
}

fn window_size(text: &str) -> Result<usize, String> {
    match size(text)? {
        bytes @ 4096..=0x1000_0000 if bytes.is_power_of_two() => Ok(bytes as usize),
        other => Err(format!("{} is not a power of two from 4K to 256M", format_size(other))),
    }
}

/// The usual options, for a server on `socket`.
pub(crate) fn options(socket: &Path) -> ServerOptions {
    ServerOptions::new(socket)
}

/// The drive's PMR, if it has one, and what to say of it. One that cannot be enabled keeps nobody from the files.
fn enable_pmr(device: &Device) -> (Option<Arc<Pmr>>, String) {
    let Some(controller) = device.controller().filter(|c| c.identity().cap.pmrs()) else {
        return (None, String::new());
    };
    match Pmr::enable(controller) {
        Ok(pmr) => {
            let text = format!(", PMR of {}", Bytes(pmr.size() as u64));
            (Some(Arc::new(pmr)), text)
        }
        Err(e) => (None, format!(", PMR not served: {}", one_line(&e.to_string()))),
    }
}

/// Mounts the filesystem and listens. Clients can connect from here on.
pub(crate) fn prepare(device: &Device, options: ServerOptions) -> Result<Server, Failure> {
    let mut fs = device::mount(device)?;
    match leftover::unfinished(&mut fs, true) {
        Ok(found) if found.files > 0 => eprintln!("cmbfs: removed {found}"),
        Ok(_) => {}
        // It is no reason not to serve the rest.
        Err(e) => eprintln!("cmbfs: what killed commands left stays: {}", one_line(&e.to_string())),
    }
    Ok(Server::new(fs, options)?)
}

impl Serve {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let url = device::url(self.device)?;
        let device = device::open_to_serve(&url)?;
        let (pmr, pmr_text) = enable_pmr(&device);
        let options = ServerOptions {
            pmr,
            grace: Duration::from_millis(self.grace_ms),
            window_size: self.window,
            host_cache: self.host_cache,
            placement: self.placement,
            ..options(&self.socket)
        };
        let server = prepare(&device, options)?.stop_on_signals()?;
        let cmb = device.disk()?.cmb().map(|cmb| Bytes(cmb.memory.len() as u64));
        let cmb = cmb
            .map_or("no CMB: everything from the host cache".to_owned(), |bytes| format!("CMB of {bytes}"));
        let mut out = std::io::stdout();
        let (socket, id) = (self.socket.display(), std::process::id());
        writeln!(out, "serving {url} on {socket} (process {id}, {cmb}{pmr_text})")?;
        out.flush()?;
        Ok(server.run()?)
    }
}
