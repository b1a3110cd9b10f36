//! Threads as clients and peers, a revoker at full speed, and every byte verified. Freed CMB pages are filled with another object's bytes
//! at once, so that whoever still looks at them finds poison.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Client, Rig, config, seed, writing};
use p2p::layout::Home;
use p2p::peer::{CopyState, EmulatedEngine};
use p2p::reader::Outcome;
use p2p::windows::{Config, Hold, PeerPath, Placement, Progress, Scope, Want};
use p2p::writer::{Finished, Returned};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

const W: usize = 8192;
const WORDS: usize = W / 8;
/// Versions are small numbers; poison is not.
const POISON: u8 = 0xee;

#[derive(Debug, Default)]
struct Shared {
    /// The version that every word had at least when it was published.
    published: AtomicU64,
    /// The highest version that was ever being written.
    begun: AtomicU64,
    /// What each reader has read.
    reads: [AtomicU64; 2],
    /// What the reading peer has read.
    peer_reads: AtomicU64,
    stop: AtomicBool,
}

/// Words of a copy must lie between what was published before it and what was begun after it.
fn verify(bytes: &[u8], low: u64, high: u64, who: &str) {
    for (i, chunk) in bytes.chunks_exact(8).enumerate() {
        let v = u64::from_le_bytes(chunk.try_into().unwrap());
        assert!(v <= high, "{who}: word {i} is {v:#x}: torn, or another's bytes (at most {high})");
        assert!(v >= low, "{who}: word {i} is {v}: stale (at least {low})");
    }
}

fn read_loop(
    c: &Client,
    hold: &Hold,
    shared: &Shared,
    reads: &AtomicU64,
    rng: &mut Xoshiro256PlusPlus,
) -> [u64; 3] {
    let mut counts = [0; 3];
    let mut bytes = vec![0; W];
    while !shared.stop.load(Ordering::Relaxed) {
        let len = 8 << (rng.next_u64() % 11);
        let at = (rng.next_u64() as usize % (W - len + 8)) / 8 * 8;
        let low = shared.published.load(Ordering::Acquire);
        match c.control.read(hold.handle, &c.view, at, &mut bytes[..len]) {
            Outcome::Copied(home) => {
                verify(&bytes[..len], low, shared.begun.load(Ordering::Acquire), "reader");
                counts[usize::from(home == Home::Host)] += 1;
                reads.fetch_add(1, Ordering::Relaxed);
            }
            Outcome::NotResident | Outcome::DeviceMoved | Outcome::Moving | Outcome::Unmapped(_) => {
                counts[2] += 1;
                std::thread::yield_now();
            }
            other => panic!("{other:?}"),
        }
    }
    counts
}

fn borrow_loop(c: &Client, hold: &Hold, shared: &Shared) -> [u64; 2] {
    let mut counts = [0; 2];
    let mut slot = c.slots.take().unwrap();
    let mut bytes = vec![0; W];
    while !shared.stop.load(Ordering::Relaxed) {
        let low = shared.published.load(Ordering::Acquire);
        let Ok(borrow) = slot.borrow(&c.control, hold.handle, &c.view) else {
            std::thread::yield_now();
            continue;
        };
        for _ in 0..3 {
            borrow.bytes().read(0, &mut bytes).unwrap();
            verify(&bytes, low, shared.begun.load(Ordering::Acquire), "borrow");
            std::thread::yield_now();
        }
        counts[usize::from(borrow.end() == Returned::Snapshot)] += 1;
        // Pages that are borrowed all the time would keep the window out of the CMB all the time.
        std::thread::sleep(Duration::from_micros(300));
    }
    counts
}

/// Raises the version in every word, again and again; publishes a version when its section ended unfenced.
fn write_loop(c: &Client, hold: &Hold, shared: &Shared, rng: &mut Xoshiro256PlusPlus) -> [u64; 2] {
    let mut counts = [0; 2];
    let mut slot = c.slots.take().unwrap();
    let mut version = 1;
    while !shared.stop.load(Ordering::Relaxed) {
        let Ok(mut section) = slot.write(&c.control, writing(hold), &c.view) else {
            std::thread::yield_now();
            continue;
        };
        shared.begun.store(version, Ordering::Release);
        let sleepy = rng.next_u64().is_multiple_of(500);
        for i in 0..WORDS {
            section.write_u64(i * 8, version).unwrap();
            if sleepy && i == WORDS / 2 {
                std::thread::sleep(Duration::from_millis(3));
            }
        }
        match section.finish() {
            Finished::Done => {
                shared.published.store(version, Ordering::Release);
                version += 1;
                counts[0] += 1;
            }
            // Told: the same version is written again.
            Finished::Revoked => counts[1] += 1,
        }
    }
    counts
}

