//! The KV cache, and attention over it.

use phalanx_proto::geometry::LayerKind;

use super::{
    backend::{CudaBackend, Vector},
    driver::{Address, Arguments, Driver, Shape},
    kernels::{ATTEND_DECODE, ATTEND_PREFILL, KV_WRITE, LARGE_SHARED_BYTES},
    linear::f32_bytes,
    memory::{Buffer, Pooled},
    step::Step,
    tensor::{Element, Tensor},
};
use crate::backend::{AttentionSite, BackendError, Batch, KvCacheSpec, Qkv};

/// Keys and values of all layers, and the step that is under way.
pub(super) struct Cache<D: Driver> {
    spec: Option<KvCacheSpec>,
    /// Keys and values, by layer.
    layers: Vec<(Buffer<D>, Buffer<D>)>,
    /// Query heads that share a head of keys, once the kernels are compiled.
    group: usize,
    /// Cosine and sine by position.
    turns: Option<Buffer<D>>,
    step: Step,
    words: Option<Pooled<D>>,
}

impl<D: Driver> Default for Cache<D> {
    fn default() -> Self {
        Self { spec: None, layers: Vec::new(), group: 0, turns: None, step: Step::default(), words: None }
    }
}

/// Rows of queries that a block of the prefill kernel takes; a group's heads at one position are neighbours.
const PREFILL_ROWS: usize = 128;
/// Most query heads that the kernels let share a head of keys.
const LARGEST_GROUP: usize = 16;
/// Tokens that a warp of the decoding kernel takes at a time, and warps of its blocks.
const DECODE_STEP: usize = 32;
const DECODE_WARPS: usize = 4;
/// Rows that a block of `rotate_and_store` takes.
const STORED_ROWS: usize = 8;

fn without_cache() -> BackendError {
    BackendError::Operation { operation: "attention", message: "the KV cache has not been allocated".to_owned() }
}

impl<D: Driver> CudaBackend<D> {
    pub(super) fn allocate_cache(&mut self, spec: &KvCacheSpec) -> Result<(), BackendError> {
        // What was there goes first, so that both never exist at once.
        self.cache.layers.clear();
        (self.cache.spec, self.cache.group, self.cache.turns) = (None, 0, None);
        if !spec.block_size.is_multiple_of(8) {
            let message = format!("blocks of {} tokens; backend cuda needs a multiple of 8", spec.block_size);
            return Err(BackendError::Unsupported(message));
        }
        let of_token = spec.kv_heads * spec.head_dim * Element::Bf16.bytes();
        for kind in &spec.layers {
            let blocks = match kind {
                LayerKind::FullAttention => spec.full_blocks,
                LayerKind::SlidingAttention => spec.sliding_blocks,
            };
            let bytes = blocks * spec.block_size * of_token;
            self.cache.layers.push((Buffer::new(&self.driver, bytes)?, Buffer::new(&self.driver, bytes)?));
        }
        self.cache.spec = Some(spec.clone());
        Ok(())
    }

    /// Query heads of this rank that share one of its heads of keys.
    fn group(&self) -> usize {
        self.cache.group
    }

    /// Compiles the attention kernels once it is known how many heads a group has, and computes the rotations.
    fn prepare_attention(&mut self, q_heads: usize) -> Result<(), BackendError> {
        let spec = self.cache.spec.as_ref().ok_or_else(without_cache)?;
        let group = q_heads / spec.kv_heads.max(1);
        if self.cache.group == group {
            return Ok(());
        }
        if !(1..=LARGEST_GROUP).contains(&group) || !spec.head_dim.is_multiple_of(32) {
            let message = format!(
                "{group} query heads a key head, of {} values each; backend cuda takes 1 to {LARGEST_GROUP} of a multiple \
                 of 32",
                spec.head_dim
            );
            return Err(BackendError::Unsupported(message));
        }
        let definitions = [("HEAD_DIM", spec.head_dim as u32), ("GROUP", group as u32)];
        let kernels = &mut self.kernels;
        kernels.add(&KV_WRITE, &definitions, &["rotary_table", "rotate_and_store"], 0)?;
        kernels.add(&ATTEND_DECODE, &definitions, &["attend_decode", "attend_combine"], LARGE_SHARED_BYTES)?;
        kernels.add(&ATTEND_PREFILL, &definitions, &["attend_prefill"], LARGE_SHARED_BYTES)?;
        self.cache.turns = Some(self.turns()?);
        self.cache.group = group;
        Ok(())
    }

