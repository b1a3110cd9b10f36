//! Drives that go away under the driver: their memory first, then all of it. Drive 1 is behind a root port, and does not come back,
//! so these cases are the last ones.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nvme_driver::clock::SystemClock;
use nvme_driver::controller::{Controller, ControllerError, ControllerOptions};
use nvme_driver::disk::{Disk, DiskError};
use nvme_driver::nvme_disk::NvmeDisk;
use nvme_driver::pci::{PciAddress, PciError};
use nvme_driver::vfio::{VfioError, VfioFunction, device_memory};

use crate::driver::{Io, cmb_of, controller};
use crate::lab::{Case, Outcome, addresses, expect, open, pattern};

pub(crate) const CASES: &[(&str, Case)] = &[("memory-off", memory_off), ("let-go-and-back", let_go_and_back)];

/// Kernel 6.1 takes a minute to close a function that is gone: it waits for it to come back from a reset.
pub(crate) const NEWER_CASES: &[(&str, Case)] = &[
    ("memory-off", memory_off),
    ("let-go-and-back", let_go_and_back),
    ("surprise-removal", surprise_removal),
];

fn is_removed(outcome: &Result<(), ControllerError>) -> bool {
    matches!(outcome, Err(ControllerError::Pci(PciError::Removed(_))))
}

/// Memory decoding off: an access to a mapped BAR is a SIGBUS now. It becomes "removed", and the process lives.
fn memory_off() -> Outcome {
    let bytes = pattern(31, 4096);
    {
        let controller = controller(1, ControllerOptions::default())?;
        let mut io = Io::new(&controller, 4096)?;
        io.put(0, &bytes)?;
        let cmb = cmb_of(&controller)?;
        device_memory::write(&cmb.data.memory, 0, &bytes)?;
        controller.check()?;
        let f = controller.function();
        let command = f.config_read(4, 2)?;
        f.config_write(4, 2, command & !2)?;
        let mut got = vec![0; 4096];
        device_memory::read(&cmb.data.memory, 0, &mut got)?;
        expect(got.iter().all(|b| *b == 0xff), "the CMB does not read as ones")?;
        device_memory::write(&cmb.data.memory, 1 << 20, &bytes)?;
        expect(device_memory::flush(&cmb.data.memory, 2 << 20)? == u32::MAX, "flush does not read ones")?;
        expect(cmb.data.memory.is_lost(), "not noted")?;
        // A doorbell as well.
        io.queue.read(1, 0, 8, io.data(0, 4096), 0)?;
        io.queue.ring();
        let said = controller.check();
        println!("{said:?}");
        expect(is_removed(&said), "expected Removed")?;
        let said = io.queue.recover(|_| ());
        println!("{said:?}");
        expect(is_removed(&said), "expected that a reset does not help")?;
    }
    // Opened anew it is as good as ever.
    let controller = controller(1, ControllerOptions::default())?;
    let mut io = Io::new(&controller, 4096)?;
    expect(io.get(0, 4096)? == bytes, "data differ afterwards")
}

/// The kernel wants the function back (as when its slot is to be switched off): it waits until we have let go.
fn let_go_and_back() -> Outcome {
    let address = addresses()?[1];
    let f = open(1)?;
    let folder = PathBuf::from("/sys/bus/pci/devices").join(address.to_string());
    let remove = folder.join("remove");
    let removing = std::thread::spawn(move || fs::write(remove, "1"));
    std::thread::sleep(Duration::from_millis(300));
    expect(!removing.is_finished() && f.read32(0, 8)? == 0x0001_0400, "taken away while in use")?;
    drop(f);
    removing.join().map_err(|_| "the writer panicked")??;
    expect(!folder.exists(), "still there")?;
    let gone = VfioFunction::open(address);
    expect(matches!(gone, Err(VfioError::NoSuchFunction(_))), format!("{gone:?}"))?;
    fs::write("/sys/bus/pci/rescan", "1")?;
    let controller = controller(1, ControllerOptions::default())?;
    Io::new(&controller, 4096)?.get(0, 4096).map(|_| ())
}

/// Switches off the slot of a function, as its owner pulling it out would: QEMU takes the drive away at once, whoever uses it.
fn pull(address: PciAddress) -> Outcome {
    let folder = fs::canonicalize(format!("/sys/bus/pci/devices/{address}"))?;
    let port = folder.parent().ok_or("no root port")?.join("config");
    let port = File::options().read(true).write(true).open(port)?;
    let mut config = [0; 256];
    port.read_exact_at(&mut config, 0)?;
    let mut at = usize::from(config[0x34]);
    while at != 0 && config[at] != 0x10 {
        at = usize::from(config[at + 1]);
    }
    expect(at != 0, "no PCI Express capability")?;
    // Slot Control (PCIe base specification): power indicator off, power controller off.
    let control = at + 0x18;
    let value = u16::from_le_bytes([config[control], config[control + 1]]) | 0x300 | 1 << 10;
    Ok(port.write_all_at(&value.to_le_bytes(), control as u64)?)
}

/// The drive is pulled out while it is read: the call ends with an error that says so, and nothing dies.
fn surprise_removal() -> Outcome {
    let address = addresses()?[1];
    let options = ControllerOptions { io_timeout: Duration::from_secs(10), ..ControllerOptions::default() };
    let controller = Controller::new(open(1)?, options, Arc::new(SystemClock::new()))?;
    let cmb = cmb_of(&controller)?;
    let mut disk = NvmeDisk::new(&controller)?;
    let puller = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        pull(address).map_err(|e| e.to_string())
    });
    let mut buffer = vec![0; 256 << 10];
    let mut reads = 0;
    let error = loop {
        match disk.read(0, &mut buffer) {
            Ok(()) => reads += 1,
            Err(e) => break e,
        }
    };
    println!("after {reads} reads: {error}");
    puller.join().map_err(|_| "the puller panicked")??;
    expect(matches!(&error, DiskError::Dead { .. }), "expected Dead")?;
    expect(error.to_string().contains("removed"), "the error does not say that it was removed")?;
    let again = disk.read(0, &mut buffer);
    expect(matches!(again, Err(DiskError::Dead { .. })), format!("{again:?}"))?;
    let mut word = [0; 8];
    device_memory::read(&cmb.data.memory, 0, &mut word)?;
    println!("the CMB reads {word:x?}");
    // What is dropped here was not there any more; the kernel forgets it in its own time.
    drop((disk, cmb, controller));
    let gone = VfioFunction::open(address);
    println!("{gone:?}");
    let said = matches!(gone, Err(VfioError::Gone(_) | VfioError::NoSuchFunction(_)));
    expect(said, "expected Gone, or NoSuchFunction once the kernel has forgotten it")
}
