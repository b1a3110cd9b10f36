//! What is where, and why: write-back in the background, read-ahead, room in the host cache, peers that take none of it, and going
//! back to the CMB without ping-pong. All in injected time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod common;

use common::{Client, Rig, config, pattern, seed, writing};
use p2p::counters::{Path, Reason};
use p2p::layout::Home;
use p2p::peer::EmulatedEngine;
use p2p::reader::Outcome;
use p2p::windows::{Config, Ensured, Hold, ObjectOptions, PeerPath, Placement, Scope, Want, WriteBack};
use p2p::writer::Finished;
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

const W: usize = 16 * 1024;

fn write(c: &Client, hold: &Hold, offset: usize, bytes: &[u8]) {
    let mut slot = c.slots.take().unwrap();
    let mut s = slot.write(&c.control, writing(hold), &c.view).unwrap();
    s.write(offset, bytes).unwrap();
    assert_eq!(s.finish(), Finished::Done);
}

fn home(rig: &Rig, hold: &Hold) -> Home {
    rig.windows.status(hold.handle.index).unwrap().home
}

#[test]
fn what_has_been_dirty_for_a_while_is_written_back_straight_from_the_cmb() {
    let wb = WriteBack { after: 1000, rate: 1 << 40 };
    let mut rig = Rig::new(8 * W, Config { write_back: Some(wb), ..config() });
    rig.object(7, 4 * W, W);
    let c = rig.client();
    let hold = rig.hold(&c, 7, 0, true);
    rig.ensure(&hold);
    let deadline = rig.windows.poll(&mut rig.drive, 0).deadline.unwrap();
    assert!(deadline <= wb.after, "somebody may write, so there is something to look at");
    write(&c, &hold, 4096, b"dirty");
    write(&c, &hold, 3 * 4096, b"dirty");
    let background = |rig: &Rig| rig.windows.counters().get(Path::Cmb, Reason::Background).bytes;
    for now in [1000, 1500, 1999] {
        rig.windows.poll(&mut rig.drive, now);
        assert_eq!(background(&rig), 0, "too young at {now}");
    }
    rig.windows.poll(&mut rig.drive, 2000);
    assert_eq!((background(&rig), rig.drive.host_bytes), (2 * 4096, 0), "no byte through host memory");
    assert_eq!(&rig.drive.objects[&7][4096..4101], b"dirty");
    let done = rig.windows.commit(7, &(0..W as u64), &mut rig.drive).unwrap();
    assert_eq!((done.cmb_bytes, done.host_bytes), (0, 0), "nothing is left for the commit");
    // Released and clean: nothing to look at any more.
    rig.windows.release(c.id, hold.handle.index).unwrap();
    let mut now = 3000;
    let polled = loop {
        now += 1000;
        let polled = rig.windows.poll(&mut rig.drive, now);
        if polled.deadline.is_none() || now > 20_000 {
            break polled;
        }
    };
    assert_eq!((polled.deadline, polled.pending), (None, false));
}

#[test]
fn background_write_back_keeps_to_its_rate_and_ends() {
    const PAGES: usize = 1024;
    let rate = 4096 * 1000;
    let wb = WriteBack { after: 1, rate };
    let mut rig = Rig::new(PAGES * 4096, Config { write_back: Some(wb), ..config() });
    rig.object(7, PAGES * 4096, 1 << 20);
    let c = rig.client();
    let holds: Vec<_> = (0..4).map(|n| rig.hold(&c, 7, n << 20, true)).collect();
    for h in &holds {
        rig.ensure(h);
        for page in 0..256 {
            write(&c, h, page * 4096, b"x");
        }
    }
    let written = |rig: &Rig| rig.windows.counters().get(Path::Cmb, Reason::Background).bytes;
    let second = 1_000_000_000;
    let mut now = 0;
    while written(&rig) < PAGES as u64 * 4096 {
        now += second / 50;
        rig.windows.poll(&mut rig.drive, now);
        let most = u128::from(rate) * u128::from(now) / 1_000_000_000;
        assert!(u128::from(written(&rig)) <= most, "{} of {most} bytes at {now} ns", written(&rig));
        assert!(now < 4 * second, "1024 pages at 1000 a second");
    }
}

