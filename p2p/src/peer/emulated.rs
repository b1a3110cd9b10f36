//! An emulated DMA engine: the peer that everybody has.
//!
//! It owns local memory and copies between that and I/O virtual addresses of its own domain, as a GPU or a NIC would. Work
//! is queued by [`submit`](EmulatedEngine::submit) and done by [`step`](EmulatedEngine::step), so that a test can revoke in between.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nvme_driver::emu::iommu::Domain;
use nvme_driver::mem::{MapError, Mapping, PAGE};
use nvme_driver::pci::DmaAccess;

use super::{Mapper, PeerError};

/// First address that the engine hands out: anything but the address of the memory, so that mixing the two shows.
const IOVA_BASE: u64 = 0x10_0000_0000;

/// Names a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CopyId(pub(super) u64);

/// How a copy stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyState {
    /// Queued.
    Queued,
    /// Done, every byte moved.
    Done,
    /// Faulted, refused or stopped; nothing is known about its bytes.
    Failed(String),
    /// Cut off, for reasons that are not its own: its mapping was taken back, or its queue with it. Nothing is known about its bytes
    /// either, and nothing becomes of it any more; it may be asked for again.
    GivenUp(String),
}

/// What the engine has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineCounters {
    /// Bytes read from windows into local memory.
    pub bytes_in: u64,
    /// Bytes written from local memory to windows.
    pub bytes_out: u64,
    /// Copies that faulted in the IOMMU.
    pub faults: u64,
    /// Copies refused because their range was being taken back.
    pub stopped: u64,
}

#[derive(Clone, Debug)]
struct Copy {
    id: CopyId,
    iova: u64,
    local: usize,
    len: usize,
    /// Towards the window.
    out: bool,
}

#[derive(Debug, Default)]
struct State {
    next_iova: u64,
    next_id: u64,
    queue: VecDeque<Copy>,
    stopped: Vec<(u64, u64)>,
    results: VecDeque<(CopyId, CopyState)>,
    counters: EngineCounters,
}

/// A DMA engine behind its own IOMMU domain. Shared: one handle goes to the registry as its [`Mapper`], others submit.
#[derive(Clone, Debug)]
pub struct EmulatedEngine {
    name: String,
    domain: Arc<Domain>,
    local: Arc<Mapping>,
    coherent: bool,
    state: Arc<Mutex<State>>,
}

/// Results kept until somebody asks.
const RESULTS: usize = 4096;

impl EmulatedEngine {
    /// An engine with `len` bytes of local memory, in a memfd so that another process can verify what landed there.
    pub fn new(name: &str, len: usize) -> Result<Self, MapError> {
        Ok(Self {
            name: name.to_owned(),
            domain: Domain::new(name),
            local: Mapping::memfd(name, len.max(PAGE).next_multiple_of(PAGE))?,
            coherent: true,
            state: Arc::new(Mutex::new(State { next_iova: IOVA_BASE, ..State::default() })),
        })
    }

    /// The same engine on a fabric that does not keep the processors' caches coherent: it gets windows for reading only.
    pub fn not_coherent(self) -> Self {
        Self { coherent: false, ..self }
    }

    /// Its local memory.
    pub fn local(&self) -> &Arc<Mapping> {
        &self.local
    }

    /// Its IOMMU domain, which counts bytes and faults independently.
    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    /// What it has done.
    pub fn counters(&self) -> EngineCounters {
        self.state().counters
    }

    /// Queues a copy of `len` bytes between `iova` and `local` bytes into its memory; `out` means towards the window.
    pub fn submit(&self, iova: u64, local: usize, len: usize, out: bool) -> Result<CopyId, PeerError> {
        let refuse =
            |reason: &str| PeerError::Transfer { peer: self.name.clone(), reason: reason.to_owned() };
        let end = iova.checked_add(len as u64).ok_or_else(|| refuse("the address range wraps around"))?;
        if local.checked_add(len).is_none_or(|end| end > self.local.len()) {
            return Err(refuse("the range is not inside its local memory"));
        }
        let mut state = self.state();
        if state.stopped.iter().any(|(s, e)| *s < end && iova < *e) {
            state.counters.stopped += 1;
            return Err(refuse("the mapping is being revoked; map the window again"));
        }
        state.next_id += 1;
        let id = CopyId(state.next_id);
        state.queue.push_back(Copy { id, iova, local, len, out });
        Ok(id)
    }

