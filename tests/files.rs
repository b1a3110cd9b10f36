//! Files in and out: directly on a device, through a server, and crosswise; every byte compared.

use std::io::Read;
use std::process::Stdio;

use cmbfs_tests::{Lab, pattern};

const DRIVE: &str = "emu:disk.img?cmb=4M&size=256M";

fn lab() -> Lab {
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    lab.ok(&["mkfs", DRIVE]);
    lab
}

fn sizes() -> Vec<usize> {
    vec![0, 1, 4095, 4096, 4097, 262_144, 1_048_577, 9_000_001]
}

#[test]
fn what_is_put_on_a_device_is_got_back() {
    let lab = lab();
    for (i, size) in sizes().into_iter().enumerate() {
        let bytes = pattern(i as u64, size);
        lab.file("in", &bytes);
        let path = format!("/f{size}");
        lab.ok(&["put", DRIVE, "in", &path]);
        lab.ok(&["get", DRIVE, &path, "out"]);
        assert!(std::fs::read(lab.path("out")).unwrap() == bytes, "get of {size} bytes differs");
        assert!(lab.ok(&["cat", DRIVE, &path]) == bytes, "cat of {size} bytes differs");
    }
    lab.ok(&["check", DRIVE]);
}

#[test]
fn what_is_put_through_a_server_is_got_back_and_is_on_the_device() {
    let lab = lab();
    let server = lab.serve(DRIVE, "s", &[]);
    for (i, size) in sizes().into_iter().enumerate() {
        let bytes = pattern(100 + i as u64, size);
        lab.file("in", &bytes);
        let path = format!("/f{size}");
        lab.ok(&["put", "--socket", "s", "in", &path]);
        lab.ok(&["get", "--socket", "s", &path, "out"]);
        assert!(std::fs::read(lab.path("out")).unwrap() == bytes, "get of {size} bytes differs");
        assert!(lab.ok(&["cat", "--socket", "s", &path]) == bytes, "cat of {size} bytes differs");
    }
    assert_eq!(server.stop(), Some(0), "the server did not end cleanly on SIGTERM");
    assert!(!lab.path("s").exists(), "the server left its socket behind");
    for (i, size) in sizes().into_iter().enumerate() {
        let got = lab.ok(&["cat", DRIVE, &format!("/f{size}")]);
        assert!(got == pattern(100 + i as u64, size), "{size} bytes differ after the server ended");
    }
    lab.ok(&["check", DRIVE]);
}

#[test]
fn a_server_shows_what_was_put_directly_before_and_after_a_revocation() {
    let lab = lab();
    let bytes = pattern(7, 3_000_000);
    lab.file("in", &bytes);
    lab.ok(&["put", DRIVE, "in", "/f"]);
    let _server = lab.serve(DRIVE, "s", &[]);
    for round in 0..3 {
        assert!(lab.ok(&["cat", "--socket", "s", "/f"]) == bytes, "round {round} differs");
        let args: &[&str] = match round {
            0 => &["revoke", "--socket", "s", "/f"],
            _ => &["revoke", "--socket", "s"],
        };
        lab.ok(args);
    }
    let status: serde_json::Value =
        serde_json::from_slice(&lab.ok(&["status", "--json", "--socket", "s"])).unwrap();
    assert!(status.is_object(), "{status}");
    assert!(!lab.ok(&["status", "--socket", "s"]).is_empty());
}

