//! `cmbfs revoke`: every scope, against a server whose clients hold windows. What moved is asked of `cmbfs status --json`.
#![allow(clippy::unwrap_used, reason = "test helpers: a step that fails is a test that fails")]

use cmbfs::{Client, File, Mapped, OpenMode};
use cmbfs_tests::{Lab, Server, pattern};
use serde_json::Value;

const DRIVE: &str = "emu:disk.img?cmb=4M&size=64M";
const WINDOW: u64 = 65_536;
/// Windows of each file.
const WINDOWS: u64 = 4;

/// A client that holds all windows of a file, in the CMB.
struct Holder {
    client: Client,
    file: File,
    mapped: Mapped,
    bytes: Vec<u8>,
}

impl Holder {
    fn new(lab: &Lab, path: &str, bytes: &[u8]) -> Self {
        let client = Client::connect(lab.path("s")).unwrap();
        let file = client.open(path, OpenMode::read()).unwrap();
        let mapped = file.map_read(0, bytes.len() as u64).unwrap();
        let holder = Self { client, file, mapped, bytes: bytes.to_vec() };
        holder.reads();
        holder
    }

    /// Every byte is what was put, wherever its window is.
    fn reads(&self) {
        let mut got = vec![0; self.bytes.len()];
        self.mapped.read(0, &mut got).unwrap();
        assert!(got == self.bytes, "the bytes changed");
    }
}

struct Scene {
    lab: Lab,
    _server: Server,
    a: Holder,
    b: Holder,
}

/// Two clients that hold four windows of a file each, all of them in the CMB.
fn scene() -> Scene {
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    lab.ok(&["mkfs", DRIVE]);
    let bytes = ["/a", "/b"].map(|path| {
        let bytes = pattern(path.len() as u64, (WINDOWS * WINDOW) as usize);
        lab.file("in", &bytes);
        lab.ok(&["put", DRIVE, "in", path]);
        bytes
    });
    let server = lab.serve(DRIVE, "s", &["--window", "64K"]);
    let (a, b) = (Holder::new(&lab, "/a", &bytes[0]), Holder::new(&lab, "/b", &bytes[1]));
    let scene = Scene { lab, _server: server, a, b };
    assert_eq!(scene.in_cmb(), 2 * WINDOWS, "they are all in the CMB at first");
    scene
}

impl Scene {
    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_slice(&self.lab.ok(args)).unwrap()
    }

    /// Windows in the CMB, by the server's status.
    fn in_cmb(&self) -> u64 {
        let status = self.json(&["status", "--json", "--socket", "s"])["status"].take();
        let windows = status["cmb_windows"].as_u64().unwrap();
        assert_eq!(status["cmb_used"].as_u64().unwrap(), windows * WINDOW, "{status}");
        windows
    }

    /// Runs `cmbfs revoke`, which must say that it moved and freed so many windows; everybody reads on.
    fn revokes(&self, windows: u64, args: &[&str]) {
        let before = self.in_cmb();
        let said = self.json(&[&["revoke", "--json", "--socket", "s"], args].concat());
        assert_eq!(said["windows"], windows, "{args:?}: {said}");
        assert_eq!(said["freed_pages"], windows * WINDOW / 4096, "{args:?}: {said}");
        assert_eq!((&said["quarantined_pages"], &said["fenced"]), (&0.into(), &0.into()), "{args:?}: {said}");
        assert_eq!(self.in_cmb(), before - windows, "{args:?}");
        self.a.reads();
        self.b.reads();
    }
}

#[test]
fn a_file_is_revoked_and_no_other() {
    let scene = scene();
    let cmb_reads = scene.b.mapped.paths().cmb_reads;
    scene.revokes(WINDOWS, &["/a"]);
    assert!(scene.b.mapped.paths().cmb_reads > cmb_reads, "/b was to stay in the CMB");
    scene.revokes(0, &["/a"]); // again is nothing
    scene.lab.fails(1, &["revoke", "--socket", "s", "/none"]);
    scene.lab.fails(1, &["revoke", "--socket", "s", "/"]);
    assert_eq!(scene.in_cmb(), WINDOWS);
}

