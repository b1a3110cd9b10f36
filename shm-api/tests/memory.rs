//! Device memory through server and clients: the drive's PMR, and what peers export, with the API of a file.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::Arc;

use common::{Process, SMALL, Serving, Setup, connect, options, role, spawn, until};
use extent_fs::{Filesystem, FormatOptions, MountOptions};
use nvme_driver::emu::{EmulatedController, Fault, Rule, Target};
use nvme_driver::pmr::Pmr;
use nvme_driver::spec::{NvmOpcode, regs};
use p2p::refusal::Refusals;
use shm_api::client::{Client, ClientError, File, OpenMode};
use shm_api::protocol::messages::{HelloRequest, MEMORY_PMR, MemoryRequest, ReadRequest};
use shm_api::protocol::{ErrorCode, Message, Op, VERSION, header};
use shm_api::server::ServerOptions;
use shm_api::transport::socket::Socket;

const WINDOW: u64 = SMALL.window as u64;

fn code(result: Result<impl Sized, ClientError>) -> Option<ErrorCode> {
    match result {
        Err(ClientError::Server(e)) => Some(e.code),
        _ => None,
    }
}

/// A server with the PMR of the drive that `url` names.
struct Rig {
    serving: Serving,
    emulated: Arc<EmulatedController>,
    pmr: Arc<Pmr>,
}

impl Rig {
    fn new(url: &str, change: impl FnOnce(ServerOptions) -> ServerOptions) -> Self {
        let device = nvme_driver::open(&url.parse().unwrap(), &Default::default()).unwrap();
        let emulated = Arc::clone(device.emulated().unwrap());
        let pmr = Arc::new(Pmr::enable(device.controller().unwrap()).unwrap());
        let mut disk = device.disk().unwrap();
        if !extent_fs::probe(&mut disk).unwrap() {
            common::format(&mut disk, FormatOptions::default());
        }
        let filesystem = Filesystem::mount(disk, MountOptions::default()).unwrap();
        let setup = Setup { url, ..SMALL };
        let served = Some(Arc::clone(&pmr));
        let serving = Serving::with(filesystem, |socket| {
            change(ServerOptions { pmr: served, write_back: None, ..options(socket, setup) })
        });
        Self { serving, emulated, pmr }
    }

    fn held(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.pmr.read(at, &mut bytes).unwrap();
        bytes
    }

    fn barriers(&self) -> u64 {
        self.emulated.counters().pmr_barriers
    }
}

fn get(file: &File, at: u64, len: usize) -> Vec<u8> {
    let mut got = vec![0; len];
    assert_eq!(file.read_at(at, &mut got).unwrap(), len);
    got
}

#[test]
fn helper_process() {
    let Some((role, args)) = role() else { return };
    let client = connect(Path::new(&args[0]));
    let file = match role.as_str() {
        "pmr" => client.pmr().unwrap(),
        "peer" => client.peer_memory("gpu").unwrap(),
        other => panic!("{other}"),
    };
    let mapped = file.map(0, 2 * WINDOW).unwrap();
    println!("\nready");
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let (command, text) = line.split_once(' ').unwrap_or((&line, ""));
        match command {
            "write" => mapped.write(100, text.as_bytes()).unwrap(),
            "commit" => drop(file.commit().unwrap()),
            other => panic!("{other}"),
        }
        let mut got = [0; 8];
        mapped.read(100, &mut got).unwrap();
        let paths = mapped.paths();
        println!("{} {}", String::from_utf8_lossy(&got), paths.host_reads == 0 && paths.host_writes == 0);
    }
}

