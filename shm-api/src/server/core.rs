//! What the server knows: the filesystem, the windows, who has what open, and the jobs that take longer than one turn.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use nvme_driver::clock::SystemClock;
use nvme_driver::disk::{Disk, DiskError};
use nvme_driver::mem::Mapping;
use p2p::backing::BackingError;
use p2p::peer::PeerError;
use p2p::windows::{ClientId, Config, PeerId, Scope, Windows, WindowsError};

use super::backing::FileBacking;
use super::drives::Drive;
use super::jobs::{Answer, Job, Unsynced, Work};
use super::raw::{Allocation, is_raw};
use super::session::{OpenFile, ReplyTo, Session};
use super::{ServerError, ServerOptions};
use crate::Placement;
use crate::protocol::{ErrorCode, MAX_IN_FLIGHT, WireError};

/// Files that nobody has open any more but whose windows are kept for the next who opens them.
const KEEP_CLOSED: usize = 64;
/// Time to wait at the end for windows that are moving, in nanoseconds.
const LAST_MOVES: u64 = 2_000_000_000;

/// An inode that clients have open.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Opened {
    /// How many open files name it.
    pub(super) count: u32,
    /// How many of them belong to clients that may not map the CMB.
    pub(super) without_cmb: u32,
    /// How many of them belong to clients that have left, and whose process lives.
    pub(super) left: u32,
}

/// Counted since the start.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) expelled: u64,
    pub(super) died: u64,
    pub(super) commits: u64,
    pub(super) clients: u64,
}

pub(crate) struct Core {
    pub(super) backing: FileBacking,
    pub(super) windows: Windows,
    pub(super) server_uid: u32,
    pub(super) window_size: usize,
    pub(super) grace: u64,
    pub(super) opened: HashMap<u64, Opened>,
    /// What the server was told; `auto` leaves it to files and filesystem.
    pub(super) placement: Placement,
    /// What `auto` means on this device.
    pub(super) auto: p2p::windows::Placement,
    /// Process and user of each client.
    pub(super) people: BTreeMap<ClientId, (u32, u32)>,
    /// Longest that one request waits for a window that is moving, in nanoseconds.
    pub(super) patience: u64,
    /// Raw memory, by object.
    pub(super) allocations: BTreeMap<u64, Allocation>,
    pub(super) next_raw: u64,
    /// Bytes of memory of their own that the peers of each user have.
    pub(super) peer_memory: BTreeMap<u32, u64>,
    /// Raw memory that nobody has any more and of which pages are in quarantine. Its numbers are not used again.
    pub(super) leaving: Vec<u64>,
    pub(super) closed: VecDeque<u64>,
    pub(super) jobs: Vec<Job>,
    pub(super) counts: Counts,
    /// Drives of the server's that are peers.
    pub(super) drives: Vec<Drive>,
    /// Bytes that each peer moved by DMA, and that went through host memory for it.
    pub(super) moved: BTreeMap<PeerId, (u64, u64)>,
    pub(super) leases: super::leases::Leases,
    pub(super) fence: Option<super::Fence>,
    unread: Vec<u32>,
    pending: bool,
    deadline: Option<u64>,
}

/// Whether the drive had no room for blocks of the filesystem's: a full disk of the host under an image.
fn is_no_space(error: &BackingError) -> bool {
    let BackingError::Failed { source, .. } = error else { return false };
    match source.downcast_ref::<DiskError>() {
        Some(disk) => disk.is_no_space(),
        None => {
            let fs = source.downcast_ref::<extent_fs::FsError>();
            matches!(fs, Some(extent_fs::FsError::Device(disk)) if disk.is_no_space())
        }
    }
}

/// An error of the windows' as it goes to a client.
pub(super) fn windows_error(error: &WindowsError) -> WireError {
    let code = match error {
        WindowsError::TooManyWindows(_) | WindowsError::TooManyDirtyPages(_) => ErrorCode::TooMany,
        WindowsError::Barred(_) => ErrorCode::Denied,
        WindowsError::UnknownClient(_) | WindowsError::UnknownPeer(_) => ErrorCode::BadHandle,
        WindowsError::Backing(e) if is_no_space(e) => ErrorCode::NoSpace,
        WindowsError::Backing(_) => ErrorCode::Device,
        WindowsError::Peer(PeerError::Drive { .. }) => ErrorCode::Device,
        WindowsError::Peer(_) => ErrorCode::PeerFault,
        WindowsError::MemoryGone(_) => ErrorCode::DataLost,
        WindowsError::MemoryHeld { .. } => ErrorCode::NotResident,
        WindowsError::BeyondMemory { .. } => ErrorCode::Invalid,
        WindowsError::TooFar(_) | WindowsError::NoRoomForRaw { .. } => ErrorCode::TooBig,
        _ => ErrorCode::Internal,
    };
    WireError::new(code, error.to_string())
}