#[test]
fn a_part_of_a_file_is_revoked_and_no_more() {
    let scene = scene();
    scene.revokes(2, &["/a", "--offset", "64K", "--len", "65537"]); // two windows have a part of it
    scene.revokes(1, &["/a", "--len", "1"]);
    scene.revokes(0, &["/b", "--offset", "1T"]);
    scene.revokes(0, &["/b", "--len", "0"]);
    scene.revokes(3, &["/b", "--offset", "64K"]); // to the end
}

#[test]
fn a_client_is_revoked_as_a_whole_and_nobody_else() {
    let scene = scene();
    let id = scene.a.client.id();
    let status = scene.json(&["status", "--json", "--socket", "s"]);
    let line = status["status"]["people"].as_array().unwrap().iter().find(|p| p["client"] == id).unwrap();
    assert_eq!(line["windows"], WINDOWS, "the number is the one in the status");
    scene.revokes(WINDOWS, &["--client", &id.to_string()]);
    assert!(scene.a.file.map_read(0, 1).is_err(), "it was to map nothing more");
    assert!(scene.b.file.map_read(0, 1).is_ok());
    assert!(scene.lab.fails(1, &["revoke", "--socket", "s", "--client", "9999"]).stderr.contains("9999"));
}

#[test]
fn a_peer_loses_its_mappings_and_windows_stay() {
    let scene = scene();
    let peers = [&scene.a, &scene.b].map(|holder| {
        let peer = holder.client.attach_peer(4096).unwrap();
        let window = peer.map(&holder.file, 0, false).unwrap();
        peer.dma_read(window.iova, 0, 4096).unwrap();
        (peer, window.iova)
    });
    let mappings = || scene.json(&["peers", "--json", "--socket", "s"])["all_mappings"].as_u64();
    assert_eq!(mappings(), Some(2));
    let before = scene.in_cmb();
    scene.lab.ok(&["revoke", "--socket", "s", "--peer", "1"]);
    assert_eq!((mappings(), scene.in_cmb()), (Some(1), before));
    let reaches = peers.each_ref().map(|(peer, iova)| peer.dma_read(*iova, 0, 4096).is_ok());
    assert_eq!(reaches, [false, true]);
    assert!(scene.lab.fails(1, &["revoke", "--socket", "s", "--peer", "77"]).stderr.contains("77"));
}

#[test]
fn everything_is_revoked_and_said_in_words() {
    let scene = scene();
    let text = String::from_utf8(scene.lab.ok(&["revoke", "--socket", "s"])).unwrap();
    assert!(text.starts_with("8 windows moved in "), "{text}");
    assert!(
        text.ends_with(": 512 KiB of the CMB freed, 0 B quarantined, 0 write sections fenced\n"),
        "{text}"
    );
    assert_eq!(scene.in_cmb(), 0);
    scene.revokes(0, &[]);
}

#[test]
fn scopes_that_do_not_go_together_are_refused_and_nothing_moves() {
    let scene = scene();
    for (args, named) in [
        (&["--offset", "3"][..], "PATH"),
        (&["--len", "3"], "PATH"),
        (&["--peer", "1", "--offset", "3"], "--offset"),
        (&["--peer", "1", "--len", "3"], "--len"),
        (&["--client", "1", "--offset", "3"], "--offset"),
        (&["--client", "1", "--len", "3"], "--len"),
        (&["--client", "1", "--peer", "1"], "--peer"),
        (&["--client", "1", "/a"], "PATH"),
        (&["--peer", "1", "/a"], "PATH"),
        (&["--client", "me"], "me"),
        (&["/a", "--offset", "far"], "far"),
    ] {
        let said = scene.lab.fails(2, &[&["revoke", "--socket", "s"], args].concat()).stderr;
        assert!(said.contains(named), "{args:?}: {said}");
    }
    assert_eq!(scene.in_cmb(), 2 * WINDOWS);
}
