//! The coordinator through its public doors: gRPC over loopback, with workers that have no model but keep every rule.

mod harness;
mod lifecycle;
mod recovery;
mod requests;
mod worker;
