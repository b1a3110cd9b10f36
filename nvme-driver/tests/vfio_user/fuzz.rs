//! Random messages: some of the right shape with wild values, some of no shape at all, some that bring the controller up and have it
//! work. The session must answer or hang up, never crash, and every reply must have the form that the specification gives it.
use std::cell::Cell;
use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use nvme_driver::emu::EmulatedController;
use nvme_driver::mem::{Access, Mapping};
use nvme_driver::vfio_user::{ClientCalls, Header, Session, command};

use crate::dma::memfd;
use crate::raw::{Served, access, config, dma_map};
use crate::tape::{Feature, Tape, campaign};

/// Where working clients have their memory, with and without a descriptor.
const MAPPED: u64 = 0x10_0000;
const REMOTE: u64 = 0x30_0000;
const SIZE: u64 = 1 << 20;
/// Messages of one session at most.
const MESSAGES: u64 = 1000;

/// A client's memory without a descriptor. It refuses every so many accesses.
#[derive(Debug)]
struct Memory {
    bytes: Mutex<(Vec<u8>, u64)>,
}

impl Memory {
    fn access(&self, address: u64, len: usize, copy: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let mut guard = self.bytes.lock().unwrap();
        guard.1 += 1;
        let at = address.checked_sub(REMOTE).and_then(|at| usize::try_from(at).ok());
        let refused = guard.1.is_multiple_of(61);
        let range = at.and_then(|at| guard.0.get_mut(at..at.checked_add(len)?)).filter(|_| !refused);
        range.map(copy).ok_or_else(|| io::ErrorKind::PermissionDenied.into())
    }
}

impl ClientCalls for Memory {
    fn dma_read(&self, address: u64, into: &mut [u8]) -> io::Result<()> {
        self.access(address, into.len(), |bytes| into.copy_from_slice(bytes))
    }
    fn dma_write(&self, address: u64, from: &[u8]) -> io::Result<()> {
        self.access(address, from.len(), |bytes| bytes.copy_from_slice(from))
    }
    fn twin(&self) -> io::Result<OwnedFd> {
        Ok(memfd(4096))
    }
}

/// Values that tend to matter.
fn value(tape: &mut Tape) -> u64 {
    match tape.below(8) {
        0 => 0,
        1 => tape.below(16),
        2 => tape.below(8192) & !3,
        3 => tape.below(1 << 20) & !0xfff,
        4 => 1 << tape.below(64),
        5 => (1u64 << tape.below(64)).wrapping_sub(1),
        6 => u64::MAX - tape.below(4096),
        _ => tape.any(),
    }
}

/// What a client at work sends: memory, registers, doorbells.
fn working(tape: &mut Tape) -> (u16, Vec<u8>) {
    let base = [MAPPED, REMOTE][tape.below(2) as usize];
    let write = |at: u64, value: &[u8]| (command::REGION_WRITE, access(0, at, value.len() as u32, value));
    match tape.below(8) {
        0 => (command::DMA_MAP, dma_map(base, SIZE, 0)),
        1 => (command::REGION_WRITE, access(7, 4, 2, &[6, 0])),
        2 => write(0x24, &0x000f_000fu32.to_le_bytes()),
        3 => write(0x28, &base.to_le_bytes()),
        4 => write(0x30, &(base + 0x1000).to_le_bytes()),
        5 => write(0x14, &0x0046_0001u32.to_le_bytes()),
        6 => write(0x14, &0x0046_0000u32.to_le_bytes()),
        _ => write(0x1000 + 4 * tape.below(4), &(tape.below(18) as u32).to_le_bytes()),
    }
}

