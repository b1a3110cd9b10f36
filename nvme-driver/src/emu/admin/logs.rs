//! Get Log Page.

use super::super::bus::Bus;
use super::super::state::State;
use super::{Admin, ERRORS_KEPT, LOG_CHANGED_NAMESPACES};
use crate::spec::features::{LOG_EFFECTS, LOG_ERROR, LOG_FIRMWARE, LOG_SMART, LOG_SUPPORTED};
use crate::spec::{Command, Status};

/// The drive's temperature.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kelvin(pub(super) u16);

impl Default for Kelvin {
    fn default() -> Self {
        Self(300)
    }
}

/// Longest log page.
const LONGEST: usize = 4096;

/// A failed command, for the Error Information log.
#[derive(Clone, Copy, Debug)]
pub(super) struct ErrorEntry {
    count: u64,
    sqid: u16,
    cid: u16,
    status: Status,
}

impl Admin {
    /// A command failed.
    pub(in super::super) fn log_error(&mut self, sqid: u16, cid: u16, status: Status) {
        self.error_count += 1;
        if self.errors.len() == ERRORS_KEPT {
            self.errors.pop_front();
        }
        self.errors.push_back(ErrorEntry { count: self.error_count, sqid, cid, status });
    }
}

impl State {
    pub(super) fn get_log_page(&mut self, bus: &Bus<'_>, cmd: &Command) -> Result<u32, Status> {
        let lid = cmd.cdw10 as u8;
        let retain = cmd.cdw10 & (1 << 15) != 0;
        let dwords = u64::from(cmd.cdw10 >> 16) | u64::from(cmd.cdw11 & 0xffff) << 16;
        let offset = u64::from(cmd.cdw12) | u64::from(cmd.cdw13) << 32;
        let mut page = [0u8; LONGEST];
        let len = match lid {
            LOG_SUPPORTED => supported(&mut page),
            LOG_ERROR => self.error_log(&mut page),
            LOG_SMART => {
                if !matches!(cmd.nsid, 0 | 1 | 0xffff_ffff) {
                    return Err(Status::INVALID_NAMESPACE);
                }
                self.smart_log(&mut page)
            }
            LOG_FIRMWARE => firmware_log(&mut page),
            LOG_CHANGED_NAMESPACES => self.changed_namespaces(&mut page, retain),
            LOG_EFFECTS => effects_log(&mut page),
            _ => return Err(Status::INVALID_LOG_PAGE),
        };
        if offset % 4 != 0 || offset > len as u64 {
            return Err(Status::INVALID_FIELD);
        }
        // What is asked for beyond the page's end is for the controller to define: nothing is transferred.
        let (offset, asked) = (offset as usize, (dwords + 1) * 4);
        let n = usize::try_from(asked).unwrap_or(usize::MAX).min(len - offset);
        self.reply(bus, cmd, &page[offset..offset + n])?;
        if !retain {
            self.clear_event(lid);
        }
        Ok(0)
    }

    /// Reading a log page without Retain Asynchronous Event lets its event type be reported again.
    fn clear_event(&mut self, lid: u8) {
        let kind = match lid {
            LOG_ERROR => 0,
            LOG_SMART => 1,
            LOG_CHANGED_NAMESPACES => 2,
            _ => return,
        };
        self.admin.masked[kind] = false;
    }

    fn error_log(&self, page: &mut [u8]) -> usize {
        // Newest first.
        for (slot, e) in page.chunks_exact_mut(64).zip(self.admin.errors.iter().rev()) {
            slot[..8].copy_from_slice(&e.count.to_le_bytes());
            slot[8..10].copy_from_slice(&e.sqid.to_le_bytes());
            slot[10..12].copy_from_slice(&e.cid.to_le_bytes());
            slot[12..14].copy_from_slice(&(e.status.field() << 1).to_le_bytes());
            // Parameter Error Location: not known.
            slot[14..16].copy_from_slice(&0xffffu16.to_le_bytes());
        }
        ERRORS_KEPT * 64
    }

    fn smart_log(&self, page: &mut [u8]) -> usize {
        let traffic = self.namespace.traffic;
        page[0] = u8::from(self.temperature_is_critical()) << 1;
        page[1..3].copy_from_slice(&self.admin.temperature.0.to_le_bytes());
        // Available spare and its threshold, in percent.
        (page[3], page[4]) = (100, 10);
        // Thousands of 512-byte units, rounded up.
        let units = |bytes: u64| bytes.div_ceil(512_000);
        let hours = (self.fixed.clock)().saturating_sub(self.admin.started_at) / 3_600_000_000_000;
        let words = [
            (32, units(traffic.bytes_read)),
            (48, units(traffic.bytes_written)),
            (64, traffic.reads),
            (80, traffic.writes),
            (112, 1),
            (128, hours),
            (176, self.admin.error_count),
        ];
        for (at, value) in words {
            page[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        512
    }

    fn changed_namespaces(&mut self, page: &mut [u8], retain: bool) -> usize {
        if self.admin.namespace_changed {
            page[0] = 1;
        }
        if !retain {
            self.admin.namespace_changed = false;
        }
        4096
    }
}

fn supported(page: &mut [u8]) -> usize {
    for lid in [LOG_SUPPORTED, LOG_ERROR, LOG_SMART, LOG_FIRMWARE, LOG_CHANGED_NAMESPACES, LOG_EFFECTS] {
        page[usize::from(lid) * 4] = 1;
    }
    1024
}

fn firmware_log(page: &mut [u8]) -> usize {
    page[0] = 1;
    for (to, from) in page[8..16].iter_mut().zip(env!("CARGO_PKG_VERSION").bytes().chain([b' '; 8])) {
        *to = from;
    }
    512
}

/// Commands Supported and Effects: bit 0 supported, bit 1 changes content, bit 2 changes capabilities of a namespace.
fn effects_log(page: &mut [u8]) -> usize {
    for op in [0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0a, 0x0c] {
        page[op * 4] = 1;
    }
    // Format NVM; commands to the namespace wait for it (CSE 1).
    page[0x80 * 4] = 0b111;
    page[0x80 * 4 + 2] = 1;
    for op in [0x00, 0x02, 0x05, 0x0c] {
        page[1024 + op * 4] = 1;
    }
    for op in [0x01, 0x08, 0x09] {
        page[1024 + op * 4] = 0b11;
    }
    4096
}
