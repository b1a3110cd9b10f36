//! Whoever does not keep to the protocol costs nobody else anything.

use std::os::fd::AsFd;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use shm_api::client::{Client, OpenMode};
use shm_api::protocol::messages::{self as m, HelloRequest};
use shm_api::protocol::{ErrorCode, Op, header};
use shm_api::server::ServerOptions;
use shm_api::transport::ring::{RING_LEN, word};

use crate::common::{SMALL, Serving, until};
use crate::raw::Raw;
use crate::{WINDOW, file_of};

#[test]
fn garbage_on_the_socket_costs_its_sender_the_connection_and_nobody_else_anything() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    file_of(&client, &[3; WINDOW]);
    let seed = 0x5eed_0004;
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut closed = 0;
    for round in 0..400u32 {
        let raw = Raw::connect(&serving.socket);
        if round % 4 > 0 {
            raw.hello();
        }
        let mut bytes = vec![0; (random.next_u32() % 200) as usize + 1];
        random.fill_bytes(&mut bytes);
        if round % 2 == 0 {
            // A sound header with a random body gets as far as the handlers.
            let op = Op::ALL[random.next_u32() as usize % Op::ALL.len()];
            let body = m::HandleRequest { handle: random.next_u64() % 4 };
            bytes = header::encode(op, false, u64::from(round), 0, &body, &bytes).unwrap();
        }
        let _ = raw.socket.send(&bytes, &[]);
        if round % 16 == 0 {
            // A descriptor that nobody asked for.
            let _ = raw.socket.send(&bytes, &[serving_fd().as_fd()]);
            closed += u32::from(raw.is_closed());
        }
        if round % 50 == 0 {
            client.stat("/a").unwrap();
        }
    }
    assert_eq!(closed, 25, "seed {seed:#x}");
    let mut bytes = vec![0; WINDOW];
    client.open("/a", OpenMode::read()).unwrap().read_at(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&b| b == 3));
    until("they are forgotten", || client.status().unwrap().clients == 1);
    assert!(client.status().unwrap().expelled > 100);
}

fn serving_fd() -> std::fs::File {
    std::fs::File::open("/dev/null").unwrap()
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let serving = Serving::start(SMALL);
    let path = serving.socket.with_extension("txt");
    let file = std::fs::File::create(&path).unwrap();
    let open = || {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap();
        fds.filter(|fd| std::fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|to| to == path)).count()
    };
    let before = open();
    let raw = Raw::connect(&serving.socket);
    raw.hello();
    let bytes = header::encode(Op::Info, false, 1, 1, &m::Empty {}, &[]).unwrap();
    raw.socket.send(&bytes, &[file.as_fd(), file.as_fd()]).unwrap();
    let (message, _) = raw.receive().unwrap();
    assert_eq!(message.error().unwrap().code, ErrorCode::BadMessage);
    assert!(raw.is_closed());
    until("they are closed", || open() == before);
}

