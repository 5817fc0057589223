//! The coordinator through its public doors: gRPC over loopback, with workers that have no model but keep every rule.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod harness;
mod lifecycle;
mod recovery;
mod requests;
mod worker;