/// A client in another process.
struct Other {
    process: Process,
    out: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Other {
    fn start(role: &str, socket: &Path) -> Self {
        let mut process = spawn(role, &[socket.to_str().unwrap()]);
        let mut out = BufReader::new(process.0.stdout.take().unwrap()).lines();
        assert!(out.any(|line| line.unwrap() == "ready"));
        Self { process, out }
    }

    fn ask(&mut self, command: &str) -> String {
        writeln!(self.process.0.stdin.as_mut().unwrap(), "{command}").unwrap();
        self.out.next().unwrap().unwrap()
    }
}

/// A reset of the whole subsystem turns the PMR off, behind the server's back. The next commit finds it so: on again, with the bytes that
/// were committed; and everybody who commits is told once that what was not may be lost. What is in the host cache is not, and is
/// committed by whoever commits next.
#[test]
fn a_pmr_that_a_reset_turned_off_is_on_again_and_clients_go_on() {
    let rig = Rig::new("emu:ram?size=64M&cmb=4M&pmr=1M", |options| options);
    let client = rig.serving.client();
    let (pmr, second) = (client.pmr().unwrap(), rig.serving.client().pmr().unwrap());
    let mapped = pmr.map(0, 1 << 20).unwrap();
    mapped.write(100, b"committed").unwrap();
    mapped.write(3 * WINDOW, b"in memory").unwrap();
    pmr.commit().unwrap();
    client.revoke_all().unwrap();
    mapped.write(3 * WINDOW, b"in the host cache").unwrap();
    pmr.map(0, WINDOW).unwrap().prefer_cmb().unwrap();
    mapped.write(200, b"not committed").unwrap();
    let generation = client.status().unwrap().device_generation;
    let off = || rig.emulated.function().write32(0, regs::NSSR, 0x4e56_4d65).unwrap();
    let is_off = || rig.emulated.function().read32(0, regs::PMRCTL).unwrap() == 0;
    off();
    assert!(is_off());
    let error = pmr.commit().unwrap_err();
    assert!(error.to_string().contains("its PMR with it"), "{error}");
    assert_eq!(error.code(), Some(ErrorCode::DataLost));
    assert!(!is_off(), "left off");
    let status = client.status().unwrap();
    assert!(status.resets == 1 && status.device_generation > generation, "{status:?}");
    let mut got = [0; 9];
    mapped.read(100, &mut got).unwrap();
    assert_eq!(&got, b"committed");
    // Once for each who has it open, and for nobody who opens it later.
    assert_eq!(code(second.commit()), Some(ErrorCode::DataLost));
    mapped.write(200, b"written again").unwrap();
    pmr.commit().unwrap();
    second.commit().unwrap();
    client.pmr().unwrap().commit().unwrap();
    assert_eq!((rig.held(100, 9), rig.held(200, 13)), (b"committed".to_vec(), b"written again".to_vec()));
    assert_eq!(rig.held(3 * WINDOW as usize, 17), b"in the host cache");
    // Files go on, too.
    let file = client.open("/f", OpenMode::create()).unwrap();
    file.write_at(0, &[1; 4096]).unwrap();
    file.commit().unwrap();
    assert_eq!(get(&file, 0, 4096), [1; 4096]);
    // And an orderly end brings the host cache to a region that was found off only then.
    client.revoke_all().unwrap();
    mapped.write(300, b"at the end").unwrap();
    off();
    let Rig { serving, pmr: held, .. } = rig;
    drop(serving);
    let mut bytes = [0; 10];
    held.read(300, &mut bytes).unwrap();
    assert_eq!(&bytes, b"at the end");
    held.barrier().unwrap();
}

#[test]
fn the_pmr_is_one_for_all_processes_and_survives_resets_and_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("emu:{}/disk.img?size=64M&cmb=4M&pmr=1M", dir.path().display());
    {
        let rig = Rig::new(&url, |options| options);
        let client = rig.serving.client();
        let pmr = client.pmr().unwrap();
        pmr.direct_access().unwrap();
        assert_eq!(
            (pmr.size().unwrap(), pmr.window_size(), pmr.stat().unwrap().mode),
            (1 << 20, WINDOW, 0o600)
        );
        let mut other = Other::start("pmr", &rig.serving.socket);
        let mapped = pmr.map(0, 1 << 20).unwrap();
        mapped.write(100, b"directly").unwrap();
        assert_eq!(other.ask("write other---"), "other--- true", "no byte through host memory");
        let mut got = [0; 8];
        mapped.read(100, &mut got).unwrap();
        assert_eq!((&got, rig.held(100, 8).as_slice()), (b"other---", b"other---".as_slice()));
        assert_eq!(mapped.paths().host_writes + mapped.paths().host_reads, 0);

        // A commit is a barrier, whoever asks for it.
        let before = rig.barriers();
        let report = pmr.commit().unwrap();
        assert_eq!((report.size, report.from_cmb, report.from_host), (1 << 20, 0, 0));
        assert_eq!(rig.barriers(), before + 1);
        other.ask("commit");
        assert_eq!(rig.barriers(), before + 2);

        // Revoked, both go on in the host cache; a commit brings the bytes there, and makes them last.
        client.revoke_all().unwrap();
        assert_eq!(other.ask("write revoked-"), "revoked- false");
        mapped.read(100, &mut got).unwrap();
        assert_eq!(&got, b"revoked-");
        assert_eq!(rig.held(100, 8), b"other---");
        let report = pmr.commit().unwrap();
        assert!(report.from_host >= 4096, "{report:?}");
        assert_eq!((rig.held(100, 8).as_slice(), rig.barriers()), (b"revoked-".as_slice(), before + 3));

        // A reset of the controller concerns the CMB.
        let file = client.open("/f", OpenMode::create()).unwrap();
        file.write_at(0, &[1; 4096]).unwrap();
        mapped.prefer_cmb().unwrap();
        mapped.write(200, b"kept").unwrap();
        rig.emulated.faults().inject(Rule::once(Target::io(NvmOpcode::Write as u8), Fault::WrongCid(1)));
        assert_eq!(code(file.commit()), Some(ErrorCode::DataLost));
        assert_eq!(client.status().unwrap().resets, 1);
        assert_eq!(get(&pmr, 200, 4), b"kept");
        pmr.commit().unwrap();
        assert_eq!(rig.held(200, 4), b"kept");

        // Nobody has it open: it stays.
        let status = client.status().unwrap();
        assert_eq!(status.memory_bytes, 1 << 20);
        assert!(status.memory_windows > 0, "{status:?}");
        drop((mapped, pmr));
        assert_eq!(get(&client.pmr().unwrap(), 200, 4), b"kept");
        // Written and not committed: an orderly end keeps it.
        client.pmr().unwrap().write_at(9000, b"at the end").unwrap();
        client.revoke_all().unwrap();
    }
    let rig = Rig::new(&url, |options| options);
    let pmr = rig.serving.client().pmr().unwrap();
    assert_eq!((get(&pmr, 100, 8), get(&pmr, 200, 4)), (b"revoked-".to_vec(), b"kept".to_vec()));
    assert_eq!(get(&pmr, 9000, 10), b"at the end");
}

