//! DMA memory without a descriptor: the controller's queues, lists and data lie in it, and the server reads and writes it by
//! DMA_READ and DMA_WRITE (protocol specification, sections of those names, and "twin_socket").
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nvme_driver::emu::EmulatedController;
use nvme_driver::vfio_user::{Header, command};

use crate::raw::{Client, Served, access, config, dma_map, dma_unmap, u32_at, u64_at, words};

const BASE: u64 = 0x10_0000;
const SIZE: usize = 0x8_0000;
const ASQ: usize = 0;
const ACQ: usize = 0x1000;
const SQ: usize = 0x2000;
const CQ: usize = 0x3000;
const LIST: usize = 0x4000;
const DATA: usize = 0x1_0000;
/// What the client says it takes in one message.
const MAX: usize = 4096;

/// A client whose memory nobody can map.
struct Host {
    client: Client,
    /// Where the server's commands come in, if not on the client's socket.
    twin: Option<Client>,
    memory: Vec<u8>,
    /// Command, address, count of every message served.
    served: Vec<(u16, u64, usize)>,
    tails: [u32; 2],
    heads: [usize; 2],
}

fn version(twin: bool) -> Vec<u8> {
    let twin = if twin { ",\"twin_socket\":{\"supported\":true}" } else { "" };
    let json = format!("\0\0\0\0{{\"capabilities\":{{\"max_data_xfer_size\":{MAX}{twin}}}}}\0");
    json.into_bytes()
}

impl Host {
    fn new(served: &Served, twin: bool) -> Self {
        let mut client = Client::open(&served.path);
        let (_, body, fds) = client.call(command::VERSION, &version(twin), &[]);
        let offered = String::from_utf8_lossy(&body[4..]).contains("twin_socket");
        assert_eq!((offered, fds.len()), (twin, usize::from(twin)));
        let twin = fds.into_iter().next().map(|fd| {
            let stream = UnixStream::from(fd);
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            Client::over(stream)
        });
        client.ok(command::DMA_MAP, &dma_map(BASE, SIZE as u64, 0), &[]);
        Self { client, twin, memory: vec![0; SIZE], served: Vec::new(), tails: [0; 2], heads: [0; 2] }
    }

    /// Answers one command of the server's.
    fn serve(&mut self, header: Header, body: &[u8]) {
        assert!(!header.is_reply(), "{header:?}");
        let (address, count) = (u64_at(body, 0), u64_at(body, 8) as usize);
        assert!(count > 0 && count <= MAX, "{count} bytes at once");
        self.served.push((header.command, address, count));
        let at = (address - BASE) as usize;
        let mut reply = body[..16].to_vec();
        match header.command {
            command::DMA_READ => reply.extend_from_slice(&self.memory[at..at + count]),
            command::DMA_WRITE => {
                assert_eq!(body.len(), 16 + count);
                self.memory[at..at + count].copy_from_slice(&body[16..]);
            }
            other => panic!("command {other} from the server"),
        }
        let to = Header { size: 16 + reply.len() as u32, flags: 1, ..header };
        self.twin.as_ref().unwrap_or(&self.client).send(to, &reply, &[]);
    }

    /// Waits for the server's next command: serves it.
    fn serve_next(&mut self) {
        let channel = self.twin.as_mut().unwrap_or(&mut self.client);
        let (header, body, _) = channel.receive_any().expect("the server closed the connection");
        self.serve(header, &body);
    }

    /// A call during which the server may ask for memory.
    fn call(&mut self, command: u16, body: &[u8]) -> Vec<u8> {
        self.client.send(Header::command(7, command, body.len()), body, &[]);
        loop {
            let (header, body, _) = self.client.receive_any().expect("the server closed the connection");
            if header.is_reply() {
                assert_eq!((header.id, header.command, header.is_error()), (7, command, false));
                return body;
            }
            self.serve(header, &body);
        }
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        self.call(command::REGION_WRITE, &access(region, offset, data.len() as u32, data));
    }