#[test]
fn windows_that_are_used_in_order_are_read_ahead_and_others_are_not() {
    let mut rig = Rig::new(32 * W, config());
    rig.object(7, 24 * W, W);
    rig.object(8, 24 * W, W);
    let c = rig.client();
    let holds =
        |rig: &mut Rig, o| -> Vec<Hold> { (0..24).map(|n| rig.hold(&c, o, n * W as u64, false)).collect() };
    let (ordered, random) = (holds(&mut rig, 7), holds(&mut rig, 8));
    let mut faults = 0;
    for (n, h) in ordered.iter().enumerate() {
        if home(&rig, h) == Home::None {
            faults += 1;
            rig.ensure(h);
        }
        let want: Vec<u8> = (n * W..n * W + W).map(|i| pattern(7, i)).collect();
        assert_eq!(c.read(h.handle, 0, W), (Outcome::Copied(Home::Cmb), want));
        while rig.windows.poll(&mut rig.drive, 0).worked {}
    }
    assert!(faults <= 7, "{faults} of 24 windows had to be asked for");
    let counters = rig.windows.counters();
    assert_eq!(counters.get(Path::Cmb, Reason::ReadAhead).transfers, 24 - faults);
    assert_eq!(rig.drive.host_bytes, 0, "straight into the CMB");
    for n in [5, 3, 9, 1, 20, 12] {
        rig.ensure(&random[n]);
        rig.poll();
    }
    assert_eq!(rig.windows.counters().get(Path::Cmb, Reason::ReadAhead).transfers, 24 - faults);
}

#[test]
fn read_ahead_pushes_nobody_out_of_the_cmb() {
    let mut rig = Rig::new(4 * W, config());
    rig.object(7, 24 * W, W);
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 24 * W);
    let holds: Vec<_> = (0..24).map(|n| rig.hold(&c, 7, n * W as u64, false)).collect();
    let mut faults = 0;
    for (n, h) in holds.iter().enumerate() {
        if home(&rig, h) == Home::None {
            faults += 1;
            rig.ensure(h);
            assert_eq!(home(&rig, h), Home::Cmb);
            while rig.windows.poll(&mut rig.drive, 0).worked {}
            assert_eq!(home(&rig, h), Home::Cmb, "window {n} is not pushed out by the ones behind it");
        }
    }
    let counters = rig.windows.counters();
    assert!(faults < 12 && counters.evicted <= faults, "{faults} faults, {} pushed out", counters.evicted);
    assert!(counters.get(Path::HostCache, Reason::ReadAhead).transfers > 0);
}

#[test]
fn the_host_cache_keeps_room_for_what_is_dirty_in_the_cmb() {
    let mut rig = Rig::new(4 * W, Config { host_limit: 10 * W as u64, ..config() });
    rig.object(7, 4 * W, W);
    rig.object(8, 32 * W, W);
    let mut c = rig.client();
    rig.map_host(&mut c, 7, 4 * W);
    let dirty: Vec<_> = (0..4).map(|n| rig.hold(&c, 7, n * W as u64, true)).collect();
    for h in &dirty {
        rig.ensure(h);
        write(&c, h, 0, b"dirty");
    }
    for n in 0..32 {
        let h = rig.hold(&c, 8, n * W as u64, false);
        rig.ensure_want(&h, Want::Host);
    }
    assert_eq!(rig.windows.host_bytes().0, 6 * W as u64, "four windows of room are kept");
    rig.drive.fail_writes = true;
    let report = rig.revoke(&Scope::Object(7));
    assert_eq!((report.moved, report.failed.len()), (4, 0), "without the drive");
    for h in &dirty {
        assert_eq!(c.read(h.handle, 0, 5), (Outcome::Copied(Home::Host), b"dirty".to_vec()));
    }
    // Clean or gone from the CMB, they need no room kept.
    for n in 0..32 {
        let h = rig.hold(&c, 8, n * W as u64, false);
        rig.ensure_want(&h, Want::Host);
    }
    assert_eq!(rig.windows.host_bytes().0, 10 * W as u64);
}

