//! The words of the NVM Express specifications, as used by both the driver and the emulated controller.
//!
//! Names, offsets and bit positions are those of the NVM Express Base Specification 2.0 (and of 1.4 where a field
//! moved); commands are those of the NVM Command Set Specification 1.0.
//!
//! * [`regs`]: controller properties (registers) of BAR0
//! * [`command`]: submission queue entries and opcodes
//! * [`completion`]: completion queue entries
//! * [`status`]: status codes and their names
//! * [`identify`]: the Identify data structures
//! * [`features`]: feature and log page identifiers
pub mod command;
pub mod completion;
pub mod features;
pub mod identify;
pub mod regs;
pub mod status;

pub use command::{AdminOpcode, Command, NvmOpcode};
pub use completion::Completion;
pub use status::Status;
