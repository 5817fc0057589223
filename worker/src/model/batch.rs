//! Checks a batch against the model and the KV cache, so that a plan that does not fit is an error and never a panic.

use phalanx_proto::geometry::{Geometry, LayerKind};
use thiserror::Error;

use crate::backend::{Batch, BatchSequence, KvCacheSpec};

/// What is wrong with a batch.
#[derive(Debug, Error)]
pub enum BatchError {
    /// Tokens, positions and sequences do not describe the same rows.
    #[error("{tokens} tokens, {positions} positions, sequences cover {covered} rows in order")]
    Rows {
        /// Number of tokens.
        tokens: usize,
        /// Number of positions.
        positions: usize,
        /// Rows that the sequences cover without gap.
        covered: usize,
    },
    /// A token is outside the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocab_size}")]
    Token {
        /// The token.
        token: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// A row's position is not its sequence's next.
    #[error("row {row} has position {found}, expected {expected}")]
    Position {
        /// The row.
        row: usize,
        /// Its position.
        found: u32,
        /// What follows from its sequence.
        expected: usize,
    },
    /// A block table lacks an entry or names a block that the pool does not have.
    #[error("{kind:?}: position {position} lies in block {block:?}, the pool has {blocks}")]
    Block {
        /// Which pool.
        kind: LayerKind,
        /// First position of the block.
        position: usize,
        /// The table's entry, if there is one.
        block: Option<u32>,
        /// Blocks of the pool.
        blocks: usize,
    },
    /// A row is asked for logits that is not there.
    #[error("logits of row {row} of {rows}")]
    LogitRow {
        /// The row.
        row: usize,
        /// Rows of the batch.
        rows: usize,
    },
    /// [`Model::allocate_kv_cache`](super::Model::allocate_kv_cache) was not called.
    #[error("the KV cache has not been allocated")]
    NoCache,
}

/// Checks everything that the backends index by.
pub(super) fn check(
    batch: &Batch,
    logit_rows: &[usize],
    geometry: &Geometry,
    cache: Option<&KvCacheSpec>,
) -> Result<(), BatchError> {
    let cache = cache.ok_or(BatchError::NoCache)?;
    let rows = batch.tokens.len();
    let covered = batch.sequences.iter().try_fold(0, |next, sequence| {
        (sequence.rows.start == next && !sequence.rows.is_empty()).then_some(sequence.rows.end)
    });
    if covered != Some(rows) || batch.positions.len() != rows {
        let (positions, covered) = (batch.positions.len(), covered.unwrap_or(0));
        return Err(BatchError::Rows { tokens: rows, positions, covered });
    }
    if let Some(token) = batch.tokens.iter().find(|token| token.index() >= geometry.vocab_size) {
        return Err(BatchError::Token { token: token.0, vocab_size: geometry.vocab_size });
    }
    if let Some(&row) = logit_rows.iter().find(|&&row| row >= rows) {
        return Err(BatchError::LogitRow { row, rows });
    }
    batch.sequences.iter().try_for_each(|sequence| check_sequence(batch, sequence, geometry, cache))
}

fn check_sequence(
    batch: &Batch,
    sequence: &BatchSequence,
    geometry: &Geometry,
    cache: &KvCacheSpec,
) -> Result<(), BatchError> {
    for (row, expected) in sequence.rows.clone().zip(sequence.first_position..) {
        let found = batch.positions[row];
        if found as usize != expected {
            return Err(BatchError::Position { row, found, expected });
        }
    }
    let end = sequence.first_position + sequence.rows.len();
    let window_start = (sequence.first_position + 1).saturating_sub(geometry.sliding_window);
    let pools = [
        (LayerKind::FullAttention, 0, cache.full_blocks),
        (LayerKind::SlidingAttention, window_start, cache.sliding_blocks),
    ];
    for (kind, first, blocks) in pools {
        if !cache.layers.contains(&kind) {
            continue;
        }
        for index in first / cache.block_size..end.div_ceil(cache.block_size) {
            let block = sequence.table(kind).get(index).map(|block| block.0);
            if block.is_none_or(|block| block as usize >= blocks) {
                return Err(BatchError::Block { kind, position: index * cache.block_size, block, blocks });
            }
        }
    }
    Ok(())
}