#[test]
fn a_file_larger_than_the_cmb_goes_to_a_peer_without_host_memory() {
    let mut rig = Rig::new(4 * W, config());
    rig.object(7, 16 * W, W);
    let engine = EmulatedEngine::new("dma", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine.clone()));
    let copy = |rig: &mut Rig, n: usize| {
        let index = rig.windows.window_at(7, (n * W) as u64).unwrap();
        let PeerPath::Direct(m) = rig.windows.map_peer(peer, index, false, &mut rig.drive, 0).unwrap() else {
            panic!("window {n} is not reached directly");
        };
        engine.copy(m.iova, 0, W, false).unwrap();
        rig.windows.unmap_peer(peer, index).unwrap();
        let mut got = vec![0; W];
        engine.local().read(0, &mut got).unwrap();
        assert_eq!(got, (n * W..n * W + W).map(|i| pattern(7, i)).collect::<Vec<_>>());
    };
    for n in (0..16).chain(0..16) {
        copy(&mut rig, n);
        rig.poll();
        assert_eq!((rig.windows.host_bytes().0, rig.drive.host_bytes), (0, 0), "after window {n}");
    }
    rig.revoke(&Scope::Object(7));
    assert_eq!((rig.windows.host_bytes().0, rig.drive.host_bytes), (0, 0));

    // Read by the processor in between they are in the host cache; clean ones still come from the drive.
    let c = rig.client();
    for n in 0..16 {
        let h = rig.hold(&c, 7, n * W as u64, false);
        rig.ensure_want(&h, Want::Host);
    }
    let before = rig.drive.host_bytes;
    for n in 0..16 {
        copy(&mut rig, n);
    }
    assert_eq!(rig.drive.host_bytes, before);
    assert_eq!(rig.windows.counters().get(Path::Bounce, Reason::Policy).bytes, 0, "none by the processor");
}

#[test]
fn a_window_that_was_revoked_goes_back_when_it_has_settled_and_not_before() {
    let mut rig = Rig::new(8 * W, Config { settle: 1_000_000, ..config() });
    rig.object(7, W, W);
    let mut c = rig.client();
    rig.map_host(&mut c, 7, W);
    let hold = rig.hold(&c, 7, 0, false);
    rig.ensure(&hold);
    for round in 0..5 {
        rig.revoke(&Scope::Object(7));
        let revoked = rig.now;
        for _ in 0..100 {
            rig.now += 9_000;
            rig.ensure(&hold);
            rig.poll();
            assert_eq!(home(&rig, &hold), Home::Host, "round {round}: {} ns after", rig.now - revoked);
        }
        rig.now = revoked + 1_100_000;
        rig.ensure(&hold);
        rig.poll();
        assert_eq!(home(&rig, &hold), Home::Cmb, "round {round}");
        assert_eq!(c.read(hold.handle, 0, 1).0, Outcome::Copied(Home::Cmb));
    }
    assert_eq!(rig.windows.counters().moves, 10);
}

#[test]
fn where_the_cmb_is_slow_for_processors_it_is_for_peers() {
    let mut rig = Rig::new(8 * W, config());
    rig.object(7, 2 * W, W);
    let options = ObjectOptions { window_size: W, placement: Placement::PeersFirst };
    rig.windows.add_object(7, options).unwrap();
    let c = rig.client();
    let holds = [rig.hold(&c, 7, 0, false), rig.hold(&c, 7, W as u64, false)];
    for _ in 0..10 {
        for h in &holds {
            assert_eq!(rig.ensure(h), Ensured::Ready(Home::Host, Reason::Policy));
        }
        rig.poll();
    }
    let engine = EmulatedEngine::new("dma", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine));
    let path = rig.windows.map_peer(peer, holds[0].handle.index, false, &mut rig.drive, 0).unwrap();
    assert!(matches!(path, PeerPath::Direct(_)), "{path:?}");
    assert_eq!((home(&rig, &holds[0]), home(&rig, &holds[1])), (Home::Cmb, Home::Host));
    assert!(matches!(rig.ensure_want(&holds[1], Want::Cmb), Ensured::Ready(Home::Cmb, _)), "asked for");
}

