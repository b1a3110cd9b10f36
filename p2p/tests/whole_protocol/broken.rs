//! The same protocol with one rule left out, each of which the search must notice.

use stateright::{Checker, HasDiscoveries, Model};

use crate::protocol::Protocol;
use crate::searches::{RESET, SMALL, SPARE};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    Nothing,
    NoDrain,
    NoHide,
    NoLookBack,
    NoBorrowClaim,
    NoFenceClaim,
    DeadIsClean,
    PeerStays,
    ReadingPeerSeesLateStores,
    NoDiscard,
    NoCommandClaim,
    NoRecheck,
    EvictionRecalls,
    FreedUnderLayout,
    AnnouncedLate,
    PlaceNotStamped,
    BorrowForgetsDevice,
    CopyBelieved,
    PromotedIntoLost,
    LostBytesWritten,
    ReadingPeerOutlivesReset,
    WritingPeerOutlivesReset,
    PeerDoesNotLookAgain,
    LossNotCounted,
    LossClearedByCommit,
    LossToldAgain,
    CommandOutlivesReset,
    SweepForgotten,
    SpareMissesHarvest,
    ClaimedSpare,
    SpareOutlivesItsWindow,
}

#[track_caller]
fn noticed(broken: Broken, base: Protocol) {
    let model = Protocol { broken, ..base };
    let checker = model.checker().finish_when(HasDiscoveries::Any).spawn_bfs().join();
    let found = checker.discoveries();
    println!(
        "{broken:?}: {}, after {} states",
        found.keys().copied().collect::<Vec<_>>().join("; "),
        checker.state_count()
    );
    assert!(!found.is_empty(), "{broken:?} is not noticed");
}

#[test]
fn readers() {
    noticed(Broken::NoRecheck, Protocol { sections: [0, 0], reads: 1, revocations: 1, ..SMALL });
    noticed(Broken::NoHide, Protocol { sections: [1, 0], reads: 2, revocations: 1, ..SMALL });
}

#[test]
fn writers_and_borrowers() {
    noticed(Broken::NoDrain, SMALL);
    noticed(Broken::NoLookBack, Protocol { sections: [1, 0], ..SMALL });
    noticed(Broken::NoFenceClaim, SMALL);
    noticed(Broken::NoBorrowClaim, Protocol { borrows: true, ..SMALL });
    noticed(Broken::DeadIsClean, Protocol { deaths: 1, reads: 1, ..SMALL });
}

#[test]
fn peers() {
    noticed(Broken::PeerStays, Protocol { peer_writes: 2, sections: [0, 0], ..SMALL });
    let late = Protocol { peer_reads: 2, sections: [1, 0], reads: 1, revocations: 1, ..SMALL };
    noticed(Broken::ReadingPeerSeesLateStores, late);
}

#[test]
fn drive_and_truncation() {
    noticed(Broken::NoDiscard, Protocol { truncations: 1, sections: [1, 0], ..SMALL });
    noticed(Broken::NoCommandClaim, Protocol { time_outs: 1, fills: 1, sections: [1, 0], ..SMALL });
    noticed(Broken::EvictionRecalls, Protocol { truncations: 1, sections: [0, 0], ..SMALL });
    noticed(Broken::FreedUnderLayout, Protocol { truncations: 1, sections: [0, 0], ..SMALL });
}

#[test]
fn spares() {
    noticed(Broken::SpareMissesHarvest, SPARE);
    noticed(Broken::ClaimedSpare, SPARE);
    noticed(Broken::ClaimedSpare, Protocol { borrows: true, ..SPARE });
    let cut = Protocol { sections: [0, 0], truncations: 1, fills: 1, ..SPARE };
    noticed(Broken::SpareOutlivesItsWindow, cut);
}

#[test]
fn a_reset_and_those_who_read() {
    let one = Protocol { sections: [0, 0], ..RESET };
    noticed(Broken::AnnouncedLate, Protocol { reads: 1, ..one });
    noticed(Broken::PlaceNotStamped, Protocol { reads: 2, revocations: 2, ..one });
    noticed(Broken::BorrowForgetsDevice, Protocol { sections: [1, 0], borrows: true, ..one });
    noticed(Broken::SweepForgotten, Protocol { reads: 1, resets: 0, announcements: 1, ..one });
    let peer = Protocol { peer_reads: 2, ..RESET };
    noticed(Broken::ReadingPeerOutlivesReset, peer.clone());
    noticed(Broken::PeerDoesNotLookAgain, peer);
}

#[test]
fn a_reset_and_what_the_server_copies() {
    noticed(Broken::CopyBelieved, Protocol { reads: 1, ..RESET });
    noticed(Broken::PromotedIntoLost, Protocol { revocations: 2, ..RESET });
    noticed(Broken::LostBytesWritten, RESET);
    noticed(Broken::CommandOutlivesReset, Protocol { time_outs: 1, fills: 1, ..RESET });
}

#[test]
fn a_reset_and_what_is_told() {
    let telling = Protocol { commits: 2, ..RESET };
    noticed(Broken::LossNotCounted, telling.clone());
    noticed(Broken::LossClearedByCommit, telling.clone());
    noticed(Broken::LossToldAgain, telling.clone());
    noticed(Broken::WritingPeerOutlivesReset, Protocol { peer_writes: 2, sections: [1, 0], ..telling });
}
