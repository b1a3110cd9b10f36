//! What `auto` means on this server: where windows live of files that nobody has said anything about.

use nvme_driver::clock::Clock;
use nvme_driver::disk::CmbMemory;
use p2p::layout::Home;
use p2p::probe::{Probe, measure};
use p2p::windows::Placement;

/// Measures the CMB, which nobody may use yet, and decides.
pub(super) fn placement(cmb: Option<&CmbMemory>, clock: &dyn Clock) -> Placement {
    // Ordinary memory (an emulated drive's) needs no measuring, and without a CMB there is nothing to decide.
    let Some(cmb) = cmb.filter(|cmb| cmb.is_device_memory) else { return Placement::Auto };
    match measure(cmb, clock) {
        Ok(probe) => decide(&probe),
        Err(e) => {
            tracing::warn!("{e}; it is for peers only");
            Placement::PeersFirst
        }
    }
}

fn decide(probe: &Probe) -> Placement {
    let advice = probe.readers_home();
    tracing::info!("auto: {}", advice.reason);
    if advice.home == Home::Cmb { Placement::Auto } else { Placement::PeersFirst }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nvme_driver::clock::ManualClock;
    use nvme_driver::mem::Mapping;
    use p2p::probe::{Access, SIZES};

    use super::*;

    #[test]
    fn a_slow_cmb_is_for_peers_and_a_fast_one_for_everybody() {
        for (cmb_ns, expected) in [(500_000, Placement::PeersFirst), (100, Placement::Auto)] {
            let all = |ns| {
                let time = Duration::from_nanos(ns);
                [Access { bytes: 4096, read: time, write: time }; SIZES]
            };
            assert_eq!(decide(&Probe { uncached: true, cmb: all(cmb_ns), host: all(100) }), expected);
        }
    }

    #[test]
    fn an_emulated_cmb_is_not_measured_and_left_alone() {
        let memory = Mapping::memfd("cmb", 4096).unwrap();
        memory.write(0, &[7; 8]).unwrap();
        let mut cmb =
            CmbMemory { memory, bus_address: 0, is_device_memory: false, read_data: true, write_data: true };
        let first = |cmb: &CmbMemory| {
            let mut word = [0; 8];
            cmb.memory.read(0, &mut word).unwrap();
            word
        };
        assert_eq!(placement(Some(&cmb), &ManualClock::new()), Placement::Auto);
        assert_eq!(placement(None, &ManualClock::new()), Placement::Auto);
        assert_eq!(first(&cmb), [7; 8]);
        // A clock that shows no difference speaks for nothing; but it was measured.
        cmb.is_device_memory = true;
        assert_eq!(placement(Some(&cmb), &ManualClock::new()), Placement::Auto);
        assert_ne!(first(&cmb), [7; 8]);
    }
}
