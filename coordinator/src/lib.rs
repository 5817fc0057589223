//! Turns requests into plans, and moves every rank of a group through them in lockstep.
//!
//! | module | holds |
//! | --- | --- |
//! | [`engine`] | the scheduler: requests, results and time in; plans and tokens out; no I/O |
//! | [`planner`] | what each rank of a group will hold, from headers alone |

pub mod engine;
pub mod planner;
