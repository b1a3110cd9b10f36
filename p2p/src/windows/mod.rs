//! The server's side: every window, where its bytes are, who holds it, and how it moves. One owner, never blocks.
//!
//! * `object`: what windows are windows of, and their host-cache files
//! * `window`: one window's state
//! * `clients`: attach, hold, release, death
//! * `place`: making a window resident
//! * `room`: places that are taken, and what the host cache keeps free
//! * `fill`: bytes from the drive to a place that was taken
//! * `moves`: the six steps of a move as a state machine
//! * `endings`: how a move ends: there, where it began, or not yet
//! * `copying`: bytes between two homes
//! * `waiting`: what a move waits for
//! * `reclaim`: when old pages are free again, and quarantine
//! * `spares`: host pages that a window of the CMB keeps for when it comes back
//! * `revoke`: what to revoke, tickets and reports
//! * `device`: mass revocation, and a device that was reset
//! * `writeback`: dirty pages to the drive, commit, truncate
//! * `background`: dirty pages to the drive at a bounded rate
//! * `ahead`: read-ahead for windows that are used one after the other
//! * `evict`: making room, and going back to the CMB
//! * `bounce`: bytes that go through host memory, without a place or past it
//! * `raw`: objects that are not files, and have no memory of their own
//! * `memory`: objects with device memory of their own
//! * `peers`: windows that other devices reach
//! * `registry`: which peers there are, and who of them reaches a window
//! * `error`: what windows cannot do, and why
mod ahead;
mod background;
mod bounce;
mod clients;
mod copying;
mod device;
mod endings;
mod error;
mod evict;
mod fill;
mod memory;
mod moves;
mod object;
mod peers;
mod place;
mod raw;
mod reclaim;
mod registry;
mod revoke;
mod room;
mod spares;
mod waiting;
mod window;
mod writeback;

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use nvme_driver::cmb::CmbAllocator;
use nvme_driver::disk::CmbMemory;

use crate::backing::Backing;
use crate::control::ControlPages;
use crate::counters::Counters;
use crate::layout::{Home, MIN_WINDOW, Place};
use crate::policy::S3Fifo;
use crate::protocol::Guard;
use crate::refusal::Refusals;
use crate::region::{Region, RegionKind};

pub use background::WriteBack;
pub use clients::{ClientId, Hold};
pub use device::{Losses, ResetSignal};
pub use error::WindowsError;
pub use memory::DeviceMemory;
pub use object::{ObjectOptions, Placement};
pub use peers::{PeerId, PeerMapping, PeerPath, PeerStatus};
pub use place::{Ensured, Want};
pub use reclaim::Quarantine;
pub use revoke::{Progress, Report, Scope, Ticket};
pub use waiting::InTheWay;
pub use window::WindowStatus;
pub use writeback::Committed;

use clients::Client;
use object::Object;
use reclaim::PagesOut;
use revoke::Tickets;
use window::Window;

/// The server word while no robust mutex is held there: alive, owner unnamed (no thread has this id).
const ALIVE: u32 = 0x3fff_ffff;

/// How a [`Windows`] is set up.
#[derive(Debug)]
pub struct Config {
    /// Windows that can exist at once (32 bytes of control page each).
    pub slots: u32,
    /// Bytes of host cache.
    pub host_limit: u64,
    /// How long a move waits for writers, and for borrows before it calls their pages quarantined, in nanoseconds.
    pub grace: u64,
    /// A window that moved is left where it is for this long before it goes back to the CMB, in nanoseconds.
    pub settle: u64,
    /// Words of dirty bits per client, 64 pages each.
    pub dirty_words: u32,
    /// Write-back in the background; `None`: on commit and eviction only.
    pub write_back: Option<WriteBack>,
    /// Windows that are read ahead at most when an object's are used one after the other; 0: none.
    pub read_ahead: u32,
    /// Refusals to inject.
    pub refusals: Refusals,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            slots: 16 * 1024,
            host_limit: 1 << 30,
            grace: 20_000_000,
            settle: 100_000_000,
            dirty_words: 64 * 1024,
            write_back: Some(WriteBack::default()),
            read_ahead: 8,
            refusals: Refusals::default(),
        }
    }
}

