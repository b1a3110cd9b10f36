//! P8: a client reads and writes only what its uid may open. Needs root, to become somebody else; says so when it is not.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use common::{SMALL, Serving, role, spawn};
use nvme_driver::mem::{Access, Mapping};
use shm_api::Placement;
use shm_api::client::{Client, ClientError, OpenMode};
use shm_api::protocol::messages::{self as m, HelloReply, HelloRequest, OpenRequest};
use shm_api::protocol::{ErrorCode, Message, Op, VERSION, header};
use shm_api::transport::socket::Socket;

const NOBODY: u32 = 65_534;

fn denied<T: std::fmt::Debug>(result: Result<T, ClientError>) {
    let error = result.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::Denied), "{error}");
}

/// Everything a stranger tries, in a process of its own.
fn stranger(socket: &Path) {
    let (uid, gid) = (rustix::fs::Uid::from_raw(NOBODY), rustix::fs::Gid::from_raw(NOBODY));
    rustix::thread::set_thread_groups(&[]).unwrap();
    rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
    rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
    let client = Client::connect(socket).unwrap();
    let why = client.cmb_access().unwrap_err();
    assert!(why.contains("65534"), "told why: {why}");

    denied(client.open("/secret", OpenMode::read()));
    denied(client.open("/public", OpenMode::write()));
    denied(client.open("/new", OpenMode::create()));
    denied(client.open("/closed/inside", OpenMode::read()));
    denied(client.list("/closed"));
    denied(client.stat("/closed/inside"));
    denied(client.mkdir("/d", 0o777));
    denied(client.unlink("/public"));
    denied(client.rename("/public", "/mine"));
    denied(client.rename("/sticky/other", "/sticky/mine"));
    denied(client.unlink("/sticky/other"));
    denied(client.set_mode("/public", 0o666));
    denied(client.set_owner("/public", NOBODY, NOBODY));
    denied(client.revoke("/secret"));
    denied(client.revoke_all());
    denied(client.set_placement("/public", Placement::Host));
    denied(client.set_placement("/", Placement::Host));
    denied(client.pmr());
    let theirs = client.peer_memory("gpu").unwrap_err();
    assert_eq!(theirs.code(), Some(ErrorCode::NotFound), "another user's: {theirs}");

    // That there is a device it may know, not whose bytes that reaches.
    let list = client.peers().unwrap();
    assert_eq!((list.peers.len(), list.all_mappings, list.mappings.len()), (1, 1, 0), "{list:?}");
    denied(client.peers_of(client.stat("/public").unwrap().ino));

    // What it may read comes from the host cache, though it was in the CMB.
    let public = client.open("/public", OpenMode::read()).unwrap();
    let mapped = public.map_read(0, 100_000).unwrap();
    let mut bytes = vec![0; 100_000];
    mapped.read(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&b| b == 7));
    let paths = mapped.paths();
    assert!(paths.host_reads == 2 && paths.cmb_reads == 0, "{paths:?}");
    assert!(matches!(mapped.write(0, b"x"), Err(ClientError::ReadOnly { .. })));
    denied(public.map_blocks(0, 4096, shm_api::client::Access::Read));
    denied(client.share_layout(shm_api::client::LeaseName { id: 1, device_generation: 0 }));
    denied(public.truncate(0));
    denied(public.commit());

    // What is its own it may write, through the host cache.
    let own = client.open("/sticky/own", OpenMode::create().mode(0o600)).unwrap();
    own.write_at(0, &[9; 70_000]).unwrap();
    assert!(own.commit().unwrap().from_host >= 70_000);
    assert_eq!(client.stat("/sticky/own").unwrap().uid, NOBODY);

    descriptors(socket);
}

