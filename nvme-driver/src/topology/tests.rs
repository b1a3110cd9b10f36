//! Verdicts on made-up machines that are laid out as real ones.
use std::os::unix::fs::symlink;
use std::path::Path;

use super::*;

const ROOT: u8 = 4;
const UP: u8 = 5;
const DOWN: u8 = 6;
const BRIDGE: u8 = 7;
const END: u8 = 0;
const RCIEP: u8 = 9;
const ISOLATED: Option<(u16, u16)> = Some((0x5f, 0x1d));
const NO_REDIRECT: Option<(u16, u16)> = Some((0x5f, 0x11));

struct Machine(tempfile::TempDir);

/// Config space with a PCI Express capability of this type behind a power management one, and perhaps ACS behind AER.
fn space(port: u8, bridge: bool, acs: Option<(u16, u16)>) -> Vec<u8> {
    let mut space = vec![0u8; 4096];
    space[6] = 1 << 4;
    space[0x0e] = u8::from(bridge);
    space[0x34] = 0x40;
    space[0x40..0x42].copy_from_slice(&[0x01, 0x60]);
    space[0x60..0x64].copy_from_slice(&[0x10, 0x00, 0x02 | port << 4, 0]);
    let next: u32 = if acs.is_some() { 0x148 } else { 0 };
    space[0x100..0x104].copy_from_slice(&(next << 20 | 2 << 16 | 1).to_le_bytes());
    if let Some((capability, control)) = acs {
        space[0x148..0x14c].copy_from_slice(&(1u32 << 16 | 0x0d).to_le_bytes());
        space[0x14c..0x14e].copy_from_slice(&capability.to_le_bytes());
        space[0x14e..0x150].copy_from_slice(&control.to_le_bytes());
    }
    space
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("bus/pci/devices")).unwrap();
        Self(dir)
    }

    /// A function below `parent` (a path under `devices/`), which it returns the path of.
    fn add(&self, parent: &str, address: &str, config: &[u8]) -> String {
        let path = format!("{parent}/{address}");
        let folder = self.0.path().join("devices").join(&path);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("config"), config).unwrap();
        let target = Path::new("../../../devices").join(&path);
        symlink(target, self.0.path().join("bus/pci/devices").join(address)).unwrap();
        path
    }

    fn port(&self, parent: &str, address: &str, port: u8, acs: Option<(u16, u16)>) -> String {
        self.add(parent, address, &space(port, true, acs))
    }

    fn drive(&self, parent: &str, address: &str) {
        self.add(parent, address, &space(END, false, None));
    }

    fn between(&self, a: &str, b: &str) -> Verdict {
        Topology::at(self.0.path()).between(a.parse().unwrap(), b.parse().unwrap()).unwrap()
    }
}

/// A root port, a switch behind it, and a drive behind each of two downstream ports.
fn switched(acs: Option<(u16, u16)>) -> Machine {
    let m = Machine::new();
    let root = m.port("pci0000:00", "0000:00:01.0", ROOT, ISOLATED);
    let up = m.port(&root, "0000:01:00.0", UP, None);
    for (port, bus) in [("0000:02:00.0", "0000:03:00.0"), ("0000:02:01.0", "0000:04:00.0")] {
        let down = m.port(&up, port, DOWN, acs);
        m.drive(&down, bus);
    }
    m
}

const LEFT: &str = "0000:03:00.0";
const RIGHT: &str = "0000:04:00.0";

#[test]
fn behind_a_switch_that_redirects_unmapping_is_the_fence() {
    let v = switched(ISOLATED).between(LEFT, RIGHT);
    assert_eq!((v.answer, v.fence), (Answer::Yes, Fence::Unmap), "{}", v.reason);
    assert_eq!(v.meeting, Meeting::Switch("0000:01:00.0".parse().unwrap()));
    assert!(v.reason.contains("every request passes the IOMMU"), "{}", v.reason);
    assert_eq!(v.advice, None);
    let names: Vec<String> = v.requester.hops.iter().map(|h| format!("{} {}", h.address, h.port)).collect();
    assert_eq!(
        names,
        [
            "0000:00:01.0 root port",
            "0000:01:00.0 switch upstream port",
            "0000:02:00.0 switch downstream port",
            "0000:03:00.0 endpoint"
        ]
    );
}

#[test]
fn behind_a_switch_that_does_not_redirect_unmapping_is_no_fence() {
    let v = switched(NO_REDIRECT).between(LEFT, RIGHT);
    assert_eq!((v.answer, v.fence), (Answer::Yes, Fence::Queue), "{}", v.reason);
    assert!(v.reason.contains("0000:02:00.0") && v.reason.contains("ReqRedir"), "{}", v.reason);
    assert!(v.advice.unwrap().contains("pci=config_acs"));
    let v = switched(None).between(LEFT, RIGHT);
    assert_eq!((v.answer, v.fence), (Answer::Yes, Fence::Queue));
    assert!(v.reason.contains("no ACS") && v.advice.unwrap().contains("queue is deleted"));
}

