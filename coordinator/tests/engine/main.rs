//! The engine through its public door, with a rank that checks every key a query may see.

mod cluster;
mod edges;
mod properties;
mod rank;
mod scheduling;
mod sharing;
mod speed;
