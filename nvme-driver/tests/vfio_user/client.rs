//! Our client: the driver over the socket, servers that misbehave; and a client we did not write on our server.
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nvme_driver::disk::Disk;
use nvme_driver::dma::DmaArena;
use nvme_driver::iova::IovaAllocator;
use nvme_driver::mem::Mapping;
use nvme_driver::pci::{DmaAccess, PciError};
use nvme_driver::url::DeviceUrl;
use nvme_driver::vfio_user::{Header, VfioUserFunction, command};
use nvme_driver::{OpenError, OpenOptions, open};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

use crate::dma::memfd;
use crate::raw::{Client, Served, u32_at, words};

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    (0..len).map(|_| random.next_u64() as u8).collect()
}

/// The whole driver on a controller in (as far as it knows) another process: host memory by descriptor, CMB and doorbells mapped.
#[test]
fn the_driver_runs_over_the_socket() {
    let served = Served::new();
    let device = open(&DeviceUrl::VfioUser(served.path.clone()), &OpenOptions::default()).unwrap();
    let mut disk = device.disk().unwrap();
    let block = disk.geometry().block_size as usize;
    for (lba, len) in [(0, block), (3, 8192), (100, 1 << 20), (5000, 300 * block)] {
        let bytes = pattern(lba, len);
        disk.write(lba, &bytes).unwrap();
        let mut back = vec![0; len];
        disk.read(lba, &mut back).unwrap();
        assert!(back == bytes, "{len} bytes at LBA {lba}");
    }
    disk.flush().unwrap();
    let cmb = disk.cmb().expect("no CMB").clone();
    assert!(!cmb.is_device_memory);
    let bytes = pattern(9, 65536);
    cmb.memory.write(4096, &bytes).unwrap();
    disk.write_from_cmb(64, 4096, 65536).unwrap();
    let mut back = vec![0; 65536];
    disk.read(64, &mut back).unwrap();
    assert!(back == bytes, "written from the CMB");
    let counters = served.controller.counters();
    assert_eq!((counters.iommu_faults, counters.bad_doorbells), (0, 0));
    drop((disk, device));
    // And again: the server takes the next client.
    let device = open(&DeviceUrl::VfioUser(served.path.clone()), &OpenOptions::default()).unwrap();
    let mut disk = device.disk().unwrap();
    disk.read(64, &mut back).unwrap();
    assert!(back == bytes, "after reconnecting");
}

#[test]
fn the_function_is_as_it_is_served() {
    let served = Served::new();
    let f = VfioUserFunction::connect(&served.path).unwrap();
    let original = served.controller.function();
    for index in 0..6 {
        assert_eq!(f.bar(index).unwrap(), original.bar(index).unwrap());
    }
    assert_eq!(f.read32(0, 8).unwrap(), original.read32(0, 8).unwrap());
    assert_eq!(f.read64(0, 0).unwrap(), original.read64(0, 0).unwrap());
    assert_eq!(f.config_read(0, 4).unwrap(), original.config_read(0, 4).unwrap());
    assert!(f.map_bar(0, 0, 4096).unwrap().is_none(), "registers cannot be mapped");
    assert!(f.map_bar(0, 4096, 4096).unwrap().is_some(), "doorbells can");
    assert!(f.map_bar(0, 4096, 1 << 20).is_err());
    for refused in
        [f.read32(0, 1 << 40), f.read32(0, 2), f.read32(9, 0), f.config_read(0, 3), f.config_read(4094, 4)]
    {
        assert!(matches!(refused, Err(PciError::OutOfRange { .. })), "{refused:?}");
    }
    assert!(f.set_bus_master(true).is_ok() && f.config_read(4, 2).unwrap() & 4 != 0);
    f.reset().unwrap();
    assert_eq!(f.config_read(4, 2).unwrap() & 4, 0);
    let fds: Vec<_> =
        (0..5).map(|_| rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap()).collect();
    f.set_interrupts(&fds).unwrap();
    f.set_interrupts(&fds[..2]).unwrap();
    f.set_interrupts(&[]).unwrap();
    let sixth = fds[0].try_clone().unwrap();
    let six: Vec<_> = fds.into_iter().chain([sixth]).collect();
    assert!(f.set_interrupts(&six).is_err(), "six of five vectors");
}

