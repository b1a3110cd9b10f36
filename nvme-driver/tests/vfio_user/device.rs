//! Device, regions, interrupts, reset (protocol specification, sections of those names).
use nvme_driver::vfio_user::{Header, command};

use crate::raw::{Served, access, u32_at, u64_at, words};

const CONFIG: u32 = 7;

#[test]
fn the_device_is_a_resettable_pci_function() {
    let served = Served::new();
    let mut client = served.connect();
    let info = client.ok(command::DEVICE_GET_INFO, &words(&[16, 0, 0, 0]), &[]);
    assert_eq!(info, words(&[16, 3, 9, 5]));
    assert_eq!(client.err(command::DEVICE_GET_INFO, &words(&[8, 0, 0, 0]), &[]), libc::EINVAL);
    assert_eq!(client.err(command::DEVICE_GET_INFO, &[], &[]), libc::EINVAL);
}

#[test]
fn bar0_can_be_mapped_for_exactly_the_doorbells() {
    let served = Served::new();
    let mut client = served.connect();
    let ask = |argsz| [words(&[argsz, 0, 0, 0]), vec![0; 16]].concat();
    let (_, short, fds) = client.call(command::DEVICE_GET_REGION_INFO, &ask(32), &[]);
    assert_eq!(
        (short.len(), u32_at(&short, 0), u32_at(&short, 12)),
        (32, 64, 32),
        "capabilities left out, their size named"
    );
    assert!(fds.is_empty());
    let (_, info, fds) = client.call(command::DEVICE_GET_REGION_INFO, &ask(64), &[]);
    assert_eq!(u32_at(&info, 4), 0b1111, "read, write, mmap, capabilities");
    assert_eq!(u32_at(&info, 12), 32);
    assert_eq!(
        (u32_at(&info, 32), u32_at(&info, 36), u32_at(&info, 40)),
        (0x1_0001, 0, 1),
        "one sparse area, no more capabilities"
    );
    assert_eq!((u64_at(&info, 48), u64_at(&info, 56)), (0x1000, 0x1000));
    assert_eq!(fds.len(), 1);
    // What the area is mapped from is what the registers are.
    let offset = u64_at(&info, 24) + 0x1000;
    let fd = fds.into_iter().next().unwrap();
    assert!(rustix::fs::ftruncate(&fd, 0).is_err(), "a client could take the page away");
    let more = rustix::fs::SealFlags::FUTURE_WRITE;
    assert!(
        rustix::fs::fcntl_add_seals(&fd, more).is_err(),
        "a client could keep the next one from mapping it"
    );
    let page =
        nvme_driver::mem::Mapping::from_fd(fd, offset, 0x1000, nvme_driver::mem::Access::ReadWrite).unwrap();
    client.write(0, 0x1000 + 8, &5u32.to_le_bytes());
    assert_eq!(page.u32_at(8).unwrap().load(std::sync::atomic::Ordering::Acquire), 5);
}

#[test]
fn the_cmb_bar_can_be_mapped_whole() {
    let served = Served::new();
    let mut client = served.connect();
    let (_, info, fds) =
        client.call(command::DEVICE_GET_REGION_INFO, &[words(&[32, 0, 2, 0]), vec![0; 16]].concat(), &[]);
    assert_eq!((u32_at(&info, 4), u64_at(&info, 16)), (0b111, 1 << 20));
    let fd = fds.into_iter().next().unwrap();
    let cmb = nvme_driver::mem::Mapping::from_fd(
        fd,
        u64_at(&info, 24),
        1 << 20,
        nvme_driver::mem::Access::ReadWrite,
    )
    .unwrap();
    cmb.write(4096, b"through memory").unwrap();
    assert_eq!(client.read(2, 4096, 14), b"through memory");
    client.write(2, 8191, b"by message");
    let mut got = [0; 10];
    cmb.read(8191, &mut got).unwrap();
    assert_eq!(&got, b"by message");
}

#[test]
fn other_regions_are_described_or_refused() {
    let served = Served::new();
    let mut client = served.connect();
    for (index, size) in [(1, 0), (3, 0), (4, 0x4000), (6, 0), (7, 4096), (8, 0)] {
        let (_, info, fds) = client.call(
            command::DEVICE_GET_REGION_INFO,
            &[words(&[32, 0, index, 0]), vec![0; 16]].concat(),
            &[],
        );
        assert_eq!((u32_at(&info, 8), u64_at(&info, 16)), (index, size), "region {index}");
        assert!(fds.is_empty(), "region {index} cannot be mapped");
    }
    assert_eq!(
        client.err(command::DEVICE_GET_REGION_INFO, &words(&[32, 0, 9, 0, 0, 0, 0, 0]), &[]),
        libc::EINVAL
    );
    assert_eq!(
        client.err(command::DEVICE_GET_REGION_INFO, &words(&[31, 0, 0, 0, 0, 0, 0, 0]), &[]),
        libc::EINVAL
    );
    assert_eq!(client.err(command::DEVICE_GET_REGION_INFO, &words(&[32]), &[]), libc::EINVAL);
}

