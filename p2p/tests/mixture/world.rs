//! The model, and what must always hold.

use std::collections::BTreeMap;
use std::sync::Arc;

use nvme_driver::mem::Mapping;
use p2p::layout::Home;
use p2p::peer::EmulatedEngine;
use p2p::refusal::Refusals;
use p2p::region::{Region, RegionKind, View};
use p2p::windows::{Config, DeviceMemory, Hold, ObjectOptions, PeerId, Placement, Scope};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

use crate::common::{Client, GRACE, Rig, config};
use crate::held::Held;

pub const W: usize = 4 * 4096;
pub const WORDS: usize = W / 8;
/// Words that nothing late is stored to.
pub const STABLE: usize = WORDS - 512;
pub const WINDOWS: usize = 5;
pub const LEN: usize = WINDOWS * W;
/// Objects 0 and 1 are files.
pub const FILES: usize = 2;
pub const RAW: usize = 2;
pub const OWN: usize = 3;
pub const OBJECTS: usize = 4;
const NAMES: [u64; OBJECTS] = [0, 1, 1 << 63, 1 << 63 | 1];

/// Of 1000.
#[derive(Clone, Copy, Debug, Default)]
pub struct Chances {
    pub refusals: u16,
    pub failures: u64,
    pub resets: u64,
}

pub fn name(object: usize) -> u64 {
    NAMES[object]
}

/// A word of a window, written at this time.
pub fn word(object: usize, window: usize, time: u64) -> u64 {
    time << 24 | (object as u64) << 16 | (window as u64) << 8 | 0x5a
}

pub fn words_of(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap())).collect()
}

pub fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

pub struct World {
    pub rig: Rig,
    pub rng: Xoshiro256PlusPlus,
    chances: Chances,
    seed: u64,
    /// Raised with every write.
    pub time: u64,
    /// What each object must read as, but for the last page of each window.
    pub want: Vec<Vec<u64>>,
    /// The device's own memory.
    own: Arc<Mapping>,
    /// By object and window.
    pub clients: Vec<(Client, Vec<Vec<Hold>>)>,
    /// By client and object: what it has mapped.
    views: BTreeMap<(u32, usize), View>,
    /// One that works at once, and one that takes its time.
    pub engines: [EmulatedEngine; 2],
    pub peers: [PeerId; 2],
    pub held: Vec<Held>,
    /// Resets that the model knows of.
    resolved: u64,
    /// Losses that somebody has been told of, by object.
    told: [u64; OBJECTS],
    /// What happened last, for whoever has to find out why.
    pub last: Vec<String>,
}

impl World {
    pub fn new(seed: u64, chances: Chances) -> Self {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let cmb = (2 + rng.next_u64() as usize % 8) * W;
        let host_limit = (11 + rng.next_u64() % 16) * W as u64;
        let mut rig = Rig::new(cmb, Config { host_limit, ..config() });
        let want: Vec<Vec<u64>> = (0..OBJECTS)
            .map(|o| (0..WINDOWS * WORDS).map(|i| if o == RAW { 0 } else { word(o, i / WORDS, 0) }).collect())
            .collect();
        let own = Mapping::memfd("own", LEN).unwrap();
        own.write(0, &bytes_of(&want[OWN])).unwrap();
        for o in 0..OBJECTS {
            let placement =
                if rng.next_u64().is_multiple_of(6) { Placement::PeersFirst } else { Placement::Auto };
            let options = ObjectOptions { window_size: W, placement };
            match o {
                RAW => rig.windows.add_raw(NAMES[o], LEN as u64, options).unwrap(),
                OWN => {
                    let memory = Arc::clone(&own);
                    let kind = RegionKind::Ordinary;
                    let memory = DeviceMemory { memory, bus_address: 0, offset: 0, len: LEN, kind };
                    rig.windows.add_memory(NAMES[o], memory, options).unwrap();
                }
                _ => {
                    rig.drive.objects.insert(NAMES[o], bytes_of(&want[o]));
                    rig.windows.add_object(NAMES[o], options).unwrap();
                }
            }
        }
        let engines = ["now", "later"].map(|n| EmulatedEngine::new(n, 8 * W).unwrap());
        let peers = engines.clone().map(|engine| rig.windows.register_peer(Box::new(engine)));
        let mut world = Self {
            rig,
            rng,
            chances,
            seed,
            time: 0,
            want,
            own,
            clients: Vec::new(),
            views: BTreeMap::new(),
            engines,
            peers,
            held: Vec::new(),
            resolved: 0,
            told: [0; OBJECTS],
            last: Vec::new(),
        };
        for _ in 0..3 {
            world.new_client();
        }
        world.set_chances(chances);
        world
    }

