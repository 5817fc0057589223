//! GPUs through CUDA's driver: kernels of our own, compiled for the device when the worker first starts.
//!
//! | module | holds |
//! | --- | --- |
//! | [`driver`] | the few things asked of a device |
//! | [`kernels`] | the kernels' sources and what a launch of each looks like |

pub mod driver;
pub mod kernels;