    /// Does up to `copies` of the queued work. Returns how many were done.
    pub fn step(&self, copies: usize) -> usize {
        for done in 0..copies {
            let mut state = self.state();
            let Some(copy) = state.queue.pop_front() else { return done };
            // The lock is kept: `drained` must not say yes while a copy is under way.
            let moved = if copy.out {
                self.domain.copy_in(copy.iova, &self.local, copy.local, copy.len)
            } else {
                self.domain.copy_out(copy.iova, &self.local, copy.local, copy.len)
            };
            let result = match moved {
                Ok(()) => {
                    let count =
                        if copy.out { &mut state.counters.bytes_out } else { &mut state.counters.bytes_in };
                    *count += copy.len as u64;
                    CopyState::Done
                }
                Err(fault) => {
                    state.counters.faults += 1;
                    CopyState::Failed(fault.to_string())
                }
            };
            if state.results.len() == RESULTS {
                state.results.pop_front();
            }
            state.results.push_back((copy.id, result));
        }
        copies
    }

    /// How a copy stands; `None` if it was never queued, or its result was asked for already.
    pub fn take_result(&self, id: CopyId) -> Option<CopyState> {
        let mut state = self.state();
        if let Some(at) = state.results.iter().position(|(i, _)| *i == id) {
            return state.results.remove(at).map(|(_, r)| r);
        }
        state.queue.iter().any(|c| c.id == id).then_some(CopyState::Queued)
    }

    /// Copies now: queues, steps until it is done, and returns how it went.
    pub fn copy(&self, iova: u64, local: usize, len: usize, out: bool) -> Result<(), PeerError> {
        let id = self.submit(iova, local, len, out)?;
        loop {
            let stepped = self.step(1);
            match self.take_result(id) {
                Some(CopyState::Done) => return Ok(()),
                Some(CopyState::Queued) if stepped > 0 => {}
                Some(CopyState::Failed(reason) | CopyState::GivenUp(reason)) => {
                    return Err(PeerError::Transfer { peer: self.name.clone(), reason });
                }
                _ => {
                    let reason = "somebody else took the result".to_owned();
                    return Err(PeerError::Transfer { peer: self.name.clone(), reason });
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mapper for EmulatedEngine {
    fn name(&self) -> &str {
        &self.name
    }

    fn map(
        &mut self,
        memory: &Arc<Mapping>,
        _bus_address: u64,
        offset: usize,
        len: usize,
        access: DmaAccess,
    ) -> Result<u64, PeerError> {
        let mut state = self.state();
        // Never the same address twice: a stale one must fault, and not hit the next mapping.
        let iova = state.next_iova;
        self.domain.map(iova, Arc::clone(memory), offset, len, access).map_err(|e| PeerError::Map {
            peer: self.name.clone(),
            len,
            reason: e.to_string(),
        })?;
        state.next_iova = iova + len as u64 + PAGE as u64;
        Ok(iova)
    }

    fn unmap(&mut self, iova: u64, len: usize) -> Result<(), PeerError> {
        self.domain.unmap(iova, len).map_err(|e| PeerError::Unmap {
            peer: self.name.clone(),
            iova,
            reason: e.to_string(),
        })?;
        self.state().stopped.retain(|(s, _)| *s != iova);
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
        let end = iova.saturating_add(len as u64);
        !self.state().queue.iter().any(|c| c.iova < end && iova < c.iova.saturating_add(c.len as u64))
    }

    fn is_mapped(&mut self, iova: u64, len: usize) -> bool {
        self.domain.is_mapped(iova, len, DmaAccess::Read)
            || self.domain.is_mapped(iova, len, DmaAccess::Write)
    }
    fn is_coherent(&self) -> bool {
        self.coherent
    }
}
