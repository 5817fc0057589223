//! Figures about the engine.

use std::time::Duration;

use phalanx_proto::v1::FinishReason;

/// What the engine is doing, and what it has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences on the ranks.
    pub running: usize,
    /// Sequences that wait.
    pub waiting: usize,
    /// Their tokens, prompts and outputs at most.
    pub waiting_tokens: usize,
    /// Tokens served a second while there was work, lately. 0: not measured yet.
    pub tokens_per_second: u64,
    /// When somebody who is refused now is likely to find a place. Zero: there is one.
    pub retry_after: Duration,
    /// Blocks of the full-attention pool that sequences hold, or that return when a step is acknowledged.
    pub full_blocks_used: usize,
    /// Blocks of the full-attention pool.
    pub full_blocks: usize,
    /// The same for the sliding-window pool.
    pub sliding_blocks_used: usize,
    /// Blocks of the sliding-window pool.
    pub sliding_blocks: usize,
    /// Since the engine was made.
    pub totals: Totals,
}

/// Counts since the engine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Steps that all ranks acknowledged.
    pub steps: u64,
    /// Prompt tokens of sequences that were admitted.
    pub prompt_tokens: u64,
    /// Tokens delivered.
    pub generation_tokens: u64,
    /// Tokens looked up in the prefix cache, once a sequence.
    pub prefix_cache_queries: u64,
    /// How many of these were there.
    pub prefix_cache_hits: u64,
    /// Times that a sequence had to give its blocks to another one.
    pub preemptions: u64,
    /// Sequences that ended with a stop token.
    pub finished_stop: u64,
    /// Sequences that ended at their length limit.
    pub finished_length: u64,
    /// Sequences that were cancelled.
    pub finished_aborted: u64,
    /// Sequences that a new formation had no room for.
    pub failed: u64,
    /// Requests refused at the door.
    pub refused: u64,
    /// Requests that waited for too long.
    pub expired: u64,
    /// From plan made to result applied, summed over steps.
    pub step_time: Duration,
}

impl Totals {
    /// Counts one ended sequence.
    pub(super) fn count_finished(&mut self, reason: FinishReason) {
        match reason {
            FinishReason::Stop => self.finished_stop += 1,
            FinishReason::Length => self.finished_length += 1,
            FinishReason::Aborted | FinishReason::Unspecified => self.finished_aborted += 1,
        }
    }
}
