//! Operations of the model on one rank's tensors.
//!
//! A backend knows tensors and nothing of plans, sequences or gRPC. The model calls it in the order in which data flows.
//! Activations are `[tokens, width]`, row-major, one row a token of the flat batch.

pub mod cpu;
pub mod cuda;
pub mod reference;

use std::ops::Range;

use half::bf16;
use phalanx_proto::{
    geometry::{Geometry, LayerKind},
    ids::{BlockId, TokenId},
};
use thiserror::Error;

/// Why a backend could not do its work.
#[derive(Debug, Error)]
pub enum BackendError {
    /// Memory could not be had.
    #[error("{what} needs {needed} bytes, {available} are available")]
    OutOfMemory {
        /// What it was for.
        what: String,
        /// Bytes asked for.
        needed: u64,
        /// Bytes left.
        available: u64,
    },
    /// The machine lacks what the backend relies on.
    #[error("{0}")]
    Unsupported(String),
    /// A tensor operation failed; a bug or a broken device.
    #[error("{operation}: {message}")]
    Operation {
        /// Which operation.
        operation: &'static str,
        /// What the library or device said.
        message: String,
    },
}

/// A dense matrix as it comes from a checkpoint slice, `[rows, columns]` row-major.
#[derive(Clone, Debug)]
pub enum DenseData {
    /// As in the release.
    Bf16(Vec<bf16>),
    /// From f16 and f32 checkpoints.
    F32(Vec<f32>),
}

/// A slice of a dense matrix, `[rows, columns]`, that is about to become resident.
#[derive(Clone, Debug)]
pub struct DenseMatrix {
    /// Output features.
    pub rows: usize,
    /// Input features, contiguous.
    pub columns: usize,
    /// `rows * columns` values.
    pub data: DenseData,
}

/// One rank's part of one layer's experts, as in the checkpoint.
#[derive(Clone, Debug)]
pub struct ExpertsData {
    /// Experts of the whole layer that this rank holds.
    pub experts: Range<usize>,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Held values of the intermediate axis (a multiple of 32; may be less than the model's).
    pub intermediate: usize,
    /// FP4 pairs, low nibble first: `[experts, 2 * intermediate, hidden / 32, 16]`; even rows gate, odd rows up.
    pub gate_up_blocks: Vec<u8>,
    /// E8M0 scales: `[experts, 2 * intermediate, hidden / 32]`.
    pub gate_up_scales: Vec<u8>,
    /// `[experts, 2 * intermediate]`.
    pub gate_up_bias: Vec<f32>,
    /// `[experts, hidden, intermediate / 32, 16]`.
    pub down_blocks: Vec<u8>,
    /// `[experts, hidden, intermediate / 32]`.
    pub down_scales: Vec<u8>,
    /// `[experts, hidden]`, or empty on ranks that do not add it.
    pub down_bias: Vec<f32>,
}

/// Sizes of the KV cache, and what it needs to know of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvCacheSpec {
    /// What each layer keeps.
    pub layers: Vec<LayerKind>,
    /// Key and value heads of this rank.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens a block.
    pub block_size: usize,
    /// Blocks of each full-attention layer.
    pub full_blocks: usize,
    /// Blocks of each sliding-window layer.
    pub sliding_blocks: usize,
}

/// The tokens of one step, flattened: the rows of every activation.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// One a row.
    pub tokens: Vec<TokenId>,
    /// Position of each row's token in its sequence.
    pub positions: Vec<u32>,
    /// Sequences in the order of their rows; their ranges cover all rows.
    pub sequences: Vec<BatchSequence>,
}

/// Consecutive rows of one sequence.
#[derive(Clone, Debug)]
pub struct BatchSequence {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// Position of the first row's token.
    pub first_position: usize,
    /// Block of positions `[i * block_size, (i + 1) * block_size)` at index `i`, full-attention pool.
    pub full_table: Vec<BlockId>,
    /// The same for the sliding-window pool. Entries that have left the window are stale and never read.
    pub sliding_table: Vec<BlockId>,
}

impl BatchSequence {
    /// The block table for layers of one kind.
    pub fn table(&self, kind: LayerKind) -> &[BlockId] {
        match kind {
            LayerKind::FullAttention => &self.full_table,
            LayerKind::SlidingAttention => &self.sliding_table,
        }
    }
}

/// Queries, keys and values of one layer before rotation, this rank's heads only.
pub struct Qkv<T> {
    /// `[tokens, q_heads * head_dim]`.
    pub q: T,
    /// `[tokens, kv_heads * head_dim]`.
    pub k: T,
    /// `[tokens, kv_heads * head_dim]`.
    pub v: T,
}

/// What one call of [`Backend::attention`] needs to know of its layer.
pub struct AttentionSite<'a, V> {
    /// Index of the layer, into the KV cache.
    pub layer: usize,
    /// One logit a query head of this rank; takes part in the softmax sum and carries no value.
    pub sinks: &'a V,
}

/// Operations on one rank's tensors. Weights are made resident by the `load_*` functions.
///
/// Reductions are batch-invariant: a row of a result depends on that row's inputs (and its sequence's KV cache) alone,
/// bit for bit, whatever else is in the batch.
///
/// Every function that answers with a `Result` fails when memory is short or the device does.
#[allow(clippy::missing_errors_doc, reason = "stated once for the whole trait")]
#[allow(clippy::wrong_self_convention, reason = "tensors are made by their backend, so `from_host` needs it")]
pub trait Backend: Send + Sized {
    /// Activations, `[tokens, width]`.
    type Tensor: Send;
    /// A resident vector: norm weights, sinks.
    type Vector: Send;
    /// A resident matrix `[out, in]` with an optional bias `[out]`.
    type Linear: Send;
    /// A resident embedding table `[vocab, hidden]`.
    type Embedding: Send;
    /// One layer's resident experts.
    type Experts: Send;
    /// Which experts each row visits, and with which weights.
    type Routing: Send;

