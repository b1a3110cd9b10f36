//! What a controller and its namespaces say about themselves.

use crate::mem::PAGE;
use crate::spec::identify::{IdentifyController, IdentifyNamespace, ONCS_DSM, ONCS_WRITE_ZEROES};
use crate::spec::regs::{Cap, Version};

/// A controller's identity, as read when it was brought up.
#[derive(Clone, Debug)]
pub struct Identity {
    /// CAP.
    pub cap: Cap,
    /// VS.
    pub version: Version,
    /// Identify Controller.
    pub controller: Box<IdentifyController>,
    /// The active namespaces, ascending.
    pub namespaces: Vec<Namespace>,
    /// I/O queue pairs granted.
    pub io_queues: u16,
    /// Whether there is a volatile write cache that is enabled: then only Flush makes writes durable.
    pub write_cache: bool,
}

impl Identity {
    /// Serial number, trimmed.
    pub fn serial(&self) -> String {
        ascii(&self.controller.sn)
    }

    /// Model number, trimmed.
    pub fn model(&self) -> String {
        ascii(&self.controller.mn)
    }

    /// Firmware revision, trimmed.
    pub fn firmware(&self) -> String {
        ascii(&self.controller.fr)
    }

    /// NVM subsystem NQN.
    pub fn subnqn(&self) -> String {
        let nqn = &self.controller.subnqn;
        String::from_utf8_lossy(nqn.split(|&b| b == 0).next().unwrap_or_default()).into_owned()
    }

    /// Maximum data transfer in bytes (MDTS in units of the minimum memory page size); `None`: no limit.
    pub fn max_transfer(&self) -> Option<usize> {
        let mdts = u32::from(self.controller.mdts);
        let min_page = PAGE.checked_shl(u32::from(self.cap.mpsmin()))?;
        if mdts == 0 { None } else { min_page.checked_mul(1usize.checked_shl(mdts)?) }
    }

    /// Whether Dataset Management is supported.
    pub fn can_deallocate(&self) -> bool {
        self.controller.oncs & ONCS_DSM != 0
    }

    /// Whether Write Zeroes is supported.
    pub fn can_write_zeroes(&self) -> bool {
        self.controller.oncs & ONCS_WRITE_ZEROES != 0
    }
}

/// An active namespace.
#[derive(Clone, Debug)]
pub struct Namespace {
    /// Its identifier.
    pub nsid: u32,
    /// Its size in logical blocks (NSZE).
    pub blocks: u64,
    /// Bytes per logical block of the current format; 0 if the format makes no sense.
    pub block_size: u32,
    /// Why this driver cannot use it, if so.
    pub unusable: Option<String>,
    /// Identify Namespace.
    pub data: Box<IdentifyNamespace>,
}

impl Namespace {
    pub(crate) fn new(nsid: u32, data: Box<IdentifyNamespace>) -> Self {
        // FLBAS: bits 3:0, and as of 2.0 bits 6:5 above them, which are 0 where there are at most 16 formats.
        let index = usize::from(data.flbas & 0xf) | usize::from(data.flbas >> 5 & 3) << 4;
        let format = data.lbaf.get(index).copied().unwrap_or_default();
        let block_size = match format.lbads {
            shift @ 9..=31 => 1u32 << shift,
            _ => 0,
        };
        let unusable = if data.nsze == 0 {
            Some("it is inactive or empty".to_owned())
        } else if !matches!(block_size, 512 | 4096) {
            Some(format!("its format has 2^{} bytes per block; 512 and 4096 are supported", format.lbads))
        } else if format.ms != 0 {
            Some(format!("its format has {} bytes of metadata per block; format it without", format.ms))
        } else if data.dps & 7 != 0 {
            Some("it is formatted with end-to-end protection; format it without".to_owned())
        } else {
            None
        };
        Self { nsid, blocks: data.nsze, block_size, unusable, data }
    }

    /// Capacity in bytes.
    pub fn bytes(&self) -> u64 {
        self.blocks.saturating_mul(u64::from(self.block_size))
    }
}

fn ascii(field: &[u8]) -> String {
    // Control characters from a device do not reach a terminal.
    field
        .iter()
        .map(|&b| if (0x20..0x7f).contains(&b) { char::from(b) } else { ' ' })
        .collect::<String>()
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;

    use super::*;

    /// What is said about a namespace with this block size (as a power of two), metadata and protection.
    fn said(lbads: u8, ms: u16, dps: u8, nsze: u64) -> Option<String> {
        let mut data = Box::new(IdentifyNamespace::zeroed());
        (data.nsze, data.dps, data.flbas) = (nsze, dps, 1);
        (data.lbaf[1].lbads, data.lbaf[1].ms) = (lbads, ms);
        Namespace::new(1, data).unusable
    }

    #[test]
    fn plain_formats_are_usable_and_others_are_refused_with_the_reason() {
        assert_eq!((said(9, 0, 0, 8), said(12, 0, 0, 8)), (None, None));
        for (refused, reason) in [
            (said(9, 8, 0, 8), "8 bytes of metadata"),
            (said(12, 64, 0, 8), "64 bytes of metadata"),
            (said(12, 0, 1, 8), "end-to-end protection"),
            (said(12, 8, 3, 8), "metadata"),
            (said(13, 0, 0, 8), "2^13 bytes per block"),
            (said(0, 0, 0, 8), "2^0 bytes per block"),
            (said(255, 0, 0, 8), "2^255 bytes per block"),
            (said(12, 0, 0, 0), "inactive or empty"),
        ] {
            let text = refused.unwrap();
            assert!(text.contains(reason), "{text}");
        }
    }
}
