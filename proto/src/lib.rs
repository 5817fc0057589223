//! The contract between Phalanx's processes, and nothing else.
//!
//! | module | holds |
//! | --- | --- |
//! | [`v1`] | messages and services generated from `proto/phalanx/v1/*.proto` |
//! | [`ids`] | newtypes for sequences, ranks, epochs, steps, blocks, tokens |
//! | [`geometry`] | the shape of a model, read from `config.json` |
//! | [`layout`] | which slice of which tensor each rank holds |
//! | [`checkpoint`] | names, shapes and byte ranges of a checkpoint's tensors, from headers alone |
//! | [`sampling`] | sampling settings, valid by construction |
//! | [`plan`] | one step's work, valid by construction, and its digest |
//! | [`fault`] | kinds of fault and their gRPC form |
//! | [`tls`] | roles, certificates and who may call what |
//! | [`trace`] | W3C trace context through gRPC metadata |
//!
//! It knows no scheduler, no tensor arithmetic, no HTTP and no text.

pub mod checkpoint;
pub mod fault;
pub mod geometry;
pub mod ids;
pub mod layout;
pub mod plan;
pub mod sampling;
pub mod tls;
pub mod trace;

/// Messages and services generated from `proto/phalanx/v1/*.proto`.
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code; its documentation stands in the .proto files"
)]
pub mod v1 {
    tonic::include_proto!("phalanx.v1");

    /// Encoded file descriptor set of the package, for gRPC reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("phalanx.v1");
}