    fn up(&mut self) {
        self.write(7, 4, &[6, 0]);
        self.write(0, 0x24, &0x000f_000fu32.to_le_bytes());
        self.write(0, 0x28, &(BASE + ASQ as u64).to_le_bytes());
        self.write(0, 0x30, &(BASE + ACQ as u64).to_le_bytes());
        self.write(0, 0x14, &0x0046_0001u32.to_le_bytes());
        let mut left = 1000;
        while u32_at(&self.call(command::REGION_READ, &access(0, 0x1c, 4, &[])), 16) & 1 == 0 {
            left -= 1;
            assert!(left > 0, "never ready");
        }
    }

    /// Puts a command into a queue of 16 entries and rings.
    fn submit(&mut self, queue: usize, mut entry: [u32; 16]) {
        entry[0] |= self.tails[queue] << 16;
        let at = [ASQ, SQ][queue] + 64 * self.tails[queue] as usize;
        self.memory[at..at + 64].copy_from_slice(&words(&entry));
        self.tails[queue] = (self.tails[queue] + 1) % 16;
        let tail = self.tails[queue];
        self.write(0, 0x1000 + 8 * queue as u64, &tail.to_le_bytes());
    }

    /// Serves the server until the queue's next completion is there: its status.
    fn wait(&mut self, queue: usize) -> u32 {
        let at = [ACQ, CQ][queue] + 16 * self.heads[queue];
        while u32_at(&self.memory, at + 12) >> 16 & 1 == 0 {
            self.serve_next();
        }
        self.heads[queue] += 1;
        u32_at(&self.memory, at + 12) >> 17
    }
}

fn identify() -> [u32; 16] {
    let mut entry = [0; 16];
    (entry[0], entry[6], entry[10]) = (6, (BASE as usize + DATA) as u32, 1);
    entry
}

fn identifies(served: &Served, twin: bool) {
    let mut host = Host::new(served, twin);
    host.up();
    host.submit(0, identify());
    assert_eq!(host.wait(0), 0);
    assert_eq!(&host.memory[DATA + 4..DATA + 18], b"CMBFS-EMULATED");
    // The entry is read, the data written, and only then the completion.
    let commands: Vec<_> = host.served.iter().map(|(c, at, n)| (*c, (at - BASE) as usize, *n)).collect();
    let (read, write) = (command::DMA_READ, command::DMA_WRITE);
    assert_eq!(commands, [(read, ASQ, 64), (write, DATA, 4096), (write, ACQ, 16)]);
    assert_eq!(served.controller.counters().iommu_faults, 0);
}

#[test]
fn an_admin_queue_by_message() {
    let served = Served::new();
    identifies(&served, false);
    // And the next client over a socket of its own for the server's commands.
    served.connect().ok(command::DEVICE_RESET, &[], &[]);
    identifies(&served, true);
}

/// The controller runs on a thread of its own, beside the one that serves the socket.
#[test]
fn a_controller_with_its_own_thread() {
    for twin in [false, true] {
        let controller = EmulatedController::new(&config()).unwrap();
        let thread = controller.spawn(None).unwrap();
        let served = Served::with(controller);
        identifies(&served, twin);
        drop((served, thread));
    }
}

/// Data and its PRP list by message, in pieces that the client takes; what was written comes back.
#[test]
fn data_and_lists_by_message() {
    const LEN: usize = 64 * 1024;
    let served = Served::new();
    let mut host = Host::new(&served, false);
    host.up();
    let mut create = [0u32; 16];
    (create[0], create[6], create[10], create[11]) = (5, (BASE as usize + CQ) as u32, 1 | 15 << 16, 1);
    host.submit(0, create);
    assert_eq!(host.wait(0), 0);
    (create[0], create[6], create[11]) = (1, (BASE as usize + SQ) as u32, 1 | 1 << 16);
    host.submit(0, create);
    assert_eq!(host.wait(0), 0);
    for i in 0..LEN {
        host.memory[DATA + i] = (i / 3 % 251) as u8;
    }
    let written = host.memory[DATA..DATA + LEN].to_vec();
    let mut io = |opcode: u32, data: usize| {
        for i in 1..LEN / 4096 {
            let page = BASE + (data + i * 4096) as u64;
            host.memory[LIST + (i - 1) * 8..][..8].copy_from_slice(&page.to_le_bytes());
        }
        let mut entry = [0; 16];
        (entry[0], entry[1], entry[12]) = (opcode, 1, (LEN / 512 - 1) as u32);
        (entry[6], entry[8]) = ((BASE as usize + data) as u32, (BASE as usize + LIST) as u32);
        host.submit(1, entry);
        assert_eq!(host.wait(1), 0);
        host.memory[data..data + LEN].to_vec()
    };
    io(1, DATA);
    assert!(io(2, DATA + LEN) == written, "read back");
    let counters = served.controller.counters();
    assert_eq!((counters.host_to_drive, counters.drive_to_host), (LEN as u64, LEN as u64));
}

