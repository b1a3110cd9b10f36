//! Another NVMe controller as a peer: its drive reads into windows and writes from them, without the host's memory in between.
//!
//! The controller may be behind VFIO (the window is mapped in its IOMMU domain by the address of the BAR that holds it), vfio-user (by a
//! file descriptor) or emulated (in the emulated IOMMU): [`PciFunction::dma_map`](nvme_driver::pci::PciFunction::dma_map) knows. It may
//! also be the very controller whose CMB the windows are in; that decodes its own memory itself, so no IOMMU is in between, and
//! what keeps it in bounds and fences it is this queue.
//!
//! The queue is this peer's own, and everything that goes to it goes through here: that is what makes it stop, drain and,
//! where unmapping is no fence ([`Fence::Queue`]), end.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nvme_driver::controller::{Controller, ControllerError};
use nvme_driver::dma::DmaBuffer;
use nvme_driver::io_queue::IoQueue;
use nvme_driver::mem::{Mapping, PAGE};
use nvme_driver::pci::DmaAccess;
use nvme_driver::queue::{Data, SubmitError};
use nvme_driver::topology::Fence;

use super::addresses::Addresses;
use super::{CopyId, CopyState, Mapper, PeerError};

/// Results kept until somebody asks.
const RESULTS: usize = 4096;
/// Completions taken at a time.
const REAP: usize = 64;
/// Polls, while commands are in flight, between two looks at the clock.
const POLLS: u32 = 16;
/// How often the controller itself is looked at, so that one that is gone is noticed long before its commands are late.
const HEALTH: Duration = Duration::from_secs(1);

/// A range of a window's memory as the controller reaches it.
#[derive(Debug)]
struct Lent {
    len: u64,
    access: DmaAccess,
    /// Mapped in its IOMMU domain; `None`: its own CMB.
    memory: Option<Arc<Mapping>>,
}

#[derive(Clone, Debug)]
struct InFlight {
    id: CopyId,
    iova: u64,
    len: u64,
    /// Where its data is, if it is not lent memory.
    memory: Memory,
}