/// The CMB: its memory as mapped here, and which pages of it are in use.
#[derive(Debug)]
struct Cmb {
    memory: CmbMemory,
    region: Region,
    pool: CmbAllocator,
    policy: S3Fifo,
}

/// What a [`Windows::poll`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Polled {
    /// Something moved.
    pub worked: bool,
    /// There is work to poll for soon: a move, or pages that wait for an answer.
    pub pending: bool,
    /// When there is something to poll for again (the end of a grace, background work), on the clock that `now` is read from.
    pub deadline: Option<u64>,
}

/// Every window of one server.
#[derive(Debug)]
pub struct Windows {
    control: ControlPages,
    /// The device generation as far as it has been dealt with. The shared word is ahead of it from when a reset is announced.
    device: u64,
    cmb: Option<Cmb>,
    host_limit: u64,
    host_bytes: u64,
    spares: spares::Spares,
    host_policy: S3Fifo,
    grace: u64,
    settle: u64,
    dirty_words: u32,
    write_back: Option<WriteBack>,
    pace: background::Pace,
    /// Holds that may write.
    writable_holds: usize,
    /// Bytes of windows of files in the CMB that may be dirty: the host cache keeps room for them.
    may_be_dirty: u64,
    raw_bytes: u64,
    /// Those of raw memory that are in the CMB: for them, too.
    raw_in_cmb: u64,
    read_ahead: u32,
    /// Windows to be read ahead, and where to.
    ahead: VecDeque<(u32, Want)>,
    refusals: Refusals,
    objects: BTreeMap<u64, Object>,
    windows: Vec<Option<Box<Window>>>,
    free_slots: Vec<u32>,
    clients: BTreeMap<u32, Client>,
    next_client: u32,
    peers: registry::Peers,
    /// Windows that are moving.
    moving: Vec<u32>,
    out: Vec<PagesOut>,
    tickets: Tickets,
    /// Control slots whose windows have not followed a mass revocation yet.
    sweep: VecDeque<(Range<u32>, Ticket)>,
    /// The device generation when no window had a stamp from before it.
    swept_at: u64,
    /// Windows used while in the host cache: candidates for the CMB.
    wanted: VecDeque<u32>,
    /// Where the search for slots to spare goes on.
    slot_cursor: u32,
    counters: Counters,
    bounce: Vec<u8>,
}

impl Windows {
    /// Windows over `cmb`, or over the host cache alone.
    pub fn new(cmb: Option<CmbMemory>, config: Config) -> Result<Self, WindowsError> {
        let slots = config.slots.max(1);
        let mut canary = None;
        let cmb = cmb.map(|memory| {
            let mut size = memory.memory.len() & !(MIN_WINDOW - 1);
            let kind = if memory.is_device_memory && size >= 2 * MIN_WINDOW {
                // The last page is the canary's: a word that never holds all ones.
                size -= MIN_WINDOW;
                canary = Some(size as u64);
                if let Ok(word) = memory.memory.u64_at(size) {
                    word.store(0, Ordering::Relaxed);
                }
                RegionKind::Device { canary: size as u64 }
            } else {
                RegionKind::Ordinary
            };
            Cmb {
                region: Region::new(std::sync::Arc::clone(&memory.memory), 0, kind),
                pool: CmbAllocator::new(size),
                policy: S3Fifo::new(size as u64),
                memory,
            }
        });
        let control = ControlPages::create(slots, canary)?;
        control.server_word().store(ALIVE, Ordering::Release);
        Ok(Self {
            device: control.device_generation(),
            swept_at: control.device_generation(),
            control,
            cmb,
            host_limit: config.host_limit,
            host_bytes: 0,
            spares: spares::Spares::default(),
            host_policy: S3Fifo::new(config.host_limit),
            grace: config.grace,
            settle: config.settle,
            dirty_words: config.dirty_words,
            write_back: config.write_back,
            pace: background::Pace::default(),
            writable_holds: 0,
            may_be_dirty: 0,
            raw_bytes: 0,
            raw_in_cmb: 0,
            read_ahead: config.read_ahead,
            ahead: VecDeque::new(),
            refusals: config.refusals,
            objects: BTreeMap::new(),
            windows: Vec::new(),
            free_slots: Vec::new(),
            clients: BTreeMap::new(),
            next_client: 1,
            peers: registry::Peers::default(),
            moving: Vec::new(),
            out: Vec::new(),
            tickets: Tickets::default(),
            sweep: VecDeque::new(),
            wanted: VecDeque::new(),
            slot_cursor: 0,
            counters: Counters::default(),
            bounce: Vec::new(),
        })
    }

