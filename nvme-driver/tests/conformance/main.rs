//! The emulated controller against the NVM Express specification, driven raw: registers, queues and doorbells by hand,
//! without our driver. Each test names the section it was written from: "Base" is the NVM Express Base Specification
//! (1.4 where not said otherwise), "NVM" the NVM command set in it.
//!
//! * `registers`: properties, enabling, reset, shutdown
//! * `queues`: admin and I/O queues, doorbells, phase, arbitration
//! * `admin`: identify, features, log pages, events, abort, format
//! * `io`: the NVM command set
//! * `pointers`: PRPs
//! * `cmb`: Controller Memory Buffer and Persistent Memory Region
//! * `pci`: config space and interrupts
//! * `faults`: injected faults
//! * `power`: the volatile write cache and power cuts
//! * `threads`: a controller on its own thread, and killed processes
//! * `host`: the raw host they share

#[cfg(test)]
mod admin;
#[cfg(test)]
mod cmb;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod host;
#[cfg(test)]
mod io;
#[cfg(test)]
mod pci;
#[cfg(test)]
mod pointers;
#[cfg(test)]
mod power;
#[cfg(test)]
mod queues;
#[cfg(test)]
mod registers;
#[cfg(test)]
mod threads;
