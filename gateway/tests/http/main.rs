//! The gateway over real HTTP, in front of a coordinator that plays scripted token streams.
//!
//! Every assertion is about bytes that came over a socket, or about what the coordinator was asked.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod chat;
mod client;
mod coordinator;
mod deadlines;
mod errors;
mod faults;
mod golden;
mod harness;
mod keys;
mod limits;
mod observe;
mod parameters;
mod stream;
mod text;
mod tls;
