//! What each rank of a group will hold, from a checkpoint's headers alone.
//!
//! Ranges come from [`phalanx_proto::layout`], which the workers read by; bytes come from the checkpoint's own element
//! types. Nothing is estimated: activations and a device's own overhead are not in these figures.

pub mod pools;
mod table;

use phalanx_proto::{
    checkpoint::Checkpoint,
    geometry::{Geometry, LayerKind},
    ids::Rank,
    layout::{Layout, LayoutError, MAX_WORLD_SIZE, Parallelism, RankLayout, TensorSlice},
};
use serde::Serialize;
use thiserror::Error;

use pools::{BlockBytes, KvDemand, KvPools, PoolError};

/// Why a model cannot be placed as asked.
#[derive(Debug, Error)]
pub enum PlanError {
    /// The world size does not divide the model.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The weights alone exceed a rank's memory.
    #[error(
        "rank {rank} needs {needed} bytes for its weights, {available} are available; \
         world sizes whose weights fit: {fitting:?}"
    )]
    Weights {
        /// The rank with the most weights.
        rank: u32,
        /// What its weights take, in bytes.
        needed: u64,
        /// What it has, in bytes.
        available: u64,
        /// World sizes at which the largest rank would fit.
        fitting: Vec<usize>,
    },
    /// What the weights leave is too little for the KV cache.
    #[error(transparent)]
    KvCache(#[from] PoolError),
}

/// What is asked of the planner.
#[derive(Clone, Debug)]
pub struct Placement {
    /// Number of ranks.
    pub world_size: usize,
    /// How the experts are divided.
    pub parallelism: Parallelism,
    /// Bytes of one key or value as the backend stores it.
    pub kv_element_bytes: usize,
    /// What the KV cache must serve.
    pub demand: KvDemand,
    /// Memory of each rank that weights and KV cache may take together, in bytes. Absent: nothing is said about what fits.
    pub memory_bytes: Option<u64>,
}

/// Where a model's bytes go. Serializes to the JSON of `phalanx plan --json`; prints as a table.
#[derive(Clone, Debug, Serialize)]
pub struct LayoutPlan {
    /// Name of the checkpoint's directory.
    pub model: String,
    /// Number of weights, every expert counted.
    pub parameters: u64,
    /// Number of ranks.
    pub world_size: usize,
    /// `tp` or `ep`.
    pub parallelism: String,
    /// One entry a rank.
    pub ranks: Vec<RankPlan>,
    /// Bytes of all tensors of the checkpoint.
    pub checkpoint_bytes: u64,
    /// Bytes of tensors that the model does not use and no rank loads.
    pub unused_bytes: u64,
    /// Bytes that are held by a second, third … rank. The ranks' weights are the checkpoint's used bytes plus these.
    pub replicated_bytes: u64,
    /// The largest rank's weights over the mean.
    pub largest_over_mean: f64,
    /// Bytes of keys and values of one token, full-attention layers, all ranks together.
    pub kv_bytes_per_token: u64,
    /// Bytes that one sequence takes in the sliding-window layers however long it grows, all ranks together.
    pub kv_bytes_per_sequence_sliding: u64,
    /// What a rank's memory leaves room for, when it was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fits: Option<Fit>,
}

/// One rank's part.
#[derive(Clone, Debug, Serialize)]
pub struct RankPlan {
    /// Place in the group.
    pub rank: u32,
    /// Bytes of weights as stored in the checkpoint.
    pub weight_bytes: u64,
    /// Of these, the experts'.
    pub expert_bytes: u64,
    /// Of these, the attention's.
    pub attention_bytes: u64,
    /// Of these, embedding, unembedding, norms and routers.
    pub other_bytes: u64,
    /// Query heads, first and one past the last.
    pub q_heads: [usize; 2],
    /// Key and value heads.
    pub kv_heads: [usize; 2],
    /// Rows of the unembedding.
    pub vocab_rows: [usize; 2],
    /// One entry a layer.
    pub layers: Vec<LayerPlan>,
    /// Bytes of keys and values of one token on this rank, full-attention layers.
    pub kv_bytes_per_token: u64,
    /// Bytes that one sequence takes on this rank in the sliding-window layers.
    pub kv_bytes_per_sequence_sliding: u64,
}

/// A rank's part of one layer's experts.
#[derive(Clone, Debug, Serialize)]
pub struct LayerPlan {
    /// Experts, first and one past the last.
    pub experts: [usize; 2],
    /// Values of the intermediate axis.
    pub intermediate: [usize; 2],
}

