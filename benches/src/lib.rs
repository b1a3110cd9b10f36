//! Benchmarks of cmbfs: what they share. The benchmarks themselves are under `benches/`.
