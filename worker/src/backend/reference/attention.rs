//! Attention over a paged cache: rotation, masks, sinks.

use std::ops::Range;

use candle_core::{Result, Tensor};
use phalanx_proto::{geometry::LayerKind, ids::BlockId};

use super::{ReferenceBackend, tensor};
use crate::backend::{AttentionSite, BackendError, Batch, BatchSequence, KvCacheSpec, Qkv};

/// Queries that attend together: positions `[n * QUERY_TILE, (n + 1) * QUERY_TILE)` of a sequence.
const QUERY_TILE: usize = 16;

/// Paged keys and values.
#[derive(Default)]
pub(super) struct Cache {
    spec: Option<KvCacheSpec>,
    /// `[layer][block, slot, kv_heads, head_dim]`
    keys: Vec<Vec<f32>>,
    /// As `keys`.
    values: Vec<Vec<f32>>,
}

impl ReferenceBackend {
    /// Rotates, writes to the cache, and attends: `[tokens, heads * head_dim]`.
    pub(super) fn attend(
        &mut self,
        qkv: &Qkv<Tensor>,
        site: &AttentionSite<'_, Tensor>,
        batch: &Batch,
    ) -> Result<Tensor> {
        let (tokens, dim) = (batch.tokens.len(), self.arithmetic.geometry.head_dim);
        let (cos, sin) = self.angles(&batch.positions)?;
        let heads = |x: &Tensor| x.reshape((tokens, (), dim));
        let q = rotate(&heads(&qkv.q)?, &cos, &sin)?;
        let k = rotate(&heads(&qkv.k)?, &cos, &sin)?;
        self.cache.write(site.layer, batch, &k.flatten_all()?.to_vec1()?, &qkv.v.flatten_all()?.to_vec1()?)?;
        let mut attended = Vec::new();
        for sequence in &batch.sequences {
            let mut row = sequence.rows.start;
            while row < sequence.rows.end {
                let position = sequence.first_position + row - sequence.rows.start;
                let rows = row..sequence.rows.end.min(row + QUERY_TILE - position % QUERY_TILE);
                attended.push(self.attend_tile(&q.narrow(0, row, rows.len())?, position, sequence, site)?);
                row = rows.end;
            }
        }
        Tensor::cat(&attended, 0)
    }

    /// Cosine and sine of every position's angles, `[tokens, 1, head_dim / 2]` each.
    fn angles(&self, positions: &[u32]) -> Result<(Tensor, Tensor)> {
        let pairs = self.arithmetic.inverse_frequencies.len();
        let turn = |&position: &u32| (0..pairs).map(move |pair| self.arithmetic.rotation(position, pair));
        let (cos, sin) = positions.iter().flat_map(turn).unzip();
        let table = |values: Vec<f32>| tensor(values, (positions.len(), 1, pairs));
        Ok((table(cos)?, table(sin)?))
    }

    /// Attention of queries `[queries, heads, head_dim]` at consecutive positions from `first` within one tile.
    fn attend_tile(
        &self,
        queries: &Tensor,
        first: usize,
        sequence: &BatchSequence,
        site: &AttentionSite<'_, Tensor>,
    ) -> Result<Tensor> {
        let geometry = &self.arithmetic.geometry;
        let (count, heads, dim) = queries.dims3()?;
        let kind = geometry.layer_types[site.layer];
        let window = match kind {
            LayerKind::FullAttention => usize::MAX,
            LayerKind::SlidingAttention => geometry.sliding_window,
        };
        let tile = first - first % QUERY_TILE..first - first % QUERY_TILE + QUERY_TILE;
        let seen_from = |position: usize| (position + 1).saturating_sub(window);
        // Keys of the whole tile, zero where no query of this call sees them: older ones may have left the cache,
        // later ones are not there yet.
        let span = seen_from(tile.start)..tile.end;
        let seen = seen_from(first)..first + count;
        let padding = (seen.start - span.start, span.end - seen.end);
        let (keys, values) = self.cache.read(site.layer, sequence.table(kind), seen)?;
        let keys = keys.pad_with_zeros(1, padding.0, padding.1)?; // [kv_heads, keys, head_dim]
        let values = values.pad_with_zeros(1, padding.0, padding.1)?;
        let kv_heads = keys.dim(0)?;
        let q = queries.pad_with_zeros(0, first - tile.start, tile.end - first - count)?.transpose(0, 1)?;
        let q = q.contiguous()?.reshape((kv_heads, heads / kv_heads * QUERY_TILE, dim))?;
        let scores = (q.matmul(&keys.transpose(1, 2)?.contiguous()?)? / (dim as f64).sqrt())?;
        let scores =
            scores.reshape((heads, QUERY_TILE, span.len()))?.broadcast_add(&mask(tile.clone(), span, window)?)?;
        let weights =
            softmax_with_sinks(&scores, site.sinks)?.reshape((kv_heads, heads / kv_heads * QUERY_TILE, ()))?;
        let attended = weights.matmul(&values)?.reshape((heads, QUERY_TILE, dim))?.transpose(0, 1)?;
        attended.narrow(0, first - tile.start, count)?.reshape((count, heads * dim))
    }
}

