//! One rank of a group: loads its shard of a gpt-oss model, executes plans in order, reports sampled tokens.
//!
//! | module | turns |
//! | --- | --- |
//! | [`join`] | a coordinator's commands into loading, forming and stepping |
//! | [`executor`] | a plan into a step's result, on the thread that owns the weights |
//! | [`sequences`] | plans into flat batches: tokens, positions, block tables |
//! | [`model`] | a batch into logits, over [`backend`] and [`collective`] |
//! | [`sampler`] | sharded logits into tokens |
//! | [`checkpoint`] | byte ranges of files into tensors of this rank's shard |
//! | [`backend`] | operations on tensors: `reference` (slow, readable), `cpu` (fast) |
//! | [`collective`] | sums and exchanges between the ranks of a group |
//! | [`config`] | settings, checked |
//! | [`instruments`] | where the time of a step went |
//!
//! It decides nothing, reads no clock that changes what it does, and knows no text, no request and no HTTP.

pub mod backend;
pub mod checkpoint;
pub mod collective;
pub mod config;
pub mod executor;
pub mod instruments;
pub mod join;
mod memory;
pub mod model;
pub mod sampler;
pub mod sequences;
mod vocabulary;

pub use config::Config;
pub use join::run;
