//! A polled NVMe driver in user space, and the emulated controller that proves it.
//!
//! * [`spec`]: the words of the NVMe specification: registers, commands, completions, status, identify data
//! * [`pci`]: what the driver needs of a PCI function; VFIO, vfio-user and the emulated controller provide it
//! * [`mem`]: memory that devices and other processes share with us
//! * [`vfio`]: real PCI functions through Linux VFIO; the scan for them, `bind` and `unbind`
//! * [`disk`]: a block device as the layers above see it
//! * [`emu`]: the emulated controller
pub mod disk;
pub mod emu;
pub mod mem;
pub mod pci;
pub mod spec;
pub mod vfio;
