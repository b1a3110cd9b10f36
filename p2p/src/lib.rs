//! Windows over the Controller Memory Buffer, their generations, peers and revocation. It knows memory, not files: a window
//! backs a range of an *object*, which is whatever the user of this crate says it is.
//!
//! Shared words and the protocol over them (`docs/revocation.md` argues it):
//! * [`layout`]: where the shared words lie and how they are packed
//! * [`protocol`]: every step with its orderings, generic over the memory so that models run the same code
//! * [`control`]: the control pages that the server writes, and a client's own region
//! * [`region`]: window memory as mapped by one process
//!
//! The code that clients run:
//! * [`reader`]: the seqlock read
//! * [`writer`]: write sections and borrows
//!
//! The server's side:
//! * [`windows`]: residency, holds, moves, revocation, quarantine, write-back
//! * [`backing`]: what windows need of the layer that knows the drive
//! * [`peer`]: other devices that DMA to windows
//! * [`drive_copy`]: blocks from one drive to another through a CMB
//! * [`probe`]: what the processor gets out of the CMB, measured, and what that means for placement
//! * [`policy`]: who leaves when memory is short
//! * [`counters`]: which path every transfer took, and why
//! * [`refusal`]: refusing placements on purpose
pub mod backing;
pub mod control;
pub mod counters;
pub mod drive_copy;
mod host;
pub mod layout;
mod pages;
pub mod peer;
pub mod policy;
pub mod probe;
pub mod protocol;
pub mod reader;
pub mod refusal;
pub mod region;
mod seals;
pub mod windows;
pub mod writer;
