//! Sums and exchanges between the ranks of a group.

pub mod host;
pub mod nccl;
pub mod push;

use thiserror::Error;

/// Why a collective ended without its result.
#[derive(Debug, Error)]
pub enum CollectiveError {
    /// [`AbortHandle::abort`] was called, here or by another rank.
    #[error("the collective of epoch {epoch} was aborted")]
    Aborted {
        /// The formation it belonged to.
        epoch: u64,
    },
    /// A peer did not take part in time; it is missing or hangs.
    #[error("rank {rank} did not come to a collective of epoch {epoch} within {limit_ms} ms")]
    Late {
        /// The peer.
        rank: usize,
        /// The formation.
        epoch: u64,
        /// How long was waited.
        limit_ms: u64,
    },
    /// A peer cannot be reached while the group forms.
    #[error("rank {rank} cannot be reached at {address}: {message}")]
    Unreachable {
        /// The peer.
        rank: usize,
        /// Where it was looked for.
        address: String,
        /// What the system said.
        message: String,
    },
    /// Shared memory or a socket failed.
    #[error("{what}: {message}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        message: String,
    },
    /// What a rank said about itself before the group formed is unreadable or belongs to another formation.
    #[error("the rendezvous of rank {rank} is unusable: {message}")]
    Rendezvous {
        /// Whose it is.
        rank: usize,
        /// What is wrong with it.
        message: String,
    },
    /// Ranks called different operations or sizes; a bug.
    #[error("rank {rank} called {found}, expected {expected}")]
    Mismatch {
        /// The peer that differs.
        rank: usize,
        /// What it called.
        found: String,
        /// What this rank called.
        expected: String,
    },
}

/// One rank's end of a group's collectives. Every rank calls the same operations in the same order. A call blocks until
/// all ranks have called, or until the group is aborted: like NCCL, it does not notice by itself that a peer is gone.
///
/// Every function that answers with a `Result` fails when the group is aborted or the transport fails.
#[allow(clippy::missing_errors_doc, reason = "stated once for the whole trait")]
pub trait Collective: Send {
    /// This rank.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn world_size(&self) -> usize;
    /// Replaces `values` by the sum over all ranks, added in the order of ranks, so that every rank has the same bits.
    fn all_reduce_sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError>;
    /// Every rank's `mine`, by rank. Lengths may differ.
    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError>;
    /// Fails if the group was aborted; waits for nobody. For work between two calls that takes long.
    fn check_abort(&self) -> Result<(), CollectiveError> {
        Ok(())
    }
    /// A handle that ends every blocked and future call from another thread.
    fn abort_handle(&self) -> AbortHandle;
}

/// Ends a group's collectives from any thread, on this rank and where possible on its peers.
#[derive(Clone)]
pub struct AbortHandle(std::sync::Arc<dyn Fn() + Send + Sync>);

impl AbortHandle {
    /// Wraps the transport's way to abort.
    pub fn new(abort: impl Fn() + Send + Sync + 'static) -> Self {
        Self(std::sync::Arc::new(abort))
    }

    /// Aborts. May be called more than once.
    pub fn abort(&self) {
        (self.0)();
    }
}

/// The collective of a group of one.
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce_sum(&mut self, _values: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        Ok(vec![mine.to_vec()])
    }

    fn abort_handle(&self) -> AbortHandle {
        AbortHandle::new(|| {})
    }
}
