//! The forward pass of gpt-oss over one rank's shard, in the order in which data flows.
//!
//! Written once over [`Backend`] and [`Collective`]. It knows no plan, no request and no file: a batch of tokens with
//! their block tables goes in, this rank's columns of the logits come out.

mod batch;
mod load;
mod rotary;

use std::time::{Duration, Instant};

use phalanx_proto::{geometry::Geometry, layout::RankLayout};
use thiserror::Error;

pub use self::{batch::BatchError, load::LoadError};
pub use crate::checkpoint::LoadedBytes;
use crate::{
    backend::{AttentionSite, Backend, BackendError, Batch, KvCacheSpec},
    collective::{Collective, CollectiveError},
};

/// Why a forward pass ended without logits.
#[derive(Debug, Error)]
pub enum ModelError {
    /// The batch does not fit the model or its cache; nothing was computed.
    #[error("batch: {0}")]
    Batch(#[from] BatchError),
    /// The backend failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A sum over the group failed or was aborted.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

/// One rank's shard of a model, resident in a backend.
pub struct Model<B: Backend> {
    geometry: Geometry,
    layout: RankLayout,
    backend: B,
    /// Absent until the cache is allocated.
    cache: Option<KvCacheSpec>,
    embedding: B::Embedding,
    layers: Vec<Layer<B>>,
    norm: B::Vector,
    /// This rank's rows of `lm_head`.
    unembedding: B::Linear,
    weight_bytes: u64,
    collective_time: Duration,
}

/// One layer's weights, this rank's part.
struct Layer<B: Backend> {
    attention_norm: B::Vector,
    /// `[q_heads * head_dim, hidden]`
    q: B::Linear,
    /// `[kv_heads * head_dim, hidden]`
    k: B::Linear,
    /// `[kv_heads * head_dim, hidden]`
    v: B::Linear,
    /// `[q_heads]`
    sinks: B::Vector,
    /// `[hidden, q_heads * head_dim]`; only the first rank has the bias.
    o: B::Linear,
    experts_norm: B::Vector,
    /// `[num_local_experts, hidden]`
    router: B::Linear,
    experts: B::Experts,
}

impl<B: Backend> Model<B> {
    /// Replaces the KV cache by an empty one. `spec` must describe this model's layers and this rank's heads:
    /// [`Model::kv_cache_spec`] makes one that does.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn allocate_kv_cache(&mut self, spec: &KvCacheSpec) -> Result<(), BackendError> {
        self.cache = None;
        self.backend.allocate_kv_cache(spec)?;
        self.cache = Some(spec.clone());
        Ok(())
    }

    /// The KV cache of this rank with so many blocks a layer of each kind.
    pub fn kv_cache_spec(&self, block_size: usize, full_blocks: usize, sliding_blocks: usize) -> KvCacheSpec {
        KvCacheSpec {
            layers: self.geometry.layer_types.clone(),
            kv_heads: self.layout.kv_heads.len(),
            head_dim: self.geometry.head_dim,
            block_size,
            full_blocks,
            sliding_blocks,
        }
    }

    /// Runs a batch through all layers and answers this rank's logits of `logit_rows`:
    /// `[logit_rows, layout.vocab_rows]`, row-major. Keys and values of every row are in the cache afterwards.
    ///
    /// # Errors
    /// When the batch does not fit the model or its cache, a collective is aborted, or the backend fails. What the
    /// cache holds of the batch's rows is then undefined.
    pub fn forward(
        &mut self,
        batch: &Batch,
        logit_rows: &[usize],
        collective: &mut dyn Collective,
    ) -> Result<Vec<f32>, ModelError> {
        batch::check(batch, logit_rows, &self.geometry, self.cache.as_ref())?;
        self.collective_time = Duration::ZERO;
        if batch.tokens.is_empty() {
            return Ok(Vec::new());
        }
        self.backend.begin(batch)?;
        let mut x = self.backend.embed(&self.embedding, &batch.tokens)?;
        for layer in 0..self.layers.len() {
            // A group of one has no sums that would notice.
            collective.check_abort()?;
            let attended = self.attention(layer, &x, batch)?;
            self.add_sum(&mut x, attended, collective)?;
            let mixed = self.mixture(layer, &x)?;
            self.add_sum(&mut x, mixed, collective)?;
        }
        if logit_rows.is_empty() {
            return Ok(Vec::new());
        }
        let last = self.backend.select_rows(&x, logit_rows)?;
        let last = self.backend.rms_norm(&last, &self.norm)?;
        let logits = self.backend.linear(&last, &self.unembedding)?;
        Ok(self.backend.to_host(&logits)?)
    }

    /// `o_proj(attention(norm(x)))`, this rank's heads.
    fn attention(&mut self, index: usize, x: &B::Tensor, batch: &Batch) -> Result<B::Tensor, BackendError> {
        let (backend, layer) = (&mut self.backend, &self.layers[index]);
        let x = backend.rms_norm(x, &layer.attention_norm)?;
        let qkv = backend.qkv(&x, &layer.q, &layer.k, &layer.v)?;
        let site = AttentionSite { layer: index, sinks: &layer.sinks };
        let attended = backend.attention(qkv, &site, batch)?;
        backend.linear(&attended, &layer.o)
    }

    /// `moe(norm(x))`, this rank's part of the experts.
    fn mixture(&mut self, index: usize, x: &B::Tensor) -> Result<B::Tensor, BackendError> {
        let (backend, layer) = (&mut self.backend, &self.layers[index]);
        let x = backend.rms_norm(x, &layer.experts_norm)?;
        let routing = backend.route(&x, &layer.router)?;
        backend.experts(&x, &routing, &layer.experts)
    }

    /// `x += Σ partial` over the group.
    fn add_sum(
        &mut self,
        x: &mut B::Tensor,
        mut partial: B::Tensor,
        collective: &mut dyn Collective,
    ) -> Result<(), ModelError> {
        if collective.world_size() > 1 {
            let spent = &mut self.collective_time;
            self.backend.update_host(&mut partial, |values| {
                let start = Instant::now();
                let summed = collective.all_reduce_sum(values);
                *spent += start.elapsed();
                summed.map_err(ModelError::from)
            })?;
        }
        Ok(self.backend.add(x, &partial)?)
    }

    /// The whole model's shape.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// What this rank holds of it.
    pub fn layout(&self) -> &RankLayout {
        &self.layout
    }

    /// The backend that holds the weights.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The backend that holds the weights, for measurements.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// Bytes of the shard, as in the checkpoint.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Time that the last forward pass spent inside collectives.
    pub fn collective_time(&self) -> Duration {
        self.collective_time
    }
}