/// As a CMB of 1 MiB under 10 GiB: one byte for ten thousand. Reads and writes, and little of everything else too.
#[test]
fn a_cmb_of_a_ten_thousandth_of_the_working_set_stays_correct() {
    const PAGE: usize = 4096;
    const PAGES: usize = 4 * 10_240;
    let seed = seed(11);
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let limits = Config { host_limit: 48 * PAGE as u64, slots: 128, ..config() };
    let mut rig = Rig::new(4 * PAGE, limits);
    rig.drive.objects.insert(7, vec![0; PAGES * PAGE]);
    let options = ObjectOptions { window_size: PAGE, ..Default::default() };
    rig.windows.add_object(7, options).unwrap();
    let mut c = rig.client();
    rig.map_host(&mut c, 7, PAGES * PAGE);
    let mut want = vec![0u64; PAGES];
    for step in 0..60_000u64 {
        // A few that are used often, a walk in order, and the rest at random.
        let page = match rng.next_u64() % 4 {
            0 => rng.next_u64() as usize % 16,
            1 => step as usize % PAGES,
            _ => rng.next_u64() as usize % PAGES,
        };
        let hold = rig.hold(&c, 7, (page * PAGE) as u64, true);
        let mut got = [0; 8];
        let resident = |rig: &mut Rig| {
            (0..100).any(|_| {
                rig.poll();
                rig.now += 1000;
                matches!(rig.ensure(&hold), Ensured::Ready(..))
            })
        };
        if resident(&mut rig) {
            let (outcome, bytes) = c.read(hold.handle, 8, 8);
            assert!(matches!(outcome, Outcome::Copied(_)), "step {step}: {outcome:?}");
            got.copy_from_slice(&bytes);
        } else {
            let at = (page * PAGE) as u64 + 8;
            rig.windows.read_through(7, at..at + 8, &mut got, &mut rig.drive).unwrap();
        }
        assert_eq!(u64::from_le_bytes(got), want[page], "step {step}, page {page}, SEED={seed}");
        if step % 3 == 0 && rig.windows.status(hold.handle.index).unwrap().home != Home::None {
            write(&c, &hold, 8, &(step + 1).to_le_bytes());
            want[page] = step + 1;
        }
        rig.windows.release(c.id, hold.handle.index).unwrap();
        assert!(rig.windows.host_bytes().0 <= 48 * PAGE as u64);
    }
    let evicted = rig.windows.evict(&Scope::Everything, &mut rig.drive, rig.now).unwrap();
    assert!(rig.finish(evicted).failed.is_empty());
    for (page, want) in want.iter().enumerate() {
        let at = page * PAGE + 8;
        assert_eq!(rig.drive.objects[&7][at..at + 8], want.to_le_bytes(), "page {page}, SEED={seed}");
    }
}