#[test]
fn what_files_can_do_and_memory_cannot_is_refused() {
    let rig = Rig::new("emu:ram?size=64M&cmb=0&pmr=64K", |options| options);
    let client = rig.serving.client();
    let pmr = client.pmr().unwrap();
    assert_eq!(pmr.window_size(), WINDOW, "windows fit the memory");
    assert_eq!(code(pmr.truncate(0)), Some(ErrorCode::Unsupported));
    assert_eq!(code(pmr.commit_range(0, 0, 1 << 20)), Some(ErrorCode::Invalid));
    assert_eq!(code(pmr.map(0, 64 * 1024 + 1)), Some(ErrorCode::Invalid));
    assert_eq!(code(pmr.map_blocks(0, 4096, shm_api::client::Access::Read)), Some(ErrorCode::Unsupported));
    assert_eq!(code(client.peer_memory("nothing")), Some(ErrorCode::NotFound));
    let text = |result: Result<(), ClientError>| result.unwrap_err().to_string();
    assert!(text(pmr.truncate(0)).contains("the drive's PMR has no file"), "{}", text(pmr.truncate(0)));
    let gpu = client.attach_peer(4096).unwrap();
    let exported = gpu.export("gpu").unwrap();
    assert!(text(exported.truncate(0)).starts_with("\"gpu\", exported by a peer, has no file"));
    let raw = client.allocate_shared("raw", 4096).unwrap();
    assert!(text(raw.commit().map(drop)).starts_with("raw memory \"raw\" has no file"));
    let without = Serving::start(SMALL);
    assert_eq!(code(without.client().pmr()), Some(ErrorCode::NotFound));
}

