//! Which path every transfer took, and why (P11).

use std::fmt;

/// The path that bytes took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Path {
    /// Between drive and CMB: no byte through host memory.
    Cmb,
    /// Between a peer and the CMB.
    PeerToPeer,
    /// Through the host cache.
    HostCache,
    /// Through a bounce buffer in host memory, because the direct path was not there.
    Bounce,
}

/// Why a transfer or a placement went the way it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// There was room, and policy wanted it there.
    Policy,
    /// The caller asked for it.
    Asked,
    /// There is no CMB.
    NoCmb,
    /// The CMB was full, and nothing could leave it at once.
    CmbFull,
    /// The CMB does not take this kind of data.
    CmbUnsupported,
    /// A client silent past the grace still holds pages of this window.
    Quarantine,
    /// The refusal was injected.
    Injected,
    /// The drive refused or failed.
    Drive,
    /// The window was evicted for another.
    Evicted,
    /// Somebody revoked it.
    Revoked,
    /// Dirty pages were written back.
    WriteBack,
    /// The host cache was full, and nothing could leave it.
    HostFull,
    /// The window is larger than the CMB or the host cache.
    TooLarge,
    /// The way between the two devices does not let them reach each other.
    Topology,
    /// The IOMMU, the kernel or the peer's runtime refused to map the memory for the peer.
    MapRefused,
    /// The peer's DMA was tried, and its bytes did not arrive.
    Untrusted,
    /// Dirty pages were written back in the background.
    Background,
    /// Windows are used one after the other: the next were read ahead.
    ReadAhead,
    /// The peer's DMA is not coherent with the processors' caches, so it may only read.
    NotCoherent,
}

const PATHS: usize = 4;
const REASONS: usize = 19;

/// All paths, in the order of the table.
pub const ALL_PATHS: [Path; PATHS] = [Path::Cmb, Path::PeerToPeer, Path::HostCache, Path::Bounce];
/// All reasons, in the order of the table.
pub const ALL_REASONS: [Reason; REASONS] = [
    Reason::Policy,
    Reason::Asked,
    Reason::NoCmb,
    Reason::CmbFull,
    Reason::CmbUnsupported,
    Reason::Quarantine,
    Reason::Injected,
    Reason::Drive,
    Reason::Evicted,
    Reason::Revoked,
    Reason::WriteBack,
    Reason::HostFull,
    Reason::TooLarge,
    Reason::Topology,
    Reason::MapRefused,
    Reason::Untrusted,
    Reason::Background,
    Reason::ReadAhead,
    Reason::NotCoherent,
];

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cmb => "CMB",
            Self::PeerToPeer => "peer to peer",
            Self::HostCache => "host cache",
            Self::Bounce => "bounce",
        })
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Policy => "policy",
            Self::Asked => "asked for",
            Self::NoCmb => "no CMB",
            Self::CmbFull => "CMB full",
            Self::CmbUnsupported => "not supported by the CMB",
            Self::Quarantine => "pages quarantined",
            Self::Injected => "refusal injected",
            Self::Drive => "drive failed",
            Self::Evicted => "evicted",
            Self::Revoked => "revoked",
            Self::WriteBack => "write-back",
            Self::HostFull => "host cache full",
            Self::TooLarge => "window too large",
            Self::Topology => "no path between the devices",
            Self::MapRefused => "peer mapping refused",
            Self::Untrusted => "peer DMA did not arrive",
            Self::Background => "background write-back",
            Self::ReadAhead => "read-ahead",
            Self::NotCoherent => "peer DMA is not coherent",
        })
    }
}

/// Transfers and bytes of one path for one reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Transfers.
    pub transfers: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Everything counted since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    table: [[Count; REASONS]; PATHS],
    /// Moves that were completed.
    pub moves: u64,
    /// Bytes that windows did not have to copy when they left the CMB, because the host cache had them still.
    pub spared_bytes: u64,
    /// Moves that were given up because the bytes could not be brought to safety.
    pub moves_failed: u64,
    /// Write sections that were fenced.
    pub fenced: u64,
    /// Bytes that went into quarantine.
    pub quarantined_bytes: u64,
    /// Bytes that came back from quarantine.
    pub reclaimed_bytes: u64,
    /// Bytes of dirty pages that were lost with their device.
    pub lost_bytes: u64,
    /// Resets of the device that were dealt with.
    pub resets: u64,
    /// Windows pushed out of the CMB to make room.
    pub evicted: u64,
    /// Placements that were refused altogether.
    pub refused: u64,
    /// Mass revocations announced by the device generation.
    pub announced: u64,
    /// Peer mappings made.
    pub peer_maps: u64,
    /// Peer mappings taken back by a revocation.
    pub peer_revocations: u64,
}

impl Counters {
    /// What took this path for this reason.
    pub fn get(&self, path: Path, reason: Reason) -> Count {
        self.table[path as usize][reason as usize]
    }

    /// What took this path, for whatever reason.
    pub fn path(&self, path: Path) -> Count {
        self.table[path as usize].iter().fold(Count::default(), |a, c| Count {
            transfers: a.transfers + c.transfers,
            bytes: a.bytes + c.bytes,
        })
    }

    /// Every path and reason that occurred.
    pub fn iter(&self) -> impl Iterator<Item = (Path, Reason, Count)> + '_ {
        ALL_PATHS
            .iter()
            .flat_map(move |&p| ALL_REASONS.iter().map(move |&r| (p, r, self.get(p, r))))
            .filter(|(_, _, c)| *c != Count::default())
    }

    pub(crate) fn add(&mut self, path: Path, reason: Reason, bytes: usize) {
        let count = &mut self.table[path as usize][reason as usize];
        count.transfers += 1;
        count.bytes += bytes as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_and_reason_has_its_own_count() {
        let mut c = Counters::default();
        for p in ALL_PATHS {
            for r in ALL_REASONS {
                c.add(p, r, 1 + p as usize * REASONS + r as usize);
            }
        }
        let got: Vec<u64> = c.iter().map(|(_, _, n)| n.bytes).collect();
        assert_eq!(got, (1..=(PATHS * REASONS) as u64).collect::<Vec<_>>());
    }
}
