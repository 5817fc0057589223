//! One pool of KV blocks: who refers to each block, which may be taken, and which keep something worth finding again.
//!
//! A block is in exactly one of three states: *free* (holds nothing), *idle* (nobody refers to it, but its content is
//! cached and can be shared until the block is taken), or *referred to* by block tables and by releases that wait for
//! their step. Only free and idle blocks can be taken.

use std::{collections::BTreeMap, sync::Arc};

use phalanx_proto::ids::{BlockId, TokenId};
use rustc_hash::{FxBuildHasher, FxHashMap};

use super::prefix::BlockKey;

/// What a cached block holds: the keys and values of `tokens` after the prefix that `parent` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Content {
    /// Chained hash of the prefix up to the end of this block.
    pub(super) key: BlockKey,
    /// Chained hash up to its beginning.
    pub(super) parent: BlockKey,
    /// The block's own tokens: a hash alone decides nothing.
    pub(super) tokens: Arc<[TokenId]>,
}

#[derive(Debug, Default)]
struct Block {
    /// Tables that name it, plus releases that wait for their step.
    refs: u32,
    /// How many of `refs` are such releases.
    leaving: u32,
    /// Its key in `Pool::idle` while `refs` is 0 and `content` is there.
    idle_since: u64,
    content: Option<Content>,
}

/// The blocks of one kind of layer.
#[derive(Debug, Default)]
pub(super) struct Pool {
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    /// Least recently used first.
    idle: BTreeMap<u64, BlockId>,
    cached: FxHashMap<BlockKey, BlockId>,
    /// Blocks all of whose references are waiting releases.
    pending: usize,
    /// Counts releases, in place of a clock.
    ticks: u64,
}

impl Pool {
    /// A pool of `count` free blocks.
    pub(super) fn new(count: usize) -> Self {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let blocks = (0..count).map(|_| Block::default()).collect();
        // No step should have to wait while this table grows.
        let cached = FxHashMap::with_capacity_and_hasher(count as usize, FxBuildHasher);
        Self { blocks, free: (0..count).rev().map(BlockId).collect(), cached, ..Self::default() }
    }

    /// Number of blocks.
    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that can be taken now.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks that can be taken once the plans in flight have been acknowledged.
    pub(super) fn pending(&self) -> usize {
        self.pending
    }

    /// Tables that name the block, and releases of it that wait for their step.
    pub(super) fn refs(&self, id: BlockId) -> u32 {
        self.blocks[id.index()].refs
    }

    /// Whether only releases refer to the block that wait for their step.
    pub(super) fn is_returning(&self, id: BlockId) -> bool {
        let block = &self.blocks[id.index()];
        block.refs > 0 && block.refs == block.leaving
    }

