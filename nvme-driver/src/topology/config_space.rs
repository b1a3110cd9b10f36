//! What config space says about a function's place in the fabric: its PCI Express port type and its Access Control Services.

use std::fmt;

/// Capability identifier of the PCI Express capability (PCI Express Base Specification, 7.5.3).
const CAP_PCIE: u8 = 0x10;
/// Extended capability identifier of Access Control Services (7.7.11).
const EXT_CAP_ACS: u16 = 0x0d;
/// Where extended capabilities begin.
const EXTENDED: usize = 0x100;
/// Bytes of the header: all that the kernel shows to users without CAP_SYS_ADMIN.
const HEADER: usize = 0x40;
/// Capabilities in a chain at most: a longer one runs in circles.
const MAX_CAPS: usize = 128;

/// What kind of PCI Express function it is (Device/Port Type in the PCI Express Capabilities register).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// An endpoint, legacy ones included.
    Endpoint,
    /// A root port.
    Root,
    /// A switch's upstream port.
    Upstream,
    /// A switch's downstream port.
    Downstream,
    /// A bridge from PCI Express to conventional PCI, or back.
    Bridge,
    /// An endpoint or event collector inside the root complex.
    RootComplex,
    /// Conventional PCI: there is no PCI Express capability.
    Conventional,
    /// It could not be read, or is reserved.
    Unknown,
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Endpoint => "endpoint",
            Self::Root => "root port",
            Self::Upstream => "switch upstream port",
            Self::Downstream => "switch downstream port",
            Self::Bridge => "bridge to conventional PCI",
            Self::RootComplex => "root complex endpoint",
            Self::Conventional => "conventional PCI",
            Self::Unknown => "unknown",
        })
    }
}

/// Access Control Services of a function: capability and control register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acs {
    /// As read.
    Present {
        /// ACS Capability register: what it can control.
        capability: u16,
        /// ACS Control register: what is switched on.
        control: u16,
    },
    /// The function has no such capability.
    Absent,
    /// Extended config space could not be read, so nobody knows.
    Unreadable,
}

/// ACS Source Validation, P2P Request Redirect, P2P Completion Redirect, Upstream Forwarding: the four that send every
/// request up to the IOMMU and back. The kernel asks for the same ones where it divides functions into IOMMU groups.
const ISOLATION: u16 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4;

impl Acs {
    /// Whether it sends peer requests up to the root complex, through the IOMMU. A service that the capability register does not
    /// list cannot be switched off (7.7.11.2), so it counts as on.
    pub fn redirects(self) -> bool {
        match self {
            Self::Present { capability, control } => {
                control & capability & ISOLATION == capability & ISOLATION
            }
            Self::Absent | Self::Unreadable => false,
        }
    }

    /// The services that would have to be switched on, by their usual names.
    pub fn missing(self) -> Vec<&'static str> {
        let Self::Present { capability, control } = self else { return Vec::new() };
        let off = capability & ISOLATION & !control;
        let names =
            [(1 << 0, "SrcValid"), (1 << 2, "ReqRedir"), (1 << 3, "CmpltRedir"), (1 << 4, "UpstreamFwd")];
        names.into_iter().filter(|(bit, _)| off & bit != 0).map(|(_, name)| name).collect()
    }
}

impl fmt::Display for Acs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("no ACS"),
            Self::Unreadable => f.write_str("ACS not readable"),
            Self::Present { .. } if self.redirects() => f.write_str("ACS redirects"),
            Self::Present { .. } => write!(f, "ACS without {}", self.missing().join(", ")),
        }
    }
}

fn u16_at(space: &[u8], at: usize) -> Option<u16> {
    space.get(at..at.checked_add(2)?)?.try_into().ok().map(u16::from_le_bytes)
}

fn u32_at(space: &[u8], at: usize) -> Option<u32> {
    space.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
}