fn message(tape: &mut Tape) -> (Header, Vec<u8>) {
    let command = if tape.below(32) == 0 { tape.any() as u16 } else { tape.below(17) as u16 };
    let mut body = Vec::new();
    let mut command = command;
    match command {
        command::DMA_MAP => {
            body.extend(((value(tape) as u32) | 32).to_le_bytes());
            body.extend((tape.below(5) as u32).to_le_bytes());
            for _ in 0..3 {
                body.extend((value(tape) & !(tape.below(2) * 0xfff)).to_le_bytes());
            }
        }
        command::DMA_UNMAP => {
            body.extend(24u32.to_le_bytes());
            body.extend((tape.below(3) as u32).to_le_bytes());
            body.extend((value(tape) & !0xfff).to_le_bytes());
            body.extend((value(tape) & !0xfff).to_le_bytes());
        }
        command::REGION_READ | command::REGION_WRITE => {
            body.extend(value(tape).to_le_bytes());
            body.extend((tape.below(10) as u32).to_le_bytes());
            let count = if tape.below(16) == 0 { value(tape) as u32 } else { tape.below(65) as u32 };
            body.extend(count.to_le_bytes());
            body.extend((0..tape.below(65)).map(|i| i as u8));
        }
        command::REGION_WRITE_MULTI => {
            let n = tape.below(4);
            body.extend(if tape.below(8) == 0 { value(tape) } else { n }.to_le_bytes());
            for _ in 0..n {
                body.extend((value(tape) % 8192).to_le_bytes());
                body.extend((tape.below(9) as u32).to_le_bytes());
                body.extend((tape.below(10) as u32).to_le_bytes());
                body.extend(value(tape).to_le_bytes());
            }
        }
        command::DEVICE_SET_IRQS => {
            for limit in [64u64, 64, 6, 8, 8] {
                body.extend((tape.below(limit) as u32).to_le_bytes());
            }
            body.extend((0..tape.below(8)).map(|i| i as u8 & 1));
        }
        // Commands that a server never gets.
        command::DMA_READ | command::DMA_WRITE | 14 => (command, body) = working(tape),
        _ => {
            for _ in 0..tape.below(10) {
                body.extend((value(tape) as u32).to_le_bytes());
            }
        }
    }
    match tape.below(16) {
        0 => body.truncate(tape.below(body.len() as u64 + 1) as usize),
        1 if !body.is_empty() => {
            let at = tape.below(body.len() as u64) as usize;
            body[at] ^= 1 << tape.below(8);
        }
        _ => {}
    }
    let mut header = Header::command(tape.below(1 << 16) as u16, command, body.len());
    if tape.below(16) == 0 {
        header = header.without_reply();
    }
    if tape.below(256) == 0 {
        header.flags = tape.any() as u32;
    }
    (header, body)
}

#[derive(Default)]
struct Tally {
    succeeded: u64,
    refused: u64,
    hung_up: u64,
}

