//! The searches: every party alone with the revokers, then all together.

use stateright::{Checker, Model};

use crate::broken::Broken;
use crate::exhaust::exhaust;
use crate::protocol::Protocol;
use crate::state::PLACES;

/// Two writers and two revokers.
pub const SMALL: Protocol = Protocol {
    revocations: 2,
    fills: 0,
    sections: [1, 1],
    borrows: false,
    reads: 0,
    commits: 0,
    deaths: 0,
    truncations: 0,
    peer_writes: 0,
    peer_reads: 0,
    time_outs: 0,
    resets: 0,
    announcements: 0,
    cmb: [false; PLACES],
    broken: Broken::Nothing,
};

/// Everybody.
const ALL: Protocol = Protocol {
    revocations: 2,
    fills: 1,
    sections: [1, 1],
    borrows: true,
    reads: 1,
    commits: 1,
    deaths: 1,
    truncations: 1,
    peer_writes: 1,
    peer_reads: 1,
    time_outs: 1,
    resets: 0,
    announcements: 0,
    cmb: [false; PLACES],
    broken: Broken::Nothing,
};

/// Two writers, a revocation and a reset, over two places in the CMB and one in the host cache.
pub const RESET: Protocol = Protocol { revocations: 1, resets: 1, cmb: [true, true, false], ..SMALL };

/// A window that goes to the host cache and back to the CMB, and to the host cache again, with a writer.
pub const SPARE: Protocol = Protocol { revocations: 3, sections: [1, 0], cmb: [true, true, false], ..SMALL };

fn holds(name: &str, model: Protocol) {
    let checker = model.checker().spawn_bfs().join();
    println!(
        "{name}: {} states, {} unique, depth {}",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth()
    );
    checker.assert_properties();
}

#[test]
fn two_writers_a_reader_and_two_revokers() {
    holds("two writers", Protocol { reads: 2, fills: 1, commits: 1, ..SMALL });
}

#[test]
fn borrowers_and_deaths() {
    holds("borrowers and deaths", Protocol { borrows: true, deaths: 2, reads: 1, ..SMALL });
}

#[test]
fn truncation_during_moves() {
    holds("truncation", Protocol { truncations: 1, reads: 1, commits: 1, ..SMALL });
}

#[test]
fn peers() {
    holds("peers", Protocol { peer_writes: 2, peer_reads: 1, sections: [1, 0], reads: 1, ..SMALL });
}

#[test]
fn a_command_that_times_out() {
    let model = Protocol { time_outs: 1, commits: 1, fills: 1, reads: 1, ..SMALL };
    holds("time-out", model);
}

#[test]
fn spares_and_writers() {
    holds("spares, writers", Protocol { sections: [1, 1], reads: 1, commits: 1, ..SPARE });
}

#[test]
fn spares_borrowers_and_deaths() {
    holds("spares, borrowers", Protocol { borrows: true, deaths: 1, reads: 1, sections: [2, 0], ..SPARE });
}

#[test]
fn spares_and_peers() {
    holds("spares, peers", Protocol { peer_writes: 1, peer_reads: 1, reads: 1, ..SPARE });
}

#[test]
fn spares_and_truncation() {
    holds("spares, truncation", Protocol { truncations: 1, fills: 1, reads: 1, commits: 1, ..SPARE });
}

#[test]
fn spares_and_a_reset() {
    holds("spares, reset", Protocol { resets: 1, reads: 1, commits: 1, fills: 1, ..SPARE });
}

#[test]
fn a_reset_and_writers() {
    holds("reset, writers", Protocol { reads: 1, commits: 1, ..RESET });
}

#[test]
fn a_reset_borrowers_and_deaths() {
    holds(
        "reset, borrowers",
        Protocol { borrows: true, deaths: 1, fills: 1, sections: [2, 0], reads: 1, ..RESET },
    );
}

#[test]
fn a_reset_and_peers() {
    let model = Protocol { peer_writes: 1, peer_reads: 1, sections: [1, 0], commits: 1, reads: 1, ..RESET };
    holds("reset, peers", model);
}

#[test]
fn a_reset_and_a_command_that_times_out() {
    let model = Protocol { time_outs: 1, fills: 1, commits: 1, sections: [1, 0], reads: 1, ..RESET };
    holds("reset, time-out", model);
}

#[test]
fn two_resets_and_a_mass_revocation() {
    let model =
        Protocol { resets: 2, announcements: 1, commits: 1, reads: 1, fills: 1, sections: [1, 0], ..RESET };
    holds("two resets and a mass revocation", model);
}

#[test]
fn a_reset_and_a_truncation() {
    holds("reset, truncation", Protocol { truncations: 1, commits: 1, reads: 1, sections: [1, 0], ..RESET });
}

/// Everybody at once, with one client.
#[test]
fn everybody_and_one_client() {
    holds("everybody, one client", Protocol { sections: [1, 0], revocations: 1, fills: 0, ..ALL });
}

/// The large search finds what stateright's finds.
#[test]
fn both_searches_agree() {
    let model = Protocol { reads: 1, commits: 1, ..SMALL };
    let theirs = model.clone().checker().spawn_bfs().join();
    let ours = exhaust(&model);
    assert_eq!(ours.states, theirs.unique_state_count());
}

#[test]
#[should_panic(expected = "P1, P2 and P7")]
fn the_large_search_notices_too() {
    exhaust(&Protocol { broken: Broken::NoFenceClaim, ..SMALL });
}

/// Everybody at once, with two.
#[test]
#[ignore = "minutes: cargo test --profile test-fast -p p2p --test whole_protocol -- --ignored --nocapture"]
fn everything_at_once() {
    let searched = exhaust(&ALL);
    println!("everything: {} states, {} steps, depth {}", searched.states, searched.steps, searched.depth);
}

/// Everybody at once with a reset and a mass revocation, and one client. Two clients, and truncation, have searches with a reset above.
#[test]
#[ignore = "minutes: cargo test --profile test-fast -p p2p --test whole_protocol -- --ignored --nocapture"]
fn everything_at_once_and_a_reset() {
    let model =
        Protocol { resets: 1, truncations: 0, announcements: 1, cmb: RESET.cmb, sections: [1, 0], ..ALL };
    let searched = exhaust(&model);
    println!("with a reset: {} states, {} steps, depth {}", searched.states, searched.steps, searched.depth);
}
