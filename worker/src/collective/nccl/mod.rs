//! Sums and exchanges between devices through NCCL, for messages too large for [`push`](super::push) and across hosts.
//!
//! | file | holds |
//! | --- | --- |
//! | `binding` | the library's functions; every `unsafe` block is there |
//! | `communicator` | one rank's end: formed, watched and aborted under deadlines |
//!
//! Communicators do not block: a call returns at once, and whether it worked is asked for under a deadline. So a peer
//! that is gone is an error here and never a call that does not return. It knows no CUDA: streams and device memory come
//! in as the numbers that CUDA gave them, and the caller's thread has the device's context current.

mod binding;
mod communicator;

use std::path::PathBuf;

use thiserror::Error;

pub use binding::{MIN_VERSION, Nccl, SONAME, UNIQUE_ID_BYTES, UniqueId};
pub use communicator::{ABORT_LIMIT, Communicator, Member};

use super::CollectiveError;

/// What went wrong with NCCL.
#[derive(Debug, Error)]
pub enum NcclError {
    /// The library cannot be loaded or is not NCCL.
    #[error("NCCL cannot be loaded from {path}: {message}; install nvidia-nccl-cu12 or give the library's path")]
    Library {
        /// Where it was looked for.
        path: PathBuf,
        /// What the system said.
        message: String,
    },
    /// The library lacks what is needed here.
    #[error("NCCL at {path} is {version}, at least 2.18 is needed")]
    TooOld {
        /// Where it is.
        path: PathBuf,
        /// Its version, such as `2.10.3`.
        version: String,
    },
    /// A call failed, or the communicator did since.
    #[error("{call}: {meaning} (code {code}): {detail}; {advice}")]
    Call {
        /// NCCL's function.
        call: &'static str,
        /// Its `ncclResult_t`.
        code: i32,
        /// NCCL's text for the code.
        meaning: String,
        /// The last thing that NCCL logged as an error; empty if nothing.
        detail: String,
        /// What to do.
        advice: &'static str,
    },
    /// A call had not ended at its deadline: a peer is missing.
    #[error("{call} of rank {rank} in epoch {epoch} was not done after {limit_ms} ms: a peer is missing or hangs")]
    Late {
        /// NCCL's function.
        call: &'static str,
        /// This rank.
        rank: usize,
        /// The formation.
        epoch: u64,
        /// How long was waited.
        limit_ms: u64,
    },
    /// The communicator was aborted.
    #[error("the communicator of epoch {epoch} was aborted")]
    Aborted {
        /// The formation.
        epoch: u64,
    },
    /// An abort did not return. Nothing but the end of the process frees the device.
    #[error("rank {rank}'s ncclCommAbort in epoch {epoch} hangs for {limit_ms} ms; the process must end")]
    AbortHung {
        /// This rank.
        rank: usize,
        /// The formation.
        epoch: u64,
        /// How long was waited.
        limit_ms: u64,
    },
}

impl From<NcclError> for CollectiveError {
    fn from(error: NcclError) -> Self {
        match error {
            NcclError::Aborted { epoch } => Self::Aborted { epoch },
            other => Self::Io { what: "NCCL".to_owned(), message: other.to_string() },
        }
    }
}

/// `ncclDataType_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Kind {
    /// Bytes.
    U8 = 1,
    /// Single precision.
    F32 = 7,
    /// Brain floating point.
    Bf16 = 9,
}

/// What a call works on.
#[derive(Clone, Copy, Debug)]
pub struct Values {
    /// Device address of what this rank gives.
    pub from: u64,
    /// Device address of the result; a sum may be taken in place, with `to` equal to `from`.
    pub to: u64,
    /// Values that each rank gives.
    pub count: usize,
    /// What they are.
    pub kind: Kind,
    /// CUDA's handle of the stream.
    pub stream: u64,
}