impl Core {
    pub(crate) fn new(
        fs: extent_fs::Filesystem<Box<dyn Disk>>,
        options: &ServerOptions,
    ) -> Result<Self, ServerError> {
        let nanoseconds = |d: std::time::Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        let grace = nanoseconds(options.grace);
        let config = Config {
            grace,
            host_limit: options.host_cache,
            refusals: options.refusals.clone(),
            write_back: options.write_back,
            ..Config::default()
        };
        let mut backing = FileBacking::new(fs);
        // Leases of a server before this one are stale: a number that none of them had.
        let generation = extent_fs::system_time().max(backing.fs.device_generation() + 1);
        backing.fs.set_device_generation(generation);
        let cmb = backing.fs.disk().cmb().cloned();
        let auto = super::auto::placement(cmb.as_ref(), &SystemClock::new());
        let windows = Windows::new(cmb, config)?;
        backing.announce_resets(windows.reset_signal());
        let mut core = Self {
            backing,
            windows,
            server_uid: rustix::process::geteuid().as_raw(),
            window_size: options.window_size,
            grace,
            opened: HashMap::new(),
            placement: options.placement,
            auto,
            people: BTreeMap::new(),
            patience: nanoseconds(options.patience),
            allocations: BTreeMap::new(),
            next_raw: 1,
            peer_memory: BTreeMap::new(),
            leaving: Vec::new(),
            closed: VecDeque::new(),
            jobs: Vec::new(),
            counts: Counts::default(),
            drives: Vec::new(),
            moved: BTreeMap::new(),
            leases: super::leases::Leases::default(),
            fence: options.fence.clone(),
            unread: Vec::new(),
            pending: false,
            deadline: None,
        };
        if let Some(pmr) = &options.pmr {
            core.add_pmr(pmr)?;
        }
        for drive in &options.peers {
            core.add_drive(drive)?;
        }
        Ok(core)
    }

    /// The control pages, for the server word.
    pub(crate) fn control_memory(&self) -> &Arc<Mapping> {
        self.windows.control().memory()
    }

    pub(crate) fn count_expelled(&mut self) {
        self.counts.expelled += 1;
    }

    /// Whether something is under way that no descriptor announces.
    pub(crate) fn is_moving(&self) -> bool {
        self.pending
    }

    /// When to look again while nothing is under way, on the clock of [`step`](Self::step): background work.
    pub(crate) fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// Something is to be looked at again soon.
    pub(super) fn keep_polling(&mut self) {
        self.pending = true;
    }

    /// Whether somebody waits for it.
    pub(crate) fn has_jobs(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// Moves on windows and jobs, and answers those that are done. True if anything was.
    pub(crate) fn step(&mut self, sessions: &mut BTreeMap<u32, Session>, now: u64) -> bool {
        self.counts.clients = sessions.len() as u64;
        let polled = self.windows.poll(&mut self.backing, now);
        (self.pending, self.deadline) = (polled.pending, polled.deadline);
        let mut busy = polled.worked;
        self.note_interruption();
        self.leaving.retain(|object| !self.windows.remove_object(*object));
        self.step_leases(|id| {
            let ring = sessions.get(&id).and_then(|s| s.ring.as_ref());
            if let Some(Err(e)) = ring.map(|ring| ring.recall()) {
                tracing::warn!(id, "a client cannot be told of a recall: {e}");
            }
        });
        let (mut waiting, mut to_sync) = (Vec::new(), Vec::new());
        for mut job in std::mem::take(&mut self.jobs) {
            match self.advance(&mut job, now) {
                None if matches!(job.work, Work::Sync(_)) => to_sync.push(job),
                None => waiting.push(job),
                Some(result) => {
                    busy = true;
                    self.finish(sessions, job, result, now);
                }
            }
        }
        if !to_sync.is_empty() {
            // Whoever commits while this flush is under way shares the next one.
            busy = true;
            for (job, result) in self.sync_waiting(to_sync, now) {
                self.finish(sessions, job, result, now);
            }
        }
        self.leave_drives(now);
        // Jobs may have started others.
        waiting.append(&mut self.jobs);
        self.jobs = waiting;
        self.pending |= !self.jobs.is_empty();
        busy
    }

    /// Answers a job that is done.
    fn finish(
        &mut self,
        sessions: &mut BTreeMap<u32, Session>,
        job: Job,
        result: Result<Answer, WireError>,
        now: u64,
    ) {
        if let Some(ino) = job.work.commits() {
            self.close_in_fs(ino);
        }
        let Some((id, to)) = job.to else { return };
        let Some(session) = sessions.get_mut(&id) else {
            if let Ok(Answer::Layout(granted)) = &result {
                // Nobody was told of it.
                self.leave_layout(granted.lease, id);
            }
            return;
        };
        let losses = match job.work {
            Work::Commit { handle, losses, .. } => Some((handle, losses)),
            Work::Sync(Unsynced { by_handle: Some(written), .. }) => Some((written.handle, written.losses)),
            _ => None,
        };
        if let Some((handle, losses)) = losses
            && let Some(file) = session.files.get_mut(&handle)
        {
            file.losses = losses;
        }
        if let (Err(_), Work::Truncate { opened: Some((reply, _)), .. }) = (&result, &job.work)
            && let Err(e) = self.close(session, reply.handle, now)
        {
            tracing::debug!("a file that could not be opened after all: {e}");
        }
        if session.answer(to, result).is_err() {
            self.unread.push(id);
        }
    }

    /// Clients that left their replies unread.
    pub(crate) fn take_expelled(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.unread)
    }

