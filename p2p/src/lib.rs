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
pub mod control;
pub mod layout;
pub mod protocol;
pub mod reader;
pub mod region;
mod seals;
pub mod writer;
