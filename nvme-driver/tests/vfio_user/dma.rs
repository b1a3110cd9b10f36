//! DMA_MAP and DMA_UNMAP (protocol specification, sections of those names).
use std::os::fd::OwnedFd;

use nvme_driver::vfio_user::command;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::raw::{Served, dma_map, dma_unmap, words};

pub(crate) fn memfd(len: u64) -> OwnedFd {
    let fd = memfd_create("client", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, len).unwrap();
    fd
}

#[test]
fn regions_come_and_go() {
    let served = Served::new();
    let mut client = served.connect();
    let fd = memfd(1 << 20);
    let mappings = || served.controller.domain().counters().mappings;
    assert!(client.ok(command::DMA_MAP, &dma_map(0x10_0000, 1 << 20, 0), &[&fd]).is_empty());
    client.ok(command::DMA_MAP, &dma_map(0x20_0000, 1 << 16, 1 << 16), &[&fd]);
    assert_eq!(mappings(), 2);
    for (iova, size) in [(0x10_0000, 4096), (0x1f_f000, 8192), (0x20_0000, 4096), (0, 1 << 30)] {
        assert_eq!(client.err(command::DMA_MAP, &dma_map(iova, size, 0), &[]), libc::EEXIST, "{iova:#x}");
    }
    for (iova, size) in [(0x10_0000, 4096), (0x10_1000, (1 << 20) - 4096), (0x18_0000, 1 << 20)] {
        assert_eq!(
            client.err(command::DMA_UNMAP, &dma_unmap(0, iova, size), &[]),
            libc::EINVAL,
            "part of a region"
        );
    }
    assert_eq!(client.err(command::DMA_UNMAP, &dma_unmap(0, 0x90_0000, 4096), &[]), libc::ENOENT);
    let reply = client.ok(command::DMA_UNMAP, &dma_unmap(0, 0x10_0000, 1 << 20), &[]);
    assert_eq!(reply, dma_unmap(0, 0x10_0000, 1 << 20));
    assert_eq!(mappings(), 1);
    client.ok(command::DMA_UNMAP, &dma_unmap(2, 0, 0), &[]);
    assert_eq!(mappings(), 0);
}

#[test]
fn one_unmap_may_cover_several_regions() {
    let served = Served::new();
    let mut client = served.connect();
    let fd = memfd(1 << 20);
    for i in 1..5u64 {
        client.ok(command::DMA_MAP, &dma_map(i << 20, 1 << 20, 0), &[&fd]);
    }
    client.ok(command::DMA_UNMAP, &dma_unmap(0, 2 << 20, 2 << 20), &[]);
    assert_eq!(served.controller.domain().counters().mappings, 2);
}

#[test]
fn regions_without_a_descriptor_are_accepted() {
    let served = Served::new();
    let mut client = served.connect();
    client.ok(command::DMA_MAP, &dma_map(0xfffc_0000, 0x4_0000, 0), &[]);
    assert_eq!(client.err(command::DMA_MAP, &dma_map(0xfffc_0000, 0x1000, 0), &[]), libc::EEXIST);
    client.ok(command::DMA_UNMAP, &dma_unmap(0, 0xfffc_0000, 0x4_0000), &[]);
}

/// Guest memory starts at 0 and lies across the range of interrupt messages: the parts that an IOMMU takes are used.
#[test]
fn guest_memory_from_address_zero() {
    let served = Served::new();
    let mut client = served.connect();
    let fd = memfd(1 << 32);
    client.ok(command::DMA_MAP, &dma_map(0, 1 << 32, 0), &[&fd]);
    let domain = served.controller.domain();
    assert_eq!(domain.counters().mappings, 2);
    domain.write(0x1000, b"low").unwrap();
    domain.write(0xfef0_0000, b"high").unwrap();
    let mut got = [0; 4];
    rustix::io::pread(&fd, &mut got, 0xfef0_0000).unwrap();
    assert_eq!(&got, b"high");
    client.ok(command::DMA_UNMAP, &dma_unmap(0, 0, 1 << 32), &[]);
    assert_eq!(domain.counters().mappings, 0);
}

#[test]
fn what_could_hurt_the_server_is_refused() {
    let served = Served::new();
    let mut client = served.connect();
    let fd = memfd(8192);
    for (body, why) in [
        (dma_map(0x10_0000, 16384, 0), "longer than its file"),
        (dma_map(0x10_0000, 4096, 8192), "beyond its file"),
        (dma_map(0x10_0000, 4096, !0xfff), "an offset that overflows"),
        (dma_map(0x10_0000, 0, 0), "empty"),
        (dma_map(0x10_0100, 4096, 0), "unaligned"),
        (dma_map(!0xfff, 8192, 0), "around the end of the address space"),
        (dma_map(0x10_0000, 4096, 0)[..31].to_vec(), "cut short"),
        (
            [words(&[32, 0]), dma_map(0x10_0000, 4096, 0)[8..].to_vec()].concat(),
            "neither readable nor writable",
        ),
    ] {
        assert_eq!(client.err(command::DMA_MAP, &body, &[&fd]), libc::EINVAL, "{why}");
    }
    assert_eq!(client.err(command::DMA_MAP, &dma_map(0x10_0000, 4096, 0), &[&fd, &fd]), libc::EINVAL);
    let pipe = rustix::pipe::pipe().unwrap().0;
    client.err(command::DMA_MAP, &dma_map(0x10_0000, 4096, 0), &[&pipe]);
    // Memory that was accepted cannot be taken away under the controller.
    client.ok(command::DMA_MAP, &dma_map(0x10_0000, 8192, 0), &[&fd]);
    assert!(ftruncate(&fd, 0).is_err());
    assert_eq!(served.controller.domain().counters().mappings, 1);
}

#[test]
fn a_client_that_leaves_takes_its_memory_along() {
    let served = Served::new();
    let mut client = served.connect();
    let fd = memfd(1 << 20);
    client.ok(command::DMA_MAP, &dma_map(0x10_0000, 1 << 20, 0), &[&fd]);
    drop(client);
    let mut next = served.connect();
    assert_eq!(served.controller.domain().counters().mappings, 0);
    next.ok(command::DMA_MAP, &dma_map(0x10_0000, 1 << 20, 0), &[&fd]);
}