/// What a command's data is in. It is kept for as long as the controller may touch it.
#[derive(Clone, Debug)]
enum Memory {
    /// A mapped window.
    Lent,
    /// Host memory of the controller's own arena.
    Buffer(#[expect(dead_code, reason = "kept, not looked at")] Arc<DmaBuffer>),
    /// There is none.
    None,
}

/// An I/O command.
#[derive(Clone, Copy, Debug)]
enum Command {
    Read { lba: u64, blocks: u32 },
    Write { lba: u64, blocks: u32 },
    Flush,
}

#[derive(Debug)]
struct State {
    /// Made when there is something to do, and again after it was deleted as a fence.
    queue: Option<IoQueue>,
    addresses: Addresses,
    /// By address.
    lent: BTreeMap<u64, Lent>,
    in_flight: Vec<InFlight>,
    stopped: Vec<(u64, u64)>,
    results: VecDeque<(CopyId, CopyState)>,
    next_id: u64,
    polls: u32,
    /// When the controller was last looked at.
    health: Duration,
    /// No more commands: it is being given back.
    closed: bool,
}

/// An NVMe controller as a peer. Shared: one handle goes to the registry as its [`Mapper`], others submit.
#[derive(Clone, Debug)]
pub struct NvmePeer {
    name: String,
    controller: Arc<Controller>,
    fence: Fence,
    state: Arc<Mutex<State>>,
}

impl NvmePeer {
    /// A peer that moves bytes between `controller`'s first namespace and windows. `fence` is what the way between it and the
    /// windows' memory asks for ([`nvme_driver::topology`]).
    pub fn new(controller: &Arc<Controller>, fence: Fence) -> Result<Self, ControllerError> {
        controller.namespace()?;
        let state = State {
            queue: None,
            addresses: Addresses::reserve(controller.iova()),
            lent: BTreeMap::new(),
            in_flight: Vec::new(),
            stopped: Vec::new(),
            results: VecDeque::new(),
            next_id: 0,
            polls: 0,
            health: controller.clock().now(),
            closed: false,
        };
        Ok(Self {
            name: format!("NVMe controller {}", controller.name()),
            controller: Arc::clone(controller),
            fence,
            state: Arc::new(Mutex::new(state)),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same peer under another name.
    #[must_use]
    pub fn named(self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self }
    }

    /// Its controller.
    pub fn controller(&self) -> &Arc<Controller> {
        &self.controller
    }

    /// Bytes of a logical block of its drive, and how many blocks there are.
    pub fn geometry(&self) -> Result<(u32, u64), PeerError> {
        let namespace = self.controller.namespace().map_err(|e| self.broken(e.to_string()))?;
        Ok((namespace.block_size, namespace.blocks))
    }

    fn refuse(&self, reason: impl Into<String>) -> PeerError {
        PeerError::Transfer { peer: self.name.clone(), reason: reason.into() }
    }

    fn revoked(&self, reason: &str) -> PeerError {
        PeerError::Revoked { peer: self.name.clone(), reason: reason.to_owned() }
    }

    pub(super) fn broken(&self, reason: String) -> PeerError {
        PeerError::Drive { peer: self.name.clone(), reason }
    }

    /// Sends a read command: `len` bytes from logical block `lba` of the drive to `iova`, inside one mapping.
    pub fn read_from_drive(&self, lba: u64, iova: u64, len: usize) -> Result<CopyId, PeerError> {
        self.submit(lba, iova, len, true)
    }

    /// Sends a write command: `len` bytes from `iova` to logical block `lba` of the drive.
    pub fn write_to_drive(&self, lba: u64, iova: u64, len: usize) -> Result<CopyId, PeerError> {
        self.submit(lba, iova, len, false)
    }

    /// Sends a command between the drive and `len` bytes from `offset` of host memory that its controller reaches; `into` the memory.
    pub fn move_through_host(
        &self,
        lba: u64,
        (buffer, offset): (&Arc<DmaBuffer>, usize),
        len: usize,
        into: bool,
    ) -> Result<CopyId, PeerError> {
        if offset.checked_add(len).is_none_or(|end| end > buffer.len()) {
            return Err(
                self.refuse(format!("{len} bytes at {offset} are not in a buffer of {}", buffer.len()))
            );
        }
        let command = self.command(lba, len, into)?;
        let mut state = self.state();
        self.send(
            &mut state,
            command,
            (buffer.bus_address() + offset as u64, len),
            Memory::Buffer(Arc::clone(buffer)),
        )
    }

    /// Sends a flush: what was written to the drive by commands that are done becomes durable.
    pub fn flush(&self) -> Result<CopyId, PeerError> {
        let mut state = self.state();
        self.send(&mut state, Command::Flush, (0, 0), Memory::None)
    }

    /// Ends its queue, and takes no more commands: none does anything any more when this returns.
    pub fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.end_queue("the peer is given back");
    }

    /// `into`: towards the window.
    fn submit(&self, lba: u64, iova: u64, len: usize, into: bool) -> Result<CopyId, PeerError> {
        let end =
            iova.checked_add(len as u64).ok_or_else(|| self.refuse("the address range wraps around"))?;
        let command = self.command(lba, len, into)?;
        let mut state = self.state();
        if state.stopped.iter().any(|(s, e)| *s < end && iova < *e) {
            return Err(self.revoked("the mapping is being revoked; map the window again"));
        }
        let Some((_, lent)) = state.lent_at(iova, end) else {
            return Err(self.revoked("nothing is mapped for it there"));
        };
        // In its own CMB there is no IOMMU that would refuse.
        if lent.memory.is_none() && into && !lent.access.writable() {
            return Err(self.refuse("the mapping is for reading only"));
        }
        self.send(&mut state, command, (iova, len), Memory::Lent)
    }

    /// The command that moves `len` bytes from block `lba` on, if that makes sense.
    fn command(&self, lba: u64, len: usize, into: bool) -> Result<Command, PeerError> {
        let (block, blocks_there) = self.geometry()?;
        let block = block as usize;
        let blocks = u32::try_from(len / block).unwrap_or(u32::MAX);
        if len == 0 || !len.is_multiple_of(block) || len > self.controller.max_transfer() {
            let most = self.controller.max_transfer();
            return Err(
                self.refuse(format!("{len} bytes in one command: a multiple of {block}, at most {most}"))
            );
        }
        if lba.checked_add(blocks.into()).is_none_or(|end| end > blocks_there) {
            return Err(self.refuse(format!("{blocks} blocks at LBA {lba} are not on the drive")));
        }
        Ok(if into { Command::Read { lba, blocks } } else { Command::Write { lba, blocks } })
    }

    fn send(
        &self,
        state: &mut State,
        command: Command,
        (address, len): (u64, usize),
        memory: Memory,
    ) -> Result<CopyId, PeerError> {
        if state.closed {
            return Err(self.broken("it is given back".to_owned()));
        }
        let nsid = self.controller.namespace().map_err(|e| self.broken(e.to_string()))?.nsid;
        if state.queue.as_ref().is_some_and(IoQueue::is_gone) {
            state.end_queue("the controller was reset");
        }
        let queue = match &mut state.queue {
            Some(queue) => queue,
            none => none.insert(self.controller.create_queue().map_err(|e| self.broken(e.to_string()))?),
        };
        let id = CopyId(state.next_id + 1);
        let data = Data { address, len };
        let sent = match command {
            Command::Read { lba, blocks } => queue.read(nsid, lba, blocks, data, id.0),
            Command::Write { lba, blocks } => queue.write(nsid, lba, blocks, data, id.0),
            Command::Flush => queue.flush(nsid, id.0),
        };
        match sent {
            Ok(_) => queue.ring(),
            Err(SubmitError::Full) => return Err(PeerError::Busy { peer: self.name.clone() }),
            Err(e) => return Err(self.refuse(e.to_string())),
        }
        state.next_id = id.0;
        state.in_flight.push(InFlight { id, iova: address, len: len as u64, memory });
        Ok(id)
    }

    /// Takes completions. Returns how many commands are still in flight.
    pub fn poll(&self) -> usize {
        self.state().poll()
    }

    /// How a command stands; `None` if it was never sent, or its result was asked for already.
    pub fn take_result(&self, id: CopyId) -> Option<CopyState> {
        self.poll();
        self.taken(id)
    }

    /// The same of what was polled already.
    pub(super) fn taken(&self, id: CopyId) -> Option<CopyState> {
        let mut state = self.state();
        if let Some(at) = state.results.iter().position(|(i, _)| *i == id) {
            return state.results.remove(at).map(|(_, r)| r);
        }
        state.in_flight.iter().any(|c| c.id == id).then_some(CopyState::Queued)
    }
}

impl State {
    /// What is lent and holds all of a range.
    fn lent_at(&self, iova: u64, end: u64) -> Option<(&u64, &Lent)> {
        self.lent.range(..=iova).next_back().filter(|(start, lent)| end <= **start + lent.len)
    }