#[test]
fn one_port_without_redirection_is_enough_whichever_side_it_is_on() {
    let m = switched(ISOLATED);
    let config = m.0.path().join("devices/pci0000:00/0000:00:01.0/0000:01:00.0/0000:02:01.0/config");
    fs::write(config, space(DOWN, true, NO_REDIRECT)).unwrap();
    assert_eq!(m.between(LEFT, RIGHT).fence, Fence::Queue);
    assert_eq!(m.between(RIGHT, LEFT).fence, Fence::Queue);
}

#[test]
fn across_root_ports_it_is_tried() {
    for (acs, fence) in [(ISOLATED, Fence::Unmap), (NO_REDIRECT, Fence::Queue), (None, Fence::Queue)] {
        let m = Machine::new();
        for (port, drive) in [("0000:00:01.0", LEFT), ("0000:00:01.1", RIGHT)] {
            let root = m.port("pci0000:00", port, ROOT, acs);
            m.drive(&root, drive);
        }
        let v = m.between(LEFT, RIGHT);
        assert_eq!(
            (v.answer, v.fence, v.meeting),
            (Answer::Try, fence, Meeting::RootComplex),
            "{}",
            v.reason
        );
        assert!(v.reason.contains("tried"), "{}", v.reason);
    }
}

#[test]
fn endpoints_of_the_root_complex_meet_there() {
    let m = Machine::new();
    for address in ["0000:00:03.0", "0000:00:04.0"] {
        m.add("pci0000:00", address, &space(RCIEP, false, None));
    }
    let v = m.between("0000:00:03.0", "0000:00:04.0");
    assert_eq!((v.answer, v.fence), (Answer::Try, Fence::Unmap), "{}", v.reason);
}

#[test]
fn different_host_bridges_do_not_meet() {
    let m = Machine::new();
    let root = m.port("pci0000:00", "0000:00:01.0", ROOT, ISOLATED);
    m.drive(&root, LEFT);
    let other = m.port("pci0000:80", "0000:80:01.0", ROOT, ISOLATED);
    m.drive(&other, "0000:81:00.0");
    let v = m.between(LEFT, "0000:81:00.0");
    assert_eq!((v.answer, v.meeting), (Answer::No, Meeting::Nowhere));
    assert!(v.reason.contains("pci0000:80") && v.advice.is_some(), "{}", v.reason);
}

#[test]
fn behind_conventional_pci_nothing_keeps_peers_in_bounds() {
    let m = Machine::new();
    let root = m.port("pci0000:00", "0000:00:01.0", ROOT, ISOLATED);
    let bridge = m.port(&root, "0000:01:00.0", BRIDGE, None);
    m.drive(&bridge, LEFT);
    m.drive(&bridge, RIGHT);
    let v = m.between(LEFT, RIGHT);
    assert_eq!(v.answer, Answer::No);
    assert!(v.reason.contains("0000:01:00.0") && v.reason.contains("requester id"), "{}", v.reason);
    // A function without a PCI Express capability.
    let m = switched(ISOLATED);
    let mut plain = vec![0; 256];
    plain[6] = 0;
    m.add("pci0000:00", "0000:00:07.0", &plain);
    assert_eq!(m.between(LEFT, "0000:00:07.0").answer, Answer::No);
}

#[test]
fn functions_of_one_device_may_talk_inside_it() {
    let m = Machine::new();
    let root = m.port("pci0000:00", "0000:00:01.0", ROOT, ISOLATED);
    for (address, acs) in [("0000:01:00.0", None), ("0000:01:00.1", ISOLATED)] {
        let mut config = space(END, false, acs);
        config[0x0e] = 0x80;
        m.add(&root, address, &config);
    }
    let v = m.between("0000:01:00.1", "0000:01:00.0");
    let port = "0000:00:01.0".parse().unwrap();
    assert_eq!((v.answer, v.fence, v.meeting), (Answer::Try, Fence::Queue, Meeting::Device(port)));
    let v = m.between("0000:01:00.0", "0000:01:00.0");
    assert_eq!((v.answer, v.fence, v.meeting), (Answer::Yes, Fence::Queue, Meeting::Function));
}

#[test]
fn a_user_without_rights_sees_no_acs_and_is_told() {
    let m = switched(ISOLATED);
    for path in ["0000:02:00.0", "0000:02:01.0"] {
        let config =
            m.0.path().join("devices/pci0000:00/0000:00:01.0/0000:01:00.0").join(path).join("config");
        // What the kernel shows of config space without CAP_SYS_ADMIN. The capability itself lies beyond.
        let all = fs::read(&config).unwrap();
        fs::write(&config, &all[..64]).unwrap();
    }
    let v = m.between(LEFT, RIGHT);
    assert_eq!((v.answer, v.fence), (Answer::Yes, Fence::Queue), "{}", v.reason);
    assert!(v.advice.unwrap().contains("root"));
}

#[test]
fn what_is_not_there_is_an_error() {
    let m = switched(ISOLATED);
    let t = Topology::at(m.0.path());
    assert!(matches!(t.route("0000:09:00.0".parse().unwrap()), Err(TopologyError::NoSuchFunction(_))));
    m.add("platform", "0000:05:00.0", &space(END, false, None));
    assert!(matches!(t.route("0000:05:00.0".parse().unwrap()), Err(TopologyError::Strange { .. })));
}