/// The writing peer: as `write_loop`, by DMA. Between submission and DMA anything may happen to the window.
fn peer_write_loop(engine: &EmulatedEngine, iova: &AtomicU64, shared: &Shared) -> [u64; 2] {
    let mut counts = [0; 2];
    let mut version = 1u64;
    while !shared.stop.load(Ordering::Relaxed) {
        engine.local().write(0, &version.to_le_bytes().repeat(WORDS)).unwrap();
        shared.begun.store(version, Ordering::Release);
        let done = fly(engine, iova, true);
        if done {
            shared.published.store(version, Ordering::Release);
            version += 1;
        }
        counts[usize::from(!done)] += 1;
    }
    counts
}

fn peer_read_loop(engine: &EmulatedEngine, iova: &AtomicU64, shared: &Shared) -> [u64; 2] {
    let mut counts = [0; 2];
    let mut bytes = vec![0; W];
    while !shared.stop.load(Ordering::Relaxed) {
        let low = shared.published.load(Ordering::Acquire);
        let done = fly(engine, iova, false);
        if done {
            engine.local().read(0, &mut bytes).unwrap();
            verify(&bytes, low, shared.begun.load(Ordering::Acquire), "reading peer");
            shared.peer_reads.fetch_add(1, Ordering::Relaxed);
        }
        counts[usize::from(!done)] += 1;
    }
    counts
}

/// One DMA of the whole window; whether it was done.
fn fly(engine: &EmulatedEngine, iova: &AtomicU64, out: bool) -> bool {
    let Ok(copy) = engine.submit(iova.load(Ordering::Acquire), 0, W, out) else {
        std::thread::yield_now();
        return false;
    };
    std::thread::yield_now();
    engine.step(1);
    engine.take_result(copy) == Some(CopyState::Done)
}

/// Who uses the window besides two readers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Party {
    Writer,
    WriterAndBorrower,
    Peers,
}

