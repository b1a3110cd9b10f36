//! Serves an emulated NVMe controller over vfio-user, for example to QEMU's `vfio-user-pci`:
//!
//! ```text
//! cargo run --release --example emulate -- IMAGE SIZE_MIB CMB_MIB FOLDER/cntrl
//! ```
//!
//! The image is created if it does not exist. Runs until its standard input ends.
use std::error::Error;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nvme_driver::emu::{Backing, Config, EmulatedController};
use nvme_driver::vfio_user::server::Server;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [image, size, cmb, socket] = &args[..] else {
        return Err("usage: emulate IMAGE SIZE_MIB CMB_MIB SOCKET".into());
    };
    let config = Config {
        namespace: Backing::File { path: image.into(), create: Some(size.parse::<u64>()? << 20) },
        cmb_size: cmb.parse::<u64>()? << 20,
        ..Config::default()
    };
    let controller = EmulatedController::new(&config)?;
    let server = Server::bind(Path::new(socket), controller.function())?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopper = Arc::clone(&stop);
    std::thread::spawn(move || {
        // Whatever ends the input ends the server, also the death of whoever started it.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        stopper.store(true, Ordering::Relaxed);
    });
    println!("serving {image} on {socket}");
    server.run(&stop)?;
    println!("{:#?}", controller.counters());
    Ok(())
}
