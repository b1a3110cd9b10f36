//! Queue pairs: one submission queue and its completion queue, owned by one thread.
//!
//! * [`QueuePair`]: command slots, submission, reaping; every completion is checked before a slot is believed done
//! * `ring`: the two rings in shared memory
//! * `doorbell`: the doorbell registers
//! * `prp`: physical region pages of a contiguous transfer, lists preallocated per slot
//!
//! Nothing here allocates, locks or makes a system call per command.
mod doorbell;
mod pair;
mod prp;
mod ring;

pub use pair::{Data, Done, QueueError, QueuePair, SubmitError};

pub(crate) use doorbell::Doorbell;
pub(crate) use pair::{Layout, Parts};
pub(crate) use prp::{PrpLists, list_pages};
pub(crate) use ring::{CompletionRing, RingMemory, SubmissionRing};

#[cfg(test)]
mod tests;
