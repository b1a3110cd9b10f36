//! What is refused, and what is full: nothing is lost by either.

use cmbfs_tests::{Lab, pattern, skip};

fn lab() -> Lab {
    Lab::new(env!("CARGO_BIN_EXE_cmbfs"))
}

#[test]
fn a_file_that_is_no_image_is_never_formatted_without_force() {
    let lab = lab();
    let precious = pattern(1, 3_000_000);
    lab.file("photo.jpg", &precious);
    let said = lab.fails(1, &["mkfs", "emu:photo.jpg?cmb=4M"]).stderr;
    assert!(said.contains("--force"), "{said}");
    for command in ["ls", "cat", "stat", "rm"] {
        lab.fails(1, &[command, "emu:photo.jpg?cmb=4M", "/"]);
    }
    lab.fails(1, &["serve", "emu:photo.jpg", "--socket", "s"]);
    lab.fails(1, &["mkfs", "file:photo.jpg"]);
    assert!(std::fs::read(lab.path("photo.jpg")).unwrap() == precious, "the file was changed");
    assert!(!lab.path("s").exists());
}

#[test]
fn a_host_cache_that_could_leave_a_writer_without_a_window_is_not_served() {
    let lab = lab();
    let drive = "emu:disk.img?size=64M&cmb=0";
    lab.ok(&["mkfs", drive]);
    for cache in ["0", "128K", "511K"] {
        let said = lab.fails(1, &["serve", drive, "--socket", "s", "--host-cache", cache]).stderr;
        assert!(said.contains("262144") && said.contains("524288 bytes or more (--host-cache)"), "{said}");
        assert!(!lab.path("s").exists());
    }
    let server = lab.serve(drive, "s", &["--host-cache", "512K"]);
    let bytes = pattern(3, 3_000_000);
    lab.file("in", &bytes);
    lab.ok(&["put", "--socket", "s", "in", "/f"]);
    assert!(lab.ok(&["cat", "--socket", "s", "/f"]) == bytes, "cat differs");
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn a_refused_mkfs_leaves_no_image_behind() {
    let lab = lab();
    for drive in [
        "emu:x.img?size=1",
        "emu:x.img?size=100K",
        "emu:x.img?size=8000000T",
        "emu:x.img?size=64M&cmb=8000000T",
    ] {
        lab.fails(1, &["mkfs", drive]);
        assert!(!lab.path("x.img").exists(), "{drive} was refused and left a file");
    }
    // What was there stays there.
    lab.file("y.img", &[0; 100_000]);
    lab.fails(1, &["mkfs", "emu:y.img"]);
    assert_eq!(std::fs::read(lab.path("y.img")).unwrap(), [0; 100_000]);
}

#[test]
fn a_filesystem_with_files_is_not_formatted_without_force() {
    let lab = lab();
    let drive = "emu:disk.img?size=64M";
    lab.ok(&["mkfs", drive]);
    lab.ok(&["mkfs", drive]); // empty: nothing to lose
    lab.file("in", b"precious");
    lab.ok(&["put", drive, "in", "/f"]);
    let said = lab.fails(1, &["mkfs", drive]).stderr;
    assert!(said.contains("--force"), "{said}");
    assert_eq!(lab.ok(&["cat", drive, "/f"]), b"precious");
    lab.ok(&["mkfs", "--force", drive]);
    assert_eq!(lab.ok(&["ls", drive, "/"]), b"");
}

#[test]
fn an_image_that_another_process_holds_is_refused_naming_the_holder() {
    let lab = lab();
    let drive = "emu:disk.img?cmb=4M&size=64M";
    lab.ok(&["mkfs", drive]);
    let server = lab.serve(drive, "s", &[]);
    let holder = server.pid().to_string();
    for args in [
        &["mkfs", "--force", drive][..],
        &["ls", drive, "/"],
        &["identify", drive],
        &["check", drive],
        &["serve", drive, "--socket", "s2"],
    ] {
        let said = lab.fails(1, args).stderr;
        assert!(said.contains(&holder), "{args:?} does not name process {holder}:\n{said}");
    }
    assert_eq!(lab.ok(&["ls", "--socket", "s", "/"]), b"");
}

#[test]
fn a_socket_in_use_is_not_taken_and_a_stale_one_is() {
    let lab = lab();
    for image in ["a.img", "b.img"] {
        lab.ok(&["mkfs", &format!("emu:{image}?size=64M")]);
    }
    let server = lab.serve("emu:a.img?size=64M", "s", &[]);
    let said = lab.fails(1, &["serve", "emu:b.img?size=64M", "--socket", "s"]).stderr;
    assert!(said.contains('s'), "{said}");
    assert_eq!(lab.ok(&["ls", "--socket", "s", "/"]), b"");
    server.kill(); // leaves its socket behind
    let server = lab.serve("emu:b.img?size=64M", "s", &[]);
    assert_eq!(lab.ok(&["ls", "--socket", "s", "/"]), b"");
    assert_eq!(server.stop(), Some(0));
    lab.file("plain", b"not a socket");
    lab.fails(1, &["serve", "emu:b.img?size=64M", "--socket", "plain"]);
    assert_eq!(std::fs::read(lab.path("plain")).unwrap(), b"not a socket");
}

#[test]
fn no_server_is_said_so() {
    let lab = lab();
    for args in [
        &["ls", "--socket", "none", "/"][..],
        &["status", "--socket", "none"],
        &["revoke", "--socket", "none"],
    ] {
        let said = lab.fails(1, args).stderr;
        assert!(said.contains("none") && said.contains("there is no such socket"), "{said}");
    }
    lab.file("plain", b"");
    for (socket, word) in [("plain", "a plain file"), (".", "a directory"), ("/dev/null", "a device node")] {
        let said = lab.fails(1, &["status", "--socket", socket]).stderr;
        assert!(said.contains(&format!("that is {word}, not a socket")), "{said}");
    }
}

#[test]
fn a_full_disk_loses_nothing() {
    for through_a_server in [false, true] {
        let lab = lab();
        let drive = "emu:disk.img?cmb=1M&size=32M";
        lab.ok(&["mkfs", drive]);
        let server = through_a_server.then(|| lab.serve(drive, "s", &[]));
        let at: &[&str] = if through_a_server { &["--socket", "s"] } else { &[drive] };
        let mut kept = 0;
        let said = loop {
            lab.file("in", &pattern(kept, 3_000_000));
            let done = lab.run(&[&["put"], at, &["in", &format!("/f{kept}")]].concat());
            if done.code != Some(0) {
                break done.stderr;
            }
            kept += 1;
            assert!(kept < 12, "36 MB fitted on a disk of 32 MiB");
        };
        assert!(said.contains("space"), "{said}");
        assert!(kept >= 6, "only {kept} files of 3 MB fitted on a disk of 32 MiB");
        let intact = |n: u64| {
            let got = lab.ok(&[&["cat"], at, &[&format!("/f{n}")]].concat());
            assert!(got == pattern(n, 3_000_000), "file {n} of {kept} differs after the disk was full");
        };
        (0..kept).for_each(&intact);
        let listed = String::from_utf8(lab.ok(&[&["ls"], at, &["/"]].concat())).unwrap();
        assert_eq!(listed.lines().count() as u64, kept, "the failed put left something behind:\n{listed}");
        // Space comes back.
        lab.ok(&[&["rm"], at, &["/f0"]].concat());
        lab.file("in", &pattern(1000, 3_000_000));
        lab.ok(&[&["put"], at, &["in", "/again"]].concat());
        assert!(lab.ok(&[&["cat"], at, &["/again"]].concat()) == pattern(1000, 3_000_000));
        (1..kept).for_each(&intact);
        if let Some(server) = server {
            assert_eq!(server.stop(), Some(0));
        }
        lab.ok(&["check", drive]);
    }
}

#[test]
fn a_full_cmb_only_changes_the_path() {
    let lab = lab();
    let drive = "emu:disk.img?cmb=1M&size=128M";
    lab.ok(&["mkfs", drive]);
    let files: Vec<_> = (0..4).map(|n| pattern(n, 5_000_000 + n as usize)).collect();
    for (n, bytes) in files.iter().enumerate() {
        lab.file("in", bytes);
        lab.ok(&["put", drive, "in", &format!("/f{n}")]);
    }
    let _server = lab.serve(drive, "s", &[]);
    // Four readers at once over a CMB of one twentieth of the files.
    let children: Vec<_> = (0..files.len())
        .map(|n| lab.command(&["cat", "--socket", "s", &format!("/f{n}")]).spawn().unwrap())
        .collect();
    for (n, child) in children.into_iter().enumerate() {
        let out = child.wait_with_output().unwrap();
        assert!(out.stdout == files[n], "file {n} differs: {}", String::from_utf8_lossy(&out.stderr));
    }
}

#[test]
fn a_mistyped_name_creates_no_image() {
    let lab = lab();
    for args in [
        &["ls", "emu:typo.img", "/"][..],
        &["check", "emu:typo.img"],
        &["identify", "emu:typo.img"],
        &["probe", "emu:typo.img"],
        &["copy", "emu:typo.img", "/a", "emu:ram", "/a"],
        &["serve", "emu:typo.img", "--socket", "s"],
    ] {
        let said = lab.fails(1, args).stderr;
        assert!(said.contains("typo.img"), "{said}");
    }
    assert!(!lab.path("typo.img").exists());
}

#[test]
fn a_full_host_disk_is_said_once_and_in_words() {
    let lab = lab();
    std::fs::create_dir(lab.path("small")).unwrap();
    lab.file("in", &pattern(9, 8_000_000));
    // A filesystem of 4 MiB that only these commands see.
    let script = r#"mount -t tmpfs -o size=4M none small || exit 77
        "$0" mkfs "emu:small/disk.img?size=64M" || exit 78
        exec "$0" put "emu:small/disk.img?size=64M" in /f"#;
    let mut command = std::process::Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]);
    let out = command.arg(env!("CARGO_BIN_EXE_cmbfs")).current_dir(lab.dir()).output();
    let said = out.as_ref().map(|out| String::from_utf8_lossy(&out.stderr).into_owned()).unwrap_or_default();
    match out.ok().and_then(|out| out.status.code()) {
        None | Some(77) => {
            return skip("a_full_host_disk_is_said_once_and_in_words", "no mount in a user namespace");
        }
        code if !said.contains("cmbfs") && code != Some(0) => {
            return skip("a_full_host_disk_is_said_once_and_in_words", said.trim());
        }
        code => assert_eq!(code, Some(1), "{said}"),
    }
    assert_eq!(said.matches("no space left on the host for the image small/disk.img").count(), 1, "{said}");
    assert!(said.lines().count() <= 4, "{said}");
    assert!(said.contains("no space left where the drive keeps its blocks"), "{said}");
    // Whoever goes through a server does not see its log.
    let script = r#"mount -t tmpfs -o size=4M none small || exit 77
        "$0" mkfs "emu:small/disk.img?size=64M" || exit 78
        "$0" serve "emu:small/disk.img?size=64M" --socket s 2>server.log >serving & server=$!
        while ! grep -q serving serving; do kill -0 $server || exit 79; sleep 0.1; done
        "$0" put --socket s in /f; code=$?
        kill $server; wait $server; exit $code"#;
    let mut command = std::process::Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]);
    let out = command.arg(env!("CARGO_BIN_EXE_cmbfs")).current_dir(lab.dir()).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(
        said.contains("cannot put in as /f") && said.contains("(of an image: on the host's disk), free some"),
        "{said}"
    );
}
