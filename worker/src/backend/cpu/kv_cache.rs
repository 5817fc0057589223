//! Keys and values by block: tiles of 16 positions, one cache line a dimension for keys, whole lines a position for values.

use std::ops::Range;

use phalanx_proto::{geometry::LayerKind, ids::BlockId};

use super::simd::{LANES, memory::Slab};
use crate::backend::{BackendError, Batch, BatchSequence, KvCacheSpec};

/// All layers' keys and values.
pub(super) struct KvCache {
    spec: KvCacheSpec,
    shape: CacheShape,
    layers: Vec<Layer>,
}

/// Sizes that follow from the specification.
#[derive(Clone, Copy)]
pub(super) struct CacheShape {
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    /// Positions of a block.
    pub(super) block_size: usize,
    /// Tiles of a block; the last one is not full when 16 does not divide the block size.
    pub(super) tiles: usize,
    /// Lines of one position's values.
    pub(super) value_lines: usize,
}

struct Layer {
    /// `[block, head, tile, dimension]`, 16 positions each.
    keys: Slab<[f32; LANES]>,
    /// `[block, head, position of the padded block, line]`.
    values: Slab<[f32; LANES]>,
}

impl CacheShape {
    fn new(spec: &KvCacheSpec) -> Self {
        Self {
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            block_size: spec.block_size,
            tiles: spec.block_size.div_ceil(LANES),
            value_lines: spec.head_dim.div_ceil(LANES),
        }
    }

    /// The tile of a position, counted from the start of the sequence.
    pub(super) fn tile_of(&self, position: usize) -> usize {
        position / self.block_size * self.tiles + position % self.block_size / LANES
    }

    /// The positions of a tile.
    pub(super) fn positions(&self, tile: usize) -> Range<usize> {
        let (block, offset) = (tile / self.tiles, tile % self.tiles * LANES);
        let first = block * self.block_size + offset;
        first..first + LANES.min(self.block_size - offset)
    }

    /// Lines of keys of one head of one block.
    fn key_lines(&self) -> usize {
        self.tiles * self.head_dim
    }

    /// Lines of values of one head of one block.
    fn value_block_lines(&self) -> usize {
        self.tiles * LANES * self.value_lines
    }
}

/// One layer's cache, for reading.
#[derive(Clone, Copy)]
pub(super) struct LayerView<'a> {
    pub(super) shape: CacheShape,
    keys: &'a [[f32; LANES]],
    values: &'a [[f32; LANES]],
}

impl<'a> LayerView<'a> {
    /// Keys `[dimension]` and values `[position, line]` of one tile and head.
    pub(super) fn tile(&self, table: &[BlockId], tile: usize, head: usize) -> (&'a [[f32; LANES]], &'a [[f32; LANES]]) {
        let shape = &self.shape;
        let slot = table[tile / shape.tiles].index() * shape.kv_heads + head;
        let within = tile % shape.tiles;
        let keys = slot * shape.key_lines() + within * shape.head_dim;
        let values = slot * shape.value_block_lines() + within * LANES * shape.value_lines;
        (&self.keys[keys..][..shape.head_dim], &self.values[values..][..LANES * shape.value_lines])
    }
}

impl KvCache {
    /// An empty cache. Its memory is taken as blocks are first written.
    pub(super) fn new(spec: &KvCacheSpec) -> Result<Self, BackendError> {
        if spec.block_size == 0 || !spec.head_dim.is_multiple_of(2) {
            return Err(BackendError::Unsupported(format!(
                "KV cache with blocks of {} tokens and heads of {}, expected at least 1 and an even number",
                spec.block_size, spec.head_dim
            )));
        }
        let shape = CacheShape::new(spec);
        let layer = |kind: &LayerKind| {
            let slots = blocks_of(spec, *kind) * spec.kv_heads;
            Ok(Layer {
                keys: Slab::zeroed("the KV cache's keys of a layer", slots * shape.key_lines())?,
                values: Slab::zeroed("the KV cache's values of a layer", slots * shape.value_block_lines())?,
            })
        };
        let layers = spec.layers.iter().map(layer).collect::<Result<_, BackendError>>()?;
        Ok(Self { spec: spec.clone(), shape, layers })
    }

