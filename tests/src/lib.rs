//! Whole-stack tests of cmbfs: what they share. The tests themselves are under `tests/`.
