//! Cases that run inside a guest of the QEMU lab, one per process: `vm-guest CASE`, `vm-guest --list`.
//!
//! The guest has an IOMMU and two QEMU NVMe drives with a CMB each; see `tests/vm/run`.
use std::process::ExitCode;

type Case = fn() -> Result<(), Box<dyn std::error::Error>>;

const CASES: &[(&str, Case)] = &[("boots", boots)];

fn main() -> ExitCode {
    let Some(name) = std::env::args().nth(1) else {
        eprintln!("usage: vm-guest CASE | --list");
        return ExitCode::from(2);
    };
    if name == "--list" {
        CASES.iter().for_each(|(name, _)| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    let Some((_, case)) = CASES.iter().find(|(known, _)| *known == name) else {
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

/// The lab itself: the IOMMU is on, and there are two NVMe functions.
fn boots() -> Result<(), Box<dyn std::error::Error>> {
    let groups = std::fs::read_dir("/sys/kernel/iommu_groups")?.count();
    let mut nvme = 0;
    for entry in std::fs::read_dir("/sys/bus/pci/devices")? {
        let class = std::fs::read_to_string(entry?.path().join("class"))?;
        nvme += usize::from(class.trim() == "0x010802");
    }
    println!("{groups} IOMMU groups, {nvme} NVMe functions");
    if groups == 0 || nvme != 2 {
        return Err("expected IOMMU groups and two NVMe functions".into());
    }
    Ok(())
}