#[test]
fn every_request_with_random_fields_is_answered_or_refused() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    file_of(&client, &[3; WINDOW]);
    let seed = 0x5eed_0005;
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let raw = Raw::connect(&serving.socket);
    raw.hello();
    raw.send(Op::Open, &m::OpenRequest { flags: m::OPEN_READ | m::OPEN_WRITE, mode: 0 }, b"/a");
    raw.receive().unwrap();
    let mut odd = move || match random.next_u32() % 6 {
        0 => 0,
        1 => u64::MAX,
        2 => 1 << (random.next_u32() % 64),
        3 => random.next_u64() % 8,
        4 => random.next_u64() % (1 << 20),
        _ => random.next_u64(),
    };
    let mut answered = 0;
    for _ in 0..3000 {
        let (handle, offset, len) = (odd() % 3, odd(), odd());
        let flags = odd() as u32;
        match odd() % 16 {
            0 => {
                raw.send(Op::Map, &m::MapRequest { handle, offset, len, flags: flags % 4, reserved: 0 }, &[]);
            }
            1 => raw.send(Op::Fault, &m::FaultRequest { handle, offset, flags, reserved: 0 }, &[]),
            2 => raw.send(Op::Read, &m::ReadRequest { handle, offset, len: len as u32, reserved: 0 }, &[]),
            3 => {
                raw.send(Op::Commit, &m::CommitRequest { handle, offset, len, size: odd() % (1 << 21) }, &[]);
            }
            4 => raw.send(Op::Truncate, &m::TruncateRequest { handle, size: offset % (1 << 21) }, &[]),
            5 => raw.send(Op::Unmap, &m::UnmapRequest { map: odd() % 10 }, &[]),
            6 => raw.send(
                Op::Revoke,
                &m::RevokeRequest { handle, offset, len, scope: flags % 5, id: 0 },
                b"/a",
            ),
            7 => raw.send(
                Op::PeerAttach,
                &m::PeerAttachRequest { local_len: len % (1 << 20), flags, reserved: 0 },
                &[],
            ),
            8 => {
                let (iova, local, direction) = (odd(), odd(), flags % 4);
                raw.send(
                    Op::PeerDma,
                    &m::PeerDmaRequest { peer: handle, iova, local, len, direction, reserved: 0 },
                    &[],
                );
            }
            op @ (9 | 10) => {
                let local = odd();
                raw.send(
                    if op == 9 { Op::PeerRead } else { Op::PeerWrite },
                    &m::PeerReadRequest { peer: odd() % 6, handle, offset, local, len },
                    &[],
                );
            }
            11 => raw.send(Op::PeerList, &m::PeerListRequest { ino: handle }, &[]),
            12 => raw.send(
                Op::SetPlacement,
                &m::SetPlacementRequest { placement: flags % 5, reserved: 0 },
                b"/a",
            ),
            13 => raw.send(Op::Allocate, &m::AllocateRequest { len }, b"name"),
            14 => raw.send(
                Op::Memory,
                &m::MemoryRequest { what: flags % 5, reserved: 0, peer: odd() % 6 },
                b"memory",
            ),
            _ => raw.send(
                Op::PeerMap,
                &m::PeerMapRequest { peer: odd() % 6, handle, offset, write: flags % 3, reserved: 0 },
                &[],
            ),
        }
        let (message, _) = raw.receive().expect("a sound message is never a reason to let go");
        answered += u32::from(message.error().is_none());
    }
    assert!(answered > 100, "seed {seed:#x}: only {answered} made sense");
    client.stat("/a").unwrap();
}

#[test]
fn garbage_in_the_rings_and_slots_is_survived() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    file_of(&client, &[3; 3 * WINDOW]);
    let seed = 0x5eed_0006;
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut expelled = 0;
    for round in 0..60u64 {
        let raw = Raw::connect(&serving.socket);
        let mut fds = raw.hello();
        raw.send(Op::Open, &m::OpenRequest { flags: m::OPEN_READ | m::OPEN_WRITE, mode: 0 }, b"/a");
        raw.receive().unwrap();
        let map =
            m::MapRequest { handle: 1, offset: 0, len: 3 * WINDOW as u64, flags: m::MAP_WRITE, reserved: 0 };
        raw.send(Op::Map, &map, &[]);
        raw.receive().unwrap();
        use nvme_driver::mem::{Access, Mapping};
        let ring = Mapping::from_fd(fds.remove(2), 0, RING_LEN, Access::ReadWrite).unwrap();
        let slots = Mapping::from_fd(fds.remove(1), 0, 8192, Access::ReadWrite).unwrap();
        for _ in 0..200 {
            let at = random.next_u32() as usize % (4096 / 8) * 8;
            // Words that look like sections of windows that exist, and words that look like nothing.
            let value = if random.next_u32() % 2 == 0 {
                (random.next_u64() % (1 << 40)) & !0b11 | (random.next_u64() % 4)
            } else {
                random.next_u64()
            };
            slots.u64_at(at).unwrap().store(value, std::sync::atomic::Ordering::SeqCst);
        }
        client.revoke("/a").unwrap();
        let mut bytes = vec![0; RING_LEN - 4096];
        random.fill_bytes(&mut bytes);
        ring.write(4096, &bytes).unwrap();
        let lie = if round % 2 == 0 { 1 + random.next_u32() % 64 } else { random.next_u32() };
        ring.u32_at(word::REPLY_HEAD).unwrap().store(random.next_u32(), std::sync::atomic::Ordering::SeqCst);
        ring.u32_at(word::REQUEST_TAIL).unwrap().store(lie, std::sync::atomic::Ordering::SeqCst);
        raw.send(Op::Kick, &m::Empty {}, &[]);
        expelled += u32::from(raw.is_closed());
    }
    assert_eq!(expelled, 60, "seed {seed:#x}");
    let mut bytes = vec![0; WINDOW];
    let file = client.open("/a", OpenMode::write()).unwrap();
    file.read_at(0, &mut bytes).unwrap();
    file.commit().unwrap();
    assert!(bytes.iter().all(|&b| b == 3), "nobody wrote anything");
}

