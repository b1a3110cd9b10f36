//! A disk that remembers every write and flush, on an image of shared pages, so that crash states are cheap.

use std::sync::{Arc, Mutex};

use nvme_driver::disk::{Disk, DiskError, Geometry, Op};

pub const PAGE: usize = 4096;
pub const SECTOR: usize = 512;

/// An image whose copies share what they have in common.
#[derive(Clone)]
pub struct Image {
    pages: Vec<Arc<[u8; PAGE]>>,
}

impl Image {
    /// Full of bytes that nobody wrote, so that whoever shows them is found out.
    pub fn poisoned(pages: usize) -> Self {
        let page = |i: usize| {
            let mut p = [0; PAGE];
            for (at, word) in p.chunks_exact_mut(8).enumerate() {
                word.copy_from_slice(&(0xdead_0000_0000_0000u64 | (i * PAGE + at) as u64).to_le_bytes());
            }
            Arc::new(p)
        };
        Self { pages: (0..pages).map(page).collect() }
    }

    pub fn from_bytes(bytes: &[u8]) -> Self {
        let page = |p: &[u8]| Arc::new(p.try_into().unwrap());
        Self { pages: bytes.chunks_exact(PAGE).map(page).collect() }
    }

    pub fn bytes(&self) -> usize {
        self.pages.len() * PAGE
    }

    pub fn to_vec(&self) -> Vec<u8> {
        self.pages.iter().flat_map(|p| p.iter().copied()).collect()
    }

    pub fn read(&self, mut at: usize, into: &mut [u8]) {
        let mut into = into;
        while !into.is_empty() {
            let n = into.len().min(PAGE - at % PAGE);
            let (head, rest) = into.split_at_mut(n);
            head.copy_from_slice(&self.pages[at / PAGE][at % PAGE..][..n]);
            into = rest;
            at += n;
        }
    }

    pub fn write(&mut self, mut at: usize, mut from: &[u8]) {
        while !from.is_empty() {
            let n = from.len().min(PAGE - at % PAGE);
            Arc::make_mut(&mut self.pages[at / PAGE])[at % PAGE..][..n].copy_from_slice(&from[..n]);
            from = &from[n..];
            at += n;
        }
    }
}

/// What happened to the disk.
#[derive(Clone)]
pub enum Event {
    Write { at: usize, data: Vec<u8> },
    Flush,
}

/// Everything that happened, and the image as a running device shows it.
pub struct Tape {
    pub image: Image,
    pub events: Vec<Event>,
    /// Fail the write or flush with this number of events left, and everything after.
    pub fail_after: Option<usize>,
}

/// A disk on a tape; the tape can be looked at while the filesystem runs.
#[derive(Clone)]
pub struct TapeDisk {
    pub tape: Arc<Mutex<Tape>>,
    geometry: Geometry,
}

impl TapeDisk {
    pub fn new(image: Image) -> Self {
        let geometry = Geometry {
            block_size: SECTOR as u32,
            blocks: (image.bytes() / SECTOR) as u64,
            max_transfer: 1 << 20,
            volatile_cache: true,
            can_deallocate: true,
        };
        Self { tape: Arc::new(Mutex::new(Tape { image, events: Vec::new(), fail_after: None })), geometry }
    }

    /// The image as a running device shows it.
    pub fn image(&self) -> Image {
        self.tape.lock().unwrap().image.clone()
    }

    pub fn events(&self) -> usize {
        self.tape.lock().unwrap().events.len()
    }

    fn record(&self, op: Op, event: Event) -> Result<(), DiskError> {
        let mut tape = self.tape.lock().unwrap();
        if tape.fail_after.is_some_and(|n| tape.events.len() >= n) {
            return Err(DiskError::Dead { name: "tape".to_owned(), reason: format!("{op} made to fail") });
        }
        if let Event::Write { at, data } = &event {
            tape.image.write(*at, data);
        }
        tape.events.push(event);
        Ok(())
    }
}

impl Disk for TapeDisk {
    fn name(&self) -> &str {
        "tape"
    }
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }
    fn read(&mut self, lba: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.tape.lock().unwrap().image.read(lba as usize * SECTOR, into);
        Ok(())
    }
    fn write(&mut self, lba: u64, from: &[u8]) -> Result<(), DiskError> {
        assert_eq!(from.len() % SECTOR, 0);
        self.record(Op::Write, Event::Write { at: lba as usize * SECTOR, data: from.to_vec() })
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        self.record(Op::Flush, Event::Flush)
    }
    fn write_zeroes(&mut self, lba: u64, blocks: u64) -> Result<(), DiskError> {
        self.write(lba, &vec![0; blocks as usize * SECTOR])
    }
    fn deallocate(&mut self, lba: u64, blocks: u64) -> Result<(), DiskError> {
        // What is trimmed reads as rubbish.
        self.write(lba, &vec![0xdd; blocks as usize * SECTOR])
    }
}