    /// Its sizes.
    pub(super) fn shape(&self) -> CacheShape {
        self.shape
    }

    /// What a layer keeps; an error for a layer that the cache does not have.
    pub(super) fn kind(&self, layer: usize) -> Result<LayerKind, BackendError> {
        let missing = || refused(format!("layer {layer} of a KV cache for {} layers", self.spec.layers.len()));
        self.spec.layers.get(layer).copied().ok_or_else(missing)
    }

    /// One layer, for reading.
    pub(super) fn view(&self, layer: usize) -> LayerView<'_> {
        let Layer { keys, values } = &self.layers[layer];
        LayerView { shape: self.shape, keys, values }
    }

    /// Refuses a batch whose block tables do not cover what a layer of this kind reads and writes.
    pub(super) fn check(&self, batch: &Batch, kind: LayerKind, window: usize) -> Result<(), BackendError> {
        for sequence in &batch.sequences {
            let end = sequence.first_position + sequence.rows.len();
            let first = first_visible(sequence.first_position, kind, window);
            let needed = first / self.shape.block_size..end.div_ceil(self.shape.block_size);
            let table = sequence.table(kind).get(needed.clone());
            let table = table.ok_or_else(|| refused(format!("a block table that lacks some of blocks {needed:?}")))?;
            let blocks = blocks_of(&self.spec, kind);
            if let Some(block) = table.iter().find(|block| block.index() >= blocks) {
                return Err(refused(format!("block {block} of a pool of {blocks}")));
            }
        }
        Ok(())
    }

    /// Writes the keys and values, `[rows, kv_heads * head_dim]`, of a sequence's rows.
    pub(super) fn write(&mut self, layer: usize, sequence: &BatchSequence, keys: &[f32], values: &[f32]) {
        let shape = self.shape;
        let table = sequence.table(self.spec.layers[layer]);
        let layer = &mut self.layers[layer];
        let width = shape.kv_heads * shape.head_dim;
        for (index, row) in sequence.rows.clone().enumerate() {
            let position = sequence.first_position + index;
            let (block, offset) = (table[position / shape.block_size].index(), position % shape.block_size);
            for head in 0..shape.kv_heads {
                let slot = block * shape.kv_heads + head;
                let from = row * width + head * shape.head_dim..row * width + (head + 1) * shape.head_dim;
                let first = slot * shape.key_lines() + offset / LANES * shape.head_dim;
                for (line, key) in layer.keys[first..].iter_mut().zip(&keys[from.clone()]) {
                    line[offset % LANES] = *key;
                }
                let first = slot * shape.value_block_lines() + offset * shape.value_lines;
                let lines = layer.values[first..].iter_mut();
                for (line, values) in lines.zip(values[from].chunks(LANES)) {
                    line[..values.len()].copy_from_slice(values);
                }
            }
        }
    }
}

/// The first position that a query sees.
pub(super) fn first_visible(position: usize, kind: LayerKind, window: usize) -> usize {
    match kind {
        LayerKind::FullAttention => 0,
        LayerKind::SlidingAttention => (position + 1).saturating_sub(window),
    }
}

/// Blocks of the pool that layers of a kind use.
fn blocks_of(spec: &KvCacheSpec, kind: LayerKind) -> usize {
    match kind {
        LayerKind::FullAttention => spec.full_blocks,
        LayerKind::SlidingAttention => spec.sliding_blocks,
    }
}

/// The error of a batch that does not fit the cache.
pub(super) fn refused(message: String) -> BackendError {
    BackendError::Operation { operation: "attention", message }
}
