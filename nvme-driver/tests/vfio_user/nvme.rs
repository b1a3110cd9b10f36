//! An admin queue brought up by hand through the socket (NVMe base specification, "Controller Initialization").
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nvme_driver::mem::{Access, Mapping};
use nvme_driver::vfio_user::command;

use crate::dma::memfd;
use crate::raw::{Client, Served, dma_map, dma_unmap, u32_at, words};

const IOVA: u64 = 0x10_0000;
const ASQ: usize = 0;
const ACQ: usize = 0x1000;
const DATA: usize = 0x2000;

struct Admin {
    client: Client,
    memory: Arc<Mapping>,
    fd: OwnedFd,
    tail: u32,
}

impl Admin {
    fn up(mut client: Client) -> Self {
        let fd = memfd(0x10000);
        client.ok(command::DMA_MAP, &dma_map(IOVA, 0x10000, 0), &[&fd]);
        let memory = Mapping::from_fd(fd.try_clone().unwrap(), 0, 0x10000, Access::ReadWrite).unwrap();
        client.write(7, 4, &[6, 0]);
        client.write(0, 0x24, &0x000f_000fu32.to_le_bytes());
        client.write(0, 0x28, &(IOVA + ASQ as u64).to_le_bytes());
        client.write(0, 0x30, &(IOVA + ACQ as u64).to_le_bytes());
        client.write(0, 0x14, &0x0046_0001u32.to_le_bytes());
        let mut left = 1000;
        while u32_at(&client.read(0, 0x1c, 4), 0) & 1 == 0 {
            left -= 1;
            assert!(left > 0, "never ready");
        }
        Self { client, memory, fd, tail: 0 }
    }

    /// Identify Controller into the data page.
    fn submit_identify(&mut self) {
        let mut entry = [0u32; 16];
        entry[0] = 6 | (0x1234 << 16);
        entry[6] = (IOVA + DATA as u64) as u32;
        entry[10] = 1;
        self.memory.write(ASQ + 64 * self.tail as usize, &words(&entry)).unwrap();
        self.tail += 1;
        self.client.write(0, 0x1000, &self.tail.to_le_bytes());
    }

    /// The status of completion `index`, once it is there.
    fn wait(&self, index: usize) -> u32 {
        for _ in 0..30_000 {
            let word = self.memory.u32_at(ACQ + 16 * index + 12).unwrap().load(Ordering::Acquire);
            if word >> 16 & 1 == 1 {
                assert_eq!(word & 0xffff, 0x1234);
                return word >> 17;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        panic!("no completion");
    }
}

#[test]
fn identify_by_hand() {
    let served = Served::new();
    let mut admin = Admin::up(served.connect());
    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    admin.client.ok(command::DEVICE_SET_IRQS, &words(&[20, 4 | 1 << 5, 2, 0, 1]), &[&eventfd]);
    admin.submit_identify();
    assert_eq!(admin.wait(0), 0);
    let mut serial = [0; 20];
    admin.memory.read(DATA + 4, &mut serial).unwrap();
    assert_eq!(&serial[..14], b"CMBFS-EMULATED");
    let mut count = [0; 8];
    rustix::io::read(&eventfd, &mut count).unwrap();
    assert!(u64::from_le_bytes(count) >= 1, "no interrupt");
    let mut subnqn = [0; 4];
    admin.memory.read(DATA + 768, &mut subnqn).unwrap();
    assert_eq!(&subnqn, b"nqn.");
}

/// A masked vector's interrupt waits in the pending bits, which can be read, and comes when the mask goes (PCI, "MSI-X Table", "PBA").
#[test]
fn a_masked_interrupt_is_pending_and_can_be_seen() {
    const TABLE: u64 = 0;
    const PBA: u64 = 0x2000;
    let served = Served::new();
    let mut admin = Admin::up(served.connect());
    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    admin.client.ok(command::DEVICE_SET_IRQS, &words(&[20, 4 | 1 << 5, 2, 0, 1]), &[&eventfd]);
    // MSI-X capability: table and pending bits in BAR 4.
    let config = admin.client.read(7, 0, 256);
    let at = (0x40..0xf0).step_by(4).find(|at| config[*at] == 0x11).unwrap();
    assert_eq!((u32_at(&config, at + 4), u32_at(&config, at + 8)), (4 | TABLE as u32, 4 | PBA as u32));
    admin.client.write(4, TABLE + 12, &1u32.to_le_bytes());
    admin.submit_identify();
    assert_eq!(admin.wait(0), 0);
    // Interrupts follow the completions of a step: after another message that step is over.
    assert_eq!(admin.client.read(4, PBA, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
    let mut count = [0; 8];
    assert!(rustix::io::read(&eventfd, &mut count).is_err(), "masked");
    admin.client.write(4, TABLE + 12, &0u32.to_le_bytes());
    assert_eq!(admin.client.read(4, PBA, 4), [0; 4]);
    rustix::io::read(&eventfd, &mut count).unwrap();
    assert_eq!(u64::from_le_bytes(count), 1);
}

/// An eventfd whose counter is full, and whose writers block, does not stop the controller.
#[test]
fn a_full_eventfd_stops_nobody() {
    let served = Served::new();
    let mut admin = Admin::up(served.connect());
    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    rustix::io::write(&eventfd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    // Should the server be stopped by it, this test ends all the same.
    struct Drain(OwnedFd);
    impl Drop for Drain {
        fn drop(&mut self) {
            let _ = rustix::io::read(&self.0, &mut [0; 8]);
        }
    }
    let eventfd = Drain(eventfd);
    admin.client.stream.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    admin.client.ok(command::DEVICE_SET_IRQS, &words(&[20, 4 | 1 << 5, 2, 0, 1]), &[&eventfd.0]);
    for index in 0..4 {
        admin.submit_identify();
        assert_eq!(admin.wait(index), 0);
    }
    admin.client.ok(command::DEVICE_SET_IRQS, &words(&[20, 1 | 1 << 5, 2, 0, 1]), &[]);
}

/// After DMA_UNMAP is answered, nothing lands any more.
#[test]
fn unmapped_memory_is_out_of_reach() {
    let served = Served::new();
    let mut admin = Admin::up(served.connect());
    admin.client.ok(command::DMA_UNMAP, &dma_unmap(0, IOVA, 0x10000), &[]);
    let before = served.controller.domain().counters();
    admin.submit_identify();
    // The controller tries, one way or the other.
    let tried = || {
        served.controller.domain().counters().faults > before.faults
            || served.controller.counters().admin_commands[6] > 0
    };
    while !tried() {
        std::thread::yield_now();
    }
    assert_eq!(served.controller.counters().admin_commands[6], 0, "it could read the command");
    let mut all = vec![0; 0x10000];
    rustix::io::pread(&admin.fd, &mut all, 0).unwrap();
    assert!(all[ACQ..].iter().all(|b| *b == 0), "something landed");
}

#[test]
fn the_next_client_starts_over() {
    let served = Served::new();
    for _ in 0..3 {
        let mut client = served.connect();
        client.ok(command::DEVICE_RESET, &[], &[]);
        let mut admin = Admin::up(client);
        admin.submit_identify();
        assert_eq!(admin.wait(0), 0);
    }
}