#[test]
fn names_behave() {
    let lab = lab();
    lab.file("a", b"first");
    lab.file("b", b"second, and longer");
    for at in [&["--socket", "s"][..], &[DRIVE][..]] {
        // The server first, then the device that it leaves behind.
        let server = (at.len() == 2).then(|| lab.serve(DRIVE, "s", &[]));
        let run = |command: &str, args: &[&str]| lab.ok(&[&[command], at, args].concat());
        let fails = |command: &str, args: &[&str]| lab.fails(1, &[&[command], at, args].concat()).stderr;
        run("mkdir", &["/d"]);
        run("put", &["a", "/d/x"]);
        run("put", &["b", "/d/x"]); // replaced
        assert_eq!(run("cat", &["/d/x"]), b"second, and longer");
        run("put", &["a", "/d/y"]);
        run("mv", &["/d/y", "/d/x"]); // replaced by renaming
        assert_eq!(run("cat", &["/d/x"]), b"first");
        assert_eq!(run("ls", &["/d"]), b"x\n");
        assert_eq!(run("ls", &["/"]), b"d/\n");
        let stat: serde_json::Value = serde_json::from_slice(&run("stat", &["--json", "/d/x"])).unwrap();
        assert_eq!(stat["size"], 5, "{stat}");
        assert_eq!(stat["kind"], "file", "{stat}");
        let list: serde_json::Value = serde_json::from_slice(&run("ls", &["--json", "/d"])).unwrap();
        assert_eq!(list[0]["name"], "x", "{list}");
        assert!(String::from_utf8(run("ls", &["-l", "/d"])).unwrap().contains("5 B"));
        assert!(fails("put", &["a", "/no/such/x"]).contains("/no"));
        assert!(fails("put", &["missing", "/m"]).contains("missing"));
        assert!(fails("cat", &["/d"]).contains("directory"));
        assert!(fails("rm", &["/d"]).contains("empty"));
        assert!(fails("mkdir", &["/d"]).contains("exist"));
        assert!(fails("get", &["/none", "out"]).contains("/none"));
        assert!(!lab.path("out").exists(), "a failed get left a file");
        assert!(fails("ls", &["/none"]).contains("/none"));
        run("rm", &["/d/x"]);
        run("rm", &["/d"]);
        assert_eq!(run("ls", &["/"]), b"");
        if let Some(server) = server {
            assert_eq!(server.stop(), Some(0));
        }
    }
    lab.ok(&["check", DRIVE]);
}

