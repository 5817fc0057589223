//! The paged KV cache as the coordinator sees it: two pools, and which block holds which positions of a sequence.
//!
//! A block that a table lets go stays out of its pool until every rank has acknowledged the step that let it go.

use std::{
    collections::VecDeque,
    ops::{Add, AddAssign},
};

use phalanx_proto::{
    geometry::LayerKind,
    ids::{BlockId, Step, TokenId},
};

use super::{
    blocks::{Content, Pool},
    prefix::{Hit, PrefixKeys},
};

/// Numbers of blocks of the two pools. A kind of layer that the model lacks counts 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Blocks {
    pub(super) full: usize,
    pub(super) sliding: usize,
}

impl Blocks {
    /// Whether there are enough of both.
    pub(super) fn covers(self, need: Self) -> bool {
        self.full >= need.full && self.sliding >= need.sliding
    }

    /// The difference, never below zero.
    pub(super) fn minus(self, other: Self) -> Self {
        Self { full: self.full.saturating_sub(other.full), sliding: self.sliding.saturating_sub(other.sliding) }
    }
}

impl Add for Blocks {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { full: self.full + other.full, sliding: self.sliding + other.sliding }
    }
}

impl AddAssign for Blocks {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// What decides how many blocks a run of positions takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct KvShape {
    /// Tokens a block.
    pub(super) block_size: usize,
    /// Positions that a query of a sliding layer sees, its own included.
    pub(super) sliding_window: usize,
    pub(super) has_full_layers: bool,
    pub(super) has_sliding_layers: bool,
}

impl KvShape {
    /// `count` blocks of each pool that exists.
    pub(super) fn each(&self, count: usize) -> Blocks {
        Blocks {
            full: if self.has_full_layers { count } else { 0 },
            sliding: if self.has_sliding_layers { count } else { 0 },
        }
    }

    /// Blocks that hold `positions` positions.
    pub(super) fn blocks_for(&self, positions: usize) -> usize {
        positions.div_ceil(self.block_size)
    }

    /// Index of the first block that the query at `position` sees in a sliding layer.
    pub(super) fn first_visible(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.sliding_window) / self.block_size
    }

    /// Most blocks that one query's window touches: `sliding_window` positions that need not begin with a block.
    pub(super) fn window_blocks(&self) -> usize {
        (self.sliding_window - 1).div_ceil(self.block_size) + 1
    }

    /// Blocks without which a sequence of that many computed positions cannot run even alone.
    pub(super) fn alone(&self, positions: usize) -> Blocks {
        let blocks = self.blocks_for(positions);
        Blocks { full: self.each(blocks).full, sliding: self.each(blocks.min(self.window_blocks())).sliding }
    }

    /// Blocks that are missing before a prefill up to `end` can be carried through, if it goes in small chunks: a table
    /// that reaches so far and holds so many sliding blocks keeps no more than a window of these.
    pub(super) fn need_in_chunks(&self, reach: Blocks, sliding_held: usize, end: usize) -> Blocks {
        let rest = self.each(self.blocks_for(end)).minus(reach);
        let window = self.window_blocks().saturating_sub(sliding_held).max(1);
        Blocks { full: rest.full, sliding: rest.sliding.min(window) }
    }

    /// Most positions that a sequence can compute when it has `capacity` for itself.
    pub(super) fn most_positions(&self, capacity: Blocks) -> usize {
        let full = if self.has_full_layers { capacity.full * self.block_size } else { usize::MAX };
        let passes = !self.has_sliding_layers || capacity.sliding >= self.window_blocks();
        full.min(if passes { usize::MAX } else { capacity.sliding * self.block_size })
    }
}

/// One sequence's blocks, by position.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    /// Block `i` holds positions from `i * block_size` on.
    full: Vec<BlockId>,
    /// The same from block `sliding_start` on; what lies before has left the window and was let go.
    sliding: VecDeque<BlockId>,
    sliding_start: usize,
    /// How many blocks of each kind the ranks have been told.
    named: Blocks,
}

impl Table {
    /// Blocks that are missing before positions up to `end` (exclusive) can be computed.
    pub(super) fn need(&self, shape: &KvShape, end: usize) -> Blocks {
        shape.each(shape.blocks_for(end)).minus(self.reach())
    }

    /// How far (exclusive) positions can be computed with `room` more blocks.
    pub(super) fn reachable(&self, shape: &KvShape, room: Blocks) -> usize {
        let reach = self.reach() + room;
        let full = if shape.has_full_layers { reach.full } else { usize::MAX };
        let sliding = if shape.has_sliding_layers { reach.sliding } else { usize::MAX };
        full.min(sliding).saturating_mul(shape.block_size)
    }

    /// Blocks held now.
    pub(super) fn held(&self) -> (impl Iterator<Item = BlockId>, impl Iterator<Item = BlockId>) {
        (self.full.iter().copied(), self.sliding.iter().copied())
    }

    /// Number of blocks from position 0 to the end, those that were let go included.
    pub(super) fn reach(&self) -> Blocks {
        Blocks { full: self.full.len(), sliding: self.sliding_start + self.sliding.len() }
    }

    /// Index of the first sliding block that is still held.
    pub(super) fn sliding_start(&self) -> usize {
        self.sliding_start
    }

