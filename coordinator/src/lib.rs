//! Turns requests into plans, and moves every rank of a group through them in lockstep.
//!
//! | module | holds |
//! | --- | --- |
//! | [`planner`] | what each rank of a group will hold, from headers alone |

pub mod planner;
