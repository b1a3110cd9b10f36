//! `cmbfs peers`: who reaches what on a server, and what there is to explain.
#![allow(clippy::unwrap_used, reason = "test helpers: a step that fails is a test that fails")]

use cmbfs::{Client, OpenMode};
use cmbfs_tests::{Lab, pattern};
use serde_json::Value;

const DRIVE: &str = "emu:disk.img?cmb=4M&size=64M";

#[test]
fn a_servers_peers_are_listed_whole_and_by_file() {
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    lab.ok(&["mkfs", DRIVE]);
    for (seed, path) in ["/a", "/b"].into_iter().enumerate() {
        lab.file("in", &pattern(seed as u64, 300_000));
        lab.ok(&["put", DRIVE, "in", path]);
    }
    let _server = lab.serve(DRIVE, "s", &["--window", "64K"]);
    assert_eq!(lab.ok(&["peers", "--socket", "s"]), b"no peers\n");
    let client = Client::connect(lab.path("s")).unwrap();
    let (a, b) = (client.open("/a", OpenMode::read()).unwrap(), client.open("/b", OpenMode::read()).unwrap());
    let _held = (a.map_read(0, 300_000).unwrap(), b.map_read(0, 300_000).unwrap());
    let (first, second) = (client.attach_peer(4096).unwrap(), client.attach_peer(4096).unwrap());
    first.map(&a, 0, false).unwrap();
    first.map(&a, 65_536, false).unwrap();
    second.map(&b, 0, false).unwrap();
    let json = |args: &[&str]| -> Value { serde_json::from_slice(&lab.ok(args)).unwrap() };
    let all = json(&["peers", "--socket", "s", "--json"]);
    assert_eq!((all["peers"].as_array().unwrap().len(), all["all_mappings"].as_u64()), (2, Some(3)), "{all}");
    let of_a = json(&["peers", "--socket", "s", "--json", "/a"]);
    let offsets: Vec<_> =
        of_a["mappings"].as_array().unwrap().iter().map(|m| m["offset"].as_u64().unwrap()).collect();
    assert_eq!((offsets, of_a["peers"].as_array().unwrap().len()), (vec![0, 65_536], 1), "{of_a}");
    let text = String::from_utf8(lab.ok(&["peers", "--socket", "s"])).unwrap();
    assert!(text.contains("64 KiB") && text.lines().count() == 8, "{text}");
    assert!(lab.fails(1, &["peers", "--socket", "s", "/none"]).stderr.contains("/none"));
}

#[test]
fn only_pci_functions_have_a_way_to_explain() {
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    assert!(
        lab.fails(1, &["peers", "--explain", "emu:ram", "pci:0000:01:00.0"]).stderr.contains("copy --peer")
    );
    assert!(
        lab.fails(1, &["peers", "--explain", "ffff:ff:1f.7", "ffff:ff:1f.6"]).stderr.contains("ffff:ff:1f.7")
    );
    lab.fails(2, &["peers", "--explain", "nonsense", "emu:ram"]);
    lab.fails(2, &["peers"]);
    lab.fails(2, &["peers", "--socket", "s", "--explain", "emu:ram", "emu:ram"]);
}

#[test]
fn a_served_drive_moves_its_blocks_and_what_it_may_not_is_refused() {
    const OTHER: &str = "emu:other.img?cmb=0&lba=512&size=16M";
    const LEN: u64 = 131_072;
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    lab.ok(&["mkfs", DRIVE]);
    let (ours, theirs) = (pattern(1, LEN as usize), pattern(2, 16 << 20));
    lab.file("in", &ours);
    lab.file("other.img", &theirs);
    lab.ok(&["put", DRIVE, "in", "/a"]);
    // What cannot be a peer: the device itself, one twice, no drive at all, a mistyped one (which is not made).
    let serve = ["serve", DRIVE, "--socket", "s", "--window", "64K"];
    let with = |more: &[&'static str]| [&serve[..], more].concat();
    assert!(lab.fails(2, &with(&["--peer", "emu:./disk.img"])).stderr.contains("is served"));
    assert!(
        lab.fails(2, &with(&["--peer", OTHER, "--peer-write", "emu:other.img"])).stderr.contains("twice")
    );
    assert!(lab.fails(1, &with(&["--peer", "file:in"])).stderr.contains("no NVMe controller"));
    assert!(lab.fails(1, &with(&["--peer", "emu:mistyped.img"])).stderr.contains("mistyped.img"));
    assert!(!lab.path("mistyped.img").exists());
    // For reading: the image stays as it is, the trial included.
    let name = OTHER.parse::<cmbfs::DeviceUrl>().unwrap().to_string();
    let server = lab.serve(DRIVE, "s", &["--window", "64K", "--peer", OTHER]);
    {
        let client = Client::connect(lab.path("s")).unwrap();
        let file = client.open("/a", OpenMode::write()).unwrap();
        let mapped = file.map(0, LEN).unwrap();
        let drive = client.open_drive(&name).unwrap();
        assert!(drive.fill(&file, 65_536, 8192, 65_536).unwrap().direct);
        let mut got = vec![0; 65_536];
        mapped.read(65_536, &mut got).unwrap();
        assert!(got == theirs[8192..8192 + 65_536]);
        assert!(drive.store(&file, 0, 0, 65_536).unwrap_err().to_string().contains("--peer-write"));
        file.commit().unwrap();
    }
    let text = String::from_utf8(lab.ok(&["peers", "--socket", "s"])).unwrap();
    assert!(text.contains(&name) && text.contains("may be read)") && text.contains("64 KiB"), "{text}");
    let json: Value = serde_json::from_slice(&lab.ok(&["status", "--socket", "s", "--json"])).unwrap();
    let peer = &json["peers"][0];
    assert_eq!(
        (peer["direct_bytes"].as_u64(), peer["bounced_bytes"].as_u64()),
        (Some(65_536), Some(0)),
        "{json}"
    );
    assert_eq!((&peer["name"], &peer["drive"]["writable"]), (&name.as_str().into(), &false.into()), "{json}");
    assert_eq!(server.stop(), Some(0));
    assert!(std::fs::read(lab.path("other.img")).unwrap() == theirs, "a drive for reading was written");
    // For writing: what was stored and flushed is there when the server is killed.
    let server = lab.serve(DRIVE, "s", &["--window", "64K", "--peer-write", OTHER]);
    {
        let client = Client::connect(lab.path("s")).unwrap();
        let file = client.open("/a", OpenMode::read()).unwrap();
        let _mapped = file.map_read(0, LEN).unwrap();
        let drive = client.open_drive(&name).unwrap();
        assert!(drive.store(&file, 0, 1 << 20, 65_536).unwrap().direct);
        assert!(drive.store(&file, 65_536, 2 << 20, 65_536).unwrap().direct);
        drive.flush().unwrap();
    }
    let text = String::from_utf8(lab.ok(&["status", "--socket", "s"])).unwrap();
    assert!(text.contains(&name) && text.contains("read and written)"), "{text}");
    server.kill();
    let (mut expected, half) = (theirs.clone(), 65_536);
    expected[1 << 20..(1 << 20) + half].copy_from_slice(&ours[..half]);
    expected[2 << 20..(2 << 20) + half].copy_from_slice(&theirs[8192..8192 + half]);
    assert!(std::fs::read(lab.path("other.img")).unwrap() == expected, "not what was stored");
    lab.ok(&["check", DRIVE]);
}
