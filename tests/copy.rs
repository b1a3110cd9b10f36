//! `cmbfs copy`: from device to device, by both ways; every byte compared, and counted by the drives.
#![allow(clippy::unwrap_used, reason = "test helpers: a step that fails is a test that fails")]

use cmbfs_tests::{Done, Lab, pattern};
use serde_json::Value;

const A: &str = "emu:a.img?cmb=2M&size=64M";
const B: &str = "emu:b.img?cmb=0&size=64M&lba=512";

fn lab() -> Lab {
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    lab.ok(&["mkfs", A]);
    lab.ok(&["mkfs", B]);
    lab
}

fn json(out: &[u8]) -> Value {
    serde_json::from_slice(out).unwrap()
}

#[test]
fn a_peer_copy_moves_no_byte_through_host_memory() {
    let lab = lab();
    for (seed, size) in [0, 1, 4096, 4097, 9_000_001].into_iter().enumerate() {
        let bytes = pattern(seed as u64, size);
        lab.file("in", &bytes);
        lab.ok(&["put", A, "in", "/f"]);
        // The second one replaces the first.
        let report = json(&lab.ok(&["copy", "--peer", "--json", A, "/f", B, "/g"]));
        assert!(lab.ok(&["cat", B, "/g"]) == bytes, "{size} bytes differ");
        let blocks = (size as u64).next_multiple_of(4096);
        let (peer, bounce) = (report["peer_bytes"].as_u64(), report["bounce_bytes"].as_u64());
        assert_eq!((peer, bounce), (Some(blocks), Some(0)), "{report}");
        assert_eq!(report["counted"]["source_to_cmb"], blocks, "{report}");
        assert_eq!(report["counted"]["cmb_to_destination"], blocks, "{report}");
        assert_eq!(report["counted"]["through_host"], 0, "{report}");
        if size > 0 {
            assert_eq!(
                (&report["path"], &report["reason"]),
                (&"peer to peer".into(), &Value::Null),
                "{report}"
            );
        }
    }
    lab.ok(&["check", A]);
    lab.ok(&["check", B]);
}

#[test]
fn without_a_cmb_or_without_being_asked_it_goes_through_host_memory_and_says_why() {
    let lab = lab();
    let bytes = pattern(5, 3_000_000);
    lab.file("in", &bytes);
    lab.ok(&["put", B, "in", "/f"]);
    for (args, reason) in [(&["copy", "--peer"][..], "no CMB"), (&["copy"][..], "asked for")] {
        let report = json(&lab.ok(&[args, &["--json", B, "/f", A, "/g"]].concat()));
        assert_eq!((&report["path"], &report["reason"]), (&"bounce".into(), &reason.into()), "{report}");
        assert_eq!(report["peer_bytes"], 0, "{report}");
        // In and out.
        assert_eq!(report["counted"]["through_host"], 2 * 3_002_368, "{report}");
        assert!(lab.ok(&["cat", A, "/g"]) == bytes);
        let text = String::from_utf8(lab.ok(&[args, &[B, "/f", A, "/g"]].concat())).unwrap();
        assert!(text.contains("through host memory") && text.contains(reason), "{text}");
    }
}

#[test]
fn both_drives_over_vfio_user_reach_each_other() {
    let lab = lab();
    std::fs::create_dir(lab.path("run")).unwrap();
    let bytes = pattern(6, 5_000_000);
    lab.file("in", &bytes);
    lab.ok(&["put", A, "in", "/f"]);
    let _a = lab.emulate("a.img?cmb=2M", "run/a");
    let _b = lab.emulate("b.img?cmb=0&lba=512", "run/b");
    let report =
        json(&lab.ok(&["copy", "--peer", "--json", "vfio-user:run/a", "/f", "vfio-user:run/b", "/g"]));
    assert_eq!((&report["path"], &report["bounce_bytes"]), (&"peer to peer".into(), &0.into()), "{report}");
    assert!(lab.ok(&["cat", "vfio-user:run/b", "/g"]) == bytes);
}

#[test]
fn holes_stay_holes_and_modes_stay_modes() {
    use std::os::unix::fs::PermissionsExt;
    let lab = lab();
    let file = lab.file("in", b"x");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
    lab.ok(&["put", A, "in", "/f"]);
    // A file of 20 MiB with its bytes at the end only, made through a server.
    let server = lab.serve(A, "s", &[]);
    let client = cmbfs::Client::connect(lab.path("s")).unwrap();
    let sparse = client.open("/f", cmbfs::OpenMode::write()).unwrap();
    sparse.write_at(20 << 20, b"the end").unwrap();
    sparse.commit().unwrap();
    drop((sparse, client));
    assert_eq!(server.stop(), Some(0));
    let report = json(&lab.ok(&["copy", "--peer", "--json", A, "/f", B, "/f"]));
    assert_eq!(report["size"], (20 << 20) + 7);
    assert!(report["bytes"].as_u64().unwrap() < 1 << 20, "{report}");
    assert!(lab.ok(&["cat", A, "/f"]) == lab.ok(&["cat", B, "/f"]));
    let stat = json(&lab.ok(&["stat", "--json", B, "/f"]));
    assert!(stat["allocated"].as_u64().unwrap() < 1 << 20, "{stat}");
    assert_eq!(stat["mode"], 0o640, "{stat}");
}

#[test]
fn what_cannot_be_copied_says_so_and_changes_nothing() {
    let lab = lab();
    lab.file("in", b"precious");
    lab.ok(&["mkdir", A, "/d"]);
    lab.ok(&["put", B, "in", "/keep"]);
    let fails = |args: &[&str]| -> Done { lab.fails(1, args) };
    assert!(fails(&["copy", "--peer", A, "/none", B, "/keep"]).stderr.contains("/none"));
    assert!(fails(&["copy", "--peer", A, "/d", B, "/keep"]).stderr.contains("directory"));
    lab.ok(&["put", A, "in", "/f"]);
    assert!(fails(&["copy", A, "/f", B, "/no/such/x"]).stderr.contains("/no"));
    assert!(fails(&["copy", A, "/f", B, "/x/"]).stderr.contains("directory"));
    assert!(fails(&["copy", A, "/f", "emu:none.img", "/x"]).stderr.contains("none.img"));
    assert!(lab.fails(2, &["copy", A, "/f", A, "/x"]).stderr.contains("a.img"));
    // Too large for the other side: what was there stays, and nothing is left behind.
    lab.ok(&["mkfs", "emu:small.img?cmb=0&size=8M"]);
    lab.ok(&["put", "emu:small.img", "in", "/keep"]);
    lab.file("big", &pattern(9, 12_000_000));
    lab.ok(&["put", A, "big", "/big"]);
    fails(&["copy", "--peer", A, "/big", "emu:small.img", "/keep"]);
    assert_eq!(lab.ok(&["cat", "emu:small.img", "/keep"]), b"precious");
    assert_eq!(lab.ok(&["ls", "emu:small.img", "/"]), b"keep\n");
    assert_eq!(lab.ok(&["cat", B, "/keep"]), b"precious");
    for device in [A, B, "emu:small.img"] {
        lab.ok(&["check", device]);
    }
}