/// What a function is. `space` is as much of its config space as could be read.
pub(super) fn port(space: &[u8]) -> Port {
    // Bit 4 of Status: there is a capability list. All ones: nothing answers.
    match u16_at(space, 6) {
        None | Some(0xffff) => return Port::Unknown,
        Some(status) if status & 1 << 4 == 0 => return Port::Conventional,
        Some(_) => {}
    }
    let mut at = space.get(0x34).map_or(0, |p| usize::from(p & !3));
    for _ in 0..MAX_CAPS {
        if at < HEADER {
            return Port::Conventional;
        }
        let (Some(id), Some(next)) = (space.get(at), space.get(at + 1)) else { return Port::Unknown };
        if *id == CAP_PCIE {
            return match u16_at(space, at + 2).map(|caps| caps >> 4 & 0xf) {
                Some(0 | 1) => Port::Endpoint,
                Some(4) => Port::Root,
                Some(5) => Port::Upstream,
                Some(6) => Port::Downstream,
                Some(7 | 8) => Port::Bridge,
                Some(9 | 10) => Port::RootComplex,
                _ => Port::Unknown,
            };
        }
        at = usize::from(next & !3);
    }
    Port::Unknown
}

/// Whether it is one of several functions of a device (bit 7 of the header type).
pub(super) fn is_multifunction(space: &[u8]) -> bool {
    space.get(0x0e).is_some_and(|header| header & 0x80 != 0)
}

/// Whether it forwards to a bus behind it (header type 1).
pub(super) fn is_bridge(space: &[u8]) -> bool {
    space.get(0x0e).is_some_and(|header| header & 0x7f == 1)
}

/// Its Access Control Services.
pub(super) fn acs(space: &[u8]) -> Acs {
    if space.len() <= HEADER {
        return Acs::Unreadable;
    }
    // Conventional functions and those without extended config space have 256 bytes.
    let mut at = EXTENDED;
    for _ in 0..MAX_CAPS {
        let Some(head) = u32_at(space, at) else { return Acs::Absent };
        if head == 0 || head == u32::MAX {
            return Acs::Absent;
        }
        if head as u16 == EXT_CAP_ACS {
            return match (u16_at(space, at + 4), u16_at(space, at + 6)) {
                (Some(capability), Some(control)) => Acs::Present { capability, control },
                _ => Acs::Unreadable,
            };
        }
        let next = (head >> 20 & 0xffc) as usize;
        if next < EXTENDED {
            return Acs::Absent;
        }
        at = next;
    }
    Acs::Absent
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_chains_end() {
        let mut space = vec![0u8; 4096];
        space[6] = 1 << 4;
        space[0x34] = 0x50;
        space[0x50..0x52].copy_from_slice(&[0x05, 0x50]);
        assert_eq!(port(&space), Port::Unknown, "a list that runs in circles");
        space[0x51] = 0xfc;
        space[0xfc] = 0x10;
        assert_eq!(port(&space[..0xfd]), Port::Unknown, "a list that leaves what could be read");
        space[0x100..0x104].copy_from_slice(&(0x100u32 << 20 | 3).to_le_bytes());
        assert_eq!(acs(&space), Acs::Absent);
        space[0x100..0x104].copy_from_slice(&(0xffcu32 << 20 | 3).to_le_bytes());
        space[0xffc..].copy_from_slice(&u32::from(EXT_CAP_ACS).to_le_bytes());
        assert_eq!(acs(&space), Acs::Unreadable, "a capability cut off by the end");
        assert_eq!(port(&[0xff; 4096]), Port::Unknown);
        assert_eq!(acs(&[0xff; 4096]), Acs::Absent);
        assert_eq!((port(&[]), acs(&[])), (Port::Unknown, Acs::Unreadable));
        assert_eq!(acs(&[0; 64]), Acs::Unreadable);
    }

    #[test]
    fn a_service_that_cannot_be_switched_counts_as_on() {
        let acs = |capability, control| Acs::Present { capability, control };
        assert!(acs(0b1_1101, 0b1_1101).redirects());
        assert!(acs(0b0_1101, 0b0_1101).redirects());
        assert!(!acs(0b1_1101, 0b1_1001).redirects());
        assert_eq!(acs(0b1_1101, 0b1_1001).missing(), ["ReqRedir"]);
        assert!(!Acs::Absent.redirects() && !Acs::Unreadable.redirects());
    }
}