    /// The blocks that the ranks do not know yet, in order of position. Tables on the ranks are positional, so a place
    /// that left the window before the sequence came there is filled with block 0, which is never read through it.
    pub(super) fn name_new(&mut self) -> (Vec<BlockId>, Vec<BlockId>) {
        let full = self.full[self.named.full..].to_vec();
        let sliding = (self.named.sliding..self.reach().sliding)
            .map(|index| index.checked_sub(self.sliding_start).and_then(|i| self.sliding.get(i).copied()))
            .map(|block| block.unwrap_or(BlockId(0)))
            .collect();
        self.named = self.reach();
        (full, sliding)
    }
}

/// A reference that is dropped when every rank has acknowledged `after`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Release {
    pub(super) after: Step,
    pub(super) kind: LayerKind,
    pub(super) block: BlockId,
}

/// Both pools, and what is about to return to them.
#[derive(Debug)]
pub(super) struct KvCache {
    shape: KvShape,
    full: Pool,
    sliding: Pool,
    /// In order of their steps.
    releases: VecDeque<Release>,
}

impl KvCache {
    /// Empty pools.
    pub(super) fn new(shape: KvShape, capacity: Blocks) -> Self {
        let capacity = Blocks {
            full: capacity.full.min(shape.each(usize::MAX).full),
            sliding: capacity.sliding.min(shape.each(usize::MAX).sliding),
        };
        let (full, sliding) = (Pool::new(capacity.full), Pool::new(capacity.sliding));
        Self { shape, full, sliding, releases: VecDeque::new() }
    }

    /// What decides how many blocks are needed.
    pub(super) fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// The pool of full-attention layers.
    pub(super) fn full(&self) -> &Pool {
        &self.full
    }

    /// The pool of sliding-window layers.
    pub(super) fn sliding(&self) -> &Pool {
        &self.sliding
    }

    /// All blocks.
    pub(super) fn capacity(&self) -> Blocks {
        Blocks { full: self.full.len(), sliding: self.sliding.len() }
    }

    /// Blocks that can be taken now.
    pub(super) fn available(&self) -> Blocks {
        Blocks { full: self.full.available(), sliding: self.sliding.available() }
    }

    /// Blocks that can be taken once the plans in flight have been acknowledged.
    pub(super) fn pending(&self) -> Blocks {
        Blocks { full: self.full.pending(), sliding: self.sliding.pending() }
    }

    /// Sliding blocks that no other table than this one names.
    pub(super) fn sliding_unshared(&self, table: &Table) -> usize {
        table.sliding.iter().filter(|&&id| self.sliding.refs(id) == 1).count()
    }

    /// References that wait for their step.
    pub(super) fn releases(&self) -> impl Iterator<Item = &Release> {
        self.releases.iter()
    }

    /// Appends the blocks that positions up to `end` need. The caller has seen to it that they are available.
    pub(super) fn grow(&mut self, table: &mut Table, end: usize) {
        let need = table.need(&self.shape, end);
        table.full.extend((0..need.full).map_while(|_| self.full.take()));
        table.sliding.extend((0..need.sliding).map_while(|_| self.sliding.take()));
    }

    /// A table that begins with the blocks of `hit`.
    pub(super) fn share(&mut self, hit: Hit) -> Table {
        hit.full.iter().for_each(|&id| self.full.share(id));
        hit.sliding.iter().for_each(|&id| self.sliding.share(id));
        let sliding_start = if self.shape.has_sliding_layers { hit.sliding_start } else { 0 };
        Table { full: hit.full, sliding: hit.sliding.into(), sliding_start, named: Blocks::default() }
    }

    /// Makes full block `index` of a table findable.
    pub(super) fn remember(&mut self, table: &Table, index: usize, keys: &PrefixKeys, tokens: &[TokenId]) {
        let size = self.shape.block_size;
        let (Some(key), Some(tokens)) = (keys.get(index), tokens.get(index * size..(index + 1) * size)) else {
            return;
        };
        let content = Content { key, parent: keys.parent(index), tokens: tokens.into() };
        let sliding = index.checked_sub(table.sliding_start).and_then(|i| table.sliding.get(i));
        if let Some(&id) = sliding {
            self.sliding.remember(id, content.clone());
        }
        if let Some(&id) = table.full.get(index) {
            self.full.remember(id, content);
        }
    }

    /// Lets go of the sliding blocks that no query from `next_position` on will see.
    pub(super) fn pass_window(&mut self, table: &mut Table, next_position: usize, after: Step) {
        let first = self.shape.first_visible(next_position);
        while table.sliding_start < first
            && let Some(block) = table.sliding.pop_front()
        {
            table.sliding_start += 1;
            self.let_go(LayerKind::SlidingAttention, block, after);
        }
    }

    /// Lets go of all blocks of a table, the last first: a prefix is worth more than what follows it.
    pub(super) fn let_go_all(&mut self, table: Table, after: Step) {
        for &block in table.full.iter().rev() {
            self.let_go(LayerKind::FullAttention, block, after);
        }
        for &block in table.sliding.iter().rev() {
            self.let_go(LayerKind::SlidingAttention, block, after);
        }
    }

    /// Returns what waited for `step`, which every rank has acknowledged.
    pub(super) fn acknowledge(&mut self, step: Step) {
        while let Some(release) = self.releases.pop_front_if(|release| release.after <= step) {
            self.pool(release.kind).release(release.block);
        }
    }

    fn let_go(&mut self, kind: LayerKind, block: BlockId, after: Step) {
        self.pool(kind).begin_release(block);
        self.releases.push_back(Release { after, kind, block });
    }

    fn pool(&mut self, kind: LayerKind) -> &mut Pool {
        match kind {
            LayerKind::FullAttention => &mut self.full,
            LayerKind::SlidingAttention => &mut self.sliding,
        }
    }
}
