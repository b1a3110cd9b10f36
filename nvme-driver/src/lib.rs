//! A polled NVMe driver in user space, and the emulated controller that proves it.
//!
//! * [`spec`]: the words of the NVMe specification: registers, commands, completions, status, identify data
//! * [`pci`]: what the driver needs of a PCI function; VFIO, vfio-user and the emulated controller provide it
//! * [`mem`]: memory that devices and other processes share with us
//! * [`clock`]: time, injected
//! * [`iova`], [`dma`]: I/O virtual addresses, and memory that the device may reach
//! * [`controller`]: bring-up, admin commands, reset, shutdown
//! * [`queue`], [`io_queue`]: submission and completion, the hot path
//! * [`cmb`]: the Controller Memory Buffer
//! * [`peer_memory`]: another device's memory, mapped for a controller
//! * [`pmr`]: the Persistent Memory Region, as raw memory that keeps its bytes
//! * [`disk`]: a block device as the layers above see it
//! * [`nvme_disk`], [`file_disk`]: the two kinds there are
//! * [`url`], [`fn@open`], [`lock`]: from a name to an open device that nobody else has
//! * [`topology`]: the way between two functions of this machine, and what fences a peer's DMA on it
//! * [`vfio`]: real PCI functions through Linux VFIO; the scan for them, `bind` and `unbind`
//! * [`socket_path`]: what is there where a server's socket was expected
//! * [`vfio_user`]: functions served to other processes over vfio-user
//! * [`emu`]: the emulated controller
pub mod clock;
pub mod cmb;
pub mod controller;
pub mod disk;
pub mod dma;
pub mod emu;
pub mod file_disk;
pub mod io_queue;
pub mod iova;
pub mod lock;
pub mod mem;
pub mod nvme_disk;
mod open;
pub mod pci;
pub mod peer_memory;
pub mod pmr;
pub mod queue;
mod ranges;
pub mod socket_path;
pub mod spec;
pub mod topology;
pub mod url;
pub mod vfio;
pub mod vfio_user;

pub use open::{Device, EmulatedDrive, OpenError, OpenOptions, open, open_emulated};
pub use ranges::NotAllocated;
