//! A controller: brought up, asked, given queues, reset, shut down.
//!
//! * [`Controller`]: the handle; shared, its admin queue behind a lock (nothing hot goes through it)
//! * `bringup`: the state machine from power-on to ready, and through every reset
//! * `admin`: the admin queue and its commands
//! * `events`: what the controller reports by itself
//! * `queues`: making a queue pair
//! * `registers`: typed access to the registers
//! * [`identity`]: what the controller and its namespaces say about themselves
mod admin;
mod bringup;
mod control;
mod events;
pub mod identity;
mod queues;
mod registers;

use std::sync::Arc;
use std::time::Duration;

pub use bringup::State;
pub use control::Controller;
pub use events::{Event, EventKind};
pub use identity::{Identity, Namespace};

use crate::clock::Clock;
use crate::dma::{DmaArena, DmaError};
use crate::iova::IovaAllocator;
use crate::mem::OutOfRange;
use crate::pci::PciError;
use crate::queue::{QueueError, SubmitError};
use crate::spec::Status;

/// How to run a controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerOptions {
    /// Entries of an I/O queue: rounded down to a power of two, and to what CAP.MQES allows. Commands in flight are one fewer.
    pub queue_entries: u16,
    /// I/O queue pairs to ask for. The controller may grant fewer.
    pub io_queues: u16,
    /// The longest transfer of one command in bytes; MDTS may make it shorter. Bounds the memory for PRP lists.
    pub max_transfer: usize,
    /// How long an admin command may take.
    pub admin_timeout: Duration,
    /// How long an I/O command may take before it is aborted.
    pub io_timeout: Duration,
    /// How long an aborted command may take to complete before the controller is reset.
    pub abort_timeout: Duration,
    /// Bytes at the end of the CMB for submission queues, where the controller supports them there (CMBSZ.SQS). 0: queues
    /// stay in host memory and the whole CMB is for data.
    pub cmb_queue_bytes: u64,
    /// Put PRP lists into that part of the CMB too, where the controller supports them there (CMBSZ.LISTS).
    pub cmb_prp_lists: bool,
}

impl Default for ControllerOptions {
    fn default() -> Self {
        Self {
            queue_entries: 256,
            io_queues: 16,
            max_transfer: 1 << 20,
            admin_timeout: Duration::from_secs(10),
            io_timeout: Duration::from_secs(30),
            abort_timeout: Duration::from_secs(2),
            cmb_queue_bytes: 0,
            cmb_prp_lists: false,
        }
    }
}

/// What everything that talks to one controller shares.
#[derive(Debug)]
pub(crate) struct Env {
    pub(crate) registers: registers::Registers,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) arena: DmaArena,
    pub(crate) iova: Arc<IovaAllocator>,
    pub(crate) options: ControllerOptions,
}

impl Env {
    pub(crate) fn name(&self) -> &str {
        self.registers.function.name()
    }
}

/// A controller could not be brought up, asked, or recovered.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// The PCI function failed, or is gone ([`PciError::Removed`]).
    #[error(transparent)]
    Pci(#[from] PciError),
    /// No DMA memory.
    #[error(transparent)]
    Dma(#[from] DmaError),
    /// A ring did not fit its memory.
    #[error(transparent)]
    Memory(#[from] OutOfRange),
    /// A wait took longer than the controller says it can.
    #[error("{name}: {state:?} was not over after {} ms", .waited.as_millis())]
    Stuck {
        /// The controller.
        name: String,
        /// Where it got stuck.
        state: State,
        /// For how long.
        waited: Duration,
    },
    /// CSTS.CFS is set.
    #[error("{name}: controller fatal status (CSTS.CFS) in {state:?}")]
    Fatal {
        /// The controller.
        name: String,
        /// When.
        state: State,
    },
    /// An admin command completed with an error.
    #[error("{name}: {command} failed: {status}")]
    Command {
        /// The controller.
        name: String,
        /// The command.
        command: &'static str,
        /// Its status.
        status: Status,
    },
    /// An admin command did not complete. The controller has to be reset before the next one.
    #[error("{name}: {command} did not complete within {} ms", .waited.as_millis())]
    CommandTimeout {
        /// The controller.
        name: String,
        /// The command.
        command: &'static str,
        /// For how long it was waited for.
        waited: Duration,
    },
    /// The admin queue is out of order since an earlier failure, until the next reset.
    #[error(
        "{name}: {command} was not sent: the admin queue failed earlier and the controller was not reset since"
    )]
    AdminQueueDown {
        /// The controller.
        name: String,
        /// The command that was not sent.
        command: &'static str,
    },
    /// The device broke the protocol.
    #[error("{name}: {source}")]
    Protocol {
        /// The controller.
        name: String,
        /// How.
        source: QueueError,
    },
    /// A command could not be queued.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The controller needs something that this driver does not do.
    #[error("{name}: {what} is not supported")]
    Unsupported {
        /// The controller.
        name: String,
        /// What it needs.
        what: String,
    },
    /// What the controller is now is not what it was before the reset.
    #[error("{name}: {what} changed in a reset; open it again")]
    Changed {
        /// The controller.
        name: String,
        /// What changed.
        what: String,
    },
    /// No queue identifier is left.
    #[error("{name}: all of its {granted} I/O queues are in use")]
    NoQueues {
        /// The controller.
        name: String,
        /// Queues it granted.
        granted: u16,
    },
    /// It was given up after a failure or shut down.
    #[error("{name}: given up: {reason}")]
    Dead {
        /// The controller.
        name: String,
        /// Why.
        reason: String,
    },
}
