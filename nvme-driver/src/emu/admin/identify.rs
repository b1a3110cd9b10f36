//! Identify.

use bytemuck::Zeroable;

use super::super::bus::Bus;
use super::super::state::State;
use super::{AER_LIMIT, ERRORS_KEPT};
use crate::spec::features::{
    CNS_ACTIVE_NAMESPACES, CNS_CONTROLLER, CNS_CS_CONTROLLER, CNS_CS_NAMESPACE, CNS_NAMESPACE,
    CNS_NAMESPACE_DESCRIPTORS,
};
use crate::spec::identify::{
    IdentifyController, IdentifyNamespace, LbaFormat, ONCS_COMPARE, ONCS_DSM, ONCS_WRITE_ZEROES,
};
use crate::spec::{Command, Status};

/// ONCS bit 6: Timestamp feature. Bit 7: Verify.
const ONCS_TIMESTAMP_VERIFY: u16 = 1 << 6 | 1 << 7;
/// Block sizes that the namespace can be formatted with, as powers of two.
pub(super) const FORMATS: [u8; 2] = [9, 12];
/// Our PCI vendor ID, which is also in config space.
use super::super::pci_config::VENDOR_ID;

/// Copies an ASCII string into a field padded with spaces.
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    let printable = text.bytes().map(|b| if (0x20..0x7f).contains(&b) { b } else { b'?' });
    for (to, from) in field.iter_mut().zip(printable) {
        *to = from;
    }
    field
}

impl State {
    pub(super) fn identify(&mut self, bus: &Bus<'_>, cmd: &Command) -> Result<u32, Status> {
        let (cns, csi) = (cmd.cdw10 as u8, (cmd.cdw11 >> 24) as u8);
        let data: [u8; 4096] = match cns {
            CNS_NAMESPACE => self.identify_namespace(cmd.nsid)?,
            CNS_CONTROLLER => bytemuck::cast(self.identify_controller()),
            CNS_ACTIVE_NAMESPACES => self.active_namespaces(cmd.nsid)?,
            CNS_NAMESPACE_DESCRIPTORS => self.namespace_descriptors(cmd.nsid)?,
            // Command set 0 is all there is; its structures say: no further limits.
            CNS_CS_NAMESPACE if csi == 0 => {
                self.check_namespace(cmd.nsid)?;
                [0; 4096]
            }
            CNS_CS_CONTROLLER if csi == 0 => [0; 4096],
            _ => return Err(Status::INVALID_FIELD),
        };
        self.reply(bus, cmd, &data)
    }

    fn check_namespace(&self, nsid: u32) -> Result<(), Status> {
        if nsid == 1 { Ok(()) } else { Err(Status::INVALID_NAMESPACE) }
    }

    fn identify_controller(&self) -> IdentifyController {
        let mut id = IdentifyController::zeroed();
        id.vid = VENDOR_ID;
        id.ssvid = VENDOR_ID;
        id.sn = padded(&self.fixed.serial);
        id.mn = padded("cmbfs emulated NVMe controller");
        id.fr = padded(env!("CARGO_PKG_VERSION"));
        id.rab = 6;
        id.mdts = self.fixed.mdts;
        id.ver = 0x0001_0400;
        // Namespace attribute notices.
        id.oaes = 1 << 8;
        id.cntrltype = 1;
        // Format NVM.
        id.oacs = 1 << 1;
        id.acl = 3;
        id.aerl = (AER_LIMIT - 1) as u8;
        // One firmware slot, read-only.
        id.frmw = 1 << 1 | 1;
        // Commands Supported and Effects log, extended Get Log Page.
        id.lpa = 1 << 1 | 1 << 2;
        id.elpe = (ERRORS_KEPT - 1) as u8;
        id.wctemp = 343;
        id.cctemp = 373;
        id.sqes = 0x66;
        id.cqes = 0x44;
        id.nn = 1;
        id.oncs = ONCS_COMPARE | ONCS_DSM | ONCS_WRITE_ZEROES | ONCS_TIMESTAMP_VERIFY;
        // Formatting applies to all namespaces: there is one.
        id.fna = 1;
        // Present; and flush takes the broadcast namespace identifier.
        id.vwc = u8::from(self.fixed.volatile_cache) | 0b11 << 1;
        // Any alignment; longer than the data is allowed.
        id.sgls = if self.fixed.sgls { 1 | 1 << 18 } else { 0 };
        let nqn = format!("nqn.2014-08.org.nvmexpress:uuid:{}", self.uuid());
        id.subnqn[..nqn.len()].copy_from_slice(nqn.as_bytes());
        // One power state, 25 W.
        id.psd[0][..2].copy_from_slice(&2500u16.to_le_bytes());
        id
    }

    fn uuid(&self) -> String {
        let b = self.uuid_bytes();
        let hex = |r: std::ops::Range<usize>| b[r].iter().map(|x| format!("{x:02x}")).collect::<String>();
        format!("{}-{}-{}-{}-{}", hex(0..4), hex(4..6), hex(6..8), hex(8..10), hex(10..16))
    }

    fn identify_namespace(&self, nsid: u32) -> Result<[u8; 4096], Status> {
        let mut id = IdentifyNamespace::zeroed();
        match nsid {
            1 if self.admin.attached => {
                id.nsze = self.namespace.blocks();
                id.ncap = id.nsze;
                id.nuse = id.nsze;
                id.nguid = self.namespace.identity;
                id.eui64.copy_from_slice(&id.nguid[8..]);
            }
            // An inactive namespace reads as zeros.
            1 => return Ok([0; 4096]),
            // The broadcast value is for controllers with namespace management.
            _ => return Err(Status::INVALID_NAMESPACE),
        }
        id.nlbaf = (FORMATS.len() - 1) as u8;
        id.flbas =
            FORMATS.iter().position(|s| u32::from(*s) == self.namespace.block_shift).unwrap_or(0) as u8;
        // Deallocated blocks read as zeros, and Write Zeroes may deallocate.
        id.dlfeat = 1 | 1 << 3;
        for (format, shift) in id.lbaf.iter_mut().zip(FORMATS) {
            *format = LbaFormat { ms: 0, lbads: shift, rp: 0 };
        }
        Ok(bytemuck::cast(id))
    }

    fn active_namespaces(&self, after: u32) -> Result<[u8; 4096], Status> {
        if after >= 0xffff_fffe {
            return Err(Status::INVALID_NAMESPACE);
        }
        let mut list = [0; 4096];
        if after == 0 && self.admin.attached {
            list[0] = 1;
        }
        Ok(list)
    }

    fn namespace_descriptors(&self, nsid: u32) -> Result<[u8; 4096], Status> {
        self.check_namespace(nsid)?;
        if !self.admin.attached {
            return Err(Status::INVALID_NAMESPACE);
        }
        let unique = self.namespace.identity;
        let mut list = [0; 4096];
        let mut at = 0;
        // EUI64, NGUID, UUID.
        let uuid = self.uuid_bytes();
        for (kind, id) in [(1u8, &unique[8..]), (2, &unique[..]), (3, &uuid[..])] {
            list[at] = kind;
            list[at + 1] = id.len() as u8;
            list[at + 4..at + 4 + id.len()].copy_from_slice(id);
            at += 4 + id.len();
        }
        Ok(list)
    }

    /// As a version 4 UUID.
    fn uuid_bytes(&self) -> [u8; 16] {
        let mut b = self.namespace.identity;
        b[6] = (b[6] & 0x0f) | 0x40;
        b[8] = (b[8] & 0x3f) | 0x80;
        b
    }
}
