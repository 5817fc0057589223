//! Turns requests into plans, and moves every rank of a group through them in lockstep.
//!
//! | module | holds |
//! | --- | --- |
//! | [`config`] | what a coordinator is told, as given and checked |
//! | [`planner`] | what each rank of a group will hold, from headers alone |
//! | [`engine`] | the scheduler: requests, results and time in; plans and tokens out; no I/O |
//! | `group` | the life of one deployment's group; owns the engine |
//! | [`membership`] | where epochs come from |
//! | `services` | the gRPC doors: `Inference` for clients, `Cluster` for workers |
//! | `door` | who may connect, over TLS or not, and call what |
//! | `server` | one coordinator process, from configuration to orderly end: [`run`] |
//! | `instruments` | everything that is counted |
//!
//! It does no tensor work and knows no text: prompts are token ids, and a grammar is a mask over the vocabulary.

pub mod config;
mod door;
pub mod engine;
mod group;
mod instruments;
pub mod membership;
pub mod planner;
mod server;
mod services;

pub use config::{Backend, Config, DeploymentConfig, Limits};
pub use server::{run, run_over};