/// Commands that the client sends while it owes an answer are served afterwards, in their order.
#[test]
fn commands_in_between_are_put_aside() {
    let served = Served::new();
    let mut host = Host::new(&served, false);
    host.up();
    host.submit(0, identify());
    let (header, body, _) = host.client.receive_any().unwrap();
    assert_eq!(header.command, command::DMA_READ);
    for id in 50..60 {
        host.client.send(Header::command(id, command::REGION_READ, 16), &access(0, 8, 4, &[]), &[]);
    }
    host.serve(header, &body);
    let mut replies = Vec::new();
    while replies.len() < 10 {
        let (header, body, _) = host.client.receive_any().unwrap();
        if header.is_reply() {
            assert_eq!(u32_at(&body, 16), 0x0001_0400);
            replies.push(header.id);
        } else {
            host.serve(header, &body);
        }
    }
    assert_eq!(replies, (50..60).collect::<Vec<_>>());
    assert_eq!(host.wait(0), 0);
}

#[test]
fn a_client_that_talks_instead_of_answering_is_hung_up_on() {
    let served = Served::new();
    let mut host = Host::new(&served, false);
    host.up();
    host.submit(0, identify());
    assert!(host.client.receive_any().is_some());
    for id in 0..300 {
        let header = Header::command(id, command::DEVICE_GET_INFO, 16);
        // It may have hung up already.
        let bytes = [&header.to_bytes()[..], &words(&[16, 0, 0, 0])].concat();
        let _ = std::io::Write::write_all(&mut &host.client.stream, &bytes);
    }
    while host.client.receive_any().is_some() {}
    served.connect();
}

/// The client says no: that DMA faults, and all else goes on.
#[test]
fn a_refusal_is_a_fault() {
    let served = Served::new();
    let mut host = Host::new(&served, false);
    host.up();
    host.submit(0, identify());
    let (header, _, _) = host.client.receive_any().unwrap();
    host.client.send(Header { size: 16, flags: 1 | 1 << 5, error: 14, ..header }, &[], &[]);
    let csts = host.call(command::REGION_READ, &access(0, 0x1c, 4, &[]));
    assert_eq!(u32_at(&csts, 16) & 2, 2, "no command without its entry: CSTS.CFS");
    assert_eq!(served.controller.counters().admin_commands[6], 0);
    host.client.ok(command::DEVICE_RESET, &[], &[]);
    (host.tails, host.heads) = ([0; 2], [0; 2]);
    host.up();
    host.submit(0, identify());
    assert_eq!(host.wait(0), 0);
}

type Answer = fn(Header, &[u8]) -> (Header, Vec<u8>);

#[test]
fn answers_that_make_no_sense_end_the_connection() {
    let wrong: [Answer; 5] = [
        |h, b| (Header { id: h.id.wrapping_add(1), ..h }, [b, &[0; 64]].concat()),
        |h, b| (Header { command: command::DMA_WRITE, ..h }, [b, &[0; 64]].concat()),
        |h, b| (Header { flags: 3, ..h }, [b, &[0; 64]].concat()),
        |h, _| (Header { size: 3, ..h }, Vec::new()),
        |h, _| (Header { size: u32::MAX, ..h }, Vec::new()),
    ];
    let served = Served::new();
    for answer in wrong {
        let mut host = Host::new(&served, false);
        host.client.ok(command::DEVICE_RESET, &[], &[]);
        host.up();
        host.submit(0, identify());
        let (header, body, _) = host.client.receive_any().unwrap();
        let size = 16 + 16 + 64;
        let (header, body) = answer(Header { size, flags: 1, ..header }, &body);
        host.client.send(header, &body, &[]);
        assert!(host.client.is_closed(), "{header:?}");
    }
    // A reply of the right form for something else: refused, and the entry is not believed.
    let mut host = Host::new(&served, false);
    host.client.ok(command::DEVICE_RESET, &[], &[]);
    host.up();
    host.submit(0, identify());
    let (header, body, _) = host.client.receive_any().unwrap();
    let other = [&(u64_at(&body, 0) + 64).to_le_bytes()[..], &body[8..], &[0; 64]].concat();
    host.client.send(Header { size: 96, flags: 1, ..header }, &other, &[]);
    let csts = host.call(command::REGION_READ, &access(0, 0x1c, 4, &[]));
    assert_eq!(u32_at(&csts, 16) & 2, 2);
}

