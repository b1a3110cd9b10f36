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
