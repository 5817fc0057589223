//! GPUs through CUDA's driver: kernels of our own, compiled for the device when the worker first starts.
//!
//! | module | holds |
//! | --- | --- |
//! | [`driver`] | the few things asked of a device |
//! | [`kernels`] | the kernels' sources and what a launch of each looks like |
//! | [`compiler`], [`nvrtc`] | kernels from source to machine code, kept on disk |
//! | [`library`] | CUDA's libraries, found when the program runs |

pub mod compiler;
pub mod driver;
pub mod kernels;
pub mod library;
pub mod nvrtc;