    /// Takes a free block, or else the one that has been idle longest, which loses its content.
    pub(super) fn take(&mut self) -> Option<BlockId> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => self.idle.pop_first()?.1,
        };
        let block = &mut self.blocks[id.index()];
        if let Some(content) = block.content.take() {
            self.cached.remove(&content.key);
        }
        block.refs = 1;
        Some(id)
    }

    /// Adds a reference to a block that holds cached content.
    pub(super) fn share(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.index()];
        if block.refs == 0 {
            self.idle.remove(&block.idle_since);
        } else if block.leaving == block.refs {
            self.pending -= 1;
        }
        block.refs += 1;
    }

    /// Announces that a reference will be dropped by [`Pool::release`].
    pub(super) fn begin_release(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.index()];
        block.leaving += 1;
        if block.leaving == block.refs {
            self.pending += 1;
        }
    }

    /// Drops a reference that was announced. The last one makes the block idle, or free if nothing is cached in it.
    pub(super) fn release(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.index()];
        block.leaving -= 1;
        block.refs -= 1;
        if block.refs > 0 {
            return;
        }
        self.pending -= 1;
        if block.content.is_none() {
            self.free.push(id);
            return;
        }
        self.ticks += 1;
        block.idle_since = self.ticks;
        self.idle.insert(self.ticks, id);
    }

    /// Makes a block's content findable. If equal content is cached elsewhere already, that stays the one to be found.
    pub(super) fn remember(&mut self, id: BlockId, content: Content) {
        let block = &mut self.blocks[id.index()];
        if block.content.is_none() && !self.cached.contains_key(&content.key) {
            self.cached.insert(content.key, id);
            block.content = Some(content);
        }
    }

    /// The block that holds `tokens` after the prefix `parent`, if one does.
    pub(super) fn find(&self, key: BlockKey, parent: BlockKey, tokens: &[TokenId]) -> Option<BlockId> {
        let id = *self.cached.get(&key)?;
        let content = self.blocks[id.index()].content.as_ref()?;
        (content.parent == parent && *content.tokens == *tokens).then_some(id)
    }

    /// Compares the pool with what its users say: per block, how many tables name it and how many releases wait.
    ///
    /// # Errors
    /// Names the first block or counter that does not add up.
    pub(super) fn check(&self, tables: &[u32], releases: &[u32]) -> Result<(), String> {
        let mut free = vec![0_u32; self.blocks.len()];
        for id in &self.free {
            free[id.index()] += 1;
        }
        let mut idle = vec![0_u32; self.blocks.len()];
        for (&since, id) in &self.idle {
            idle[id.index()] += u32::from(self.blocks[id.index()].idle_since == since);
        }
        for (index, block) in self.blocks.iter().enumerate() {
            if block.refs != tables[index] + releases[index] || block.leaving != releases[index] {
                let (tables, releases) = (tables[index], releases[index]);
                return Err(format!("block {index}: {tables} tables and {releases} releases name it, it is {block:?}"));
            }
            let expected = match (block.refs, &block.content) {
                (0, None) => (1, 0),
                (0, Some(_)) => (0, 1),
                _ => (0, 0),
            };
            if (free[index], idle[index]) != expected {
                return Err(format!(
                    "block {index}: free {} times, idle {} times, {block:?}",
                    free[index], idle[index]
                ));
            }
            if let Some(content) = &block.content
                && self.cached.get(&content.key).is_none_or(|id| id.index() != index)
            {
                return Err(format!("block {index}: cached, but its key does not lead to it"));
            }
        }
        self.check_counters()
    }

    fn check_counters(&self) -> Result<(), String> {
        let count = |wanted: fn(&Block) -> bool| self.blocks.iter().filter(|block| wanted(block)).count();
        let idle = count(|block| block.refs == 0 && block.content.is_some());
        if idle != self.idle.len() {
            return Err(format!("{idle} blocks are idle, {} are listed so", self.idle.len()));
        }
        let pending = count(|block| block.refs > 0 && block.refs == block.leaving);
        if pending != self.pending {
            return Err(format!("{pending} blocks are pending, counted {}", self.pending));
        }
        let cached = count(|block| block.content.is_some());
        if cached != self.cached.len() {
            return Err(format!("{cached} blocks have content, {} keys are known", self.cached.len()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::prefix::PrefixKeys;

    #[test]
    fn equal_hashes_of_different_prefixes_share_nothing() {
        let tokens: Arc<[TokenId]> = [1, 2, 3, 4].map(TokenId).into();
        let mut keys = PrefixKeys::new("");
        keys.extend(&tokens, 2);
        let (key, parent) = (keys.get(1).unwrap(), keys.parent(1));
        let mut pool = Pool::new(1);
        let block = pool.take().unwrap();
        pool.remember(block, Content { key, parent, tokens: tokens[2..].into() });
        assert_eq!(pool.find(key, parent, &tokens[2..]), Some(block));
        assert_eq!(pool.find(key, parent, &tokens[..2]), None, "other tokens under the same key");
        assert_eq!(pool.find(key, keys.parent(0), &tokens[2..]), None, "another prefix under the same key");
    }
}
