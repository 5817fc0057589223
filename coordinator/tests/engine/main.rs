//! The engine through its public door, with a rank that checks every key a query may see.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests fail by panicking, as tests do")]

mod cluster;
mod edges;
mod fairness;
mod properties;
mod rank;
mod scheduling;
mod sharing;
mod speed;