/// The `vfio_user` crate ignores error replies: a mapping the server refused would look like one that works. Ours does not.
#[test]
fn refusals_are_errors() {
    let served = Served::new();
    let f = VfioUserFunction::connect(&served.path).unwrap();
    let memory = Mapping::memfd("test", 1 << 20).unwrap();
    f.dma_map(&memory, 0, 8192, 0x10_0000, DmaAccess::ReadWrite).unwrap();
    let refused = f.dma_map(&memory, 0, 4096, 0x10_1000, DmaAccess::ReadWrite);
    assert!(matches!(refused, Err(PciError::DmaMap { .. })), "{refused:?}");
    assert!(matches!(f.dma_unmap(0x10_0000, 4096), Err(PciError::DmaUnmap { .. })));
    assert!(matches!(f.dma_unmap(0x10_1000, 4096), Err(PciError::DmaUnmap { .. })));
    f.dma_unmap(0x10_0000, 8192).unwrap();
    let private = Mapping::anonymous(4096).unwrap();
    let refused = f.dma_map(&private, 0, 4096, 0x10_0000, DmaAccess::Read).unwrap_err();
    assert!(refused.to_string().contains("file descriptor"), "{refused}");
}

#[test]
fn nobody_listening_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let refused = open(&DeviceUrl::VfioUser(dir.path().join("none")), &OpenOptions::default());
    assert!(matches!(refused, Err(OpenError::VfioUser(PciError::Io { .. }))), "{refused:?}");
}

#[test]
fn a_server_that_goes_away_is_a_removed_device() {
    let served = Served::new();
    let f = VfioUserFunction::connect(&served.path).unwrap();
    drop(served);
    assert!(matches!(f.read32(0, 8), Err(PciError::Removed(_))));
    assert!(matches!(f.read32(0, 8), Err(PciError::Removed(_))));
}

/// The levels and texts of what is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<(tracing::Level, String)>>>);

impl tracing::field::Visit for Log {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        if let ("message", Some(last)) = (field.name(), self.0.lock().unwrap().last_mut()) {
            last.1 = format!("{value:?}");
        }
    }
}

impl tracing::Subscriber for Log {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        self.0.lock().unwrap().push((*event.metadata().level(), String::new()));
        event.record(&mut self.clone());
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

/// A server that dies may have left something behind that still writes: the memory is kept, which is a warning and no error.
#[test]
fn memory_that_a_dead_server_may_still_write_is_not_used_again() {
    let served = Served::new();
    let f = VfioUserFunction::connect(&served.path).unwrap();
    let iova = Arc::new(IovaAllocator::new(f.iova_ranges()));
    let before = iova.free_bytes();
    let arena = DmaArena::new(f, Arc::clone(&iova));
    drop(arena.alloc(4096).unwrap());
    drop(served);
    let log = Log::default();
    tracing::subscriber::with_default(log.clone(), || drop(arena));
    assert_eq!(iova.free_bytes(), before - (2 << 20), "the address is not used again");
    let log = log.0.lock().unwrap();
    let [(level, text)] = &log[..] else { panic!("{log:?}") };
    assert_eq!(*level, tracing::Level::WARN);
    assert!(text.contains("2097152 bytes of DMA memory are kept and never used again"), "{text}");
}

type Answer = fn(Header, &[u8]) -> Option<Vec<u8>>;

/// A server that answers as it is told: `reply(header, body)` gives the bytes to send, or none to hang up.
pub(crate) fn fake(
    path: &Path,
    mut reply: impl FnMut(Header, &[u8]) -> Option<Vec<u8>> + Send + 'static,
) -> JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = [0; 16];
        while stream.read_exact(&mut head).is_ok() {
            let header = Header::parse(&head);
            let mut body = vec![0; header.size as usize - 16];
            stream.read_exact(&mut body).unwrap();
            match reply(header, &body) {
                Some(bytes) if stream.write_all(&bytes).is_ok() => {}
                _ => return,
            }
        }
    })
}

pub(crate) fn reply(to: Header, body: &[u8]) -> Vec<u8> {
    let header = Header { size: 16 + body.len() as u32, flags: 1, ..to };
    [&header.to_bytes()[..], body].concat()
}