#[test]
fn into_a_directory_things_go_under_their_own_name_and_it_is_said() {
    let lab = lab();
    const OTHER: &str = "emu:other.img?cmb=0&size=64M";
    lab.ok(&["mkfs", OTHER]);
    lab.ok(&["mkdir", OTHER, "/d"]);
    lab.file("a", b"first");
    std::fs::create_dir_all(lab.path("out/taken")).unwrap();
    for at in [&["--socket", "s"][..], &[DRIVE][..]] {
        let server = (at.len() == 2).then(|| lab.serve(DRIVE, "s", &[]));
        let run = |command: &str, args: &[&str]| {
            String::from_utf8(lab.ok(&[&[command], at, args].concat())).unwrap()
        };
        let fails = |command: &str, args: &[&str]| lab.fails(1, &[&[command], at, args].concat()).stderr;
        run("mkdir", &["/d"]);
        assert_eq!(run("put", &["a", "/whole"]), "", "what goes where it was told to needs no word");
        for (target, said) in
            [("/", "a -> /a\n"), ("/d", "a -> /d/a\n"), ("/d/", "a -> /d/a\n"), ("/d/.", "a -> /d/./a\n")]
        {
            assert_eq!(run("put", &["a", target]), said);
        }
        assert_eq!(run("cat", &["/d/a"]), "first");
        assert_eq!(run("mv", &["/whole", "/d/"]), "/whole -> /d/whole\n");
        assert_eq!(run("mv", &["/d/whole", "/"]), "/d/whole -> /whole\n");
        run("mkdir", &["/e"]);
        assert_eq!(run("mv", &["/e/", "/d"]), "/e/ -> /d/e\n");
        assert_eq!(run("mv", &["/d/e", "/new/"]), "", "a directory may be named with a slash behind it");
        assert_eq!(run("ls", &["/d"]), "a\n");
        for (target, said) in
            [("out", "/d/a -> out/a\n"), ("out/", "/d/a -> out/a\n"), (".", "/d/a -> ./a\n")]
        {
            assert_eq!(run("get", &["/d/a", target]), said);
        }
        assert_eq!(std::fs::read(lab.path("out/a")).unwrap(), b"first");
        // Nothing becomes a file that was said to be a directory, and no directory is replaced.
        run("mkdir", &["/new/a"]);
        run("mkdir", &["/d/taken"]);
        run("put", &["a", "/taken"]);
        for (command, args, word) in [
            ("put", &["a", "/none/"][..], "there is no directory /none/"),
            ("put", &["a", "/a/"], "/a/ is not a directory"),
            ("put", &["a", "/new"], "/new/a is a directory"),
            ("put", &["out", "/d"], "out is a directory"),
            ("mv", &["/a", "/none/"], "there is no directory /none/"),
            ("mv", &["/taken", "/d"], "directory"),
            ("mv", &["/d", "/d"], "into itself"),
            ("get", &["/a", "none/"], "there is no directory none/"),
            ("get", &["/taken", "out"], "out/taken: Is a directory"),
            ("get", &["/", "out"], "/ names no file"),
        ] {
            let said = fails(command, args);
            assert!(said.contains(word), "{command} {args:?}: {said}");
        }
        for name in ["/new/a", "/new", "/d/taken", "/taken", "/a", "/whole", "/d/a"] {
            run("rm", &[name]);
        }
        if let Some(server) = server {
            assert_eq!(server.stop(), Some(0));
        }
        lab.ok(&["rm", DRIVE, "/d"]);
    }
    lab.ok(&["put", DRIVE, "a", "/f"]);
    for how in [&["copy"][..], &["copy", "--peer"]] {
        let copy =
            |target: &str| String::from_utf8(lab.ok(&[how, &[DRIVE, "/f", OTHER, target]].concat())).unwrap();
        assert!(copy("/d").starts_with("/f -> /d/f\n"));
        assert!(copy("/").starts_with("/f -> /f\n"), "the same name is still said: it was not given");
        assert!(!copy("/whole").contains("->"));
        for (target, word) in [("/none/", "there is no directory /none/"), ("/whole/", "is not a directory")]
        {
            let said = lab.fails(1, &[how, &[DRIVE, "/f", OTHER, target]].concat()).stderr;
            assert!(said.contains(word), "{said}");
        }
    }
    assert_eq!(lab.ok(&["cat", OTHER, "/d/f"]), b"first");
    lab.ok(&["check", DRIVE]);
    lab.ok(&["check", OTHER]);
}

#[test]
fn a_failed_get_leaves_the_local_file_alone() {
    let lab = lab();
    lab.file("precious", b"keep me");
    lab.fails(1, &["get", DRIVE, "/none", "precious"]);
    assert_eq!(std::fs::read(lab.path("precious")).unwrap(), b"keep me");
}

#[test]
fn a_reader_that_leaves_early_is_not_complained_about() {
    let lab = lab();
    lab.file("in", &pattern(3, 4_000_000));
    lab.ok(&["put", DRIVE, "in", "/f"]);
    let mut child = lab.command(&["cat", DRIVE, "/f"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
    // As a shell has it of any other tool: not done, by SIGPIPE.
    assert_eq!(out.status.code(), Some(141));
    let mut child = lab.command(&["get", DRIVE, "/f", "/dev/stdout"]).stdout(Stdio::piped()).spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(141));
}

#[test]
fn a_log_that_is_no_terminal_gets_no_colours() {
    let lab = lab();
    let out = lab.command(&["ls", DRIVE, "/"]).env("CMBFS_LOG", "trace").output().unwrap();
    assert!(!out.stderr.is_empty(), "nothing was logged");
    assert!(!out.stderr.contains(&0x1b), "{}", String::from_utf8_lossy(&out.stderr));
}
