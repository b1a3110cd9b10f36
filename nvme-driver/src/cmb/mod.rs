//! The Controller Memory Buffer: finding and enabling it ([`Cmb`]), and dividing it up ([`CmbAllocator`]).
mod alloc;
mod enable;

pub use alloc::CmbAllocator;
pub use enable::{Cmb, CmbStatus};
pub(crate) use enable::{enable, reenable};