#[test]
fn a_read_that_ends_behind_a_pmr_is_refused_by_the_offset_that_was_asked_for() {
    let rig = Rig::new("emu:ram?size=64M&cmb=0&pmr=64K", |options| options);
    let socket = Socket::connect(&rig.serving.socket).unwrap();
    let hello = HelloRequest { min_version: VERSION, max_version: VERSION, reserved: 0 };
    let open = MemoryRequest { what: MEMORY_PMR, reserved: 0, peer: 0 };
    // The first handle of a connection is 1.
    let read = |offset| ReadRequest { handle: 1, offset, len: 16, reserved: 0 };
    for bytes in [
        header::encode(Op::Hello, false, 1, 0, &hello, &[]),
        header::encode(Op::Memory, false, 2, 0, &open, &[]),
        header::encode(Op::Read, false, 3, 0, &read(65536 - 16), &[]),
        header::encode(Op::Read, false, 4, 0, &read(65536 - 8), &[]),
    ] {
        socket.send(&bytes.unwrap(), &[]).unwrap();
    }
    let mut errors = Vec::new();
    while errors.len() < 4 {
        socket.wait_readable(1000).unwrap();
        let Ok(datagram) = socket.receive() else { continue };
        errors.push(Message::decode(&datagram.unwrap().bytes).unwrap().error());
    }
    let refused = errors.pop().unwrap().unwrap();
    assert_eq!(errors, [None, None, None]);
    assert_eq!(refused.code, ErrorCode::Invalid);
    assert_eq!(refused.text, "16 bytes at 65528 end behind the 65536 bytes of the drive's PMR");
}

#[test]
fn every_byte_of_a_pmr_is_the_same_whatever_is_refused() {
    use rand_xoshiro::Xoshiro256PlusPlus;
    use rand_xoshiro::rand_core::{Rng, SeedableRng};
    let seed = common::number("SEED").unwrap_or(7);
    println!("SEED={seed}");
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let rig = Rig::new("emu:ram?size=64M&cmb=1M&pmr=256K", |options| ServerOptions {
        refusals: Refusals::new(seed, 200),
        host_cache: 1 << 20,
        ..options
    });
    let clients = [rig.serving.client(), rig.serving.client()];
    let files = clients.each_ref().map(|c| c.pmr().unwrap());
    let size = 256 * 1024;
    let mut want = vec![0; size];
    let maps = files.each_ref().map(|f| f.map(0, size as u64).unwrap());
    for _ in 0..400 {
        let (who, at) = (rng.next_u64() as usize % 2, rng.next_u64() as usize % (size - 5000));
        let len = 1 + rng.next_u64() as usize % 5000;
        match rng.next_u64() % 8 {
            0..3 => {
                let mut got = vec![0; len];
                maps[who].read(at as u64, &mut got).unwrap();
                assert_eq!(got, want[at..at + len], "{len} bytes at {at}");
            }
            3..6 => {
                let bytes = vec![rng.next_u64() as u8; len];
                maps[who].write(at as u64, &bytes).unwrap();
                want[at..at + len].copy_from_slice(&bytes);
            }
            6 => drop(files[who].revoke_window(at as u64).unwrap()),
            _ => {
                files[who].commit().unwrap();
                let held = rig.held(0, size);
                let wrong = held.iter().zip(&want).position(|(a, b)| a != b);
                assert_eq!(wrong, None, "committed, and the PMR differs from this byte on");
            }
        }
    }
}

