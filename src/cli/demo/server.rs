//! The server process of the demo: `cmbfs serve`, with the emulated drive's own counters on request.

use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use cmbfs::DeviceUrl;
use cmbfs::nvme_driver::emu::EmulatedController;
use serde::{Deserialize, Serialize};

use crate::cli::failure::Failure;
use crate::cli::{device, serve};

#[derive(Args, Debug)]
pub(super) struct Server {
    #[arg(long)]
    device: DeviceUrl,
    #[arg(long)]
    socket: PathBuf,
}

/// Bytes of file data by where the emulated drive's DMA took them.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Moved {
    pub(super) drive_to_cmb: u64,
    pub(super) cmb_to_drive: u64,
    pub(super) drive_to_host: u64,
    pub(super) host_to_drive: u64,
}

impl Moved {
    fn now(emulated: &EmulatedController) -> Self {
        let c = emulated.counters();
        Self {
            drive_to_cmb: c.drive_to_cmb,
            cmb_to_drive: c.cmb_to_drive,
            drive_to_host: c.drive_to_host,
            host_to_drive: c.host_to_drive,
        }
    }

    pub(super) fn since(self, before: Self) -> Self {
        Self {
            drive_to_cmb: self.drive_to_cmb - before.drive_to_cmb,
            cmb_to_drive: self.cmb_to_drive - before.cmb_to_drive,
            drive_to_host: self.drive_to_host - before.drive_to_host,
            host_to_drive: self.host_to_drive - before.host_to_drive,
        }
    }
}

impl Server {
    pub(super) fn run(self) -> Result<(), Failure> {
        let device = device::open_existing(&self.device)?;
        let emulated = device.emulated().cloned();
        let server = serve::prepare(&device, serve::options(&self.socket))?;
        std::thread::spawn(move || {
            if let Some(emulated) = emulated {
                answer_questions(&emulated);
            }
        });
        println!("\"serving\"");
        Ok(server.run()?)
    }
}

/// Any line on standard input is answered with the counters. They are the drive's: the server knows nothing of them.
fn answer_questions(emulated: &Arc<EmulatedController>) {
    for _ in std::io::stdin().lock().lines().map_while(Result::ok) {
        let mut out = std::io::stdout().lock();
        let said = serde_json::to_writer(&mut out, &Moved::now(emulated)).is_ok()
            && writeln!(out).is_ok()
            && out.flush().is_ok();
        if !said {
            return;
        }
    }
}
