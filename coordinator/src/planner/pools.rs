//! How a rank's KV memory is divided between the pool of the full-attention layers and that of the sliding-window layers.

use thiserror::Error;

/// Plans that may be in flight at once. A block that a slice has left is free only when these are acknowledged.
const PLANS_IN_FLIGHT: u64 = 2;

/// The KV cache is too small to serve one sequence of the asked length.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "one sequence of max_model_len {max_model_len} needs {needed} bytes of KV cache on a rank, {available} are \
     available; lower max_model_len to at most {largest} or give the KV cache more memory"
)]
pub struct PoolError {
    /// Length asked for.
    pub max_model_len: usize,
    /// Bytes that it takes.
    pub needed: u64,
    /// Bytes that there are.
    pub available: u64,
    /// Length that would fit; 0 if none does.
    pub largest: u64,
}

/// What the KV cache must serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvDemand {
    /// Tokens a block.
    pub block_size: usize,
    /// Sequences that run at once.
    pub max_num_seqs: usize,
    /// Longest sequence, prompt and output together.
    pub max_model_len: usize,
    /// Most tokens of one step.
    pub max_num_batched_tokens: usize,
    /// Whether blocks that no sequence holds are worth keeping.
    pub enable_prefix_caching: bool,
}

/// Bytes of one block of every layer of a kind, on one rank; 0 for a kind that the model does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockBytes {
    /// Full-attention layers together.
    pub full: u64,
    /// Sliding-window layers together.
    pub sliding: u64,
}

/// Blocks of each pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvPools {
    /// Blocks of each full-attention layer.
    pub full_blocks: u32,
    /// Blocks of each sliding-window layer.
    pub sliding_blocks: u32,
}

impl KvPools {
    /// Bytes that both pools take on one rank.
    pub fn bytes(&self, block: &BlockBytes) -> u64 {
        u64::from(self.full_blocks) * block.full + u64::from(self.sliding_blocks) * block.sliding
    }
}

impl KvDemand {
    /// Blocks of the full pool that one sequence of the greatest length takes.
    pub fn full_blocks_per_sequence(&self) -> u64 {
        self.max_model_len.div_ceil(self.block_size) as u64
    }

    /// Blocks of the sliding pool that one decoding sequence takes: the window at its worst alignment, and one more
    /// while the plans in flight still hold the block that the window has left.
    pub fn sliding_blocks_per_sequence(&self, window: usize) -> u64 {
        let seen = window.min(self.max_model_len).max(1);
        ((seen - 1).div_ceil(self.block_size) + 2) as u64
    }

    /// Blocks that the new tokens of the plans in flight take, in either pool.
    fn blocks_in_flight(&self) -> u64 {
        PLANS_IN_FLIGHT * self.max_num_batched_tokens.min(self.max_model_len).div_ceil(self.block_size) as u64
    }

    /// Sliding blocks beyond which more would serve nobody.
    fn sliding_useful(&self, window: usize) -> u64 {
        let running = self.max_num_seqs as u64 * self.sliding_blocks_per_sequence(window) + self.blocks_in_flight();
        // A cached prefix is of use only while the sliding blocks before its end are still there.
        if self.enable_prefix_caching { 2 * running } else { running }
    }
}

/// Divides `memory` bytes of one rank. One sequence of `max_model_len` always fits; then the sliding pool grows to what
/// `max_num_seqs` sequences need, by at most half of what is left; the full pool takes the rest, as far as
/// `max_num_seqs` sequences of `max_model_len` could use it.
///
/// # Errors
/// When not even one sequence fits.
pub fn split(memory: u64, block: &BlockBytes, window: usize, demand: &KvDemand) -> Result<KvPools, PoolError> {
    let least_full = if block.full > 0 { demand.full_blocks_per_sequence() } else { 0 };
    // Prefill may go in smaller chunks when blocks are few, so one chunk of one block is what cannot be done without.
    let least_sliding =
        if block.sliding > 0 { demand.sliding_blocks_per_sequence(window) + PLANS_IN_FLIGHT } else { 0 };
    let least = least_full * block.full + least_sliding * block.sliding;
    let Some(rest) = memory.checked_sub(least) else {
        let for_full = memory.saturating_sub(least_sliding * block.sliding);
        let largest = for_full.checked_div(block.full).unwrap_or(0) * demand.block_size as u64;
        return Err(PoolError { max_model_len: demand.max_model_len, needed: least, available: memory, largest });
    };
    let share = if block.full > 0 { rest / 2 } else { rest };
    let useful = demand.sliding_useful(window).saturating_sub(least_sliding);
    let more_sliding = share.checked_div(block.sliding).unwrap_or(0).min(useful);
    let rest = rest - more_sliding * block.sliding;
    let useful = least_full * (demand.max_num_seqs as u64).saturating_sub(1);
    let more_full = rest.checked_div(block.full).unwrap_or(0).min(useful);
    let clamp = |blocks: u64| u32::try_from(blocks).unwrap_or(u32::MAX);
    Ok(KvPools { full_blocks: clamp(least_full + more_full), sliding_blocks: clamp(least_sliding + more_sliding) })
}