#[test]
fn a_peers_memory_is_a_file_for_others_and_their_peers() {
    let serving = Serving::start(SMALL);
    let (owner, client) = (serving.client(), serving.client());
    let gpu = owner.attach_peer(3 * WINDOW).unwrap();
    let exported = gpu.export("gpu").unwrap();
    assert_eq!((exported.size().unwrap(), exported.window_size()), (3 * WINDOW, WINDOW));
    assert_eq!(code(gpu.export("twice")), Some(ErrorCode::Exists));
    assert_eq!(code(client.allocate_shared("gpu", 0)), Some(ErrorCode::Exists));
    let raw = client.allocate_shared("raw", WINDOW).unwrap();
    assert_eq!(code(client.peer_memory("raw")), Some(ErrorCode::NotFound));
    let second = owner.attach_peer(4096 * 5).unwrap();
    assert_eq!(code(second.export("raw")), Some(ErrorCode::Exists));
    assert_eq!(second.export("").unwrap().window_size(), 4096, "windows that fit its pages");
    drop(raw);

    let theirs = client.peer_memory("gpu").unwrap();
    theirs.direct_access().unwrap();
    let mapped = theirs.map(0, 3 * WINDOW).unwrap();
    gpu.local().write(WINDOW as usize, b"from the device").unwrap();
    let mut got = [0; 15];
    mapped.read(WINDOW, &mut got).unwrap();
    assert_eq!(&got, b"from the device");
    mapped.write(0, b"to the device").unwrap();
    gpu.local().read(0, &mut got[..13]).unwrap();
    assert_eq!((&got[..13], mapped.paths().host_writes), (b"to the device".as_slice(), 0));

    // Another device reads and writes it, past the host, until it is taken back.
    let nic = client.attach_peer(8192).unwrap();
    let window = nic.map(&theirs, 0, true).unwrap();
    nic.dma_read(window.iova, 0, 4096).unwrap();
    nic.local().read(0, &mut got[..13]).unwrap();
    assert_eq!(&got[..13], b"to the device");
    nic.local().write(4096, b"by dma").unwrap();
    nic.dma_write(window.iova + 50, 4096, 6).unwrap();
    gpu.local().read(50, &mut got[..6]).unwrap();
    assert_eq!(&got[..6], b"by dma");
    assert_eq!(theirs.revoke_window(0).unwrap().windows, 1);
    assert_eq!(code(nic.dma_write(window.iova, 4096, 6)), Some(ErrorCode::PeerFault));
    mapped.write(50, b"cached").unwrap();
    gpu.local().read(50, &mut got[..6]).unwrap();
    assert_eq!(&got[..6], b"by dma", "in the host cache until it is committed");
    assert!(theirs.commit().unwrap().from_host >= 4096);
    gpu.local().read(50, &mut got[..6]).unwrap();
    assert_eq!(&got[..6], b"cached");

    // Its owner goes, and its peer; who has it open keeps it.
    drop((exported, gpu, second, owner));
    mapped.read(50, &mut got[..6]).unwrap();
    assert_eq!(&got[..6], b"cached");
    drop((mapped, theirs));
    until("its memory is free", || client.status().unwrap().memory_bytes == 0);
    assert_eq!(code(client.peer_memory("gpu")), Some(ErrorCode::NotFound));
}

#[test]
fn exported_memory_is_limited_and_goes_with_the_last_process_that_has_it() {
    let serving = Serving::start_with(SMALL, |options| ServerOptions { host_cache: 8 * WINDOW, ..options });
    let client = serving.client();
    let big = client.attach_peer(5 * WINDOW).unwrap();
    assert_eq!(code(big.export("")), Some(ErrorCode::TooBig));
    let gpu = client.attach_peer(3 * WINDOW).unwrap();
    let exported = gpu.export("gpu").unwrap();
    let mut other = Other::start("peer", &serving.socket);
    assert_eq!(other.ask("write process"), "process\0 true");
    assert_eq!(get(&exported, 100, 7), b"process");
    assert_eq!(code(client.attach_peer(2 * WINDOW).unwrap().export("")), Some(ErrorCode::TooBig));
    drop((exported, gpu));
    assert_eq!(client.status().unwrap().memory_bytes, 3 * WINDOW);
    other.process.0.kill().unwrap();
    until("a killed process' memory is free", || client.status().unwrap().memory_bytes == 0);
    assert_eq!(code(Client::peer_memory(&client, "gpu")), Some(ErrorCode::NotFound));
}
