//! `cmbfs emulate`: an emulated drive for other processes, over vfio-user.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;
use cmbfs::DeviceUrl;
use cmbfs::nvme_driver::open_emulated;
use cmbfs::nvme_driver::vfio_user::server::{Server, ServerSocket};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::failure::Failure;
use super::place::text;
use super::units::Bytes;

/// Serve an emulated NVMe drive over vfio-user until SIGINT or SIGTERM
///
/// For cmbfs itself (vfio-user:SOCKET), QEMU's vfio-user-pci, SPDK and other vfio-user clients; one at a time, the next one
/// after it has gone. Prints one line that starts with "serving" once a client can connect.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  mkdir -p run\n  cmbfs emulate 'disk.img?cmb=64M&size=1G' --socket run/cntrl\n  cmbfs emulate 'ram?size=512M&lba=512' --socket run/cntrl\n  cmbfs identify vfio-user:run/cntrl"
)]
pub(crate) struct Emulate {
    /// What follows `emu:` in a device's URL: an image (made if there is none), `ram` or `null`, with size=, cmb=, pmr=, lba= and
    /// cache=; by default the image's size or 1G, 64M, none, 4096 and on
    #[arg(value_name = "IMAGE")]
    image: OsString,
    /// Where to listen: a Unix socket, created here; SPDK's host wants it to be named cntrl, in a folder of its own
    #[arg(long, value_name = "SOCK")]
    socket: PathBuf,
}

impl Emulate {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let image = text(self.image, "IMAGE")?;
        let url = if image.starts_with("emu:") { image } else { format!("emu:{image}") };
        let url: DeviceUrl = url.parse().map_err(Failure::usage)?;
        let DeviceUrl::Emulated(emulated) = &url else {
            return Err(Failure::usage(format!("{url} is no emulated drive")));
        };
        // From here on a signal ends the loop below, which takes the socket away and lets go of the image.
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&stop))?;
        }
        // The socket first: a drive that cannot be served leaves no image behind.
        let socket = ServerSocket::bind(&self.socket)?;
        let drive = open_emulated(emulated)?;
        let server = Server::new(socket, drive.controller.function());
        let mut out = std::io::stdout();
        let cmb = match emulated.cmb {
            0 => "no CMB".to_owned(),
            bytes => format!("CMB of {}", Bytes(bytes)),
        };
        writeln!(out, "serving {url} on {} (process {}, {cmb})", self.socket.display(), std::process::id())?;
        out.flush()?;
        Ok(server.run(&stop)?)
    }
}
