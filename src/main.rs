//! The `cmbfs` command.
fn main() {}
