//! The Controller Memory Buffer: finding and enabling it ([`Cmb`]), dividing it up ([`CmbAllocator`]), and exporting
//! parts of it to other drivers ([`CmbExport`]).
mod alloc;
mod enable;
mod export;

pub use alloc::CmbAllocator;
pub use enable::{Cmb, CmbStatus};
pub(crate) use enable::{enable, reenable};
pub use export::{CmbExport, ExportError};
