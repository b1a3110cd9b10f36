//! Refusing placements on purpose: every placement may be refused, and the bytes read must stay the same (P4).

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

/// Where a refusal can be injected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Taking pages of the CMB.
    CmbPlace,
    /// Taking room in the host cache.
    HostPlace,
    /// Filling from the drive.
    Fill,
    /// Mapping for a peer.
    PeerMap,
}

/// Seeded refusals. The default refuses nothing.
#[derive(Clone, Debug)]
pub struct Refusals {
    rng: Xoshiro256PlusPlus,
    per_mille: u16,
}

impl Default for Refusals {
    fn default() -> Self {
        Self::new(0, 0)
    }
}

impl Refusals {
    /// Refuses `per_mille` of 1000 placements, drawn from `seed`.
    pub fn new(seed: u64, per_mille: u16) -> Self {
        Self { rng: Xoshiro256PlusPlus::seed_from_u64(seed), per_mille }
    }

    pub(crate) fn refuse(&mut self, point: Point) -> bool {
        let refused = self.per_mille > 0 && self.rng.next_u64() % 1000 < u64::from(self.per_mille);
        if refused {
            tracing::debug!("refusal injected: {point:?}");
        }
        refused
    }
}