#[test]
fn config_space_reads_in_any_size() {
    let served = Served::new();
    let mut client = served.connect();
    let all = client.read(CONFIG, 0, 4096);
    assert_eq!(&all[9..12], [0x02, 0x08, 0x01], "class code: NVM Express");
    for (offset, count) in [(0, 1), (0, 2), (0, 4), (1, 2), (3, 7), (0, 64), (4095, 1)] {
        assert_eq!(client.read(CONFIG, offset, count), all[offset as usize..][..count as usize]);
    }
    // PCIe, power management and MSI-X are there.
    let (mut at, mut ids) = (usize::from(all[0x34]), Vec::new());
    while at != 0 {
        ids.push(all[at]);
        at = usize::from(all[at + 1]);
    }
    ids.sort_unstable();
    assert_eq!(ids, [0x01, 0x10, 0x11]);
    for (offset, count) in [(4096, 1), (4090, 8), (u64::MAX, 1), (0, 0)] {
        assert_eq!(client.err(command::REGION_READ, &access(CONFIG, offset, count, &[]), &[]), libc::EINVAL);
    }
    client.write(CONFIG, 4, &[6, 0]);
    assert_eq!(client.read(CONFIG, 4, 2), [6, 0]);
}

#[test]
fn registers_and_their_refusals() {
    let served = Served::new();
    let mut client = served.connect();
    let version = client.read(0, 8, 4);
    assert_eq!(version, 0x0001_0400u32.to_le_bytes());
    assert_eq!(client.read(0, 8, 2), version[..2]);
    assert_eq!(client.read(0, 0, 8).len(), 8);
    assert_eq!(client.read(0, 0, 64).len(), 64);
    client.write(0, 0x28, &0x1234_5678_9000u64.to_le_bytes());
    assert_eq!(client.read(0, 0x28, 8), 0x1234_5678_9000u64.to_le_bytes());
    let refused: [(u32, u64, u32); 6] =
        [(0, 0x14, 2), (0, 0x15, 4), (0, 1 << 40, 4), (1, 0, 4), (6, 0, 4), (u32::MAX, 0, 4)];
    for (region, offset, count) in refused {
        let data = vec![0; count as usize];
        assert_eq!(
            client.err(command::REGION_WRITE, &access(region, offset, count, &data), &[]),
            libc::EINVAL
        );
    }
    assert_eq!(
        client.err(command::REGION_WRITE, &access(0, 0x14, 8, &[0; 4]), &[]),
        libc::EINVAL,
        "less data than said"
    );
    assert_eq!(client.err(command::REGION_READ, &access(0, 0, u32::MAX, &[]), &[]), libc::EINVAL);
}

#[test]
fn several_writes_in_one_message() {
    let served = Served::new();
    let mut client = served.connect();
    let one = |offset: u64, count: u32, data: u64| {
        [access(0, offset, count, &[]), data.to_le_bytes().to_vec()].concat()
    };
    let body = [2u64.to_le_bytes().to_vec(), one(0x24, 4, 0x001f_001f), one(0x28, 8, 0x7000)].concat();
    assert_eq!(client.ok(command::REGION_WRITE_MULTI, &body, &[]), 2u64.to_le_bytes());
    assert_eq!(client.read(0, 0x24, 4), 0x001f_001fu32.to_le_bytes());
    assert_eq!(client.read(0, 0x28, 8), 0x7000u64.to_le_bytes());
    for bad in [3u64, 0x0aaa_aaaa_aaaa_aaab, u64::MAX] {
        let body = [bad.to_le_bytes().to_vec(), one(0x24, 4, 0)].concat();
        assert_eq!(client.err(command::REGION_WRITE_MULTI, &body, &[]), libc::EINVAL);
    }
    let body = [1u64.to_le_bytes().to_vec(), one(0x24, 9, 0)].concat();
    assert_eq!(client.err(command::REGION_WRITE_MULTI, &body, &[]), libc::EINVAL, "more than eight bytes");
}