fn storm(seed: u64, revocations: u64, per_mille: u16, party: Party) {
    let mut rig = Rig::new(3 * W, Config { grace: 500_000, host_limit: 64 * W as u64, ..config() });
    rig.object(7, W, W);
    rig.drive.objects.insert(7, vec![0; W]);
    rig.object(666, 2 * W, W);
    rig.drive.objects.insert(666, vec![POISON; 2 * W]);
    let only = p2p::windows::ObjectOptions { window_size: W, placement: Placement::CmbOnly };
    rig.windows.add_object(666, only).unwrap();
    rig.windows.set_refusals(p2p::refusal::Refusals::new(seed, per_mille));
    let clock = Instant::now();

    let mut clients = Vec::new();
    for _ in 0..4 {
        let mut c = rig.client();
        rig.map_host(&mut c, 7, W);
        let hold = rig.hold(&c, 7, 0, true);
        clients.push((c, hold));
    }
    let poisoner = rig.client();
    let poison: Vec<Hold> = (0..2).map(|n| rig.hold(&poisoner, 666, n * W as u64, false)).collect();
    let index = clients[0].1.handle.index;
    let engines = ["writes", "reads"].map(|name| EmulatedEngine::new(name, W).unwrap());
    let peers = engines.clone().map(|engine| rig.windows.register_peer(Box::new(engine)));
    let iovas = [AtomicU64::new(0), AtomicU64::new(0)];
    let shared = Shared::default();
    std::thread::scope(|scope| {
        let (shared, clients, engines, iovas) = (&shared, &clients, &engines, &iovas);
        let rng = |n| Xoshiro256PlusPlus::seed_from_u64(seed ^ n);
        let readers: Vec<_> = (0..2u64)
            .map(|n| {
                scope.spawn(move || {
                    let (client, hold) = &clients[n as usize];
                    read_loop(client, hold, shared, &shared.reads[n as usize], &mut rng(n))
                })
            })
            .collect();
        let second = scope.spawn(move || match party {
            Party::WriterAndBorrower => borrow_loop(&clients[2].0, &clients[2].1, shared),
            Party::Peers => peer_read_loop(&engines[1], &iovas[1], shared),
            Party::Writer => [0; 2],
        });
        let writer = scope.spawn(move || match party {
            Party::Peers => peer_write_loop(&engines[0], &iovas[0], shared),
            _ => write_loop(&clients[3].0, &clients[3].1, shared, &mut rng(9)),
        });
        let failed = || {
            readers.iter().any(|r| r.is_finished())
                || writer.is_finished()
                || (party != Party::Writer && second.is_finished())
        };

        let mut rng = rng(17);
        let mut done = 0;
        let (mut freed, mut poisoned) = (0, 0);
        // On a busy machine a thread may have had no turn yet when there have been revocations enough.
        let all = || {
            let [first, second] = &shared.reads;
            let done =
                [first, second, &shared.published, &shared.peer_reads].map(|n| n.load(Ordering::Relaxed));
            done[..if party == Party::Peers { 4 } else { 3 }].iter().all(|n| *n > 0)
        };
        while (done < revocations || !all()) && !failed() {
            rig.now = clock.elapsed().as_nanos() as u64;
            rig.windows.ensure(index, Want::Auto, &mut rig.drive, rig.now).unwrap();
            rig.windows.promote(index, &mut rig.drive, rig.now);
            rig.poll();
            if party == Party::Peers {
                for (n, peer) in peers.iter().enumerate() {
                    let path = rig.windows.map_peer(*peer, index, n == 0, &mut rig.drive, rig.now).unwrap();
                    let PeerPath::Direct(mapping) = path else { continue };
                    iovas[n].store(mapping.iova, Ordering::Release);
                }
                // They get to use it: on few cores, only now and then.
                std::thread::sleep(Duration::from_micros(rng.next_u64() % 200));
            }
            let ticket = match rng.next_u64() % 20 {
                0 => rig.windows.revoke(&Scope::Everything, &mut rig.drive, rig.now),
                1 => rig.windows.evict(&Scope::Window(index), &mut rig.drive, rig.now),
                _ => rig.windows.revoke(&Scope::Window(index), &mut rig.drive, rig.now),
            }
            .unwrap();
            let report = loop {
                rig.now = clock.elapsed().as_nanos() as u64;
                rig.poll();
                match rig.windows.progress(ticket) {
                    Some(Progress::Done(report)) => break report,
                    _ if failed() => return,
                    _ => std::thread::yield_now(),
                }
            };
            done += report.moved;
            freed += report.freed_bytes;
            // Whatever is free is another's at once.
            for h in &poison {
                rig.ensure_want(h, Want::Cmb);
            }
            for h in &poison {
                // And whoever can still store there, or has a DMA under way, is found by what it leaves.
                let (outcome, bytes) = poisoner.read(h.handle, 0, W);
                if outcome == Outcome::Copied(Home::Cmb) {
                    assert!(bytes.iter().all(|b| *b == POISON), "something landed in pages that were freed");
                    poisoned += 1;
                }
            }
            let out = rig.windows.evict(&Scope::Object(666), &mut rig.drive, rig.now).unwrap();
            while !matches!(rig.windows.progress(out), Some(Progress::Done(_))) {
                rig.now = clock.elapsed().as_nanos() as u64;
                rig.poll();
            }
        }
        shared.stop.store(true, Ordering::Relaxed);
        let reads: Vec<_> = readers.into_iter().map(|r| r.join().unwrap()).collect();
        let (writes, others) = (writer.join().unwrap(), second.join().unwrap());
        println!(
            "{done} revocations, {freed} bytes freed; reads by CMB, host, retried: {reads:?}; sections done, fenced: \
             {writes:?}; borrows current, snapshot, or peer's reads done, faulted: {others:?}; {poisoned} pages poisoned; {:?}",
            rig.windows.counters().iter().collect::<Vec<_>>()
        );
        assert!(reads.iter().all(|r| r[0] + r[1] > 0) && writes[0] > 0);
        assert!(freed > 0 && poisoned > 0);
    });
    // Nothing was lost: the last published version is what the drive gets.
    rig.now = clock.elapsed().as_nanos() as u64;
    rig.windows.commit(7, &(0..W as u64), &mut rig.drive).unwrap();
    verify(
        &rig.drive.objects[&7],
        shared.published.load(Ordering::Acquire),
        shared.begun.load(Ordering::Acquire),
        "drive",
    );
}

#[test]
fn a_storm_of_revocations() {
    storm(seed(1), 2000, 0, Party::Writer);
}

#[test]
fn a_storm_with_borrows() {
    storm(seed(3), 500, 0, Party::WriterAndBorrower);
}

#[test]
fn a_storm_with_refusals_everywhere() {
    storm(seed(2), 500, 200, Party::WriterAndBorrower);
}

#[test]
fn a_storm_with_peers() {
    storm(seed(4), 500, 0, Party::Peers);
}

#[test]
fn a_storm_with_peers_and_refusals() {
    storm(seed(5), 300, 200, Party::Peers);
}
