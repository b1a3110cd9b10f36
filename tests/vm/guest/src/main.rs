//! Cases that run inside a guest of the QEMU lab, one per process: `vm-guest GROUP/CASE`; `vm-guest --list GROUP` names them.
//!
//! The guests of the groups `vfio` and `vfio-newer` have an IOMMU and two QEMU NVMe drives with a 64 MiB CMB each (and the first one a PMR); those of `linux`, `reboot` and
//! `linux-newer` have our emulated controller, served over vfio-user. See `tests/vm/run`.
//!
//! * `lab`: finding the drives and taking them
//! * `stack`: the `cmbfs` command on QEMU's drive
//! * `linux`: the kernel's own driver on our controller
//! * `driver`: our driver on top: I/O, CMB, peer to peer, interrupts, reset
//! * `windows`: windows in one drive's CMB, the other drive as their peer
//! * `served`: a server on the one drive, which has the other as a peer for its clients
//! * `dma_buf`: parts of the CMB for other drivers
//! * `removal`: drives that go away
//! * `odd`: a guest with everything that an error message is about
//! * `power_cut`: what was acknowledged before a power cut
//! * `pmr`: the Persistent Memory Region
//! * `bench`: our driver against the kernel's; no test
//! * `function`: the PCI function over VFIO: config space, BARs, DMA mappings, reset, bind and unbind
use std::process::ExitCode;

mod bench;
mod dma_buf;
mod driver;
mod function;
mod lab;
mod linux;
mod odd;
mod pmr;
mod power_cut;
mod removal;
mod served;
mod stack;
mod windows;

use lab::Case;

fn group(name: &str) -> Option<Vec<(&'static str, Case)>> {
    Some(match name {
        "vfio" | "vfio-newer" => {
            let last = if name == "vfio" { removal::CASES } else { removal::NEWER_CASES };
            let stacks = [stack::CASES, served::CASES].concat();
            [function::CASES, driver::CASES, windows::CASES, dma_buf::CASES, pmr::CASES, &stacks, last]
                .concat()
        }
        "odd" => odd::CASES.to_vec(),
        "power-cut" => power_cut::CASES.to_vec(),
        "linux" => linux::CASES.to_vec(),
        "linux-newer" => linux::NEWER_CASES.to_vec(),
        "bench" => bench::CASES.to_vec(),
        "reboot" => linux::REBOOT_CASES.to_vec(),
        _ => return None,
    })
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (list, wanted) = match &args[..] {
        [flag, name] if flag == "--list" => (group(name), None),
        [path] => match path.split_once('/') {
            Some((name, case)) => (group(name), Some(case)),
            None => (None, None),
        },
        _ => (None, None),
    };
    let Some(list) = list else {
        eprintln!(
            "usage: vm-guest GROUP/CASE | --list GROUP (vfio, vfio-newer, odd, power-cut, linux, reboot, linux-newer, bench)"
        );
        return ExitCode::from(2);
    };
    let Some(wanted) = wanted else {
        list.iter().for_each(|(name, _)| println!("{name}"));
        return ExitCode::SUCCESS;
    };
    let helpers: [(&str, Case); 2] = [
        ("hold-until-killed", driver::hold_until_killed),
        ("write-until-killed", power_cut::write_until_killed),
    ];
    let Some((_, case)) = list.iter().chain(&helpers).find(|(name, _)| *name == wanted) else {
        eprintln!("no case is called {wanted}");
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