/// Reads of the drive for skewed visits to many windows, with a host cache of 64 of them, and a CMB of `cmb`.
fn reads(seed: u64, cmb: usize) -> u32 {
    const WINDOWS: u64 = 1024;
    let limits = Config { slots: 2 * WINDOWS as u32, host_limit: 64 * 4096, ..config() };
    let mut rig = Rig::new(cmb * 4096, limits);
    rig.object(7, WINDOWS as usize * 4096, 4096);
    let c = rig.client();
    let holds: Vec<_> = (0..WINDOWS).map(|n| rig.hold(&c, 7, n * 4096, false)).collect();
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut misses = 0;
    for visit in 0..40_000u64 {
        let at = (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let hold = &holds[(at.powi(4) * WINDOWS as f64) as usize];
        if home(&rig, hold) == Home::None {
            // The caches are full when it counts.
            misses += u32::from(visit > 10_000);
        }
        rig.windows.ensure(hold.handle.index, Want::Auto, &mut rig.drive, visit * 1000).unwrap();
        rig.windows.poll(&mut rig.drive, visit * 1000);
    }
    misses
}

#[test]
fn a_small_cmb_before_a_full_host_cache_costs_no_reads_of_the_drive() {
    let seed = seed(0x5eed_0011);
    let (with, without) = (reads(seed, 4), reads(seed, 0));
    println!("seed {seed:#x}: {with} reads with a CMB, {without} without");
    assert!(with <= without, "seed {seed:#x}: {with} reads with a CMB, {without} without");
}

/// Everything that could fill a small host cache at once, at random: raw memory in it and in the CMB, windows of the CMB that may be
/// dirty, and a file that may live in the host cache only. Its writers find a place each time. Then the CMB is taken back from a drive
/// that takes no writes: all raw memory gets out of it, and of what is dirty what finds a place. With the drive back the rest follows, and
/// no byte is another's or an older one.
#[test]
fn raw_memory_and_what_is_dirty_leave_room_for_a_writer_and_have_room_themselves() {
    for seed in seed(40)..seed(40) + 40 {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let mut below = |n: usize| (rng.next_u64() % n as u64) as usize;
        let limit = 2 + below(15);
        let cmb = 1 + below(16);
        let raw = below(limit / 2 + 1);
        // In pages: a limit need not be whole windows.
        let host_limit = (limit * W + below(4) * 4096) as u64;
        // Nothing goes to the drive that does not have to.
        let mut rig = Rig::new(cmb * W, Config { host_limit, write_back: None, ..config() });
        const RAW: u64 = 1 << 63;
        let options = |placement| ObjectOptions { window_size: W, placement };
        rig.windows.add_raw(RAW, (raw * W) as u64, options(Placement::Auto)).unwrap();
        rig.object(7, cmb * W, W);
        rig.object(8, 24 * W, W);
        rig.windows.add_object(8, options(Placement::HostOnly)).unwrap();
        // One for each object: a client of the rig has one host-cache file mapped.
        let clients = [(RAW, raw.max(1)), (7, cmb), (8, 24)].map(|(object, windows)| {
            let mut c = rig.client();
            rig.map_host(&mut c, object, windows * W);
            (object, c)
        });
        let of = |object: u64| &clients.iter().find(|(o, _)| *o == object).unwrap().1;
        let mut model: std::collections::BTreeMap<(u64, usize), (Hold, u8)> =
            std::collections::BTreeMap::new();
        for step in 0..120 {
            let (object, n) = match below(4) {
                0 if raw > 0 => (RAW, below(raw)),
                1 => (7, below(cmb)),
                _ => (8, below(24)),
            };
            let (hold, _) = *model
                .entry((object, n))
                .or_insert_with(|| (rig.hold(of(object), object, (n * W) as u64, true), 0));
            let placed = rig.ensure(&hold);
            assert!(
                matches!(placed, Ensured::Ready(..)),
                "SEED={seed} step {step}: {object} {n}: {placed:?}"
            );
            let byte = 1 + below(255) as u8;
            write(of(object), &hold, 0, &[byte; 8]);
            model.insert((object, n), (hold, byte));
            if below(8) == 0 {
                rig.windows.promote(hold.handle.index, &mut rig.drive, rig.now);
            }
        }
        rig.drive.fail_writes = true;
        let report = rig.revoke(&Scope::Object(RAW));
        assert_eq!(report.failed.len(), 0, "SEED={seed}: raw memory has a place: {report:?}");
        rig.revoke(&Scope::Object(7));
        rig.drive.fail_writes = false;
        let report = rig.revoke(&Scope::Everything);
        assert_eq!(report.failed.len(), 0, "SEED={seed}: {report:?}");
        for ((object, n), (hold, byte)) in &model {
            rig.ensure(hold);
            let (outcome, got) = of(*object).read(hold.handle, 0, 8);
            assert!(matches!(outcome, Outcome::Copied(_)), "SEED={seed}: {outcome:?}");
            assert_eq!(got, [*byte; 8], "SEED={seed}: object {object} window {n}");
        }
    }
}

/// While more may be dirty in the CMB than the host cache has room for, the drive has it sooner.
#[test]
fn what_may_find_no_place_is_written_back_sooner() {
    let wb = WriteBack { after: 8000, rate: 1 << 40 };
    for (held, sooner) in [(4, false), (5, true)] {
        let host_limit = 8 * W as u64;
        let mut rig = Rig::new(8 * W, Config { host_limit, write_back: Some(wb), ..config() });
        rig.object(7, 8 * W, W);
        let c = rig.client();
        let holds: Vec<_> = (0..held).map(|n| rig.hold(&c, 7, n * W as u64, true)).collect();
        for h in &holds {
            rig.ensure(h);
            write(&c, h, 0, b"dirty");
        }
        let background = |rig: &Rig| rig.windows.counters().get(Path::Cmb, Reason::Background).bytes;
        let mut now = 0;
        while background(&rig) == 0 {
            now += 500;
            rig.windows.poll(&mut rig.drive, now);
            assert!(now < 20_000, "never written back");
        }
        assert_eq!(now <= wb.after / 2, sooner, "{held} windows of 8: written at {now}");
        assert!(now >= wb.after / 4, "too young at {now}");
    }
}
