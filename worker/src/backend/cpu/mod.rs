//! The fast CPU backend: bf16 and MXFP4 weights as they are, on its own threads.
//!
//! | module | holds |
//! | --- | --- |
//! | `panels`, `blocks` | resident weights, and how kernels read them |
//! | `quantized`, `rows` | activations as integers, and in tiles |
//! | `product`, `dense`, `mxfp4` | the matrix kernel |
//! | `linear`, `experts`, `norm` | what the model calls |
//! | `kv_cache`, `rotary`, `attention` | attention over the paged cache |
//! | `simd` | vectors, threads and memory: the only unsafe code |
//!
//! Weights are decoded exactly. Dense products are sums in f32 of activations in f32; experts meet activations quantized
//! to 16 bits. Results depend neither on the batch nor on the number of threads, and are the same on all instruction sets
//! that have fused multiply-add.

mod attention;
mod bandwidth;
mod blocks;
mod dense;
mod experts;
mod kv_cache;
mod linear;
mod mxfp4;
mod norm;
mod panels;
mod product;
mod quantized;
mod rotary;
mod rows;
mod simd;

use phalanx_proto::ids::TokenId;

use self::{
    attention::Attention,
    experts::Scratch,
    kv_cache::{KvCache, refused},
    rotary::Rotary,
    simd::{Level, pool::Pool},
};
pub use self::{
    bandwidth::measure_read_bandwidth,
    experts::{Experts, Routing},
    linear::{Embedding, Linear},
    simd::Isa,
};
use super::{Arithmetic, AttentionSite, Backend, BackendError, Batch, DenseMatrix, ExpertsData, KvCacheSpec, Qkv};

/// Activations in host memory, `[tokens, width]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Activations {
    values: Vec<f32>,
    width: usize,
}

impl Activations {
    fn rows(&self) -> usize {
        self.values.len() / self.width.max(1)
    }
}

/// One rank's operations on the cores of this machine.
pub struct CpuBackend {
    arithmetic: Arithmetic,
    pool: Pool,
    isa: Isa,
    level: Level,
    cache: Option<KvCache>,
    rotary: Rotary,
    scratch: Scratch,
    weight_bytes_read: u64,
}

impl CpuBackend {
    /// A backend with `threads` threads, the caller's own included, and the machine's fastest instruction set.
    ///
    /// # Errors
    /// When threads do not start.
    pub fn new(arithmetic: Arithmetic, threads: usize) -> Result<Self, BackendError> {
        let fastest = Isa::available().first().copied().unwrap_or(Isa::Portable);
        Self::with_isa(arithmetic, threads, fastest)
    }

    /// The same with an instruction set of the caller's choice.
    ///
    /// # Errors
    /// When threads do not start or the machine lacks the instruction set.
    pub fn with_isa(arithmetic: Arithmetic, threads: usize, isa: Isa) -> Result<Self, BackendError> {
        let Some(level) = Level::new(isa) else {
            let there: Vec<_> = Isa::available().into_iter().map(Isa::name).collect();
            return Err(BackendError::Unsupported(format!(
                "this processor has no {}; it has: {}",
                isa.name(),
                there.join(", ")
            )));
        };
        Ok(Self {
            arithmetic,
            pool: Pool::new(threads)?,
            isa,
            level,
            cache: None,
            rotary: Rotary::default(),
            scratch: Scratch::default(),
            weight_bytes_read: 0,
        })
    }

    /// Bytes of weights that operations have read so far, each matrix counted once a call.
    pub fn weight_bytes_read(&self) -> u64 {
        self.weight_bytes_read
    }

    fn count_bytes(&mut self, bytes: usize) {
        self.weight_bytes_read += bytes as u64;
    }
}

/// Refuses an operand whose width is not what the weights expect.
fn check_width(operation: &'static str, found: usize, expected: usize) -> Result<(), BackendError> {
    if found == expected {
        return Ok(());
    }
    Err(BackendError::Operation { operation, message: format!("rows of {found} values, expected {expected}") })
}

impl Backend for CpuBackend {
    type Tensor = Activations;
    type Vector = Vec<f32>;
    type Linear = Linear;
    type Embedding = Embedding;
    type Experts = Experts;
    type Routing = Routing;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn device(&self) -> String {
        let threads = self.pool.threads();
        format!("{}, {}, {threads} thread{}", processor(), self.isa.name(), if threads == 1 { "" } else { "s" })
    }

    fn load_vector(&mut self, values: Vec<f32>) -> Result<Vec<f32>, BackendError> {
        Ok(values)
    }

    fn load_linear(&mut self, weight: DenseMatrix, bias: Option<Vec<f32>>) -> Result<Linear, BackendError> {
        Linear::new(&mut self.pool, &weight, bias)
    }

    fn load_embedding(&mut self, table: DenseMatrix) -> Result<Embedding, BackendError> {
        Embedding::new(table)
    }

    fn load_experts(&mut self, experts: ExpertsData) -> Result<Experts, BackendError> {
        Experts::new(&mut self.pool, experts)
    }

    fn allocate_kv_cache(&mut self, spec: &KvCacheSpec) -> Result<(), BackendError> {
        // First the old one goes, so that both need not fit.
        self.cache = None;
        self.cache = Some(KvCache::new(spec)?);
        Ok(())
    }

    fn kv_bytes_per_token_and_layer(&self, kv_heads: usize, head_dim: usize) -> usize {
        2 * kv_heads * head_dim * size_of::<f32>()
    }

    fn embed(&mut self, table: &Embedding, tokens: &[TokenId]) -> Result<Activations, BackendError> {
        Ok(Activations { values: table.rows(tokens)?, width: table.columns() })
    }

