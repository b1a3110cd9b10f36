//! An emulated NVMe controller: a backing of [`PciFunction`](crate::pci::PciFunction), not a mock of the driver's API.
//!
//! It follows the NVMe specification (1.4) closely enough that drivers which nobody here wrote can be run on it;
//! `docs/emulated-controller.md` says what is implemented and where it deviates. Everything it reads from memory is
//! copied once and then checked; it reaches memory only through an emulated IOMMU.
//!
//! ```
//! use nvme_driver::emu::{Backing, Config, EmulatedController, Fault, Rule, Target};
//! use nvme_driver::spec::Status;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = Config { namespace: Backing::Ram { bytes: 64 << 20 }, cmb_size: 16 << 20, ..Config::default() };
//! let controller = EmulatedController::new(&config)?;
//! let function = controller.function(); // hand this to a driver
//! controller.faults().inject(Rule::once(Target::io(0x02), Fault::Status(Status::UNRECOVERED_READ_ERROR)));
//! controller.step(); // or: let thread = controller.spawn(Some(1))?;
//! assert_eq!(controller.counters().drive_to_cmb, 0);
//! # Ok(())
//! # }
//! ```
//!
//! * [`EmulatedController`]: the handle: make one, step it or give it a thread, count, inject faults, cut the power
//! * [`Config`], [`Backing`], [`CmbSupport`]: what to emulate
//! * [`iommu`]: the emulated IOMMU, also for peers of other kinds
//! * [`Counters`]: what the controller did
//! * [`Faults`]: what a bad drive does, on demand
//! * [`PowerCut`]: what becomes of unflushed writes
//!
//! Inside: `state` holds everything and resets it; `registers`, `doorbell`, `pci_config` and `msix` are what the host
//! sees; `step` fetches, dispatches and completes; `data` and `sgl` find a command's data, `bus` and `session` move it, `remote`
//! by asking whoever has it; `admin` and `io` are the command sets; `held` is what faults do to commands; `namespace`, `cache`,
//! `media`, `file`, `buffered` and `reads` are the drive.
mod admin;
mod buffered;
mod bus;
mod cache;
mod config;
mod controller;
mod counters;
mod data;
mod doorbell;
mod faults;
mod file;
mod function;
mod held;
mod io;
pub mod iommu;
mod media;
mod msix;
mod namespace;
mod pci_config;
mod queue;
mod ranges;
mod reads;
mod registers;
mod remote;
mod session;
mod sgl;
mod state;
mod step;
mod thread;

pub use cache::{PowerCut, PowerCutReport};
pub use config::{Backing, Clock, CmbSupport, Config, EmuError};
pub use controller::EmulatedController;
pub use counters::Counters;
pub use faults::{Fault, Faults, Rule, Stuck, Target};
pub use thread::ControllerThread;
