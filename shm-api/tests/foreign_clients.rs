//! Clients in other languages against a real server: the C header, and Python.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use std::path::Path;
use std::process::Command;

use common::{SMALL, Serving};
use shm_api::client::OpenMode;

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i ^ (i >> 9)) as u8).collect()
}

fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        common::skip("foreign_clients", &format!("this machine has no {program}"));
    }
    found
}

fn served(bytes: &[u8]) -> (Serving, shm_api::client::Client) {
    served_by(Serving::start(SMALL), bytes)
}

fn served_by(serving: Serving, bytes: &[u8]) -> (Serving, shm_api::client::Client) {
    let client = serving.client();
    client.mkdir("/d", 0o755).unwrap();
    let file = client.open("/d/file", OpenMode::create()).unwrap();
    file.write_at(0, bytes).unwrap();
    file.commit().unwrap();
    (serving, client)
}

#[test]
fn a_c_client_reads_a_file_through_windows() {
    if !has("cc") {
        return;
    }
    let bytes = pattern(200_001);
    let (serving, client) = served(&bytes);
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("cmbfs_cat");
    let built = Command::new("cc")
        .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", "-I"])
        .arg(here().join("include"))
        .arg(here().join("examples/cmbfs_cat.c"))
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    for revoked in [false, true] {
        if revoked {
            client.revoke("/d/file").unwrap();
        }
        let out = Command::new(&program).arg(&serving.socket).arg("/d/file").output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert!(out.stdout == bytes, "revoked: {revoked}");
    }
    let out = Command::new(&program).arg(&serving.socket).arg("/nothing").output().unwrap();
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("nothing"));
}

const SCRIPT: &str = r#"
import sys
sys.path.insert(0, sys.argv[1])
from cmbfs_client import Client, CmbfsError
with Client(sys.argv[2]) as client:
    assert client.server_alive
    assert client.list("/d") == [("file", 200001)], client.list("/d")
    assert client.stat("/d/file")["size"] == 200001
    expected = bytes((i ^ (i >> 9)) & 255 for i in range(200001))
    with client.open("/d/file") as file:
        assert file.read() == expected
        window = file.map(65530, 20)
        assert window.read(0, 20) == expected[65530:65550]
        assert window.counts["host"] == 0, window.counts
        print("revoke", flush=True)
        sys.stdin.readline()
        faults = window.counts["faults"]
        assert window.read(0, 20) == expected[65530:65550]
        assert window.counts["host"] == 2, window.counts
        assert window.counts["faults"] == faults, "redirected without asking the server"
        window.close()
    with client.peer_memory("gpu") as memory:
        window = memory.map(0, memory.size)
        assert window.read(8190, 4) == b"memo" and window.counts["host"] == 0, window.counts
    try:
        client.pmr()
    except CmbfsError as error:
        assert error.code == 16, error
    else:
        raise AssertionError
    try:
        client.stat("/nothing")
    except CmbfsError as error:
        assert error.code == 16 and error.errno == 2, error
    else:
        raise AssertionError
print("ok")
"#;

#[test]
fn a_python_client_lists_opens_and_reads_on_while_windows_move() {
    if !has("python3") {
        return;
    }
    use std::io::{BufRead, BufReader, Read, Write};
    let (serving, client) = served(&pattern(200_001));
    let peer = client.attach_peer(16384).unwrap();
    peer.local().write(8190, b"memory").unwrap();
    let _exported = peer.export("gpu").unwrap();
    let mut python = Command::new("python3")
        .args(["-c", SCRIPT])
        .arg(here().join("python"))
        .arg(&serving.socket)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(python.stdout.take().unwrap());
    let mut text = String::new();
    out.read_line(&mut text).unwrap();
    assert_eq!(text, "revoke\n");
    client.revoke("/d/file").unwrap();
    python.stdin.take().unwrap().write_all(b"\n").unwrap();
    out.read_to_string(&mut text).unwrap();
    assert!(python.wait().unwrap().success() && text.ends_with("ok\n"), "{text}");
}

const BLOCKS: &str = r#"
import os, sys, time
sys.path.insert(0, sys.argv[1])
from cmbfs_client import Client, CmbfsError, UNWRITTEN, WRITTEN
image = os.open(sys.argv[3], os.O_RDWR)
with Client(sys.argv[2]) as client, client.open("/d/file", writable=True) as file:
    layout = file.map_blocks(0, 8192, write=True)
    assert layout.uuid == client.uuid and [e[3] for e in layout.extents] == [WRITTEN], layout.extents
    first = os.pread(image, 8192, layout.extents[0][1] * layout.block_size)
    assert first == bytes((i ^ (i >> 9)) & 255 for i in range(8192))
    os.pwrite(image, b"z" * 8192, layout.extents[0][1] * layout.block_size)
    assert layout.commit() == 200001
    assert client.recall_count == 0 and client.recalls() == []
    print("read", flush=True)
    while client.recall_count == 0:
        time.sleep(0.001)
    (lease, generation, offset, length, deadline) = client.recalls()[0]
    assert (lease, generation, offset, length) == (layout.lease, layout.device_generation, 0, 8192)
    layout.release(offset, length)
    assert client.recalls() == []
    try:
        layout.commit()
    except CmbfsError as error:
        assert error.code == 37, error
    else:
        raise AssertionError
print("ok")
"#;

#[test]
fn a_python_client_writes_by_block_numbers_until_they_are_recalled() {
    if !has("python3") {
        return;
    }
    use std::io::{BufRead, BufReader, Read};
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    let url = format!("emu:{}?size=64M&cmb=4M", image.display());
    let (serving, client) =
        served_by(Serving::start(common::Setup { url: &url, ..SMALL }), &pattern(200_001));
    let mut python = Command::new("python3")
        .args(["-c", BLOCKS])
        .arg(here().join("python"))
        .arg(&serving.socket)
        .arg(&image)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(python.stdout.take().unwrap());
    let mut text = String::new();
    out.read_line(&mut text).unwrap();
    assert_eq!(text, "read\n");
    let mut bytes = vec![0; 8193];
    client.open("/d/file", OpenMode::read()).unwrap().read_at(0, &mut bytes).unwrap();
    assert!(bytes[..8192].iter().all(|&b| b == b'z') && bytes[8192] == pattern(8193)[8192]);
    out.read_to_string(&mut text).unwrap();
    assert!(python.wait().unwrap().success() && text.ends_with("ok\n"), "{text}");
}

/// The header's numbers are the protocol's: a change of one without the other shows here.
#[test]
fn the_c_header_names_the_same_numbers() {
    use shm_api::protocol::{ErrorCode, MAX_MESSAGE, Op};
    let header = std::fs::read_to_string(here().join("include/cmbfs.h")).unwrap();
    let snake = |name: String| {
        name.chars().enumerate().fold(String::new(), |mut out, (i, c)| {
            if c.is_uppercase() && i > 0 {
                out.push('_');
            }
            out.push(c.to_ascii_uppercase());
            out
        })
    };
    for &op in Op::ALL {
        let line = format!("CMBFS_OP_{} = {}", snake(format!("{op:?}")), op as u16);
        assert!(header.contains(&line), "no {line}");
    }
    for &code in ErrorCode::ALL {
        let line = format!("CMBFS_E_{} = {}", snake(format!("{code:?}")), code as u32);
        assert!(header.contains(&line), "no {line}");
    }
    assert!(header.contains(&format!("CMBFS_MAX_MESSAGE {MAX_MESSAGE}")));
}
