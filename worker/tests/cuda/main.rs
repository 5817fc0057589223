//! The CUDA kernels, run on the host by the emulator, against f64 on the host.
//!
//! Every kernel runs in both orders of blocks, warps and lanes, at the shapes that the models and their shards give it.

#![allow(missing_docs, reason = "tests have no users")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail by panicking")]
#![allow(unsafe_code, reason = "the emulator loads compiled kernels and gives them memory with guard pages")]

mod all_reduce;
mod attention;
mod bench;
mod dense;
#[path = "../emulator/mod.rs"]
mod emulator;
mod experts;
mod mistakes;
mod rows;
