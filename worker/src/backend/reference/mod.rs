//! The oracle: plain f32 tensor code on candle-core, slow and readable, held to the golden tensors.
//!
//! Weights stay as in the checkpoint, so that they take no more memory, and are widened to f32 when they are used.
//! A row's result depends on that row alone, bit for bit: products take a fixed number of rows at a time, and
//! attention looks at queries in tiles whose place and extent depend on positions only.

mod attention;
mod experts;

use candle_core::{D, DType, Device, Result, Tensor};
use phalanx_proto::ids::TokenId;

use self::attention::Cache;
pub use self::experts::{Experts, Routing};
use super::{
    Arithmetic, AttentionSite, Backend, BackendError, Batch, DenseData, DenseMatrix, ExpertsData, KvCacheSpec, Qkv,
};

/// Rows of one matrix product. Fixed, and short batches are padded, so that every product of a matrix runs the same
/// kernel and adds in the same order.
const PRODUCT_ROWS: usize = 16;

/// The backend. See the module.
pub struct ReferenceBackend {
    arithmetic: Arithmetic,
    cache: Cache,
}

/// A matrix `[out, in]` with its bias.
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl ReferenceBackend {
    /// A backend for models with these constants.
    pub fn new(arithmetic: Arithmetic) -> Self {
        Self { arithmetic, cache: Cache::default() }
    }
}

fn failed(operation: &'static str) -> impl FnOnce(candle_core::Error) -> BackendError {
    move |error| BackendError::Operation { operation, message: error.to_string() }
}

/// A tensor in host memory.
fn tensor(values: Vec<f32>, shape: impl candle_core::shape::ShapeWithOneHole) -> Result<Tensor> {
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// A matrix in the checkpoint's precision.
fn dense(matrix: DenseMatrix) -> Result<Tensor> {
    let shape = (matrix.rows, matrix.columns);
    match matrix.data {
        DenseData::Bf16(values) => Tensor::from_vec(values, shape, &Device::Cpu),
        DenseData::F32(values) => tensor(values, shape),
    }
}

/// `x wᵀ` for `x` `[rows, in]` and `w` `[out, in]`.
fn product(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let rows = x.dim(0)?;
    let padded = x.pad_with_zeros(0, 0, rows.next_multiple_of(PRODUCT_ROWS) - rows)?;
    let transposed = w.to_dtype(DType::F32)?.t()?;
    let tile = |start| padded.narrow(0, start, PRODUCT_ROWS)?.matmul(&transposed);
    let tiles = (0..rows).step_by(PRODUCT_ROWS).map(tile).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&tiles, 0)?.narrow(0, 0, rows)
}

fn linear(x: &Tensor, linear: &Linear) -> Result<Tensor> {
    let y = product(x, &linear.weight)?;
    linear.bias.as_ref().map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
}

impl Backend for ReferenceBackend {
    type Tensor = Tensor;
    type Vector = Tensor;
    type Linear = Linear;
    type Embedding = Tensor;
    type Experts = Experts;
    type Routing = Routing;

    fn name(&self) -> &'static str {
        "reference"
    }

    fn device(&self) -> String {
        "candle-core, f32".to_owned()
    }

    fn load_vector(&mut self, values: Vec<f32>) -> std::result::Result<Tensor, BackendError> {
        let len = values.len();
        tensor(values, len).map_err(failed("load_vector"))
    }

    fn load_linear(
        &mut self,
        weight: DenseMatrix,
        bias: Option<Vec<f32>>,
    ) -> std::result::Result<Linear, BackendError> {
        let bias = bias.map(|bias| self.load_vector(bias)).transpose()?;
        Ok(Linear { weight: dense(weight).map_err(failed("load_linear"))?, bias })
    }

    fn load_embedding(&mut self, table: DenseMatrix) -> std::result::Result<Tensor, BackendError> {
        dense(table).map_err(failed("load_embedding"))
    }

    fn load_experts(&mut self, data: ExpertsData) -> std::result::Result<Experts, BackendError> {
        Ok(Experts::new(data))
    }

    fn allocate_kv_cache(&mut self, spec: &KvCacheSpec) -> std::result::Result<(), BackendError> {
        self.cache = Cache::new(spec)?;
        Ok(())
    }

    fn kv_bytes_per_token_and_layer(&self, kv_heads: usize, head_dim: usize) -> usize {
        2 * kv_heads * head_dim * size_of::<f32>()
    }

    fn embed(&mut self, table: &Tensor, tokens: &[TokenId]) -> std::result::Result<Tensor, BackendError> {
        let rows = select(table, tokens.iter().map(|token| token.0));
        rows.and_then(|rows| rows.to_dtype(DType::F32)).map_err(failed("embed"))
    }

    fn rms_norm(&mut self, x: &Tensor, weight: &Tensor) -> std::result::Result<Tensor, BackendError> {
        let eps = f64::from(self.arithmetic.geometry.rms_norm_eps);
        rms_norm(x, weight, eps).map_err(failed("rms_norm"))
    }

    fn linear(&mut self, x: &Tensor, weight: &Linear) -> std::result::Result<Tensor, BackendError> {
        linear(x, weight).map_err(failed("linear"))
    }

    fn attention(
        &mut self,
        qkv: Qkv<Tensor>,
        site: &AttentionSite<'_, Tensor>,
        batch: &Batch,
    ) -> std::result::Result<Tensor, BackendError> {
        self.attend(&qkv, site, batch).map_err(failed("attention"))
    }

    fn route(&mut self, x: &Tensor, router: &Linear) -> std::result::Result<Routing, BackendError> {
        let logits = linear(x, router).and_then(|logits| logits.to_vec2()).map_err(failed("route"))?;
        Ok(Routing::new(&logits, self.arithmetic.geometry.num_experts_per_tok))
    }

    fn experts(
        &mut self,
        x: &Tensor,
        routing: &Routing,
        experts: &Experts,
    ) -> std::result::Result<Tensor, BackendError> {
        let limit = f64::from(self.arithmetic.geometry.swiglu_limit);
        experts.mix(x, routing, limit).map_err(failed("experts"))
    }

    fn add(&mut self, x: &mut Tensor, y: &Tensor) -> std::result::Result<(), BackendError> {
        *x = (&*x + y).map_err(failed("add"))?;
        Ok(())
    }

    fn select_rows(&mut self, x: &Tensor, rows: &[usize]) -> std::result::Result<Tensor, BackendError> {
        select(x, rows.iter().map(|&row| row as u32)).map_err(failed("select_rows"))
    }

    fn to_host(&mut self, x: &Tensor) -> std::result::Result<Vec<f32>, BackendError> {
        x.flatten_all().and_then(|x| x.to_vec1()).map_err(failed("to_host"))
    }

    fn from_host(&mut self, values: Vec<f32>, width: usize) -> std::result::Result<Tensor, BackendError> {
        let rows = values.len() / width;
        tensor(values, (rows, width)).map_err(failed("from_host"))
    }

    fn update_host<E: From<BackendError>>(
        &mut self,
        x: &mut Tensor,
        reduce: impl FnOnce(&mut [f32]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let mut values = self.to_host(x)?;
        reduce(&mut values)?;
        *x = tensor(values, x.shape()).map_err(failed("update_host"))?;
        Ok(())
    }
}

fn select(x: &Tensor, rows: impl Iterator<Item = u32>) -> Result<Tensor> {
    let rows: Vec<u32> = rows.collect();
    let len = rows.len();
    x.index_select(&Tensor::from_vec(rows, len, &Device::Cpu)?, 0)
}

fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let root = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&root)?.broadcast_mul(weight)
}