    fn poll(&mut self) -> usize {
        let Some(queue) = &mut self.queue else { return 0 };
        if queue.is_gone() {
            self.end_queue("the controller was reset");
            return 0;
        }
        let mut done = Vec::new();
        let reaped = queue.reap(REAP, |d| done.push(d));
        for d in done {
            let Some(at) = self.in_flight.iter().position(|c| c.id.0 == d.token) else { continue };
            let command = self.in_flight.swap_remove(at);
            // Some controllers report success for a DMA that faulted: where the mapping is gone a status means nothing.
            let cut_off = matches!(command.memory, Memory::Lent)
                && self.lent_at(command.iova, command.iova + command.len).is_none();
            let state = match d.status.is_success() {
                _ if cut_off => {
                    CopyState::GivenUp("its mapping was taken back before it was done".to_owned())
                }
                true => CopyState::Done,
                false => CopyState::Failed(d.status.to_string()),
            };
            self.note(command.id, state);
        }
        if let Err(e) = reaped {
            // Whose completion that was is unknown, so any of the commands may be waited for in vain.
            self.end_queue(&e.to_string());
        }
        self.polls = self.polls.wrapping_add(1);
        if !self.in_flight.is_empty() && self.polls.is_multiple_of(POLLS) {
            self.look();
        }
        self.in_flight.len()
    }

    /// Looks whether commands are late, and now and then whether the controller still runs.
    #[cold]
    fn look(&mut self) {
        let Some(queue) = &mut self.queue else { return };
        let controller = Arc::clone(queue.controller());
        let now = controller.clock().now();
        let limit = controller.options().io_timeout;
        let mut late = Vec::new();
        queue.pair().check_timeouts(now, limit, |_, token| late.push(token));
        if !late.is_empty() || now.saturating_sub(self.health) >= HEALTH {
            self.health = now;
            // Then no command is to blame.
            if let Err(e) = controller.check() {
                return self.end_queue(&e.to_string());
            }
        }
        if !late.is_empty() {
            let why = format!("a command did not complete within {} ms", limit.as_millis());
            self.end_queue_for(&why, &late);
        }
    }

