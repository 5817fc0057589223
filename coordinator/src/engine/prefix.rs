//! Prefix caching: equal beginnings are computed once.
//!
//! A full block of tokens is named by the hash of its tokens and of everything before it, so that equal names mean equal
//! prefixes; the tokens themselves are compared as well. Only full blocks are shared, and nobody writes to them again.

use phalanx_proto::ids::{BlockId, TokenId};
use xxhash_rust::xxh3::xxh3_128;

use super::kv::{Blocks, KvCache};

/// Names a prefix that ends at the end of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct BlockKey(u128);

/// The names of a sequence's full blocks, in order.
#[derive(Clone, Debug)]
pub(super) struct PrefixKeys {
    /// The empty prefix; differs by salt, so that nothing is shared across salts.
    root: BlockKey,
    keys: Vec<BlockKey>,
}

impl PrefixKeys {
    /// No blocks yet.
    pub(super) fn new(salt: &str) -> Self {
        Self { root: BlockKey(xxh3_128(salt.as_bytes())), keys: Vec::new() }
    }

    /// Names the blocks that `tokens` has filled since the last call.
    pub(super) fn extend(&mut self, tokens: &[TokenId], block_size: usize) {
        for block in tokens.chunks_exact(block_size).skip(self.keys.len()) {
            let mut bytes = Vec::with_capacity(16 + 4 * block_size);
            bytes.extend_from_slice(&self.parent(self.keys.len()).0.to_le_bytes());
            bytes.extend(block.iter().flat_map(|token| token.0.to_le_bytes()));
            self.keys.push(BlockKey(xxh3_128(&bytes)));
        }
    }

    /// Name of the prefix that ends with block `index`, if that is full.
    pub(super) fn get(&self, index: usize) -> Option<BlockKey> {
        self.keys.get(index).copied()
    }

    /// Name of the prefix before block `index`.
    pub(super) fn parent(&self, index: usize) -> BlockKey {
        index.checked_sub(1).and_then(|before| self.get(before)).unwrap_or(self.root)
    }

    /// Number of named blocks.
    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }
}

/// The longest cached beginning of a sequence.
#[derive(Debug, Default)]
pub(super) struct Hit {
    /// Blocks' worth of tokens that need not be computed.
    pub(super) blocks: usize,
    /// Blocks of the full pool, all of them.
    pub(super) full: Vec<BlockId>,
    /// Index of the first block that the next query's window touches.
    pub(super) sliding_start: usize,
    /// Blocks of the sliding pool from there on.
    pub(super) sliding: Vec<BlockId>,
    /// How many of these nobody refers to now; sharing makes them unavailable.
    pub(super) unreferenced: Blocks,
    /// How many of these are on their way back to their pool; sharing keeps them.
    pub(super) returning: Blocks,
}

impl KvCache {
    /// Finds the longest beginning of `tokens` whose keys and values are there: every block of the full pool, and those of
    /// the sliding pool that the query after it sees. At least one token is left to compute.
    pub(super) fn longest_hit(&self, keys: &PrefixKeys, tokens: &[TokenId]) -> Hit {
        let shape = self.shape();
        let most = (tokens.len().saturating_sub(1) / shape.block_size).min(keys.len());
        let (mut full, mut sliding) = (Vec::new(), Vec::new());
        let (mut best, mut sliding_run) = (0, 0);
        for (index, block) in tokens.chunks_exact(shape.block_size).take(most).enumerate() {
            let Some(key) = keys.get(index) else { break };
            let parent = keys.parent(index);
            if shape.has_full_layers {
                let Some(id) = self.full().find(key, parent, block) else { break };
                full.push(id);
            }
            let end = index + 1;
            if shape.has_sliding_layers {
                let found = self.sliding().find(key, parent, block);
                sliding_run = if found.is_some() { sliding_run + 1 } else { 0 };
                sliding.push(found);
            }
            if !shape.has_sliding_layers || end - shape.first_visible(end * shape.block_size) <= sliding_run {
                best = end;
            }
        }
        full.truncate(best);
        let sliding_start = shape.first_visible(best * shape.block_size).min(best);
        let sliding: Vec<BlockId> = sliding.into_iter().take(best).skip(sliding_start).flatten().collect();
        let unreferenced = Blocks {
            full: full.iter().filter(|&&id| self.full().refs(id) == 0).count(),
            sliding: sliding.iter().filter(|&&id| self.sliding().refs(id) == 0).count(),
        };
        let returning = Blocks {
            full: full.iter().filter(|&&id| self.full().is_returning(id)).count(),
            sliding: sliding.iter().filter(|&&id| self.sliding().is_returning(id)).count(),
        };
        Hit { blocks: best, full, sliding_start, sliding, unreferenced, returning }
    }
}