    fn set_chances(&mut self, chances: Chances) {
        self.rig.windows.set_refusals(Refusals::new(self.seed, chances.refusals));
        self.rig.drive.unreliable(self.seed ^ 0xd, chances.failures);
        let signal = self.rig.windows.reset_signal();
        self.rig.drive.resets(signal, self.seed ^ 0x4e5, chances.resets);
    }

    pub fn new_client(&mut self) {
        let client = self.rig.client();
        let mut holds = Vec::new();
        for (o, name) in NAMES.iter().enumerate() {
            holds.push((0..WINDOWS).map(|n| self.rig.hold(&client, *name, (n * W) as u64, true)).collect());
            let mut view = client.view.clone();
            if o == OWN {
                view.cmb = Some(Region::new(Arc::clone(&self.own), 0, RegionKind::Ordinary));
            }
            for lane in 0..p2p::layout::LANES {
                let base = lane * p2p::layout::LANE;
                let fd = self.rig.windows.host_fd(*name, true).unwrap();
                let memory = Mapping::from_fd(fd, base, LEN, nvme_driver::mem::Access::ReadWrite).unwrap();
                view.host.push(Region::new(memory, base, RegionKind::Ordinary));
            }
            self.views.insert((client.id.0, o), view);
        }
        self.clients.push((client, holds));
    }

    /// Whether the drive may be reset.
    pub fn resets(&self) -> bool {
        self.chances.resets > 0
    }

    /// Whether the drive fails, or is reset.
    pub fn is_bad(&self) -> bool {
        self.chances.resets + self.chances.failures > 0
    }

    /// What a client sees of an object.
    pub fn view(&self, client: usize, object: usize) -> View {
        self.views[&(self.clients[client].0.id.0, object)].clone()
    }

    pub fn pick(&mut self, n: usize) -> usize {
        (self.rng.next_u64() % n as u64) as usize
    }

    pub fn index(&self, object: usize, window: usize) -> u32 {
        self.clients[0].1[object][window].handle.index
    }

    pub fn settle(&mut self) {
        for _ in 0..8 {
            self.rig.now += GRACE;
            self.rig.poll();
        }
    }

    /// Whether a reset has happened that the model does not know of: then what was read may be what is left.
    pub fn is_unresolved(&self) -> bool {
        self.rig.drive.reset_count() != self.resolved
    }

    /// Words that may be late: each must be one of this window's.
    pub fn check_words(&self, object: usize, window: usize, words: &[u64], who: &str) {
        for w in words {
            let time = w >> 24;
            let good = *w == 0 || (*w == word(object, window, time) && time <= self.time);
            assert!(good, "{who}: {w:#x} was never in object {object} window {window}\n{}", self.story());
        }
    }

    /// Demands the model's words of what was read from the `first` word of a window on.
    pub fn check(&self, object: usize, window: usize, first: usize, got: &[u64], who: &str) {
        if self.is_unresolved() {
            return;
        }
        let stable = got.len().min(STABLE.saturating_sub(first));
        let want = &self.want[object][window * WORDS + first..][..stable];
        if let Some(at) = got[..stable].iter().zip(want).position(|(a, b)| a != b) {
            panic!(
                "{who}: word {} of object {object} window {window} is {:#x}, not {:#x}\n{}",
                first + at,
                got[at],
                want[at],
                self.story()
            );
        }
        self.check_words(object, window, &got[stable..], who);
    }

    pub fn story(&self) -> String {
        let last = self.last.len().saturating_sub(40);
        let windows: Vec<String> = self.rig.windows.iter().map(|(i, w)| format!("{i}: {w:?}")).collect();
        format!("{}\n{}", self.last[last..].join("\n"), windows.join("\n"))
    }