#[test]
fn msix_is_the_only_interrupt() {
    let served = Served::new();
    let mut client = served.connect();
    for (kind, expected) in
        [(0, [16, 0, 0, 0]), (1, [16, 0, 1, 0]), (2, [16, 9, 2, 5]), (3, [16, 0, 3, 0]), (4, [16, 0, 4, 0])]
    {
        assert_eq!(client.ok(command::DEVICE_GET_IRQ_INFO, &words(&[16, 0, kind, 0]), &[]), words(&expected));
    }
    assert_eq!(client.err(command::DEVICE_GET_IRQ_INFO, &words(&[16, 0, 5, 0]), &[]), libc::EINVAL);
    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    let (none, bools, fds, trigger, mask) = (1u32, 2, 4, 1 << 5, 1 << 3);
    client.ok(command::DEVICE_SET_IRQS, &words(&[20, fds | trigger, 2, 1, 1]), &[&eventfd]);
    client.ok(command::DEVICE_SET_IRQS, &words(&[20, none | trigger, 2, 1, 1]), &[]);
    let mut count = [0u8; 8];
    rustix::io::read(&eventfd, &mut count).unwrap();
    assert_eq!(u64::from_le_bytes(count), 1, "asked to signal, it signals");
    client.ok(command::DEVICE_SET_IRQS, &[words(&[21, bools | trigger, 2, 1, 1]), vec![0]].concat(), &[]);
    assert!(rustix::io::read(&eventfd, &mut count).is_err(), "asked not to signal, it does not");
    client.ok(command::DEVICE_SET_IRQS, &words(&[20, fds | trigger, 2, 1, 1]), &[]);
    client.ok(command::DEVICE_SET_IRQS, &words(&[20, none | trigger, 2, 1, 1]), &[]);
    assert!(rustix::io::read(&eventfd, &mut count).is_err(), "without an eventfd nothing is signalled");
    client.ok(command::DEVICE_SET_IRQS, &words(&[20, none | trigger, 2, 0, 0]), &[]);
    for bad in [
        [20, fds | trigger, 2, 4, 2],
        [20, fds | trigger, 2, u32::MAX, u32::MAX],
        [20, none | trigger, 0, 0, 1],
        [20, none | mask, 2, 0, 1],
        [20, none | fds | trigger, 2, 0, 1],
        [20, bools | trigger, 2, 0, 1],
        [20, 0, 2, 0, 0],
        [19, none | trigger, 2, 0, 0],
        [20, none | trigger, 9, 0, 0],
    ] {
        assert_eq!(client.err(command::DEVICE_SET_IRQS, &words(&bad), &[]), libc::EINVAL, "{bad:?}");
    }
    assert_eq!(
        client.err(command::DEVICE_SET_IRQS, &words(&[20, fds | trigger, 2, 0, 1]), &[&eventfd, &eventfd]),
        libc::EINVAL
    );
    // Too many descriptors for any message.
    let many: Vec<_> = (0..40).map(|_| &eventfd).collect();
    client.send(
        Header::command(7, command::DEVICE_SET_IRQS, 20),
        &words(&[20, fds | trigger, 2, 0, 5]),
        &many,
    );
    assert!(client.is_closed());
    served.connect();
}

/// Only eventfds: a pipe nobody reads would be a SIGPIPE, a full one a write that blocks.
#[test]
fn what_is_no_eventfd_is_refused() {
    let served = Served::new();
    let mut client = served.connect();
    let (reader, pipe) = rustix::pipe::pipe().unwrap();
    drop(reader);
    let file: std::os::fd::OwnedFd = tempfile::tempfile().unwrap().into();
    for fd in [&pipe, &file, &crate::dma::memfd(4096)] {
        let set = words(&[20, 4 | 1 << 5, 2, 0, 1]);
        assert_eq!(client.err(command::DEVICE_SET_IRQS, &set, &[fd]), libc::EINVAL);
    }
}

#[test]
fn reset_brings_the_registers_back() {
    let served = Served::new();
    let mut client = served.connect();
    client.write(0, 0x24, &0x001f_001fu32.to_le_bytes());
    assert!(client.ok(command::DEVICE_RESET, &[], &[]).is_empty());
    assert_eq!(client.read(0, 0x24, 4), [0; 4]);
}

#[test]
fn state_outlives_a_client_but_bus_mastering_does_not() {
    let served = Served::new();
    let mut client = served.connect();
    client.write(0, 0x24, &0x001f_001fu32.to_le_bytes());
    client.write(CONFIG, 4, &[6, 0]);
    drop(client);
    let mut next = served.connect();
    assert_eq!(next.read(0, 0x24, 4), 0x001f_001fu32.to_le_bytes());
    assert_eq!(next.read(CONFIG, 4, 2), [2, 0]);
}
