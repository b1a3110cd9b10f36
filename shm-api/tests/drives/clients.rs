//! Who has a drive do things: a process that is killed, and one that may not.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use nvme_driver::emu::Fault;
use nvme_driver::spec::NvmOpcode;
use shm_api::client::{Client, OpenMode};
use shm_api::protocol::ErrorCode;

use crate::common::{self, SMALL, Setup, spawn, until};
use crate::rig::{AT, Drive, NAME, W, content, file, pattern, refused};

const NOBODY: u32 = 65_534;

/// A process that has the drive do things until it is killed.
pub fn user(args: &[String]) {
    let client = Client::connect(Path::new(&args[0])).unwrap();
    let file = client.open("/a", OpenMode::write()).unwrap();
    let _mapped = file.map(0, 2 * W).unwrap();
    let drive = client.open_drive(NAME).unwrap();
    let window = drive.map(&file, 0, true).unwrap();
    println!("\nmapped");
    std::io::stdout().flush().unwrap();
    // The test has this one go on for long.
    drive.dma_fill(window.iova, AT, W).unwrap();
    unreachable!();
}

/// One that may not have it.
pub fn stranger(args: &[String]) {
    let (uid, gid) = (rustix::fs::Uid::from_raw(NOBODY), rustix::fs::Gid::from_raw(NOBODY));
    rustix::thread::set_thread_groups(&[]).unwrap();
    rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
    rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
    let client = Client::connect(Path::new(&args[0])).unwrap();
    // That there is one it may know.
    assert_eq!(client.peers().unwrap().peers.len(), 1);
    let said = refused(client.open_drive(NAME), ErrorCode::Denied);
    assert!(said.contains("65534"), "{said}");
    println!("\nok");
}

fn says(child: &mut std::process::Child, word: &str) {
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == word), "it never said {word}");
}

#[test]
fn a_client_that_is_killed_amid_a_dma_gives_its_windows_back() {
    let mut other = Drive::new();
    other.put(AT, &pattern(W, 11));
    // Long, for a client that seems to have left before it is seen dead has its windows revoked.
    let serving = other.serve(Setup { grace_ms: 20_000, ..SMALL }, other.peer());
    let client = serving.client();
    let (file, mapped) = file(&client, "/a", 2 * W);
    // It has its queue, and nothing mapped.
    client.open_drive(NAME).unwrap().fill(&file, 0, 0, 512).unwrap();
    let before = other.mappings();
    other.next(NvmOpcode::Read, Fault::Delay { steps: 3000 });
    let mut helper = spawn("user", &[serving.socket.to_str().unwrap()]);
    says(&mut helper.0, "mapped");
    until("the command is held", || other.emulated.faults().held() > 0);
    helper.0.kill().unwrap();
    helper.0.wait().unwrap();
    assert!(other.emulated.faults().held() > 0, "it was over already: this shows nothing");
    until("its window is taken back from the drive", || client.peers().unwrap().all_mappings == 0);
    assert_eq!((other.mappings(), other.emulated.domain().counters().faults), (before, 0));
    // What was under way has been let finish; the window goes on, and the next one has the drive do things.
    assert!(content(&mapped, 0, W) == pattern(W, 11));
    let drive = client.open_drive(NAME).unwrap();
    drive.fill(&file, W, AT, W).unwrap();
    assert!(content(&mapped, W, W) == pattern(W, 11));
    client.revoke("/a").unwrap();
    assert!(content(&mapped, 0, W) == pattern(W, 11));
}

#[test]
fn a_stranger_may_not_have_raw_blocks() {
    if !rustix::process::geteuid().is_root() {
        return common::skip("a_stranger_may_not_have_raw_blocks", "not root: cannot become another user");
    }
    use std::os::unix::fs::PermissionsExt;
    let other = Drive::new();
    let serving = other.serve(SMALL, other.peer());
    let folder = serving.socket.parent().unwrap();
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&serving.socket, std::fs::Permissions::from_mode(0o666)).unwrap();
    let mut helper = spawn("stranger", &[serving.socket.to_str().unwrap()]);
    says(&mut helper.0, "ok");
    assert!(helper.0.wait().unwrap().success());
}
