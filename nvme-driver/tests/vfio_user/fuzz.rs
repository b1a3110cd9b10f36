//! Random messages: some of the right shape with wild values, some of no shape at all. The session must answer or hang up, never crash,
//! and every reply must have the form that the specification gives it.
use std::os::fd::OwnedFd;

use nvme_driver::emu::EmulatedController;
use nvme_driver::vfio_user::{Header, Session, command};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

use crate::dma::memfd;
use crate::raw::{Served, config};

struct Random(Xoshiro256PlusPlus);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0.next_u64() % n
    }

    /// Values that tend to matter.
    fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => self.below(16),
            2 => self.below(8192) & !3,
            3 => self.below(1 << 20) & !0xfff,
            4 => 1 << self.below(64),
            5 => (1u64 << self.below(64)).wrapping_sub(1),
            6 => u64::MAX - self.below(4096),
            _ => self.0.next_u64(),
        }
    }

    fn message(&mut self) -> (Header, Vec<u8>) {
        let command = if self.below(32) == 0 { self.0.next_u64() as u16 } else { self.below(17) as u16 };
        let mut body = Vec::new();
        let v = |r: &mut Self| r.value();
        match command {
            command::DMA_MAP => {
                body.extend(((v(self) as u32) | 32).to_le_bytes());
                body.extend((self.below(5) as u32).to_le_bytes());
                for _ in 0..3 {
                    body.extend((v(self) & !(self.below(2) * 0xfff)).to_le_bytes());
                }
            }
            command::DMA_UNMAP => {
                body.extend(24u32.to_le_bytes());
                body.extend((self.below(3) as u32).to_le_bytes());
                body.extend((v(self) & !0xfff).to_le_bytes());
                body.extend((v(self) & !0xfff).to_le_bytes());
            }
            command::REGION_READ | command::REGION_WRITE => {
                body.extend(v(self).to_le_bytes());
                body.extend((self.below(10) as u32).to_le_bytes());
                let count = if self.below(16) == 0 { v(self) as u32 } else { self.below(65) as u32 };
                body.extend(count.to_le_bytes());
                body.extend((0..self.below(65)).map(|i| i as u8));
            }
            command::REGION_WRITE_MULTI => {
                let n = self.below(4);
                body.extend(if self.below(8) == 0 { v(self) } else { n }.to_le_bytes());
                for _ in 0..n {
                    body.extend((v(self) % 8192).to_le_bytes());
                    body.extend((self.below(9) as u32).to_le_bytes());
                    body.extend((self.below(10) as u32).to_le_bytes());
                    body.extend(v(self).to_le_bytes());
                }
            }
            command::DEVICE_SET_IRQS => {
                for limit in [64u64, 64, 6, 8, 8] {
                    body.extend((self.below(limit) as u32).to_le_bytes());
                }
                body.extend((0..self.below(8)).map(|i| i as u8 & 1));
            }
            _ => {
                for _ in 0..self.below(10) {
                    body.extend((v(self) as u32).to_le_bytes());
                }
            }
        }
        match self.below(16) {
            0 => body.truncate(self.below(body.len() as u64 + 1) as usize),
            1 if !body.is_empty() => {
                let at = self.below(body.len() as u64) as usize;
                body[at] ^= 1 << self.below(8);
            }
            _ => {}
        }
        let mut header = Header::command(self.0.next_u64() as u16, command, body.len());
        if self.below(16) == 0 {
            header = header.without_reply();
        }
        if self.below(256) == 0 {
            header.flags = self.0.next_u64() as u32;
        }
        (header, body)
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn random_messages_never_crash_a_session() {
    let seed = setting("CMBFS_SEED", 1);
    let count = setting("CMBFS_FUZZ_MESSAGES", 100_000);
    eprintln!("CMBFS_SEED={seed} CMBFS_FUZZ_MESSAGES={count}");
    let mut random = Random(Xoshiro256PlusPlus::seed_from_u64(seed));
    let controller = EmulatedController::new(&config()).unwrap();
    let open = || {
        let mut session = Session::new(controller.function(), false, None).unwrap();
        let version = b"\0\0\0\0{\"capabilities\":{\"write_multiple\":true}}\0";
        session.handle(Header::command(0, command::VERSION, version.len()), version, Vec::new()).unwrap();
        session
    };
    let memory = memfd(1 << 20);
    let mut session = open();
    let (mut succeeded, mut refused, mut hung_up) = (0u64, 0u64, 0u64);
    for _ in 0..count {
        let (header, body) = random.message();
        let fds: Vec<OwnedFd> = match random.below(8) {
            0..4 if header.command == command::DMA_MAP => vec![memory.try_clone().unwrap()],
            0 => (0..random.below(4)).map(|_| memory.try_clone().unwrap()).collect(),
            _ => Vec::new(),
        };
        match session.handle(header, &body, fds) {
            Ok(None) => assert!(header.flags & 0x10 != 0),
            Ok(Some(reply)) => {
                let head = Header::parse(&reply.bytes[..16].try_into().unwrap());
                assert!(head.is_reply() && head.id == header.id && head.command == header.command);
                assert_eq!(head.size as usize, reply.bytes.len());
                if head.is_error() {
                    refused += 1;
                } else {
                    succeeded += 1;
                }
                assert!(!head.is_error() || (head.size == 16 && head.error != 0 && reply.fds.is_empty()));
            }
            Err(_) => {
                hung_up += 1;
                session = open();
            }
        }
        controller.step();
    }
    drop(session);
    assert_eq!(controller.domain().counters().mappings, 0, "a session left mappings behind");
    eprintln!("{succeeded} succeeded, {refused} refused, {hung_up} hung up");
    assert!(
        succeeded > count / 20 && refused > count / 20,
        "the messages are too tame or too wild to test anything"
    );
}

/// The same through the socket, with random bytes in between: the server outlives every client.
#[test]
fn random_bytes_never_stop_the_server() {
    let seed = setting("CMBFS_SEED", 1);
    eprintln!("CMBFS_SEED={seed}");
    let mut random = Random(Xoshiro256PlusPlus::seed_from_u64(seed));
    let served = Served::new();
    for _ in 0..100 {
        let client = served.connect();
        let mut bytes = Vec::new();
        for _ in 0..random.below(20) {
            let (header, body) = random.message();
            bytes.extend(header.to_bytes());
            bytes.extend(body);
        }
        bytes.extend((0..random.below(64)).map(|_| random.0.next_u64() as u8));
        client.stream.set_nonblocking(true).unwrap();
        let _ = std::io::Write::write_all(&mut &client.stream, &bytes);
    }
    let mut client = served.connect();
    client.ok(command::DEVICE_GET_INFO, &crate::raw::words(&[16, 0, 0, 0]), &[]);
}
