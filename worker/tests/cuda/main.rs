//! The CUDA kernels, run on the host by the emulator, against f64 on the host.
//!
//! Every kernel runs in both orders of blocks, warps and lanes, at the shapes that the models and their shards give it.
//! `PHALANX_TEST_GPU=1` runs the same tests on a real GPU, all but those of the emulator itself (`mistakes`) and of several
//! ranks (`all_reduce`).

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
#[path = "../emulator/machine.rs"]
mod machine;
mod mistakes;
mod rows;