/// The twin socket is for the server's commands and their replies alone.
#[test]
fn a_command_over_the_twin_socket_ends_the_connection() {
    let served = Served::new();
    for ask in [true, false] {
        let mut host = Host::new(&served, true);
        host.client.ok(command::DEVICE_RESET, &[], &[]);
        host.up();
        host.submit(0, identify());
        let twin = host.twin.as_mut().unwrap();
        twin.receive_any().unwrap();
        if ask {
            twin.send(Header::command(1, command::DEVICE_GET_INFO, 16), &words(&[16, 0, 0, 0]), &[]);
        } else {
            // Or it is hung up on.
            host.twin = None;
        }
        assert!(host.client.is_closed());
    }
    served.connect();
}

/// Leaving, and stopping the server, while the server waits for an answer.
#[test]
fn nobody_waits_for_a_client_that_is_gone() {
    let served = Served::new();
    for _ in 0..3 {
        let mut host = Host::new(&served, false);
        host.client.ok(command::DEVICE_RESET, &[], &[]);
        host.up();
        host.submit(0, identify());
        host.client.receive_any().unwrap();
    }
    let mut host = Host::new(&served, true);
    host.client.ok(command::DEVICE_RESET, &[], &[]);
    host.up();
    host.submit(0, identify());
    host.twin.as_mut().unwrap().receive_any().unwrap();
    // The server is told to stop; it ends although this client neither answers nor leaves.
    drop(served);
    assert!(host.client.is_closed());
}

/// After DMA_UNMAP is answered, nothing is asked for any more.
#[test]
fn unmapped_memory_is_not_asked_for() {
    let served = Served::new();
    let mut host = Host::new(&served, false);
    host.up();
    host.call(command::DMA_UNMAP, &dma_unmap(0, BASE, SIZE as u64));
    host.submit(0, identify());
    while served.controller.domain().counters().faults == 0 {
        std::thread::yield_now();
    }
    host.call(command::REGION_READ, &access(0, 0x1c, 4, &[]));
    assert!(host.served.is_empty());
}

/// Thousands of regions, with and without a descriptor: each is reached, and none costs the server an open file.
#[test]
fn many_regions() {
    const REGIONS: u64 = 3000;
    let served = Served::new();
    let mut host = Host::new(&served, true);
    let fd: OwnedFd = crate::dma::memfd(REGIONS * 4096);
    let open_files = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open_files();
    // Many at a time: commands may be pipelined ("Command Concurrency").
    for first in (0..REGIONS).step_by(50) {
        for i in first..first + 50 {
            let header = Header::command(i as u16, command::DMA_MAP, 32);
            let at = (1 << 32) + i * 8192;
            if i % 2 == 0 {
                host.client.send(header, &dma_map(at, 4096, i * 4096), &[&fd]);
            } else {
                host.client.send(header, &dma_map(at, 4096, 0), &[]);
            }
        }
        for i in first..first + 50 {
            let (header, _, _) = host.client.receive();
            assert_eq!((header.id, header.is_error()), (i as u16, false));
        }
    }
    let after = open_files();
    assert!(after < before + 1000, "{before} open files, then {after}");
    let domain = served.controller.domain();
    assert_eq!(domain.counters().mappings, REGIONS + 1);
    for i in (0..REGIONS).step_by(2) {
        domain.write((1 << 32) + i * 8192, &i.to_le_bytes()).unwrap();
    }
    let mut got = [0; 8];
    for i in (0..REGIONS).step_by(202) {
        rustix::io::pread(&fd, &mut got, i * 4096).unwrap();
        assert_eq!(u64::from_le_bytes(got), i);
    }
    host.client.ok(command::DMA_UNMAP, &dma_unmap(2, 0, 0), &[]);
    assert_eq!(domain.counters().mappings, 0);
}