    /// Cosine and sine of every position that can occur.
    fn turns(&self) -> Result<Buffer<D>, BackendError> {
        // No sequence is longer than the cache.
        let capacity = self.cache.spec.as_ref().map_or(0, |spec| spec.full_blocks * spec.block_size);
        let positions = self.arithmetic.geometry.max_position_embeddings.min(capacity);
        let frequencies: Vec<f32> = self.arithmetic.inverse_frequencies.iter().map(|&value| value as f32).collect();
        let table = Buffer::new(&self.driver, 8 * positions * frequencies.len())?;
        let count = frequencies.len();
        let frequencies = Buffer::holding(&self.driver, &f32_bytes(&frequencies))?;
        let arguments = Arguments::new()
            .pointer(frequencies.address())
            .pointer(table.address())
            .f64(self.arithmetic.rotary_scale)
            .size(positions);
        let grid = [(positions * count).div_ceil(256).min(4096) as u32, 1, 1];
        self.kernels.launch("rotary_table", Shape { grid, threads: 256, shared_bytes: 0 }, &arguments)?;
        Ok(table)
    }

    pub(super) fn begin_step(&mut self, batch: &Batch) -> Result<(), BackendError> {
        let spec = self.cache.spec.as_ref().ok_or_else(without_cache)?;
        let geometry = &self.arithmetic.geometry;
        // World sizes beyond the number of key heads leave a rank fewer queries a key, which need no fewer tiles.
        let group = geometry.num_attention_heads.div_ceil(geometry.num_key_value_heads).max(1);
        let step = Step::new(batch, spec.block_size, (PREFILL_ROWS / group).max(1));
        self.cache.words = Some(self.words(step.words.iter().copied())?);
        self.cache.step = step;
        Ok(())
    }

    pub(super) fn attend(
        &mut self,
        qkv: &Qkv<Tensor<D>>,
        site: &AttentionSite<'_, Vector<D>>,
    ) -> Result<Tensor<D>, BackendError> {
        self.prepare_attention(site.sinks.len)?;
        let q = self.rotated(qkv, site)?;
        let out = self.tensor(q.rows, q.width, Element::Bf16)?;
        if self.cache.step.decoding > 0 {
            self.decode(&q, site, &out)?;
        }
        if self.cache.step.tiles > 0 {
            self.prefill(&q, site, &out)?;
        }
        Ok(out)
    }

    fn base(&self) -> Address {
        self.cache.words.as_ref().map_or(Address(0), Pooled::address)
    }

    fn spec(&self) -> Result<&KvCacheSpec, BackendError> {
        self.cache.spec.as_ref().ok_or_else(without_cache)
    }

    /// Queries turned to their positions; keys and values in the cache.
    fn rotated(&self, qkv: &Qkv<Tensor<D>>, site: &AttentionSite<'_, Vector<D>>) -> Result<Tensor<D>, BackendError> {
        let (spec, step, base) = (self.spec()?, &self.cache.step, self.base());
        let rows = qkv.q.rows;
        let packed = self.side_by_side(qkv)?;
        let q = self.tensor(rows, qkv.q.width, Element::Bf16)?;
        let (keys, values) = &self.cache.layers[site.layer];
        let arguments = Arguments::new()
            .pointer(packed.as_ref().unwrap_or(&qkv.q).address())
            .optional(self.cache.turns.as_ref().map(Buffer::address))
            .pointer(step.positions(base))
            .pointer(step.slots(base, spec.layers[site.layer]))
            .pointer(q.address())
            .pointer(keys.address())
            .pointer(values.address())
            .size(rows)
            .size(spec.kv_heads)
            .size(spec.block_size);
        let grid = [rows.div_ceil(STORED_ROWS) as u32, spec.kv_heads as u32, 1];
        self.kernels.launch("rotate_and_store", Shape { grid, threads: 256, shared_bytes: 0 }, &arguments)?;
        Ok(q)
    }

    /// Queries, keys and values as one bf16 tensor, if they are not columns of one already.
    fn side_by_side(&self, qkv: &Qkv<Tensor<D>>) -> Result<Option<Tensor<D>>, BackendError> {
        let parts = [&qkv.q, &qkv.k, &qkv.v];
        let width = parts.iter().map(|part| part.width).sum();
        if qkv.q.element == Element::Bf16 && qkv.q.stride == width && qkv.q.column == 0 {
            return Ok(None);
        }
        let all = self.tensor(qkv.q.rows, width, Element::Bf16)?;
        let mut column = 0;
        for part in parts {
            let wide = self.widened(part)?;
            let to = all.columns(column, part.width).address();
            self.narrow_into(wide.as_ref().unwrap_or(part), to, width)?;
            column += part.width;
        }
        Ok(Some(all))
    }

