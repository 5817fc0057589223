//! A backend that does what another does and keeps what passed through it.

use phalanx_proto::ids::TokenId;
use phalanx_worker::backend::{
    Arithmetic, AttentionSite, Backend, BackendError, Batch, DenseMatrix, ExpertsData, KvCacheSpec, Qkv,
};

use crate::Candidate;

/// Intermediate results in the order of the operations.
#[derive(Default)]
pub(crate) struct Recording {
    /// The residual stream: after the embedding, then after each addition. `[tokens, hidden]`
    pub(crate) stream: Vec<Vec<f32>>,
    /// Results of dense products: q, k, v, o of each layer, then the unembedding. `[tokens, out]`
    pub(crate) products: Vec<Vec<f32>>,
    /// Router logits of each layer. `[tokens, experts]`
    pub(crate) router: Vec<Vec<f32>>,
    /// Results of norms: two a layer, then the last. `[tokens, hidden]`
    pub(crate) norms: Vec<Vec<f32>>,
}

pub(crate) struct Recorder<B> {
    inner: B,
    pub(crate) recording: Recording,
}

impl<B: Candidate> Candidate for Recorder<B> {
    const LOGIT_TOLERANCE: f32 = B::LOGIT_TOLERANCE;
    const BLOCK_SIZE: usize = B::BLOCK_SIZE;

    fn make(arithmetic: Arithmetic) -> Self {
        Self { inner: B::make(arithmetic), recording: Recording::default() }
    }
}

impl<B: Backend> Backend for Recorder<B> {
    type Tensor = B::Tensor;
    type Vector = B::Vector;
    type Linear = B::Linear;
    type Embedding = B::Embedding;
    type Experts = B::Experts;
    type Routing = B::Routing;

    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn device(&self) -> String {
        self.inner.device()
    }

    fn load_vector(&mut self, values: Vec<f32>) -> Result<B::Vector, BackendError> {
        self.inner.load_vector(values)
    }

    fn load_linear(&mut self, weight: DenseMatrix, bias: Option<Vec<f32>>) -> Result<B::Linear, BackendError> {
        self.inner.load_linear(weight, bias)
    }

    fn load_embedding(&mut self, table: DenseMatrix) -> Result<B::Embedding, BackendError> {
        self.inner.load_embedding(table)
    }

    fn load_experts(&mut self, experts: ExpertsData) -> Result<B::Experts, BackendError> {
        self.inner.load_experts(experts)
    }

    fn allocate_kv_cache(&mut self, spec: &KvCacheSpec) -> Result<(), BackendError> {
        self.inner.allocate_kv_cache(spec)
    }

    fn kv_bytes_per_token_and_layer(&self, kv_heads: usize, head_dim: usize) -> usize {
        self.inner.kv_bytes_per_token_and_layer(kv_heads, head_dim)
    }

    fn begin(&mut self, batch: &Batch) -> Result<(), BackendError> {
        self.inner.begin(batch)
    }

    fn embed(&mut self, table: &B::Embedding, tokens: &[TokenId]) -> Result<B::Tensor, BackendError> {
        let x = self.inner.embed(table, tokens)?;
        self.recording.stream.push(self.inner.to_host(&x)?);
        Ok(x)
    }

    fn rms_norm(&mut self, x: &B::Tensor, weight: &B::Vector) -> Result<B::Tensor, BackendError> {
        let y = self.inner.rms_norm(x, weight)?;
        self.recording.norms.push(self.inner.to_host(&y)?);
        Ok(y)
    }

    fn linear(&mut self, x: &B::Tensor, linear: &B::Linear) -> Result<B::Tensor, BackendError> {
        let y = self.inner.linear(x, linear)?;
        self.recording.products.push(self.inner.to_host(&y)?);
        Ok(y)
    }

    fn attention(
        &mut self,
        qkv: Qkv<B::Tensor>,
        site: &AttentionSite<'_, B::Vector>,
        batch: &Batch,
    ) -> Result<B::Tensor, BackendError> {
        self.inner.attention(qkv, site, batch)
    }

    fn route(&mut self, x: &B::Tensor, router: &B::Linear) -> Result<B::Routing, BackendError> {
        let logits = self.inner.linear(x, router)?;
        self.recording.router.push(self.inner.to_host(&logits)?);
        self.inner.route(x, router)
    }

    fn experts(
        &mut self,
        x: &B::Tensor,
        routing: &B::Routing,
        experts: &B::Experts,
    ) -> Result<B::Tensor, BackendError> {
        self.inner.experts(x, routing, experts)
    }

    fn add(&mut self, x: &mut B::Tensor, y: &B::Tensor) -> Result<(), BackendError> {
        self.inner.add(x, y)?;
        self.recording.stream.push(self.inner.to_host(x)?);
        Ok(())
    }

    fn select_rows(&mut self, x: &B::Tensor, rows: &[usize]) -> Result<B::Tensor, BackendError> {
        self.inner.select_rows(x, rows)
    }

    fn to_host(&mut self, x: &B::Tensor) -> Result<Vec<f32>, BackendError> {
        self.inner.to_host(x)
    }

    fn from_host(&mut self, values: Vec<f32>, width: usize) -> Result<B::Tensor, BackendError> {
        self.inner.from_host(values, width)
    }

    fn update_host<E: From<BackendError>>(
        &mut self,
        x: &mut B::Tensor,
        reduce: impl FnOnce(&mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.inner.update_host(x, reduce)
    }
}