    /// After a reset each page is what it was, or what is behind it; and what was lost is counted.
    pub fn resolve(&mut self) {
        let mut lost = [0; OBJECTS];
        loop {
            let resets = self.rig.drive.reset_count();
            self.settle();
            for (object, lost) in lost.iter_mut().enumerate() {
                let mut bytes = vec![0; LEN];
                let all = 0..LEN as u64;
                let (w, d) = (&mut self.rig.windows, &mut self.rig.drive);
                w.read_through(NAMES[object], all, &mut bytes, d).unwrap();
                let got = words_of(&bytes);
                for window in 0..WINDOWS {
                    let at = window * WORDS;
                    self.check_words(object, window, &got[at + STABLE..at + WORDS], "after a reset");
                    for page in (at..at + STABLE).step_by(512) {
                        let page = page..page + 512;
                        if got[page.clone()] == self.want[object][page.clone()] {
                            continue;
                        }
                        let behind = match object {
                            RAW => vec![0; 512],
                            OWN => panic!("a reset is none of its business\n{}", self.story()),
                            _ => words_of(
                                &self.rig.drive.objects[&NAMES[object]][page.start * 8..page.end * 8],
                            ),
                        };
                        let story = || format!("object {object} word {}\n{}", page.start, self.story());
                        assert!(got[page.clone()] == behind, "neither kept nor read anew: {}", story());
                        self.want[object][page.clone()].copy_from_slice(&behind);
                        self.last.push(format!(
                            "lost: object {object} window {window}, words from {}",
                            page.start - at
                        ));
                        *lost += 1;
                    }
                }
            }
            if resets == self.rig.drive.reset_count() {
                self.resolved = resets;
                break;
            }
        }
        for (object, lost) in lost.iter().enumerate() {
            let losses = self.rig.windows.losses(NAMES[object], &mut self.rig.drive, self.rig.now);
            let counted = losses.events > self.told[object];
            assert!(
                *lost == 0 || counted,
                "{lost} pages of object {object} lost untold: {losses:?}\n{}",
                self.story()
            );
            self.told[object] = losses.events;
            self.rig.windows.losses_reported(NAMES[object]);
        }
    }

    /// A commit, as the server makes it.
    pub fn commit(&mut self, object: usize) {
        let (w, d) = (&mut self.rig.windows, &mut self.rig.drive);
        let done = w.commit(NAMES[object], &(0..LEN as u64), d);
        let losses = w.losses(NAMES[object], d, self.rig.now);
        if losses.events > self.told[object] || done.is_err() || object == RAW {
            return;
        }
        // Acknowledged, so that not even a reset may have taken any of it.
        let bytes = match object {
            OWN => {
                let mut bytes = vec![0; LEN];
                self.own.read(0, &mut bytes).unwrap();
                bytes
            }
            _ => self.rig.drive.objects[&NAMES[object]].clone(),
        };
        for (window, got) in words_of(&bytes).chunks_exact(WORDS).enumerate() {
            let want = &self.want[object][window * WORDS..][..STABLE];
            let at = got.iter().zip(want).position(|(a, b)| a != b);
            assert_eq!(
                at,
                None,
                "committed, and object {object} window {window} is not there\n{}",
                self.story()
            );
            self.check_words(object, window, &got[STABLE..], "committed");
        }
    }

    /// In the end everything is where it belongs, and all memory is free.
    pub fn finish(&mut self) {
        self.chances = Chances::default();
        self.set_chances(self.chances);
        self.end_all();
        self.settle();
        self.resolve();
        for peer in self.peers {
            self.rig.windows.unregister_peer(peer, self.rig.now).unwrap();
        }
        for (c, _) in std::mem::take(&mut self.clients) {
            self.rig.windows.client_died(c.id, &mut self.rig.drive, self.rig.now);
        }
        for (object, name) in NAMES.iter().enumerate().filter(|(o, _)| *o != RAW) {
            let ticket =
                self.rig.windows.evict(&Scope::Object(*name), &mut self.rig.drive, self.rig.now).unwrap();
            let report = self.rig.finish(ticket);
            assert_eq!(report.failed, Vec::<String>::new(), "{}", self.story());
            self.commit(object);
        }
        let raw = |home| self.rig.windows.iter().filter(|(_, w)| w.home == home).count() * W;
        let (free, size) = self.rig.windows.cmb_bytes();
        assert_eq!(free + raw(Home::Cmb), size, "CMB leaked\n{}", self.story());
        assert_eq!(
            self.rig.windows.host_bytes().0 as usize,
            raw(Home::Host),
            "host cache leaked\n{}",
            self.story()
        );
        assert_eq!(self.rig.windows.quarantine().count(), 0);
        let mut bytes = vec![0; LEN];
        self.rig.windows.read_through(NAMES[RAW], 0..LEN as u64, &mut bytes, &mut self.rig.drive).unwrap();
        for (window, got) in words_of(&bytes).chunks_exact(WORDS).enumerate() {
            self.check(RAW, window, 0, got, "raw memory in the end");
        }
    }
}
