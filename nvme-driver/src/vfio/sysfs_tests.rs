//! The scan and the refusals, on a made-up tree.
use std::os::unix::fs::symlink;

use super::*;

struct Tree {
    dir: tempfile::TempDir,
    sysfs: Sysfs,
}

impl Tree {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let sysfs = Sysfs { sys: at("sys"), proc: at("proc"), dev: at("dev") };
        for folder in [
            "sys/bus/pci/devices",
            "sys/bus/pci/drivers/vfio-pci",
            "sys/class/block",
            "proc/self",
            "dev/vfio",
        ] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        Self { dir, sysfs }
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn link(&self, path: &str, to: &str) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(to, path).unwrap();
    }

    /// An NVMe function that the kernel's driver has, with namespace `nvme0n1`, partition `nvme0n1p1`.
    fn nvme(&self, address: &str) -> PciAddress {
        let d = format!("sys/bus/pci/devices/{address}");
        self.put(&format!("{d}/class"), "0x010802\n");
        self.put(&format!("{d}/vendor"), "0x1b36\n");
        self.put(&format!("{d}/device"), "0x0010\n");
        self.put(&format!("{d}/driver_override"), "(null)\n");
        self.put(
            &format!("{d}/resource"),
            "0x00000000fe810000 0x00000000fe813fff 0x0000000000140204\n0x0 0x0 0x0\n0x0000000808000000 0x000000080bffffff 0x14220c\n",
        );
        self.link(&format!("{d}/driver"), "../../drivers/nvme");
        self.link(&format!("{d}/iommu_group"), "../../../kernel/iommu_groups/7");
        self.put(&format!("{d}/nvme/nvme0/cmb"), "cmbloc : 0x00000002\ncmbsz  : 0x0040021f\n");
        self.put(&format!("{d}/nvme/nvme0/nvme0n1/size"), "1\n");
        self.put("sys/class/block/nvme0n1/dev", "259:0\n");
        self.put("sys/class/block/nvme0n1/nvme0n1p1/dev", "259:1\n");
        self.put("sys/class/block/nvme0n1p1/dev", "259:1\n");
        address.parse().unwrap()
    }
}

#[test]
fn nvme_functions_are_listed_with_what_sysfs_tells() {
    let tree = Tree::new();
    let address = tree.nvme("0000:00:05.0");
    tree.put("sys/bus/pci/devices/0000:00:01.0/class", "0x030000\n");
    let found = tree.sysfs.list().unwrap();
    assert_eq!(
        found,
        [FunctionInfo {
            address,
            vendor: 0x1b36,
            device: 0x10,
            driver: Some("nvme".into()),
            iommu_group: Some(7),
            cmb_bytes: Some(0x400 << 20),
            block_devices: vec!["nvme0n1".into()],
        }]
    );
    assert_eq!(tree.sysfs.bars(address)[2], Some(0x8_0800_0000..=0x8_0bff_ffff));
    assert_eq!(tree.sysfs.bars(address)[1], None);
    assert_eq!(tree.sysfs.bus_windows().len(), 2);
}

#[test]
fn a_mounted_partition_keeps_its_drive() {
    let tree = Tree::new();
    let address = tree.nvme("0000:00:05.0");
    tree.put("proc/self/mountinfo", "22 1 259:1 / /home rw - ext4 /dev/nvme0n1p1 rw\n");
    let error = tree.sysfs.bind(address).unwrap_err();
    assert!(error.to_string().contains("nvme0n1p1 is mounted on /home"), "{error}");
    tree.put("proc/self/mountinfo", "22 1 0:42 / /data rw - btrfs /dev/nvme0n1p1 rw\n");
    assert!(matches!(tree.sysfs.bind(address), Err(VfioError::InUse { .. })));
}

#[test]
fn swap_and_stacked_devices_keep_their_drive() {
    let tree = Tree::new();
    let address = tree.nvme("0000:00:05.0");
    tree.put("proc/swaps", "Filename Type Size\n/dev/nvme0n1 partition 1 0 -2\n");
    let error = tree.sysfs.bind(address).unwrap_err();
    assert!(error.to_string().contains("swap"), "{error}");
    tree.put("proc/swaps", "");
    tree.put("sys/class/block/nvme0n1p1/holders/dm-0/x", "");
    let error = tree.sysfs.bind(address).unwrap_err();
    assert!(error.to_string().contains("dm-0"), "{error}");
}

#[test]
fn only_nvme_functions_are_touched() {
    let tree = Tree::new();
    tree.put("sys/bus/pci/devices/0000:00:01.0/class", "0x030000\n");
    let vga = "00:01.0".parse().unwrap();
    assert!(matches!(tree.sysfs.bind(vga), Err(VfioError::NotNvme { class: 0x03_0000, .. })));
    assert!(matches!(tree.sysfs.unbind(vga), Err(VfioError::NotNvme { .. })));
    let none = "00:02.0".parse().unwrap();
    assert!(matches!(tree.sysfs.bind(none), Err(VfioError::NoSuchFunction(_))));
}

#[test]
fn a_function_that_does_not_move_is_reported_and_given_back() {
    let tree = Tree::new();
    let address = tree.nvme("0000:00:05.0");
    tree.put("sys/bus/pci/drivers_probe", "");
    fs::create_dir_all(tree.dir.path().join("sys/bus/pci/drivers/nvme")).unwrap();
    tree.put("sys/bus/pci/drivers/nvme/unbind", "");
    let error = tree.sysfs.bind(address).unwrap_err();
    assert!(matches!(error, VfioError::DidNotBind { .. }), "{error}");
    let unbound = fs::read_to_string(tree.dir.path().join("sys/bus/pci/drivers/nvme/unbind")).unwrap();
    assert_eq!(unbound, "0000:00:05.0");
}

#[test]
fn multipath_names_lead_to_the_block_device() {
    assert_eq!(block_name("nvme0n1").as_deref(), Some("nvme0n1"));
    assert_eq!(block_name("nvme1c3n2").as_deref(), Some("nvme1n2"));
    for other in ["nvme0", "hwmon1", "nvme0n", "ng0n1", "nvmen1"] {
        assert_eq!(block_name(other), None, "{other}");
    }
}