/// A minimal server without version data, without a CMB, without anything that can be mapped.
fn plain(header: Header, body: &[u8]) -> Option<Vec<u8>> {
    Some(match header.command {
        command::VERSION => reply(header, &[0, 0, 0, 0]),
        command::DEVICE_GET_INFO => reply(header, &words(&[16, 2, 9, 5])),
        command::DEVICE_GET_REGION_INFO => {
            let index = u32_at(body, 8);
            let size = if index == 0 || index == 7 { 0x1000 } else { 0 };
            reply(header, &words(&[32, 3, index, 0, size, 0, 0, 0]))
        }
        command::REGION_READ => reply(header, &[body, &vec![7; u32_at(body, 12) as usize]].concat()),
        _ => reply(Header { flags: 0, ..header }, &[]),
    })
}

#[test]
fn a_plain_server_is_enough() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let server = fake(&path, plain);
    let f = VfioUserFunction::connect(&path).unwrap();
    assert_eq!(f.read32(0, 8).unwrap(), 0x0707_0707);
    assert!(f.map_bar(0, 0, 4096).unwrap().is_none());
    assert!(matches!(f.reset(), Err(PciError::Unsupported { .. })), "it did not say that it can be reset");
    drop(f);
    server.join().unwrap();
}

/// A target that maps parts of a BAR, apart from each other: those are mapped, each from its place in the file, and nothing else is.
#[test]
fn sparse_areas_are_honoured() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let file = memfd(0x10_000);
    for page in 0..16u64 {
        rustix::io::pwrite(&file, &[page as u8; 8], page * 0x1000).unwrap();
    }
    let server = std::thread::spawn(move || {
        let mut client = Client::over(listener.accept().unwrap().0);
        while let Some((header, body, _)) = client.receive_any() {
            let bytes = plain(header, &body).unwrap();
            if header.command != command::DEVICE_GET_REGION_INFO || u32_at(&body, 8) != 0 {
                client.send(Header::parse(&bytes[..16].try_into().unwrap()), &bytes[16..], &[]);
                continue;
            }
            // BAR 0: 64 KiB, the file's second page on; an unknown capability, then two areas, then one that leads outside.
            let areas = [[0x1000u32, 0x1000], [0x3000, 0x2000], [0xf000, 0x2000]];
            let mut info = words(&[32 + 16 + 16 + 48, 0b1111, 0, 32, 0xf000, 0, 0x1000, 0]);
            info.extend(words(&[0x1_0099, 48, 0, 0, 0x1_0001, 0, 3, 0]));
            areas.iter().for_each(|[at, len]| info.extend(words(&[*at, 0, *len, 0])));
            let short = u32_at(&body, 0) < 112;
            info.truncate(if short { 32 } else { info.len() });
            let reply = Header { size: 16 + info.len() as u32, flags: 1, ..header };
            let fds = [&file];
            client.send(reply, &info, if short { &[] } else { &fds });
        }
    });
    let f = VfioUserFunction::connect(&path).unwrap();
    for (offset, len, first_page) in
        [(0x1000, 0x1000, Some(2)), (0x3000, 0x2000, Some(4)), (0x4000, 0x1000, Some(5)), (0, 0x1000, None)]
            .into_iter()
            .chain([(0x1000, 0x2000, None), (0x2000, 0x1000, None), (0x3000, 0x3000, None)])
    {
        let mapped = f.map_bar(0, offset, len).unwrap();
        let seen = mapped.map(|m| m.u32_at(0).unwrap().load(std::sync::atomic::Ordering::Relaxed) & 0xff);
        assert_eq!(seen, first_page, "{len:#x} bytes at {offset:#x}");
    }
    assert!(f.map_bar(0, 0xe000, 0x2000).is_err(), "outside the BAR");
    drop(f);
    server.join().unwrap();
}

