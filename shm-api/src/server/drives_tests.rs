//! The way between two functions as sysfs shows it, and what it comes to for a peer.
use std::fs;
use std::os::unix::fs::symlink;

use super::*;

/// Two drives behind a root port each, with nothing in their config space but what kind of port it is; in one PCIe hierarchy, or in two.
fn machine(bridges: [&str; 2]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let by_address = dir.path().join("bus/pci/devices");
    fs::create_dir_all(&by_address).unwrap();
    let drives = [("0000:00:01.0", "0000:01:00.0"), ("0000:00:02.0", "0000:02:00.0")];
    for (bridge, (port, drive)) in bridges.into_iter().zip(drives) {
        let folder = dir.path().join("devices").join(bridge).join(port);
        for (folder, name, kind) in [(folder.clone(), port, 4u8), (folder.join(drive), drive, 0)] {
            fs::create_dir_all(&folder).unwrap();
            let mut config = vec![0; 256];
            (config[6], config[0x34], config[0x40], config[0x42]) = (0x10, 0x40, 0x10, 2 | kind << 4);
            fs::write(folder.join("config"), config).unwrap();
            symlink(folder, by_address.join(name)).unwrap();
        }
    }
    dir
}

fn url(text: &str) -> DeviceUrl {
    text.parse().unwrap()
}

#[test]
fn the_topology_decides_the_fence_or_what_is_in_the_way() {
    let (a, b) = (url("pci:0000:01:00.0"), url("pci:0000:02:00.0"));
    let one = machine(["pci0000:00", "pci0000:00"]);
    // Nothing redirects its requests to the IOMMU: unmapping is no fence.
    let (fence, obstacle) = way(one.path(), &b, &a);
    assert_eq!((fence, obstacle), (Fence::Queue, None));
    let two = machine(["pci0000:00", "pci0001:00"]);
    let (_, obstacle) = way(two.path(), &b, &a);
    let obstacle = obstacle.unwrap();
    assert_eq!(obstacle.reason, Reason::Topology);
    assert!(obstacle.text.contains("host bridge"), "{obstacle:?}");
    // What cannot be made out is not relied on.
    let (_, obstacle) = way(two.path(), &url("pci:0000:09:00.0"), &a);
    assert_eq!(obstacle.unwrap().reason, Reason::Topology);
    // Where there is no fabric, what is mapped is what is reached.
    assert_eq!(way(one.path(), &url("emu:ram"), &a), (Fence::Unmap, None));
}
