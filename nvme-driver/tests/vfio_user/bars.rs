//! A server that answers at a BAR only where the BAR has been placed, as QEMU's does.
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use nvme_driver::pci::PciError;
use nvme_driver::vfio_user::{Header, VfioUserFunction, command};

use crate::client::{fake, reply};
use crate::raw::{u32_at, words};

/// Size and kind (64-bit: 4) of each BAR.
const BARS: [(u32, u32); 6] = [(0x4000, 4), (0, 0), (1 << 20, 4), (0, 0), (0x2000, 0), (0x100, 1)];

#[derive(Default)]
struct Slot {
    /// Config space words that were written, by offset.
    config: BTreeMap<u64, u32>,
}

impl Slot {
    /// What is decoded for each memory BAR.
    fn decoded(&self) -> Vec<(u64, u64)> {
        let word = |at: u64| self.config.get(&at).copied().unwrap_or(0);
        let memory_space = word(4) & 2 != 0;
        let memory = BARS.iter().enumerate().filter(|(_, (size, kind))| *size != 0 && kind & 1 == 0);
        memory
            .map(|(i, (size, kind))| {
                let at = 0x10 + 4 * i as u64;
                let high = if *kind == 4 { u64::from(word(at + 4)) << 32 } else { 0 };
                let size = u64::from(*size);
                let address = (high | u64::from(word(at))) & !(size - 1);
                if memory_space && address != 0 { (address, size) } else { (0, 0) }
            })
            .collect()
    }

    fn answer(&mut self, header: Header, body: &[u8]) -> Option<Vec<u8>> {
        let region = |at: usize| body.get(at..at + 4).map(|_| u32_at(body, at));
        let refused = Header { size: 16, flags: 1 | 1 << 5, error: 22, ..header };
        let offset = || u64::from(u32_at(body, 0));
        Some(match header.command {
            command::VERSION => reply(header, &[0, 0, 0, 0]),
            command::DEVICE_GET_INFO => reply(header, &words(&[16, 3, 9, 5])),
            command::DEVICE_GET_REGION_INFO => {
                let index = region(8)?;
                let size = BARS.get(index as usize).map_or(4096, |(size, _)| *size);
                reply(header, &words(&[32, 3, index, 0, size, 0, 0, 0]))
            }
            command::REGION_READ if region(8) == Some(7) => {
                let bar = BARS.get((offset().wrapping_sub(0x10) / 4) as usize);
                let word =
                    self.config.get(&offset()).copied().unwrap_or(0) | bar.map_or(0, |(_, kind)| *kind);
                reply(header, &[body, &word.to_le_bytes()[..u32_at(body, 12) as usize]].concat())
            }
            command::REGION_WRITE if region(8) == Some(7) => {
                let word = match body[16..] {
                    [a, b] => u32::from(u16::from_le_bytes([a, b])),
                    _ => u32_at(body, 16),
                };
                self.config.insert(offset(), word);
                reply(header, &words(&[u32_at(body, 0), 0, 7, u32_at(body, 12)]))
            }
            command::REGION_READ if self.decoded().iter().all(|(_, size)| *size != 0) => {
                reply(header, &[body, &[7; 4]].concat())
            }
            command::DEVICE_RESET => {
                self.config.clear();
                reply(header, &[])
            }
            _ => refused.to_bytes().to_vec(),
        })
    }
}

#[test]
fn bars_are_placed_before_they_are_used_and_again_after_a_reset() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let slot = Arc::new(Mutex::new(Slot::default()));
    let its = Arc::clone(&slot);
    let server = fake(&path, move |header, body| its.lock().unwrap().answer(header, body));
    let f = VfioUserFunction::connect(&path).unwrap();
    for round in 0..2 {
        assert_eq!(f.read32(0, 8).unwrap(), 0x0707_0707, "round {round}");
        let decoded = slot.lock().unwrap().decoded();
        for (i, (start, size)) in decoded.iter().enumerate() {
            assert_eq!(start % size, 0, "BAR {i} at {start:#x}");
            for range in f.iova_ranges() {
                assert!(start + size <= *range.start() || start > range.end(), "{start:#x} is for DMA, too");
            }
            for (other, len) in &decoded[i + 1..] {
                assert!(start + size <= *other || other + len <= *start, "{start:#x} overlaps {other:#x}");
            }
        }
        f.reset().unwrap();
    }
    // What is not decoded is an error, and not taken for a removed device.
    slot.lock().unwrap().config.clear();
    assert!(matches!(f.read32(0, 8), Err(PciError::Io { .. })));
    drop(f);
    server.join().unwrap();
}