#[test]
fn replies_that_make_no_sense_are_errors() {
    let wrong: Vec<(&str, Answer)> = vec![
        ("another id", |h, b| plain(Header { id: h.id.wrapping_add(1), ..h }, b)),
        ("another command", |h, b| {
            plain(h, b).map(|mut bytes| {
                bytes[2] ^= 8;
                bytes
            })
        }),
        ("a size below the header", |h, _| Some(Header { size: 3, flags: 1, ..h }.to_bytes().to_vec())),
        ("a size of 4 GiB", |h, _| Some(Header { size: u32::MAX, flags: 1, ..h }.to_bytes().to_vec())),
        ("an empty body", |h, _| Some(reply(h, &[]))),
        ("version 1", |h, _| Some(reply(h, &[1, 0, 0, 0]))),
        ("version data that is no JSON", |h, _| Some(reply(h, b"\0\0\0\0{{{\0"))),
        ("hanging up", |_, _| None),
        ("only commands", |h, _| Some(Header { size: 16, flags: 0, ..h }.to_bytes().repeat(1000))),
    ];
    for (what, answer) in wrong {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let server = fake(&path, answer);
        assert!(VfioUserFunction::connect(&path).is_err(), "{what}");
        server.join().unwrap();
    }
}

#[test]
fn an_error_reply_leaves_the_connection_usable() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut first = true;
    let server = fake(&path, move |header, body| {
        let of_bar0 = header.command == command::REGION_READ && u32_at(body, 8) == 0;
        if of_bar0 && std::mem::take(&mut first) {
            let error = Header { size: 16, flags: 1 | 1 << 5, error: 5, ..header };
            return Some(error.to_bytes().to_vec());
        }
        plain(header, body)
    });
    let f = VfioUserFunction::connect(&path).unwrap();
    assert!(matches!(f.read32(0, 0), Err(PciError::Io { .. })));
    assert_eq!(f.read32(0, 0).unwrap(), 0x0707_0707);
    drop(f);
    server.join().unwrap();
}

/// Region descriptions with wild sizes, offsets and capability chains.
#[test]
fn random_replies_never_crash_the_client() {
    let seed = std::env::var("CMBFS_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    eprintln!("CMBFS_SEED={seed}");
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut connected = 0;
    for _ in 0..300 {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut random = Xoshiro256PlusPlus::seed_from_u64(random.next_u64());
        let server = fake(&path, move |header, body| {
            let mut bytes = plain(header, body)?;
            if header.command == command::DEVICE_GET_REGION_INFO && random.next_u64() % 4 == 0 {
                let len = 32 + (random.next_u64() % 64) as usize;
                let wild: Vec<u8> =
                    (0..len).map(|_| [0, 1, 16, 32, 64, 0xff][random.next_u64() as usize % 6]).collect();
                bytes = reply(header, &wild);
            }
            for _ in 0..random.next_u64() % 4 {
                if header.command != command::VERSION && random.next_u64() % 8 == 0 {
                    let at = 16 + random.next_u64() as usize % (bytes.len() - 16).max(1);
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << (random.next_u64() % 8);
                    }
                }
            }
            Some(bytes)
        });
        if let Ok(f) = VfioUserFunction::connect(&path) {
            connected += 1;
            for bar in 0..6 {
                let _ =
                    (f.bar(bar), f.map_bar(bar, 0, 4096), f.map_bar(bar, 4096, 1 << 20), f.read64(bar, 0));
            }
        }
        server.join().unwrap();
    }
    assert!(connected > 10, "only {connected} got through: too wild to test anything");
}

/// The `vfio_user` crate's client, which we did not write.
#[test]
fn the_crates_client_gets_along_with_our_server() {
    let served = Served::new();
    let mut client = vfio_user::Client::new(&served.path).unwrap();
    let bar0 = client.region(0).unwrap();
    assert_eq!((bar0.size, bar0.sparse_areas.len()), (0x2000, 1));
    assert_eq!((bar0.sparse_areas[0].offset, bar0.sparse_areas[0].size), (0x1000, 0x1000));
    assert_eq!(client.region(2).unwrap().size, 1 << 20);
    let mut version = [0; 4];
    client.region_read(0, 8, &mut version).unwrap();
    assert_eq!(u32::from_le_bytes(version), 0x0001_0400);
    client.region_write(7, 4, &[6, 0]).unwrap();
    let fd = memfd(1 << 20);
    client.dma_map(0, 0x10_0000, 1 << 20, fd.as_raw_fd()).unwrap();
    assert_eq!(served.controller.domain().counters().mappings, 1);
    client.dma_unmap(0x10_0000, 1 << 20).unwrap();
    assert_eq!(served.controller.domain().counters().mappings, 0);
    assert_eq!(client.get_irq_info(2).unwrap().count, 5);
    client.reset().unwrap();
    client.shutdown().unwrap();
}
