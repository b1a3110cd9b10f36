//! Wrong arguments for every subcommand: exit status 2, a message that names the argument, no panic, nothing touched.

use cmbfs_tests::Lab;

fn lab() -> Lab {
    Lab::new(env!("CARGO_BIN_EXE_cmbfs"))
}

/// Subcommand lines that are wrong as they stand, and a word that the message must hold.
const WRONG: &[(&[&str], &str)] = &[
    (&[], "Usage"),
    (&["frobnicate"], "frobnicate"),
    (&["mkfs"], "DEVICE"),
    (&["mkfs", "emu:x.img", "extra"], "extra"),
    (&["mkfs", "--no-such-option", "emu:x.img"], "--no-such-option"),
    (&["mkfs", "nonsense"], "nonsense"),
    (&["mkfs", "emu:x.img?size=banana"], "banana"),
    (&["mkfs", "emu:x.img?colour=red"], "colour"),
    (&["identify"], "DEVICE"),
    (&["identify", "floppy:a"], "floppy"),
    (&["devices", "extra"], "extra"),
    (&["bind"], "ADDR"),
    (&["bind", "somewhere"], "somewhere"),
    (&["bind", "0000:01:00.8"], "0000:01:00.8"),
    (&["unbind"], "ADDR"),
    (&["unbind", "0000:01:00.0", "extra"], "extra"),
    (&["emulate"], "IMAGE"),
    (&["emulate", "x.img"], "--socket"),
    (&["emulate", "x.img?colour=red", "--socket", "s"], "colour"),
    (&["emulate", "", "--socket", "s"], "IMAGE is empty"),
    (&["put"], "DEVICE"),
    (&["put", "emu:x.img"], "LOCAL PATH"),
    (&["put", "emu:x.img", "local"], "PATH"),
    (&["put", "emu:x.img", "local", "/p", "extra"], "extra"),
    (&["put", "--socket"], "--socket"),
    (&["put", "--socket", "s", "local"], "PATH"),
    (&["put", "--socket", "s", "local", "/p", "extra"], "extra"),
    (&["get"], "DEVICE"),
    (&["get", "emu:x.img", "/p"], "LOCAL"),
    (&["get", "--socket", "s", "emu:x.img", "/p", "l"], "l"),
    (&["ls"], "DEVICE"),
    (&["ls", "emu:x.img", "/a", "/b"], "/b"),
    (&["ls", "--socket", "s", "/a", "/b"], "/b"),
    (&["cat"], "DEVICE"),
    (&["cat", "emu:x.img"], "PATH"),
    (&["cat", "--socket", "s"], "PATH"),
    (&["stat"], "DEVICE"),
    (&["stat", "emu:x.img"], "PATH"),
    (&["rm"], "DEVICE"),
    (&["rm", "emu:x.img"], "PATH"),
    (&["mkdir", "emu:x.img"], "PATH"),
    (&["mv", "emu:x.img", "/a"], "TO"),
    (&["serve"], "DEVICE"),
    (&["serve", "emu:x.img"], "--socket"),
    (&["serve", "--socket", "s"], "DEVICE"),
    (&["serve", "emu:x.img", "--socket", "s", "--grace-ms", "soon"], "soon"),
    (&["serve", "emu:x.img?size=-1", "--socket", "s"], "-1"),
    (&["status"], "--socket"),
    (&["status", "--socket", "s", "extra"], "extra"),
    (&["revoke"], "--socket"),
    (&["revoke", "--socket", "s", "/a", "/b"], "/b"),
    (&["check"], "DEVICE"),
    (&["check", "emu:x.img", "extra"], "extra"),
    (&["demo", "a", "b"], "b"),
    (&["demo", "--no-such-option"], "--no-such-option"),
];

#[test]
fn wrong_arguments_are_named_and_nothing_is_touched() {
    let lab = lab();
    for (args, word) in WRONG {
        let done = lab.fails(2, args);
        assert!(done.stderr.contains(word), "{args:?} did not name {word:?}:\n{}", done.stderr);
        assert!(done.stdout.is_empty(), "{args:?} wrote to standard output:\n{}", done.text());
    }
    let left: Vec<_> = std::fs::read_dir(lab.dir()).unwrap().collect();
    assert!(left.is_empty(), "wrong arguments left files behind: {left:?}");
}

#[test]
fn arguments_that_are_no_text_are_refused() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let lab = lab();
    let raw = OsStr::from_bytes(b"emu:\xff\xfe");
    for command in ["mkfs", "identify", "check"] {
        lab.fails(2, &[OsStr::new(command), raw]);
    }
    lab.fails(2, &[OsStr::new("ls"), raw, OsStr::new("/")]);
    lab.fails(2, &[OsStr::new("cat"), OsStr::new("emu:x.img"), OsStr::from_bytes(b"/\xff")]);
}

#[test]
fn every_subcommand_explains_itself() {
    let lab = lab();
    let all = String::from_utf8(lab.ok(&["--help"])).unwrap();
    for name in [
        "mkfs",
        "identify",
        "devices",
        "bind",
        "unbind",
        "emulate",
        "put",
        "get",
        "ls",
        "cat",
        "stat",
        "rm",
        "mkdir",
        "mv",
        "serve",
        "status",
        "revoke",
        "placement",
        "check",
        "demo",
    ] {
        assert!(all.contains(name), "--help does not list {name}");
        let help = String::from_utf8(lab.ok(&[name, "--help"])).unwrap();
        assert!(help.contains("Example"), "cmbfs {name} --help shows no example:\n{help}");
    }
    lab.ok(&["--version"]);
}
