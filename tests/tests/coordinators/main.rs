//! Coordinators that are killed, deposed and cut off from etcd, under streams that are known by heart.
//!
//! The contract: no stream breaks, every answer is the undisturbed one, and no weight is loaded again.

mod cluster;
mod credentials;
mod etcd_faults;
mod restarts;
mod takeovers;