/// `x` `[tokens, heads, head_dim]` turned by the angles: the first half of a head pairs with the second.
fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.dim(2)? / 2;
    let (x1, x2) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let first = (x1.broadcast_mul(cos)? - x2.broadcast_mul(sin)?)?;
    let second = (x2.broadcast_mul(cos)? + x1.broadcast_mul(sin)?)?;
    Tensor::cat(&[first, second], 2)
}

/// 0 where a query sees a key and -∞ elsewhere, `[queries, keys]`.
fn mask(queries: Range<usize>, keys: Range<usize>, window: usize) -> Result<Tensor> {
    let shape = (queries.len(), keys.len());
    let sees = |q: usize, k: usize| k <= q && q - k < window;
    let entry = |q, k| if sees(q, k) { 0.0 } else { f32::NEG_INFINITY };
    tensor(queries.flat_map(|q| keys.clone().map(move |k| entry(q, k))).collect(), shape)
}

/// Softmax over keys of `scores` `[heads, queries, keys]`. Sinks `[heads]` take part in the sum but carry no value:
/// they only lower the other weights.
fn softmax_with_sinks(scores: &Tensor, sinks: &Tensor) -> Result<Tensor> {
    let sinks = sinks.reshape(((), 1, 1))?;
    let largest = scores.max_keepdim(2)?.broadcast_maximum(&sinks)?;
    let exps = scores.broadcast_sub(&largest)?.exp()?;
    let sum = (exps.sum_keepdim(2)? + sinks.broadcast_sub(&largest)?.exp()?)?;
    exps.broadcast_div(&sum)
}

impl Cache {
    pub(super) fn new(spec: &KvCacheSpec) -> std::result::Result<Self, BackendError> {
        let slot = spec.kv_heads * spec.head_dim;
        let layer = |kind: &LayerKind| {
            let blocks = match kind {
                LayerKind::FullAttention => spec.full_blocks,
                LayerKind::SlidingAttention => spec.sliding_blocks,
            };
            let len = blocks * spec.block_size * slot;
            let mut values = Vec::new();
            values.try_reserve_exact(len).map_err(|_| BackendError::OutOfMemory {
                what: "the KV cache".to_owned(),
                needed: (len * size_of::<f32>()) as u64,
                available: 0,
            })?;
            values.resize(len, 0.0_f32);
            Ok::<_, BackendError>(values)
        };
        let pool = || spec.layers.iter().map(layer).collect::<std::result::Result<Vec<_>, _>>();
        Ok(Self { spec: Some(spec.clone()), keys: pool()?, values: pool()? })
    }

    fn spec(&self) -> Result<&KvCacheSpec> {
        self.spec.as_ref().ok_or_else(|| candle_core::Error::Msg("the KV cache has not been allocated".to_owned()))
    }

    /// Writes every row's key and value, `[tokens, kv_heads * head_dim]`, to its slot.
    fn write(&mut self, layer: usize, batch: &Batch, keys: &[f32], values: &[f32]) -> Result<()> {
        let spec = self.spec()?;
        let (kind, block_size, width) = (spec.layers[layer], spec.block_size, spec.kv_heads * spec.head_dim);
        for sequence in &batch.sequences {
            let table = sequence.table(kind);
            for (row, position) in sequence.rows.clone().zip(sequence.first_position..) {
                let slot = slot(table, position, block_size) * width;
                self.keys[layer][slot..slot + width].copy_from_slice(&keys[row * width..][..width]);
                self.values[layer][slot..slot + width].copy_from_slice(&values[row * width..][..width]);
            }
        }
        Ok(())
    }

    /// Keys and values of a range of positions, `[kv_heads, positions, head_dim]` each.
    fn read(&self, layer: usize, table: &[BlockId], positions: Range<usize>) -> Result<(Tensor, Tensor)> {
        let spec = self.spec()?;
        let width = spec.kv_heads * spec.head_dim;
        let gather = |pool: &[f32]| {
            let slots = positions.clone().map(|position| slot(table, position, spec.block_size) * width);
            let rows = slots.flat_map(|slot| &pool[slot..slot + width]).copied().collect();
            tensor(rows, (positions.len(), spec.kv_heads, spec.head_dim))?.transpose(0, 1)?.contiguous()
        };
        Ok((gather(&self.keys[layer])?, gather(&self.values[layer])?))
    }
}

/// A position's place in a pool, in tokens.
fn slot(table: &[BlockId], position: usize, block_size: usize) -> usize {
    table[position / block_size].index() * block_size + position % block_size
}
