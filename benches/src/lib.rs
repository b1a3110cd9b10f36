//! Benchmarks of cmbfs: what they share. The benchmarks themselves are under `benches/`; `README.md` lists them.
//!
//! * [`reads`]: 4 KiB reads in a closed loop
//! * [`Pattern`], [`cmb_memory`]: a drive that costs nothing but the copy
//! * [`quantile`], [`median`]

mod pattern;
pub mod reads;
mod sums;

pub use pattern::{Pattern, cmb_memory};
pub use sums::{median, quantile};
