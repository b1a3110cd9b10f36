//! An ordinary user's own filesystem is theirs. As root the tests become somebody else; otherwise they are somebody else.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::process::Command;

use cmbfs::extent_fs::ROOT;
use cmbfs::{Filesystem, FormatOptions, MountOptions, NewInode, OpenOptions};
use cmbfs_tests::{Lab, Server, skip};
use rustix::process::{Gid, Uid, geteuid};

const NOBODY: u32 = 65_534;
const DRIVE: &str = "emu:disk.img?cmb=4M&size=64M";

/// The command, copied to where that user may run it, as that user.
fn command(lab: &Lab, args: &[&str]) -> Command {
    let mut command = lab.command(args);
    if geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

fn ok(lab: &Lab, args: &[&str]) -> String {
    let out = command(lab, args).output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

#[test]
fn a_user_changes_the_top_of_their_own_filesystem_through_their_own_server() {
    // Where the tests are built may be out of that user's reach.
    let place = tempfile::tempdir().unwrap();
    let copy = place.path().join("cmbfs");
    fs::copy(env!("CARGO_BIN_EXE_cmbfs"), &copy).unwrap();
    let lab = Lab::new(copy.to_str().unwrap());
    if geteuid().is_root() {
        for dir in [place.path(), lab.dir()] {
            chown(dir, Some(NOBODY), Some(NOBODY)).unwrap();
        }
    }
    ok(&lab, &["mkfs", DRIVE]);
    let server = Server::start(&mut command(&lab, &["serve", DRIVE, "--socket", "s"]));
    fs::write(lab.path("in"), b"theirs").unwrap();
    for name in ["/f", "/f", "/g"] {
        ok(&lab, &["put", "--socket", "s", "in", name]);
    }
    ok(&lab, &["mv", "--socket", "s", "/f", "/h"]);
    ok(&lab, &["mkdir", "--socket", "s", "/d"]);
    ok(&lab, &["rm", "--socket", "s", "/g"]);
    assert_eq!(ok(&lab, &["cat", "--socket", "s", "/h"]), "theirs");
    let names = ok(&lab, &["ls", "--socket", "s", "/"]);
    assert!(names.contains('h') && names.contains('d') && !names.contains('g'), "{names}");
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn what_the_library_formats_is_the_callers() {
    // Credentials are a thread's: this one becomes somebody else, the others stay.
    let made = std::thread::spawn(|| {
        if geteuid().is_root() {
            let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
            rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
        } else {
            skip("what_the_library_formats_is_the_callers", "not root: as one user only");
        }
        let device =
            cmbfs::open(&"emu:ram?cmb=0&size=16M".parse().unwrap(), &OpenOptions::default()).unwrap();
        let owner = |options: &FormatOptions| {
            let mut disk = device.disk().unwrap();
            cmbfs::format(&mut disk, options).unwrap();
            let root = Filesystem::mount(disk, MountOptions::default()).unwrap().stat(ROOT).unwrap();
            (root.uid, root.gid, root.mode)
        };
        let asked = NewInode { uid: 7, gid: 8, mode: 0o1777 };
        let own = owner(&FormatOptions::default());
        (own, owner(&FormatOptions { root: Some(asked), ..FormatOptions::default() }), geteuid().as_raw())
    });
    let (own, asked, uid) = made.join().unwrap();
    assert_eq!((own.0, own.2), (uid, 0o755));
    assert_eq!(asked, (7, 8, 0o1777));
}
