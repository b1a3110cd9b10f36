//! The demo, with odd files and interrupted: the right exit status, and nothing left behind.
#![allow(clippy::unwrap_used, clippy::panic, reason = "test helpers: a step that fails is a test that fails")]

use std::io::{BufRead, BufReader};
use std::path::Path;

use cmbfs_tests::{Lab, pattern};

fn lab() -> Lab {
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    std::fs::create_dir(lab.path("tmp")).unwrap();
    lab
}

fn demo(lab: &Lab, file: Option<&Path>) -> String {
    let mut args = vec![std::ffi::OsStr::new("demo")];
    args.extend(file.map(Path::as_os_str));
    let out = lab.command(&args).env("TMPDIR", lab.path("tmp")).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(0), "{text}{errors}");
    nothing_left(lab);
    text
}

fn nothing_left(lab: &Lab) {
    let left: Vec<_> = std::fs::read_dir(lab.path("tmp")).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(left.is_empty(), "the demo left files behind: {left:?}");
    let folder = lab.path("tmp").to_string_lossy().into_owned();
    for process in std::fs::read_dir("/proc").unwrap() {
        let Ok(cmdline) = std::fs::read(process.unwrap().path().join("cmdline")) else { continue };
        let cmdline = String::from_utf8_lossy(&cmdline);
        assert!(!cmdline.contains(&folder), "the demo left a process behind: {cmdline}");
    }
}

#[test]
fn with_the_file_it_makes() {
    let lab = lab();
    let text = demo(&lab, None);
    for word in ["sha256", "CMB", "revoke", "peer", "SIGKILL", "latency", "identical"] {
        assert!(text.contains(word), "the report does not say {word:?}:\n{text}");
    }
}

#[test]
fn with_odd_files() {
    for size in [0, 1, 4096, 262_145, 1_000_003] {
        let lab = lab();
        let bytes = pattern(size as u64, size);
        let file = lab.file("odd name\n.bin", &bytes);
        demo(&lab, Some(&file));
        assert!(std::fs::read(&file).unwrap() == bytes, "the demo changed its input");
    }
}

#[test]
fn with_a_file_larger_than_the_cmb() {
    let lab = lab();
    let file = lab.file("large", &pattern(5, 80 << 20));
    demo(&lab, Some(&file));
}

#[test]
fn with_what_is_no_file() {
    let lab = lab();
    lab.fails(1, &["demo", "missing"]);
    lab.fails(1, &["demo", "tmp"]);
    lab.fails(1, &["demo", "/dev/null"]);
    lab.fails(1, &["demo", "/proc/version"]); // says that it is empty, and is not
    nothing_left(&lab);
}

#[test]
fn interrupted() {
    for lines in [1, 4, 7] {
        let lab = lab();
        let mut child = lab.command(&["demo"]).env("TMPDIR", lab.path("tmp")).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
        for _ in 0..lines {
            output.next().unwrap().unwrap();
        }
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        for line in output {
            line.unwrap();
        }
        assert_eq!(child.wait().unwrap().code(), Some(128 + 2));
        nothing_left(&lab);
    }
}