/// What fits beside the weights of the largest rank.
#[derive(Clone, Debug, Serialize)]
pub struct Fit {
    /// Memory of a rank, in bytes.
    pub memory_bytes: u64,
    /// What the weights leave of it.
    pub free_bytes: u64,
    /// What the KV cache takes of that.
    pub kv_bytes: u64,
    /// Tokens a block.
    pub block_size: usize,
    /// Blocks of each full-attention layer.
    pub full_blocks: u32,
    /// Blocks of each sliding-window layer.
    pub sliding_blocks: u32,
    /// Tokens that all sequences together can keep.
    pub tokens: u64,
    /// Sequences that can run at once, each of `max_model_len` tokens.
    pub longest_sequences: u64,
}

/// Works out where a checkpoint's bytes go.
///
/// # Errors
/// When the world size does not divide the model or a rank's memory is too small; says what would do.
pub fn plan(checkpoint: &Checkpoint, placement: &Placement) -> Result<LayoutPlan, PlanError> {
    let geometry = &checkpoint.geometry;
    let layout = Layout::new(geometry, placement.world_size, placement.parallelism)?;
    let ranks: Vec<RankPlan> = rank_layouts(&layout, geometry).map(|r| rank_plan(checkpoint, &r, placement)).collect();
    let total: u64 = ranks.iter().map(|rank| rank.weight_bytes).sum();
    let largest = ranks.iter().map(|rank| rank.weight_bytes).max().unwrap_or(0);
    let used: u64 = used_tensors(geometry)?.iter().map(|slice| checkpoint.slice_bytes(slice)).sum();
    let fits = placement.memory_bytes.map(|memory| fit(checkpoint, placement, &ranks, memory)).transpose()?;
    Ok(LayoutPlan {
        model: checkpoint.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        parameters: geometry.parameters(),
        world_size: layout.world_size(),
        parallelism: layout.parallelism().to_string(),
        checkpoint_bytes: checkpoint.bytes(),
        unused_bytes: checkpoint.bytes().saturating_sub(used),
        replicated_bytes: replicated_bytes(checkpoint, layout.world_size()),
        largest_over_mean: largest as f64 * ranks.len() as f64 / total.max(1) as f64,
        kv_bytes_per_token: ranks.iter().map(|rank| rank.kv_bytes_per_token).sum(),
        kv_bytes_per_sequence_sliding: ranks.iter().map(|rank| rank.kv_bytes_per_sequence_sliding).sum(),
        fits,
        ranks,
    })
}

/// Bytes of a block of all layers of a kind, on the rank where they take the most.
pub fn block_bytes(layout: &Layout, geometry: &Geometry, block_size: usize, kv_element_bytes: usize) -> BlockBytes {
    let of = |kind| {
        let bytes = rank_layouts(layout, geometry).map(|r| r.kv_bytes_per_token(geometry, kind, kv_element_bytes));
        (bytes.max().unwrap_or(0) * block_size) as u64
    };
    BlockBytes { full: of(LayerKind::FullAttention), sliding: of(LayerKind::SlidingAttention) }
}

fn rank_layouts(layout: &Layout, geometry: &Geometry) -> impl Iterator<Item = RankLayout> {
    (0..layout.world_size()).map(|rank| layout.rank(geometry, Rank(rank as u32)))
}

fn used_tensors(geometry: &Geometry) -> Result<Vec<TensorSlice>, LayoutError> {
    Ok(Layout::new(geometry, 1, Parallelism::Tensor)?.rank(geometry, Rank(0)).tensors(geometry))
}

fn rank_plan(checkpoint: &Checkpoint, held: &RankLayout, placement: &Placement) -> RankPlan {
    let geometry = &checkpoint.geometry;
    let (mut experts, mut attention, mut other) = (0, 0, 0);
    for slice in held.tensors(geometry) {
        let bytes = checkpoint.slice_bytes(&slice);
        match &slice.name {
            name if name.contains(".mlp.experts.") => experts += bytes,
            name if name.contains(".self_attn.") => attention += bytes,
            _ => other += bytes,
        }
    }
    let kv = |kind| held.kv_bytes_per_token(geometry, kind, placement.kv_element_bytes) as u64;
    let demand = &placement.demand;
    let sliding_tokens = demand.sliding_blocks_per_sequence(geometry.sliding_window) * demand.block_size as u64;
    RankPlan {
        rank: held.rank.0,
        weight_bytes: experts + attention + other,
        expert_bytes: experts,
        attention_bytes: attention,
        other_bytes: other,
        q_heads: [held.q_heads.start, held.q_heads.end],
        kv_heads: [held.kv_heads.start, held.kv_heads.end],
        vocab_rows: [held.vocab_rows.start, held.vocab_rows.end],
        layers: held.experts.iter().map(|e| layer_plan(&e.experts, &e.intermediate)).collect(),
        kv_bytes_per_token: kv(LayerKind::FullAttention),
        kv_bytes_per_sequence_sliding: kv(LayerKind::SlidingAttention) * sliding_tokens,
    }
}