    /// A kernel's `KvCache` of a layer.
    fn with_cache(&self, arguments: Arguments, layer: usize) -> Result<Arguments, BackendError> {
        let (spec, step) = (self.spec()?, &self.cache.step);
        let (kind, (keys, values)) = (spec.layers[layer], &self.cache.layers[layer]);
        let window = match kind {
            LayerKind::FullAttention => 0,
            LayerKind::SlidingAttention => self.arithmetic.geometry.sliding_window,
        };
        Ok(arguments
            .pointer(keys.address())
            .pointer(values.address())
            .pointer(step.tables(self.base(), kind))
            .size(step.table_stride)
            .size(spec.kv_heads)
            .size(spec.block_size)
            .size(window))
    }

    /// Into how many parts the tokens of a sequence are cut, so that the device is full and no warp has nothing to do.
    fn splits(&self, layer: usize) -> Result<usize, BackendError> {
        let (spec, step) = (self.spec()?, &self.cache.step);
        let seen = match spec.layers[layer] {
            LayerKind::FullAttention => step.longest,
            LayerKind::SlidingAttention => step.longest.min(self.arithmetic.geometry.sliding_window + DECODE_STEP),
        };
        let blocks = spec.kv_heads * step.decoding;
        let wanted = (3 * self.driver.properties().multiprocessors as usize).div_ceil(blocks);
        Ok(wanted.min(seen.div_ceil(DECODE_STEP * DECODE_WARPS)).max(1))
    }

    fn decode(&self, q: &Tensor<D>, site: &AttentionSite<'_, Vector<D>>, out: &Tensor<D>) -> Result<(), BackendError> {
        let (spec, step, base) = (self.spec()?, &self.cache.step, self.base());
        let (heads, splits) = (self.group() * spec.kv_heads, self.splits(site.layer)?);
        let partials = step.decoding * heads * splits;
        let (statistics, values) = (self.pool.take(8 * partials)?, self.pool.take(4 * partials * spec.head_dim)?);
        let arguments = Arguments::new().pointer(q.address()).pointer(step.rows(base)).pointer(step.lengths(base));
        let arguments = self
            .with_cache(arguments, site.layer)?
            .pointer(statistics.address())
            .pointer(values.address())
            .pointer(site.sinks.values.address())
            .optional((splits == 1).then(|| out.address()));
        let shape = Shape {
            grid: [splits as u32, spec.kv_heads as u32, step.decoding as u32],
            threads: 32 * DECODE_WARPS as u32,
            shared_bytes: ((spec.head_dim + 10) * self.group() * 16) as u32,
        };
        self.kernels.launch("attend_decode", shape, &arguments)?;
        if splits == 1 {
            return Ok(());
        }
        let arguments = Arguments::new()
            .pointer(statistics.address())
            .pointer(values.address())
            .pointer(step.rows(base))
            .pointer(site.sinks.values.address())
            .pointer(out.address())
            .size(heads)
            .size(splits);
        let grid = [(heads * spec.head_dim).div_ceil(256) as u32, step.decoding as u32, 1];
        Ok(self.kernels.launch("attend_combine", Shape { grid, threads: 128, shared_bytes: 0 }, &arguments)?)
    }

    fn prefill(&self, q: &Tensor<D>, site: &AttentionSite<'_, Vector<D>>, out: &Tensor<D>) -> Result<(), BackendError> {
        let (spec, step) = (self.spec()?, &self.cache.step);
        let arguments = Arguments::new().pointer(q.address()).pointer(step.tile_list(self.base()));
        let arguments =
            self.with_cache(arguments, site.layer)?.pointer(site.sinks.values.address()).pointer(out.address());
        let shape = Shape {
            grid: [step.tiles as u32, spec.kv_heads as u32, 1],
            // Wide heads leave a warp registers for half as many rows.
            threads: if spec.head_dim > 64 { 256 } else { 128 },
            shared_bytes: (4 * (64 * (spec.head_dim + 8) + spec.head_dim * 72)) as u32,
        };
        Ok(self.kernels.launch("attend_prefill", shape, &arguments)?)
    }
}
