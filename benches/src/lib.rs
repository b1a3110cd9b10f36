//! Benchmarks of cmbfs: what they share. The benchmarks themselves are under `benches/`.

mod pattern;

pub use pattern::{Pattern, cmb_memory};