/// Sessions with one controller, one after the other as they hang up.
fn run(tape: &mut Tape, sent: &Cell<u64>, tally: &mut Tally) -> HashSet<Feature> {
    let controller = EmulatedController::new(&config()).unwrap();
    let memory = Arc::new(Memory { bytes: Mutex::new((vec![0; SIZE as usize], 0)) });
    let shared = memfd(SIZE);
    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    let mapped =
        Mapping::from_borrowed_fd(std::os::fd::AsFd::as_fd(&shared), 0, SIZE as usize, Access::ReadWrite)
            .unwrap();
    // Submission queues full of commands: Identify, Get Features, queues, event requests, and what is none.
    for slot in 0..16u32 {
        let mut entry = [0u32; 16];
        let opcode = [6, 10, 5, 1, 12, 2, 9, 0x7f][slot as usize % 8];
        (entry[0], entry[10], entry[11]) = (opcode | slot << 16, 1 | (slot & 4) << 14, 1);
        for (at, word) in (slot as usize * 64..).step_by(4).zip(entry) {
            for (base, write) in [(MAPPED, true), (REMOTE, false)] {
                let word = if at % 64 == 24 { base as u32 + 0x2000 } else { word };
                if write {
                    mapped.write(at, &word.to_le_bytes()).unwrap();
                } else {
                    memory.bytes.lock().unwrap().0[at..at + 4].copy_from_slice(&word.to_le_bytes());
                }
            }
        }
    }
    let open = || {
        let calls = Arc::clone(&memory) as Arc<dyn ClientCalls>;
        let mut session = Session::new(controller.function(), false, Some(calls)).unwrap();
        let version = b"\0\0\0\0{\"capabilities\":{\"write_multiple\":true}}\0";
        session.handle(Header::command(0, command::VERSION, version.len()), version, Vec::new()).unwrap();
        session
    };
    let mut session = open();
    let mut reached = HashSet::new();
    for _ in 0..MESSAGES {
        if tape.is_over() {
            break;
        }
        sent.set(sent.get() + 1);
        let (header, body) = message(tape);
        let remote = body.get(16..24) == Some(&REMOTE.to_le_bytes());
        let fds: Vec<OwnedFd> = match tape.below(8) {
            0..4 if header.command == command::DMA_MAP && !remote => vec![shared.try_clone().unwrap()],
            0 => {
                let right = if header.command == command::DEVICE_SET_IRQS { &eventfd } else { &shared };
                (0..tape.below(4)).map(|_| right.try_clone().unwrap()).collect()
            }
            _ => Vec::new(),
        };
        let known = u32::from(header.command.min(17));
        match session.handle(header, &body, fds) {
            Ok(None) => assert!(header.flags & 0x10 != 0),
            Ok(Some(reply)) => {
                let head = Header::parse(&reply.bytes[..16].try_into().unwrap());
                assert!(head.is_reply() && head.id == header.id && head.command == header.command);
                assert_eq!(head.size as usize, reply.bytes.len());
                assert!(!head.is_error() || (head.size == 16 && head.error != 0 && reply.fds.is_empty()));
                tally.refused += u64::from(head.is_error());
                tally.succeeded += u64::from(!head.is_error());
                reached.insert([known, head.error, u32::from(reply.fds.is_empty())]);
            }
            Err(e) => {
                tally.hung_up += 1;
                reached.insert([known, u32::MAX, e.raw_os_error() as u32]);
                session = open();
            }
        }
        controller.step();
    }
    drop(session);
    let (domain, counters) = (controller.domain().counters(), controller.counters());
    assert_eq!(domain.mappings, 0, "a session left mappings behind");
    for (opcode, n) in (0..).zip(counters.admin_commands) {
        if n > 0 {
            reached.insert([100, opcode, 0]);
        }
    }
    let asked = memory.bytes.lock().unwrap().1;
    for (i, n) in
        (101..).zip([domain.faults, domain.bytes_read, domain.bytes_written, counters.errors, asked])
    {
        reached.insert([i, u32::from(n > 0), u32::from(n > 4096)]);
    }
    reached
}

#[test]
fn random_messages_never_crash_a_session() {
    let limit = std::env::var("CMBFS_FUZZ_MESSAGES").ok().and_then(|text| text.parse().ok());
    let count = limit.unwrap_or(100_000);
    let (sent, mut tally) = (Cell::new(0), Tally::default());
    let mut deep = HashSet::new();
    let enough = || sent.get() >= count;
    let rounds = campaign("vfio-user", u64::MAX, 60, enough, |tape| {
        let reached = run(tape, &sent, &mut tally);
        deep.extend(reached.iter().filter(|f| f[0] >= 100).copied());
        reached
    });
    let Tally { succeeded, refused, hung_up } = tally;
    println!("{} messages: {succeeded} succeeded, {refused} refused, {hung_up} hung up", sent.get());
    assert!(
        rounds == 1 || (succeeded > count / 20 && refused > count / 20),
        "the messages are too tame or too wild to test anything"
    );
    // Identify was executed, and memory was asked for.
    assert!(rounds == 1 || [[100, 6, 0], [105, 1, 0]].iter().all(|f| deep.contains(f)), "{deep:?}");
}

/// The same through the socket, with random bytes in between: the server outlives every client.
#[test]
fn random_bytes_never_stop_the_server() {
    let seed = std::env::var("CMBFS_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    eprintln!("CMBFS_SEED={seed}");
    let mut tape = Tape::random(seed);
    let served = Served::new();
    for _ in 0..100 {
        let client = served.connect();
        let mut bytes = Vec::new();
        for _ in 0..tape.below(20) {
            let (header, body) = message(&mut tape);
            bytes.extend(header.to_bytes());
            bytes.extend(body);
        }
        let more = tape.below(64);
        bytes.extend((0..more).map(|_| tape.below(256) as u8));
        client.stream.set_nonblocking(true).unwrap();
        let _ = io::Write::write_all(&mut &client.stream, &bytes);
    }
    let mut client = served.connect();
    client.ok(command::DEVICE_GET_INFO, &crate::raw::words(&[16, 0, 0, 0]), &[]);
}
