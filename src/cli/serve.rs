//! `cmbfs serve`: shares a filesystem with other processes.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use cmbfs::nvme_driver::pmr::Pmr;
use cmbfs::nvme_driver::url::{format_size, parse_size};
use cmbfs::shm_api::server::PeerDevice;
use cmbfs::{Device, DeviceUrl, Placement, Server, ServerOptions};

use super::device;
use super::failure::{Failure, one_line};
use super::store::leftover;
use super::units::Bytes;

/// Share a filesystem with other processes until SIGINT or SIGTERM
///
/// A drive with a Persistent Memory Region has it enabled, for clients to open.
///
/// With --peer, other drives: clients of root and of this server's own user have their blocks read into windows by their own DMA, so that
/// no byte passes host memory; where there is no way for that the bytes are copied, and it is said why. With --peer-write the blocks
/// may be written too, and whatever is on such a drive is not looked at. At the start the last 4 KiB of a drive are read into the CMB,
/// and with --peer-write written back as they were, to see whether its DMA arrives.
///
/// Prints one line that starts with "serving" once clients can connect. Ends with everything written back and durable.
/// Begins by removing what killed puts and copies left unfinished: files named as .NAME.put-1a2b-345, which nobody else should be.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  cmbfs serve 'emu:disk.img?cmb=64M' --socket /tmp/cmbfs.sock\n  cmbfs serve pci:0000:01:00.0 --socket /run/cmbfs.sock --window 64K --host-cache 4G\n  cmbfs serve pci:0000:01:00.0 --socket /run/cmbfs.sock --peer pci:0000:02:00.0"
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
    /// Another drive as a peer, by its URL: its blocks may be read into windows. May be given more than once
    #[arg(long, value_name = "URL")]
    peer: Vec<OsString>,
    /// The same, and windows may be written to its blocks: what is there is overwritten. May be given more than once
    #[arg(long, value_name = "URL")]
    peer_write: Vec<OsString>,
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

/// Opens the drives that are to be peers of windows on `served`.
fn open_peers(
    read: Vec<OsString>,
    write: Vec<OsString>,
    (served_url, served): (&DeviceUrl, &Device),
) -> Result<Vec<PeerDevice>, Failure> {
    let (read, write) = (read.into_iter().map(|arg| (arg, false)), write.into_iter().map(|arg| (arg, true)));
    let asked = read.chain(write).map(|(arg, writable)| Ok((device::url(arg)?, writable)));
    let asked: Vec<(DeviceUrl, bool)> = asked.collect::<Result<_, Failure>>()?;
    let mut peers = Vec::new();
    for (nth, (url, writable)) in asked.iter().enumerate() {
        if device::is_same(url, served_url) {
            return Err(Failure::usage(format!("{url} is the device that is served"))
                .hint("a peer is another drive: this one's files are reached by their paths"));
        }
        if asked.iter().take(nth).any(|(other, _)| device::is_same(url, other)) {
            return Err(Failure::usage(format!("{url} is named as a peer twice")));
        }
        let opened = device::open_peer(url)?;
        peers.push(PeerDevice::open(opened, served, *writable)?);
    }
    Ok(peers)
}

/// What there is to say of a peer.
fn about(peer: &PeerDevice) -> String {
    let blocks = if peer.writable { "read and written" } else { "read" };
    let way =
        peer.obstacle.as_ref().map(|o| format!(", through host memory: {}: {}", o.reason, one_line(&o.text)));
    format!(", peer {} to be {blocks}{}", one_line(&peer.name), way.unwrap_or_default())
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
        let peers = open_peers(self.peer, self.peer_write, (&url, &device))?;
        let peers_text: String = peers.iter().map(about).collect();
        let (pmr, pmr_text) = enable_pmr(&device);
        let options = ServerOptions {
            pmr,
            peers,
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
        writeln!(out, "serving {url} on {socket} (process {id}, {cmb}{pmr_text}{peers_text})")?;
        out.flush()?;
        Ok(server.run()?)
    }
}