    /// Counts one more user of an inode. The filesystem keeps it alive from here on.
    pub(super) fn open_inode(&mut self, ino: u64, has_cmb: bool) -> Result<(), WireError> {
        self.backing.fs.open(ino).map_err(|e| super::names::fs_error(&e))?;
        self.closed.retain(|c| *c != ino);
        let opened = self.opened.entry(ino).or_default();
        opened.count += 1;
        opened.without_cmb += u32::from(!has_cmb);
        let result = self.place_object(ino).map_err(|e| windows_error(&e));
        if result.is_err() {
            self.close_inode(ino, has_cmb, 0);
        }
        result
    }

    /// While a client has the file open that cannot reach the CMB, its windows live where everybody can reach them.
    pub(super) fn place_object(&mut self, ino: u64) -> Result<(), WindowsError> {
        use p2p::windows::{ObjectOptions, Placement as Home};
        let unreachable = self.opened.get(&ino).is_some_and(|o| o.without_cmb > 0);
        let own = self.allocations.get(&ino).and_then(|a| a.own.as_ref());
        let auto = own.map_or(self.auto, super::memory::OwnMemory::auto);
        let placement = match self.placement_of(ino).0 {
            Placement::Auto if !unreachable => auto,
            Placement::Cmb if !unreachable => Home::Auto,
            _ => Home::HostOnly,
        };
        let window_size = self.window_of(ino) as usize;
        self.windows.add_object(ino, ObjectOptions { window_size, placement })
    }

    /// Counts one user less. The last one of a file without a name takes it along: first its windows go, then its blocks.
    pub(super) fn close_inode(&mut self, ino: u64, has_cmb: bool, now: u64) {
        if let Some(opened) = self.opened.get_mut(&ino) {
            opened.count -= 1;
            opened.without_cmb -= u32::from(!has_cmb);
            if opened.count > 0 {
                if let Err(e) = self.place_object(ino) {
                    tracing::warn!("inode {ino}: {e}");
                }
                self.close_in_fs(ino);
                return self.empty_if_deserted(ino, now);
            }
            self.opened.remove(&ino);
        }
        if Self::stays(ino) {
            if let Err(e) = self.place_object(ino) {
                tracing::warn!("the PMR: {e}");
            }
            return;
        }
        let nameless = self.backing.fs.stat(ino).is_ok_and(|s| s.nlink == 0);
        if nameless || self.allocations.remove(&ino).is_some() {
            return self.forget(ino, now);
        }
        if let Err(e) = self.place_object(ino) {
            tracing::warn!("inode {ino}: {e}");
        }
        self.close_in_fs(ino);
        self.closed.push_back(ino);
        if self.closed.len() > KEEP_CLOSED
            && let Some(oldest) = self.closed.pop_front()
        {
            match self.windows.evict(&Scope::Object(oldest), &mut self.backing, now) {
                Ok(ticket) => self.jobs.push(Job::unasked(Work::Retire { ino: oldest, ticket })),
                Err(e) => tracing::warn!("inode {oldest}: {e}"),
            }
        }
    }

    pub(super) fn close_in_fs(&mut self, ino: u64) {
        if is_raw(ino) {
            return;
        }
        if let Err(e) = self.backing.fs.close(ino) {
            tracing::warn!("closing inode {ino}: {e}");
        }
    }