#[test]
fn a_client_that_does_not_read_is_let_go() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    let raw = Raw::connect(&serving.socket);
    raw.hello();
    let mut sent = 0;
    let bytes = header::encode(Op::Info, false, 1, 0, &m::Empty {}, &[]).unwrap();
    until("it is let go", || {
        while raw.socket.send(&bytes, &[]).is_ok() {
            sent += 1;
        }
        client.info().unwrap();
        client.status().unwrap().expelled == 1
    });
    assert!(sent > 64);
}

#[test]
fn hello_comes_first_and_once_and_in_a_known_version() {
    let serving = Serving::start(SMALL);
    let raw = Raw::connect(&serving.socket);
    raw.send(Op::Info, &m::Empty {}, &[]);
    assert_eq!(raw.receive().unwrap().0.error().unwrap().code, ErrorCode::BadState);
    raw.send(Op::Hello, &HelloRequest { min_version: 7, max_version: 9, reserved: 0 }, &[]);
    assert_eq!(raw.receive().unwrap().0.error().unwrap().code, ErrorCode::BadVersion);
    let fds = raw.hello();
    assert_eq!(fds.len(), 4);
    raw.send(Op::Hello, &HelloRequest { min_version: 1, max_version: 1, reserved: 0 }, &[]);
    assert_eq!(raw.receive().unwrap().0.error().unwrap().code, ErrorCode::BadState);
    // What is the server's to write cannot be written, even by the same uid.
    use nvme_driver::mem::{Access, Mapping};
    let control = fds[0].try_clone().unwrap();
    assert!(Mapping::from_fd(control, 0, 4096, Access::ReadWrite).is_err());
    use std::os::fd::AsRawFd;
    let again = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/self/fd/{}", fds[0].as_raw_fd()));
    if let Ok(again) = again {
        assert!(Mapping::from_fd(again.into(), 0, 4096, Access::ReadWrite).is_err(), "sealed");
    }
    for fd in &fds[..3] {
        assert!(rustix::fs::ftruncate(fd, 0).is_err(), "its size is sealed");
    }
}

#[test]
fn the_client_that_is_one_too_many_is_told_the_limit() {
    let serving = Serving::start(SMALL);
    let mut others: Vec<Raw> = (0..1024).map(|_| Raw::connect(&serving.socket)).collect();
    // All of them are in when the last one is answered: they come in order.
    others[1023].hello();
    for _ in 0..100 {
        let error = Client::connect(&serving.socket).unwrap_err();
        assert_eq!(error.code(), Some(ErrorCode::TooMany), "{error}");
        assert!(error.to_string().contains("1024"), "{error}");
    }
    // Those who say nothing wait for the answer, and not for ever; nor do others have to wait for them.
    let silent: Vec<Raw> = (0..70).map(|_| Raw::connect(&serving.socket)).collect();
    assert_eq!(Client::connect(&serving.socket).unwrap_err().code(), Some(ErrorCode::TooMany));
    assert!(silent[0].is_closed());
    others.pop();
    until("there is room again", || Client::connect(&serving.socket).is_ok());
}