    /// The control pages: the server's own mapping, writable here (the robust server word goes at
    /// [`header::SERVER`](crate::layout::header::SERVER)) and nowhere else.
    pub fn control(&self) -> &ControlPages {
        &self.control
    }

    /// A read-only descriptor of the control pages, for a client.
    pub fn control_fd(&self) -> Result<OwnedFd, WindowsError> {
        Ok(self.control.reader_fd()?)
    }

    /// The CMB that windows may live in.
    pub fn cmb(&self) -> Option<&CmbMemory> {
        self.cmb.as_ref().map(|c| &c.memory)
    }

    /// Bytes of the CMB that are free, and in all.
    pub fn cmb_bytes(&self) -> (usize, usize) {
        self.cmb.as_ref().map_or((0, 0), |c| (c.pool.free_bytes(), c.pool.size()))
    }

    /// Bytes of host cache in use (quarantined ones and [spares](Self::spare_bytes) included), and the limit.
    pub fn host_bytes(&self) -> (u64, u64) {
        (self.host_bytes, self.host_limit)
    }

    /// What went where, and why.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Refuses placements at random from now on.
    pub fn set_refusals(&mut self, refusals: Refusals) {
        self.refusals = refusals;
    }

    /// Moves on whatever can be moved on without waiting. `now` is a monotonic clock in nanoseconds.
    pub fn poll(&mut self, backing: &mut dyn Backing, now: u64) -> Polled {
        let mut worked = self.notice_reset(backing, now);
        worked |= self.sweep_some(backing, now);
        for index in self.moving.clone() {
            worked |= self.step_move(index, backing, now);
        }
        worked |= self.step_peers(now);
        worked |= self.reclaim(now);
        worked |= self.promote_some(backing, now);
        worked |= self.spare_slots(backing, now);
        worked |= self.read_ahead_some(backing, now);
        worked |= self.write_back_some(backing, now);
        Polled {
            worked,
            pending: !self.moving.is_empty()
                || !self.out.is_empty()
                || !self.sweep.is_empty()
                || !self.ahead.is_empty()
                || self.pace.is_under_way()
                || !self.peers.leaving.is_empty(),
            deadline: self.next_deadline(now),
        }
    }

    fn next_deadline(&self, now: u64) -> Option<u64> {
        let moves = self.moving.iter().filter_map(|i| self.window(*i)?.moving.as_ref()?.deadline());
        let peers = self.peers.leaving.iter().map(|l| l.2);
        let background = self.next_write_back();
        moves
            .chain(self.out.iter().map(|o| o.deadline))
            .chain(peers)
            .chain(background)
            .filter(|d| *d > now)
            .min()
    }

    fn window(&self, index: u32) -> Option<&Window> {
        self.windows.get(index as usize)?.as_deref()
    }

    fn window_mut(&mut self, index: u32) -> Option<&mut Window> {
        self.windows.get_mut(index as usize)?.as_deref_mut()
    }

    fn known(&mut self, index: u32) -> Result<&mut Window, WindowsError> {
        self.window_mut(index).ok_or(WindowsError::UnknownWindow(index))
    }

    /// The words of a slot below the configured number of slots.
    fn guard(control: &ControlPages, index: u32) -> Result<Guard<'_, AtomicU64>, WindowsError> {
        control.guard(index).map(|(g, _)| g).ok_or(WindowsError::UnknownWindow(index))
    }

    /// The place word for a home, valid under the device generation that has been dealt with.
    fn place_of(&self, home: Home, at: u64) -> Place {
        Place::new(home, at, self.device).unwrap_or(Place::NONE)
    }
}

impl Drop for Windows {
    fn drop(&mut self) {
        // Only our own mark: where a robust mutex is held, it says so itself.
        let _ = self.control.server_word().compare_exchange(ALIVE, 0, Ordering::AcqRel, Ordering::Relaxed);
    }
}