    /// Drops the windows of an inode that has no name and no user left, then lets the filesystem free it.
    /// The filesystem must hold it open once more for this.
    pub(super) fn forget(&mut self, ino: u64, now: u64) {
        self.closed.retain(|c| *c != ino);
        match self.windows.invalidate(ino, &(0..p2p::layout::LANE), &mut self.backing, now) {
            Ok(ticket) => self.jobs.push(Job::unasked(Work::Forget { ino, ticket })),
            Err(e) => {
                // Its blocks stay allocated until the next mount: better than reused under a window.
                tracing::error!("inode {ino}: {e}");
            }
        }
    }

    /// Gives back the peers and the open files of a session.
    fn close_everything(&mut self, session: &mut Session, now: u64) {
        for (_, peer) in session.peers.drain() {
            self.detach_peer(peer, now);
        }
        for (handle, path) in std::mem::take(&mut session.temporary) {
            if let Some(file) = session.files.get(&handle) {
                self.drop_temporary(session, file.ino, &path);
            }
        }
        let files: Vec<OpenFile> = session.files.drain().map(|(_, file)| file).collect();
        self.came_back(session, &files);
        for file in files {
            self.close_inode(file.ino, file.reaches, now);
        }
    }

    /// The client's process is dead.
    pub(crate) fn client_died(&mut self, session: &mut Session, now: u64) {
        if let Some(client) = session.client.take() {
            self.people.remove(&client);
            if !session.maps.is_empty() {
                self.counts.died += 1;
            }
            self.windows.client_died(client, &mut self.backing, now);
        }
        session.maps.clear();
        self.release_layouts(session.id);
        self.close_everything(session, now);
    }

    /// Writes everything back and unmounts. Clients have seen the server word go: what they store from here on they know to be lost.
    pub(crate) fn shut_down(mut self, clock: &dyn Fn() -> u64) -> Result<(), ServerError> {
        let started = clock();
        let mut nobody = BTreeMap::new();
        while self.pending && clock().saturating_sub(started) < LAST_MOVES {
            self.step(&mut nobody, clock());
        }
        self.close_drives(clock());
        let mut first_error = self.commit_all();
        let mut persistent = self.backing.pmr_barrier();
        if self.note_interruption() {
            // What was in the host cache is there still.
            first_error = self.commit_all();
            persistent = self.backing.pmr_barrier();
        }
        if let Err(e) = persistent {
            tracing::error!("what was written to the PMR may not be persistent: {e}");
        }
        drop(self.windows);
        self.backing.fs.unmount()?;
        first_error.map_or(Ok(()), |e| Err(e.into()))
    }

    /// Writes back what is dirty of every object that has a name or is memory. The first failure.
    fn commit_all(&mut self) -> Option<WindowsError> {
        let objects: std::collections::BTreeSet<u64> = self.windows.iter().map(|(_, w)| w.object).collect();
        let mut first_error = None;
        for object in objects {
            let nameless = self.backing.fs.stat(object).is_ok_and(|s| s.nlink == 0);
            if nameless {
                continue;
            }
            if let Err(e) = self.windows.commit(object, &(0..p2p::layout::LANE), &mut self.backing) {
                tracing::error!("writing back inode {object}: {e}");
                first_error.get_or_insert(e);
            }
        }
        first_error
    }

    /// Queues work whose answer goes to a client. Gives it back if the client has too much under way already.
    pub(super) fn begin(&mut self, session: u32, to: ReplyTo, work: Work) -> Result<(), WireError> {
        let under_way = self.jobs.iter().filter(|job| job.to.is_some_and(|(id, _)| id == session)).count();
        // These have begun already and must be finished in any case; they keep their place, and their sender is the first to be held up.
        let begun = matches!(
            work,
            Work::Truncate { .. } | Work::Layout(_) | Work::LayoutCommit { .. } | Work::PeerDma(_)
        );
        if under_way >= MAX_IN_FLIGHT && !begun {
            let text = format!("{MAX_IN_FLIGHT} requests are under way already; wait for their replies");
            return Err(WireError::new(ErrorCode::TooMany, text));
        }
        if let Some(ino) = work.commits() {
            // Its name and its last user may go before the answer, which is about the file as it was.
            self.backing.fs.open(ino).map_err(|e| super::names::fs_error(&e))?;
        }
        self.pending = true;
        let incarnation = work.slot().and_then(|slot| self.incarnation(slot));
        self.jobs.push(Job { to: Some((session, to)), work, incarnation });
        Ok(())
    }
}