fn layer_plan(experts: &std::ops::Range<usize>, intermediate: &std::ops::Range<usize>) -> LayerPlan {
    LayerPlan { experts: [experts.start, experts.end], intermediate: [intermediate.start, intermediate.end] }
}

/// Bytes held more than once, told by what a tensor is and not by adding up slices, so that the ranks' sum has
/// something to be checked against. Embedding, norms and routers lie on every rank; a key-value head lies on several
/// when there are more ranks than heads; everything else lies on one rank only.
fn replicated_bytes(checkpoint: &Checkpoint, world_size: usize) -> u64 {
    let kv_heads = checkpoint.geometry.num_key_value_heads;
    let kv_copies = world_size.div_ceil(kv_heads) as u64 - 1;
    let everywhere = world_size as u64 - 1;
    let copies = |name: &str| match name {
        "model.embed_tokens.weight" | "model.norm.weight" => everywhere,
        name if name.contains("layernorm.weight") || name.contains(".mlp.router.") => everywhere,
        name if name.contains(".k_proj.") || name.contains(".v_proj.") => kv_copies,
        _ => 0,
    };
    checkpoint.tensors.iter().map(|(name, entry)| copies(name) * entry.bytes).sum()
}

fn fit(checkpoint: &Checkpoint, placement: &Placement, ranks: &[RankPlan], memory: u64) -> Result<Fit, PlanError> {
    let geometry = &checkpoint.geometry;
    let layout = Layout::new(geometry, placement.world_size, placement.parallelism)?;
    let weights = ranks.iter().map(|rank| (rank.weight_bytes, rank.rank));
    let (needed, rank) = weights.max().unwrap_or_default();
    let Some(free_bytes) = memory.checked_sub(needed) else {
        let fitting = fitting_sizes(checkpoint, placement.parallelism, memory);
        return Err(PlanError::Weights { rank, needed, available: memory, fitting });
    };
    let demand = &placement.demand;
    let bytes = block_bytes(&layout, geometry, demand.block_size, placement.kv_element_bytes);
    let pools = pools::split(free_bytes, &bytes, geometry.sliding_window, demand)?;
    Ok(Fit {
        memory_bytes: memory,
        free_bytes,
        kv_bytes: pools.bytes(&bytes),
        block_size: demand.block_size,
        full_blocks: pools.full_blocks,
        sliding_blocks: pools.sliding_blocks,
        tokens: tokens_that_fit(&pools, demand),
        longest_sequences: longest_sequences(&pools, &bytes, geometry.sliding_window, demand),
    })
}

/// A model without full-attention layers keeps a window of each sequence only, whatever its length.
fn tokens_that_fit(pools: &KvPools, demand: &KvDemand) -> u64 {
    u64::from(if pools.full_blocks > 0 { pools.full_blocks } else { pools.sliding_blocks }) * demand.block_size as u64
}

fn longest_sequences(pools: &KvPools, bytes: &BlockBytes, window: usize, demand: &KvDemand) -> u64 {
    let full = u64::from(pools.full_blocks) / demand.full_blocks_per_sequence();
    let sliding = u64::from(pools.sliding_blocks) / demand.sliding_blocks_per_sequence(window);
    let of_kind = |bytes: u64, sequences: u64| if bytes > 0 { sequences } else { u64::MAX };
    of_kind(bytes.full, full).min(of_kind(bytes.sliding, sliding)).min(demand.max_num_seqs as u64)
}

/// World sizes at which the largest rank's weights fit into `memory` bytes.
fn fitting_sizes(checkpoint: &Checkpoint, parallelism: Parallelism, memory: u64) -> Vec<usize> {
    let geometry = &checkpoint.geometry;
    let fits = |&size: &usize| {
        Layout::new(geometry, size, parallelism)
            .is_ok_and(|layout| rank_layouts(&layout, geometry).all(|rank| weight_bytes(checkpoint, &rank) <= memory))
    };
    (1..=MAX_WORLD_SIZE).filter(fits).collect()
}

fn weight_bytes(checkpoint: &Checkpoint, held: &RankLayout) -> u64 {
    held.tensors(&checkpoint.geometry).iter().map(|slice| checkpoint.slice_bytes(slice)).sum()
}
