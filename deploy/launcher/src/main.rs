//! The Phalanx binary.
fn main() {}
