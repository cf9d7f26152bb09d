//! The `decant` binary.
fn main() {}