#[test]
fn raw_memory_that_was_closed_in_a_write_section_is_counted_until_the_section_ends_and_no_longer() {
    use nvme_driver::mem::{Access, Mapping};
    use std::sync::atomic::Ordering;
    let size = WINDOW as u64;
    // Room for two windows of raw memory: half of the host cache.
    let host_cache = 4 * size;
    let serving = Serving::start_with(SMALL, |options| ServerOptions { host_cache, ..options });
    let client = serving.client();
    let raw = Raw::connect(&serving.socket);
    let slots = Mapping::from_fd(raw.hello().remove(1), 0, 8192, Access::ReadWrite).unwrap();
    let ask = |op: Op, body: &[u8]| {
        raw.socket.send(body, &[]).unwrap();
        let (message, _) = raw.receive().unwrap();
        assert_eq!((message.op, message.error()), (op, None));
        message
    };
    let request = |op: Op, body: Result<Vec<u8>, _>| ask(op, &body.unwrap());
    let len = 2 * size;
    let allocate = m::AllocateRequest { len };
    let opened = request(Op::Allocate, header::encode(Op::Allocate, false, 2, 0, &allocate, &[]));
    let handle = opened.body_only::<m::OpenReply>().unwrap().handle;
    let map = m::MapRequest { handle, offset: 0, len, flags: m::MAP_WRITE, reserved: 0 };
    request(Op::Map, header::encode(Op::Map, false, 3, 0, &map, &[]));
    let fault = m::FaultRequest { handle, offset: 0, flags: m::MAP_WRITE, reserved: 0 };
    let placed = request(Op::Fault, header::encode(Op::Fault, false, 4, 0, &fault, &[]));
    let placed = placed.body_only::<m::FaultReply>().unwrap();
    assert_eq!(placed.place, m::PLACE_CMB);
    // Active, for writing, that slot, the first section: which a revocation fences, and which is never ended.
    slots.u64_at(0).unwrap().store(1 | u64::from(placed.slot) << 3 | 1 << 31, Ordering::SeqCst);
    assert_eq!(client.revoke_all().unwrap().fenced, 1);
    let close = m::HandleRequest { handle };
    request(Op::Close, header::encode(Op::Close, false, 5, 0, &close, &[]));
    assert_eq!(client.status().unwrap().cmb_quarantined, size);
    assert_eq!(client.allocate(size).unwrap_err().code(), Some(ErrorCode::TooBig), "it may still be written");
    slots.u64_at(0).unwrap().store(0, Ordering::SeqCst);
    until("its pages are free", || client.status().unwrap().cmb_used == 0);
    until("there is room again", || client.allocate(len).is_ok());
}

#[test]
fn a_mapping_that_is_in_use_is_not_given_back_and_not_forgotten() {
    use nvme_driver::mem::{Access, Mapping};
    use p2p::layout::{SectionKind, SectionState, SectionWord};
    use std::sync::atomic::Ordering;
    let serving = Serving::start(SMALL);
    let client = serving.client();
    file_of(&client, &[3; 2 * WINDOW]);
    let raw = Raw::connect(&serving.socket);
    let slots = Mapping::from_fd(raw.hello().remove(1), 0, 8192, Access::ReadWrite).unwrap();
    raw.send(Op::Open, &m::OpenRequest { flags: m::OPEN_READ, mode: 0 }, b"/a");
    let handle = raw.receive().unwrap().0.body_only::<m::OpenReply>().unwrap().handle;
    let len = 2 * WINDOW as u64;
    raw.send(Op::Map, &m::MapRequest { handle, offset: 0, len, flags: 0, reserved: 0 }, &[]);
    let (mapped, records) = {
        let (message, _) = raw.receive().unwrap();
        let (mapped, records) = message.body::<m::MapReply>().unwrap();
        (mapped, records.to_vec())
    };
    let map = mapped.map;
    let slot = u32::from_le_bytes(records[..4].try_into().unwrap());
    // Active, a borrow, the first window's slot, the first section.
    let borrow = SectionWord::new(SectionState::Active, SectionKind::Borrow, slot, 1).word();
    slots.u64_at(0).unwrap().store(borrow, Ordering::SeqCst);
    for _ in 0..2 {
        raw.send(Op::Unmap, &m::UnmapRequest { map }, &[]);
        let refused = raw.receive().unwrap().0.error().expect("it is borrowed");
        assert!(refused.text.contains("in use by a section or borrow"), "{refused:?}");
    }
    slots.u64_at(0).unwrap().store(0, Ordering::SeqCst);
    raw.send(Op::Unmap, &m::UnmapRequest { map }, &[]);
    assert_eq!(raw.receive().unwrap().0.error(), None);
    raw.send(Op::Unmap, &m::UnmapRequest { map }, &[]);
    assert_eq!(raw.receive().unwrap().0.error().unwrap().code, ErrorCode::BadHandle);
}
