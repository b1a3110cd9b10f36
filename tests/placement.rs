//! `cmbfs placement`, `mkfs --placement` and `serve --placement`: choices are kept with files and filesystems, and `stat` says whose counts.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use cmbfs_tests::{Lab, pattern};
use serde_json::Value;

const DRIVE: &str = "emu:disk.img?cmb=4M&size=64M";

fn lab(mkfs: &[&str]) -> Lab {
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    lab.ok(&[&["mkfs", DRIVE], mkfs].concat());
    lab.file("in", &pattern(1, 1_000_000));
    lab.ok(&["put", DRIVE, "in", "/f"]);
    lab
}

fn json(lab: &Lab, args: &[&str]) -> Value {
    serde_json::from_slice(&lab.ok(args)).unwrap()
}

/// Where the windows of `path` may live, and who says so.
fn placed(lab: &Lab, at: &[&str], path: &str) -> (String, String) {
    let stat = json(lab, &[&["stat", "--json"], at, &[path]].concat());
    let word = |field: &str| stat[field].as_str().unwrap().to_owned();
    (word("placement"), word("placed_by"))
}

fn pair(placement: &str, by: &str) -> (String, String) {
    (placement.to_owned(), by.to_owned())
}

/// Bytes by path, of one server.
fn bytes_by(lab: &Lab, path: &str) -> u64 {
    let status = json(lab, &["status", "--json", "--socket", "s"]);
    let lines = status["status"]["paths"].as_array().unwrap();
    lines.iter().filter(|l| l["path"] == path).map(|l| l["bytes"].as_u64().unwrap()).sum()
}

#[test]
fn on_a_device_a_choice_stays_with_the_file_and_with_the_filesystem() {
    let lab = lab(&[]);
    lab.ok(&["put", DRIVE, "in", "/g"]);
    lab.ok(&["mkdir", DRIVE, "/d"]);
    assert_eq!(placed(&lab, &[DRIVE], "/f"), pair("auto", "nobody"));
    lab.ok(&["placement", DRIVE, "/f", "host"]);
    lab.ok(&["mv", DRIVE, "/f", "/d/f"]);
    assert_eq!(placed(&lab, &[DRIVE], "/d/f"), pair("host", "file"));
    lab.ok(&["placement", DRIVE, "/", "cmb"]);
    assert_eq!(placed(&lab, &[DRIVE], "/d/f"), pair("host", "file"));
    assert_eq!(placed(&lab, &[DRIVE], "/g"), pair("cmb", "filesystem"));
    assert_eq!(placed(&lab, &[DRIVE], "/"), pair("cmb", "filesystem"));
    let text = String::from_utf8(lab.ok(&["stat", DRIVE, "/g"])).unwrap();
    assert!(text.contains("placement cmb (the filesystem's choice)"), "{text}");
    lab.ok(&["placement", DRIVE, "/d/f", "default"]);
    assert_eq!(placed(&lab, &[DRIVE], "/d/f"), pair("cmb", "filesystem"));
    lab.ok(&["placement", DRIVE, "/", "default"]);
    assert_eq!(placed(&lab, &[DRIVE], "/d/f"), pair("auto", "nobody"));
    assert!(lab.fails(1, &["placement", DRIVE, "/d", "host"]).stderr.contains("is a directory"));
    assert!(lab.fails(1, &["placement", DRIVE, "/none", "host"]).stderr.contains("/none"));
    assert!(lab.fails(2, &["placement", DRIVE, "/g", "cbm"]).stderr.contains("auto, cmb, host or default"));
    lab.fails(2, &["placement", DRIVE, "/g"]);
    lab.fails(2, &["mkfs", DRIVE, "--placement", "default"]);
    assert!(lab.ok(&["cat", DRIVE, "/d/f"]) == pattern(1, 1_000_000));
    lab.ok(&["check", DRIVE]);
}

#[test]
fn a_filesystem_made_to_opt_out_uses_no_cmb_but_for_a_file_that_asks_and_a_killed_server_forgets_nothing() {
    let lab = lab(&["--placement", "host"]);
    let bytes = pattern(1, 1_000_000);
    {
        let server = lab.serve(DRIVE, "s", &[]);
        assert_eq!(placed(&lab, &["--socket", "s"], "/f"), pair("host", "filesystem"));
        assert!(lab.ok(&["cat", "--socket", "s", "/f"]) == bytes);
        lab.ok(&["put", "--socket", "s", "in", "/g"]);
        assert!(bytes_by(&lab, "host cache") >= 2_000_000);
        assert_eq!(bytes_by(&lab, "CMB"), 0);
        assert_eq!(json(&lab, &["status", "--json", "--socket", "s"])["status"]["placement"], "host");
        lab.ok(&["placement", "--socket", "s", "/g", "cmb"]);
        assert!(lab.ok(&["cat", "--socket", "s", "/g"]) == bytes);
        server.kill();
    }
    let _server = lab.serve(DRIVE, "s", &[]);
    assert_eq!(placed(&lab, &["--socket", "s"], "/g"), pair("cmb", "file"));
    assert!(lab.ok(&["cat", "--socket", "s", "/f"]) == bytes);
    assert_eq!(bytes_by(&lab, "CMB"), 0);
    assert!(lab.ok(&["cat", "--socket", "s", "/g"]) == bytes);
    assert!(bytes_by(&lab, "CMB") >= 1_000_000);
}

#[test]
fn a_server_that_was_told_so_goes_before_files_and_says_it() {
    let lab = lab(&[]);
    {
        let server = lab.serve(DRIVE, "s", &["--placement", "host"]);
        let done = lab.run(&["placement", "--socket", "s", "/f", "cmb"]);
        assert_eq!(done.code, Some(0));
        assert!(done.stderr.contains("started with --placement host"), "{}", done.stderr);
        assert_eq!(placed(&lab, &["--socket", "s"], "/f"), pair("host", "server"));
        assert!(lab.ok(&["cat", "--socket", "s", "/f"]) == pattern(1, 1_000_000));
        assert_eq!(bytes_by(&lab, "CMB"), 0);
        assert_eq!(server.stop(), Some(0));
    }
    let _server = lab.serve(DRIVE, "s", &[]);
    assert_eq!(lab.run(&["placement", "--socket", "s", "/", "host"]).stderr, "");
    assert_eq!(placed(&lab, &["--socket", "s"], "/f"), pair("cmb", "file"));
}