    /// The backend's name: `reference`, `cpu`, `cuda`.
    fn name(&self) -> &'static str;

    /// The device for people, such as the processor's model and the instruction set in use.
    fn device(&self) -> String;

    /// Makes a vector resident.
    fn load_vector(&mut self, values: Vec<f32>) -> Result<Self::Vector, BackendError>;
    /// Makes a matrix and its bias resident; an absent bias adds nothing.
    fn load_linear(&mut self, weight: DenseMatrix, bias: Option<Vec<f32>>) -> Result<Self::Linear, BackendError>;
    /// Makes an embedding table resident.
    fn load_embedding(&mut self, table: DenseMatrix) -> Result<Self::Embedding, BackendError>;
    /// Makes one layer's experts resident.
    fn load_experts(&mut self, experts: ExpertsData) -> Result<Self::Experts, BackendError>;
    /// Replaces the KV cache by an empty one.
    fn allocate_kv_cache(&mut self, spec: &KvCacheSpec) -> Result<(), BackendError>;
    /// Bytes that the KV cache takes for one token of one layer on this rank with `kv_heads` heads of `head_dim`.
    fn kv_bytes_per_token_and_layer(&self, kv_heads: usize, head_dim: usize) -> usize;

    /// Learns what the next step is about. Comes before the step's other operations.
    fn begin(&mut self, _batch: &Batch) -> Result<(), BackendError> {
        Ok(())
    }
    /// Rows of the embedding table: `[tokens, hidden]`.
    fn embed(&mut self, table: &Self::Embedding, tokens: &[TokenId]) -> Result<Self::Tensor, BackendError>;
    /// `x / sqrt(mean(x²) + eps) * weight`, row by row, in f32.
    fn rms_norm(&mut self, x: &Self::Tensor, weight: &Self::Vector) -> Result<Self::Tensor, BackendError>;
    /// `x Wᵀ + b`: `[tokens, in]` to `[tokens, out]`.
    fn linear(&mut self, x: &Self::Tensor, linear: &Self::Linear) -> Result<Self::Tensor, BackendError>;
    /// Queries, keys and values of one layer, each like [`Backend::linear`].
    fn qkv(
        &mut self,
        x: &Self::Tensor,
        q: &Self::Linear,
        k: &Self::Linear,
        v: &Self::Linear,
    ) -> Result<Qkv<Self::Tensor>, BackendError> {
        Ok(Qkv { q: self.linear(x, q)?, k: self.linear(x, k)?, v: self.linear(x, v)? })
    }
    /// Rotates queries and keys to the batch's positions, writes keys and values to the KV cache, and attends:
    /// `[tokens, q_heads * head_dim]`. Causal; sliding layers see `sliding_window` positions.
    fn attention(
        &mut self,
        qkv: Qkv<Self::Tensor>,
        site: &AttentionSite<'_, Self::Vector>,
        batch: &Batch,
    ) -> Result<Self::Tensor, BackendError>;
    /// Top `num_experts_per_tok` experts a row by router logit, weighted by the softmax over those logits.
    /// Ties go to the lower expert.
    fn route(&mut self, x: &Self::Tensor, router: &Self::Linear) -> Result<Self::Routing, BackendError>;
    /// This rank's part of the routed experts' weighted sum: `[tokens, hidden]`. Experts that it does not hold add nothing.
    fn experts(
        &mut self,
        x: &Self::Tensor,
        routing: &Self::Routing,
        experts: &Self::Experts,
    ) -> Result<Self::Tensor, BackendError>;
    /// `x += y`.
    fn add(&mut self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<(), BackendError>;
    /// The named rows of `x`, in that order.
    fn select_rows(&mut self, x: &Self::Tensor, rows: &[usize]) -> Result<Self::Tensor, BackendError>;
    /// A copy of `x` in host memory, row-major.
    fn to_host(&mut self, x: &Self::Tensor) -> Result<Vec<f32>, BackendError>;
    /// Activations made from host memory: `values.len() == rows * width`.
    fn from_host(&mut self, values: Vec<f32>, width: usize) -> Result<Self::Tensor, BackendError>;
    /// Lets `reduce` replace the values of `x` in host memory, in place where the backend can. A collective of the
    /// host sums partial results this way; a device's collective works on device memory instead.
    fn update_host<E: From<BackendError>>(
        &mut self,
        x: &mut Self::Tensor,
        reduce: impl FnOnce(&mut [f32]) -> Result<(), E>,
    ) -> Result<(), E>;
}

/// Constants of the arithmetic that every backend is made with.
#[derive(Clone, Debug)]
pub struct Arithmetic {
    /// The whole model's shape.
    pub geometry: Geometry,
    /// Rotary frequencies of one head, `[head_dim / 2]`, each an f32. Use [`Arithmetic::rotation`] for angles.
    pub inverse_frequencies: Vec<f64>,
    /// Factor on cosine and sine (YaRN's attention factor).
    pub rotary_scale: f64,
}