/// The descriptors themselves: what is for reading cannot be written, not even when opened anew through /proc.
fn descriptors(socket: &Path) {
    let raw = Socket::connect(socket).unwrap();
    let ask = |op, body: &[u8], tail: &[u8]| -> (Message, Vec<OwnedFd>) {
        let all = [body, tail].concat();
        raw.send(&header::encode(op, false, 1, 0, &m::Empty {}, &all).unwrap(), &[]).unwrap();
        raw.wait_readable(5000).unwrap();
        let datagram = raw.receive().unwrap().unwrap();
        (Message::decode(&datagram.bytes).unwrap(), datagram.fds)
    };
    use shm_api::protocol::wire::Wire;
    let hello = HelloRequest { min_version: VERSION, max_version: VERSION, reserved: 0 };
    let (reply, regions) = ask(Op::Hello, &hello.to_bytes(), &[]);
    assert_eq!(reply.body::<HelloReply>().unwrap().0.cmb_reason, m::CMB_OTHER_UID);
    assert_eq!(regions.len(), 3, "no CMB among them");
    let (_, cache) = ask(Op::Open, &OpenRequest { flags: m::OPEN_READ, mode: 0 }.to_bytes(), b"/public");
    for fd in [&regions[0], &cache[0]] {
        let fd = fd.try_clone().unwrap();
        let again = format!("/proc/self/fd/{}", fd.as_raw_fd());
        assert!(rustix::io::pwrite(&fd, b"x", 0).is_err());
        assert!(std::fs::OpenOptions::new().write(true).open(again).is_err());
        assert!(Mapping::from_fd(fd, 0, 4096, Access::ReadWrite).is_err());
    }
    // A handle for reading maps nothing for writing, whoever asks by hand.
    let map = m::MapRequest { handle: 1, offset: 0, len: 4096, flags: m::MAP_WRITE, reserved: 0 };
    let (reply, _) = ask(Op::Map, &map.to_bytes(), &[]);
    assert_eq!(reply.error().unwrap().code, ErrorCode::Denied);
    let commit = m::CommitRequest { handle: 1, offset: 0, len: 0, size: 0 };
    assert_eq!(ask(Op::Commit, &commit.to_bytes(), &[]).0.error().unwrap().code, ErrorCode::Denied);
    let cut = m::TruncateRequest { handle: 1, size: 0 };
    assert_eq!(ask(Op::Truncate, &cut.to_bytes(), &[]).0.error().unwrap().code, ErrorCode::Denied);
}

#[test]
fn helper_process() {
    let Some((_, args)) = role() else { return };
    stranger(Path::new(&args[0]));
    println!("\nok");
    std::io::stdout().flush().unwrap();
    std::process::exit(0);
}

#[test]
fn a_stranger_gets_what_its_uid_may_open_and_is_told_why() {
    if !rustix::process::geteuid().is_root() {
        common::skip("permissions", "only root can become somebody else");
        return;
    }
    let url = "emu:ram?size=64M&cmb=4M&pmr=64K".parse().unwrap();
    let device = nvme_driver::open(&url, &nvme_driver::OpenOptions::default()).unwrap();
    let pmr = nvme_driver::pmr::Pmr::enable(device.controller().unwrap()).unwrap();
    let mut disk = device.disk().unwrap();
    common::format(&mut disk, Default::default());
    let filesystem = extent_fs::Filesystem::mount(disk, extent_fs::MountOptions::default()).unwrap();
    let serving = Serving::with(filesystem, |socket| shm_api::server::ServerOptions {
        pmr: Some(std::sync::Arc::new(pmr)),
        ..common::options(socket, SMALL)
    });
    let client = serving.client();
    for (path, mode) in [("/secret", 0o600), ("/public", 0o644)] {
        let file = client.open(path, OpenMode::create().mode(mode)).unwrap();
        file.write_at(0, &[7; 100_000]).unwrap();
        file.commit().unwrap();
    }
    client.mkdir("/closed", 0o700).unwrap();
    client.open("/closed/inside", OpenMode::create().mode(0o666)).unwrap();
    client.mkdir("/sticky", 0o1777).unwrap();
    client.open("/sticky/other", OpenMode::create().mode(0o666)).unwrap();
    let public = client.open("/public", OpenMode::read()).unwrap();
    let mapped = public.map_read(0, 100_000).unwrap();
    let mut bytes = vec![0; 100_000];
    mapped.read(0, &mut bytes).unwrap();
    assert_eq!(mapped.paths().host_reads, 0, "in the CMB before the stranger comes");

    let open = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    open(serving.socket.parent().unwrap(), 0o755);
    open(&serving.socket, 0o666);
    let secret = client.open("/secret", OpenMode::read()).unwrap();
    let _held = secret.map_read(0, 100).unwrap();
    let peer = client.attach_peer(4096).unwrap();
    peer.map(&secret, 0, false).unwrap();
    let _exported = peer.export("gpu").unwrap();
    client.pmr().unwrap().write_at(0, b"mine").unwrap();
    assert_eq!(client.peers().unwrap().mappings.len(), 1);
    let mut process = spawn("stranger", &[serving.socket.to_str().unwrap()]);
    let child = &mut process.0;
    let mut text = String::new();
    std::io::Read::read_to_string(child.stdout.as_mut().unwrap(), &mut text).unwrap();
    assert!(child.wait().unwrap().success(), "{text}");
    // Who was reading goes on, redirected.
    mapped.read(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&b| b == 7));
    assert_eq!(client.stat("/public").unwrap().size, 100_000);
}
