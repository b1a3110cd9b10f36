//! What the command says: paths and not inodes, a device once, one thing in the singular; JSON that programs can use.

use cmbfs_tests::{Lab, pattern};

const DRIVE: &str = "emu:disk.img?cmb=4M&size=64M";

fn lab() -> Lab {
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    lab.ok(&["mkfs", DRIVE]);
    lab.file("in", &pattern(1, 100_000));
    lab.ok(&["put", DRIVE, "in", "/f"]);
    lab.ok(&["mkdir", DRIVE, "/d"]);
    lab
}

#[test]
fn a_message_names_the_path_and_no_inode() {
    let lab = lab();
    for at in [&["--socket", "s"][..], &[DRIVE][..]] {
        let _server = (at.len() == 2).then(|| lab.serve(DRIVE, "s", &[]));
        for (command, args, path) in [
            ("cat", &["/d"][..], "/d"),
            ("cat", &["/f/x"], "/f/x"),
            ("get", &["/d", "out"], "/d"),
            ("ls", &["/f/x"], "/f/x"),
            ("stat", &["/d/none"], "/d/none"),
            ("mkdir", &["/d"], "/d"),
            ("mkdir", &["/"], "/"),
            ("mkdir", &["/f/x"], "/f"),
            ("rm", &["/none"], "/none"),
            ("mv", &["/f", "/f/x"], "/f/x"),
            ("mv", &["/", "/x"], "/x"),
            ("mv", &["/d", "/f"], "/f"),
            ("put", &["in", "/f/x"], "/f/x"),
        ] {
            let said = lab.fails(1, &[&[command], at, args].concat()).stderr;
            assert!(said.contains(path), "{command} {args:?}: {said}");
            assert!(!said.contains("inode") && !said.contains("\"\""), "{command} {args:?}: {said}");
        }
        for (command, args) in [("cat", &[""][..]), ("put", &["in", ""]), ("mv", &["/f", ""])] {
            assert!(lab.fails(2, &[&[command], at, args].concat()).stderr.contains("empty"));
        }
    }
}

#[test]
fn one_device_cannot_be_both_ends() {
    let lab = lab();
    let other_name = format!("emu:{}", lab.path("disk.img").display());
    for args in [
        &["copy", DRIVE, "/f", DRIVE, "/g"][..],
        &["copy", DRIVE, "/f", &other_name, "/g"],
        &["probe", DRIVE, "--peer", &other_name],
    ] {
        let said = lab.fails(2, args).stderr;
        assert!(said.contains("are the same device") && said.contains("hint"), "{args:?}: {said}");
    }
}

#[test]
fn json_has_the_uuid_that_mkfs_printed() {
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    let made = String::from_utf8(lab.ok(&["mkfs", DRIVE])).unwrap();
    let _server = lab.serve(DRIVE, "s", &[]);
    let status: serde_json::Value =
        serde_json::from_slice(&lab.ok(&["status", "--json", "--socket", "s"])).unwrap();
    let uuid = status["server"]["uuid"].as_str().unwrap();
    assert!(uuid.len() == 36 && made.contains(uuid), "{uuid} is not in {made}");
}

#[test]
fn output_that_finds_no_room_is_told_from_a_full_drive() {
    let lab = lab();
    for args in [&["ls", DRIVE, "/"][..], &["cat", DRIVE, "/f"], &["stat", DRIVE, "/f"], &["check", DRIVE]] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let out = lab.command(args).stdout(full).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(said.contains("cannot write to standard output: No space left"), "{args:?}: {said}");
        assert_eq!(out.status.code(), Some(1), "{args:?}: {said}");
    }
}

#[test]
fn what_cannot_be_an_image_or_a_socket_is_said() {
    let lab = lab();
    for device in ["emu:/dev/null", "file:/dev/null"] {
        let said = lab.fails(1, &["mkfs", device]).stderr;
        assert!(said.contains("/dev/null is neither a regular file nor a block device"), "{said}");
    }
    let long = "s".repeat(120);
    for args in [&["serve", DRIVE, "--socket", &long][..], &["status", "--socket", &long]] {
        let said = lab.fails(1, args).stderr;
        assert!(said.contains("the path of a socket 107"), "{said}");
    }
    for args in [&["get", DRIVE, "/f", ""][..], &["put", DRIVE, "", "/f"]] {
        assert!(lab.fails(2, args).stderr.contains("LOCAL is empty"));
    }
}

#[test]
fn help_says_what_a_url_stands_for() {
    let help = String::from_utf8(lab().ok(&["--help"])).unwrap();
    for part in ["size=1G     the drive's size", "cmb=64M ", "pmr=0 ", "lba=4096 ", "cache=on "] {
        assert!(help.contains(part), "{part} is not in {help}");
    }
}
