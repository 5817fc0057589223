//! One file per endpoint, and what they share on a request's way.
//!
//! - `chat`, `completions`: the endpoints that generate; `models`, `tokens`, `observe`: the others;
//! - `prepare`: from checked parameters to a request of the coordinator;
//! - `replies`: from the coordinator's events to steps of the answer;
//! - `deliver`: from steps to one body or a stream of events;
//! - `faults`: from a fault to what the client sees.

pub(crate) mod chat;
mod chat_wire;
pub(crate) mod completions;
mod deliver;
mod faults;
pub(crate) mod models;
pub(crate) mod observe;
mod prepare;
mod replies;
pub(crate) mod tokens;
