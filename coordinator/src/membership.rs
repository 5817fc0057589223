//! Where epochs come from. Their uniqueness is the one fact about a group that must outlive the coordinator.

pub mod embedded;

use std::path::PathBuf;

use phalanx_proto::ids::Epoch;
use thiserror::Error;

/// Why no epoch could be issued.
#[derive(Debug, Error)]
pub enum EpochError {
    /// The file or its directory cannot be used.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another coordinator works with the same directory.
    #[error("{path} is locked: another coordinator uses this state directory; stop it or choose another directory")]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// The file does not hold a number.
    #[error(
        "{path} holds {found:?}, expected a number; if it was damaged, write a number above every epoch used so far"
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Its beginning.
        found: String,
    },
    /// Numbers ran out, or a worker claims to have seen an absurd one.
    #[error("epoch {0} has no successor")]
    Exhausted(Epoch),
}