    fn rms_norm(&mut self, x: &Activations, weight: &Vec<f32>) -> Result<Activations, BackendError> {
        check_width("rms_norm", x.width, weight.len())?;
        let eps = self.arithmetic.geometry.rms_norm_eps;
        let values = norm::rms_norm((&mut self.pool, self.level), &x.values, weight, eps);
        Ok(Activations { values, width: x.width })
    }

    fn linear(&mut self, x: &Activations, linear: &Linear) -> Result<Activations, BackendError> {
        check_width("linear", x.width, linear.inputs())?;
        self.count_bytes(linear.bytes());
        let values = linear.apply((&mut self.pool, self.level), &x.values, &mut self.scratch.packed);
        Ok(Activations { values, width: linear.outputs() })
    }

    fn attention(
        &mut self,
        qkv: Qkv<Activations>,
        site: &AttentionSite<'_, Vec<f32>>,
        batch: &Batch,
    ) -> Result<Activations, BackendError> {
        let Qkv { mut q, mut k, v } = qkv;
        let Some(cache) = &mut self.cache else { return Err(refused("there is no KV cache yet".to_owned())) };
        let shape = cache.shape();
        let kind = cache.kind(site.layer)?;
        let window = self.arithmetic.geometry.sliding_window;
        check_width("attention, queries", q.width, site.sinks.len() * shape.head_dim)?;
        check_width("attention, keys", k.width, shape.kv_heads * shape.head_dim)?;
        check_width("attention, values", v.width, k.width)?;
        check_batch(batch, [&q, &k, &v], site.sinks.len(), shape.kv_heads)?;
        cache.check(batch, kind, window)?;
        self.rotary.prepare(&batch.positions, &self.arithmetic);
        // The logits' factor goes onto the queries, which are fewer.
        let factor = 1.0 / (shape.head_dim as f32).sqrt();
        self.rotary.turn(&mut self.pool, &mut q.values, q.width, factor);
        self.rotary.turn(&mut self.pool, &mut k.values, k.width, 1.0);
        for sequence in &batch.sequences {
            cache.write(site.layer, sequence, &k.values, &v.values);
        }
        let (layer, width) = (site.layer, q.width);
        let attention = Attention { cache, layer, kind, window, queries: &q.values, sinks: site.sinks };
        Ok(Activations { values: attention.compute(&mut self.pool, self.level, batch), width })
    }

    fn route(&mut self, x: &Activations, router: &Linear) -> Result<Routing, BackendError> {
        let logits = self.linear(x, router)?;
        Ok(Routing::new(&logits.values, logits.width, self.arithmetic.geometry.num_experts_per_tok))
    }

    fn experts(&mut self, x: &Activations, routing: &Routing, experts: &Experts) -> Result<Activations, BackendError> {
        check_width("experts", x.width, experts.hidden())?;
        if routing.rows() != x.rows() {
            let message = format!("a routing of {} rows for {}", routing.rows(), x.rows());
            return Err(BackendError::Operation { operation: "experts", message });
        }
        self.count_bytes(experts.bytes_visited(routing));
        let limit = self.arithmetic.geometry.swiglu_limit;
        let values = experts.apply((&mut self.pool, self.level), &x.values, routing, limit, &mut self.scratch);
        Ok(Activations { values, width: x.width })
    }

    fn add(&mut self, x: &mut Activations, y: &Activations) -> Result<(), BackendError> {
        check_width("add", y.values.len(), x.values.len())?;
        for (x, y) in x.values.iter_mut().zip(&y.values) {
            *x += y;
        }
        Ok(())
    }

    fn select_rows(&mut self, x: &Activations, rows: &[usize]) -> Result<Activations, BackendError> {
        let mut values = Vec::with_capacity(rows.len() * x.width);
        for &row in rows {
            let Some(row) = x.values.get(row * x.width..(row + 1) * x.width) else {
                let message = format!("row {row} of {}", x.rows());
                return Err(BackendError::Operation { operation: "select_rows", message });
            };
            values.extend_from_slice(row);
        }
        Ok(Activations { values, width: x.width })
    }

    fn to_host(&mut self, x: &Activations) -> Result<Vec<f32>, BackendError> {
        Ok(x.values.clone())
    }

    fn from_host(&mut self, values: Vec<f32>, width: usize) -> Result<Activations, BackendError> {
        if width == 0 || !values.len().is_multiple_of(width) {
            let message = format!("{} values in rows of {width}", values.len());
            return Err(BackendError::Operation { operation: "from_host", message });
        }
        Ok(Activations { values, width })
    }

    fn update_host<E: From<BackendError>>(
        &mut self,
        x: &mut Activations,
        reduce: impl FnOnce(&mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        reduce(&mut x.values)
    }
}

/// Refuses a batch whose parts do not fit each other.
fn check_batch(batch: &Batch, qkv: [&Activations; 3], heads: usize, kv_heads: usize) -> Result<(), BackendError> {
    let rows = batch.tokens.len();
    if batch.positions.len() != rows || qkv.iter().any(|part| part.rows() != rows) {
        return Err(refused(format!("{rows} tokens with {} positions", batch.positions.len())));
    }
    let mut next = 0;
    for sequence in &batch.sequences {
        if sequence.rows.start != next || sequence.rows.end <= next {
            return Err(refused(format!("rows {:?} of a sequence that should begin at {next}", sequence.rows)));
        }
        next = sequence.rows.end;
    }
    if next != rows {
        return Err(refused(format!("sequences with {next} of {rows} rows")));
    }
    if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(refused(format!("{heads} query heads on {kv_heads} key and value heads")));
    }
    Ok(())
}

/// The processor's model, where the system tells.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}
