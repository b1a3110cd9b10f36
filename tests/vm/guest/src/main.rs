//! Cases that run inside a guest of the QEMU lab, one per process: `vm-guest CASE`, `vm-guest --list`.
//!
//! The guest has an IOMMU and two QEMU NVMe drives with a 64 MiB CMB each; see `tests/vm/run`.
//!
//! * `lab`: finding the drives and taking them
//! * `driver`: our driver on top: I/O, CMB, peer to peer, interrupts, reset
//! * `function`: the PCI function over VFIO: config space, BARs, DMA mappings, reset, bind and unbind
use std::process::ExitCode;

mod driver;
mod function;
mod lab;

use lab::Case;

fn cases() -> impl Iterator<Item = &'static (&'static str, Case)> {
    function::CASES.iter().chain(driver::CASES)
}

fn main() -> ExitCode {
    let Some(name) = std::env::args().nth(1) else {
        eprintln!("usage: vm-guest CASE | --list");
        return ExitCode::from(2);
    };
    if name == "--list" {
        cases().for_each(|(name, _)| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    let Some((_, case)) = cases().find(|(known, _)| *known == name) else {
        eprintln!("no case is called {name}");
        return ExitCode::from(2);
    };
    match case() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