    fn note(&mut self, id: CopyId, state: CopyState) {
        if self.results.len() == RESULTS {
            self.results.pop_front();
        }
        self.results.push_back((id, state));
    }

    fn end_queue(&mut self, why: &str) {
        self.end_queue_for(why, &[]);
    }

    /// Deletes the queue, because of the commands `to_blame` or for another reason: when this returns, none of its commands does
    /// anything any more. (A controller that refuses to delete it is reset; one that cannot be reset is cut off from the bus.)
    fn end_queue_for(&mut self, why: &str, to_blame: &[u64]) {
        drop(self.queue.take());
        for command in std::mem::take(&mut self.in_flight) {
            let state = if to_blame.contains(&command.id.0) {
                CopyState::Failed(why.to_owned())
            } else {
                CopyState::GivenUp(format!("given up with its queue: {why}"))
            };
            self.note(command.id, state);
        }
    }

    fn is_busy(&self, iova: u64, len: u64) -> bool {
        let end = iova.saturating_add(len);
        self.in_flight.iter().any(|c| c.iova < end && iova < c.iova + c.len)
    }
}

impl Mapper for NvmePeer {
    fn name(&self) -> &str {
        &self.name
    }

    fn map(
        &mut self,
        memory: &Arc<Mapping>,
        bus_address: u64,
        offset: usize,
        len: usize,
        access: DmaAccess,
    ) -> Result<u64, PeerError> {
        let refuse = |reason: String| PeerError::Map { peer: self.name.clone(), len, reason };
        let mut state = self.state();
        let own = self.controller.cmb().cmb().is_some_and(|cmb| Arc::ptr_eq(&cmb.data.memory, memory));
        if own {
            let iova = bus_address + offset as u64;
            state.lent.insert(iova, Lent { len: len as u64, access, memory: None });
            return Ok(iova);
        }
        let State { addresses, lent, .. } = &mut *state;
        let in_use = |at: u64, end: u64| {
            lent.range(..end).next_back().filter(|(s, l)| *s + l.len > at).map(|(s, l)| s + l.len)
        };
        let iova = addresses
            .next(len as u64, in_use)
            .ok_or_else(|| refuse("its I/O virtual addresses are used up".to_owned()))?;
        let mapped = self.controller.function().dma_map(memory, offset, len, iova, access);
        mapped.map_err(|e| refuse(e.to_string()))?;
        state.lent.insert(iova, Lent { len: len as u64, access, memory: Some(Arc::clone(memory)) });
        Ok(iova)
    }

    fn unmap(&mut self, iova: u64, len: usize) -> Result<(), PeerError> {
        let refuse = |reason: String| PeerError::Unmap { peer: self.name.clone(), iova, reason };
        let mut state = self.state();
        let Some(lent) = state.lent.get(&iova).filter(|lent| lent.len == len as u64) else {
            return Err(refuse("no mapping starts there with that length".to_owned()));
        };
        let own = lent.memory.is_none();
        state.poll();
        if (own || self.fence == Fence::Queue) && state.is_busy(iova, len as u64) {
            // A command that is under way does not pass the IOMMU, or may not.
            state.end_queue("a mapping had to be taken back that it was using");
        }
        if !own {
            self.controller.function().dma_unmap(iova, len).map_err(|e| refuse(e.to_string()))?;
        }
        state.lent.remove(&iova);
        state.stopped.retain(|(s, _)| *s != iova);
        Ok(())
    }

    fn stop(&mut self, iova: u64, len: usize) {
        let range = (iova, iova.saturating_add(len as u64));
        let mut state = self.state();
        if !state.stopped.contains(&range) {
            state.stopped.push(range);
        }
    }

    fn drained(&mut self, iova: u64, len: usize) -> bool {
        let mut state = self.state();
        state.poll();
        !state.is_busy(iova, len as u64)
    }

    // Coherent, as by default: VFIO takes no function whose DMA is not (Linux 5.19), and the other transports are processes.

    fn is_mapped(&mut self, iova: u64, len: usize) -> bool {
        let state = self.state();
        let end = iova.saturating_add(len as u64);
        let lent = state.lent.range(..end).next_back().is_some_and(|(start, lent)| start + lent.len > iova);
        lent || self.controller.function().dma_reaches(iova, len)
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // Commands first: what they reference goes away below.
        self.end_queue("the peer is gone");
    }
}

// A page is what the IOMMU maps, and windows are whole pages.
const _: () = assert!(crate::layout::MIN_WINDOW.is_multiple_of(PAGE));
