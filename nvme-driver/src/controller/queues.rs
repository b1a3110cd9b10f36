//! Making a queue pair: memory, doorbells, PRP lists.

use std::sync::Arc;

use super::{ControllerError, Env};
use crate::mem::{Mapping, PAGE};
use crate::pci::PciError;
use crate::queue::{
    CompletionRing, Doorbell, Parts, PrpLists, QueuePair, RingMemory, SubmissionRing, list_pages,
};
use crate::spec::regs::{self, Cap};

/// Maps the doorbells of queues 0 to `queues`, if the transport can.
pub(crate) fn map_doorbells(env: &Env, cap: Cap, queues: u16) -> Result<Option<Arc<Mapping>>, PciError> {
    let function = &env.registers.function;
    let end = regs::cq_head_doorbell(queues, cap.dstrd()) + 4 - regs::DOORBELLS;
    let room = function.bar(0)?.size.saturating_sub(regs::DOORBELLS);
    let len = end.next_multiple_of(PAGE as u64).min(room & !(PAGE as u64 - 1));
    if len == 0 { Ok(None) } else { function.map_bar(0, regs::DOORBELLS, len) }
}

fn doorbell(env: &Env, doorbells: Option<&Arc<Mapping>>, offset: u64) -> Doorbell {
    let at = (offset - regs::DOORBELLS) as usize;
    match doorbells.map(|page| Doorbell::mapped(page, at)) {
        Some(Ok(mapped)) => mapped,
        _ => Doorbell::Call { function: Arc::clone(&env.registers.function), offset },
    }
}

/// Memory in the CMB for parts of a queue pair; host memory is used for what is `None`.
#[derive(Debug, Default)]
pub(crate) struct CmbRoom {
    pub(crate) submission_queue: Option<RingMemory>,
    pub(crate) lists: Option<RingMemory>,
}

/// Bytes of PRP lists of a queue with that many entries.
pub(crate) fn list_bytes(entries: u16, max_transfer: usize) -> usize {
    PrpLists::bytes(usize::from(entries), list_pages(max_transfer)).unwrap_or(usize::MAX)
}

/// A queue pair that the controller does not know of yet. `entries` is a power of two.
pub(crate) fn build(
    env: &Env,
    cap: Cap,
    doorbells: Option<&Arc<Mapping>>,
    qid: u16,
    entries: u16,
    max_transfer: usize,
    room: CmbRoom,
) -> Result<QueuePair, ControllerError> {
    let slots = usize::from(entries);
    let host = |bytes| env.arena.alloc(bytes).map(RingMemory::host);
    let sq_memory = match room.submission_queue {
        Some(memory) => memory,
        None => host(slots * 64)?,
    };
    let list_memory = match room.lists {
        Some(memory) => memory,
        None => host(list_bytes(entries, max_transfer))?,
    };
    let function = &env.registers.function;
    let pair = QueuePair::new(Parts {
        qid,
        entries,
        sq: SubmissionRing::new(sq_memory, entries)?,
        cq: CompletionRing::new(host(slots * 16)?, entries)?,
        sq_doorbell: doorbell(env, doorbells, regs::sq_tail_doorbell(qid, cap.dstrd())),
        cq_doorbell: doorbell(env, doorbells, regs::cq_head_doorbell(qid, cap.dstrd())),
        lists: PrpLists::new(list_memory, slots, list_pages(max_transfer))?,
        max_transfer,
        step: function.needs_step().then(|| Arc::clone(function)),
    })?;
    Ok(pair)
}
