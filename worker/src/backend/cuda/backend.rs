//! The model's operations on a device.

use std::sync::Arc;

use phalanx_proto::ids::TokenId;

use super::{
    attention::Cache,
    driver::{Address, Arguments, Driver, DriverError, Properties, Shape},
    experts::{Experts, Routing},
    kernels::Kernels,
    linear::{Linear, bf16_bytes, f32_bytes},
    memory::{Buffer, Pool, Pooled},
    tensor::{Element, Tensor},
};
use crate::backend::{
    Arithmetic, AttentionSite, Backend, BackendError, Batch, DenseMatrix, ExpertsData, KvCacheSpec, Qkv,
};

/// The backend. See the module above.
pub struct CudaBackend<D: Driver> {
    pub(super) arithmetic: Arithmetic,
    pub(super) driver: Arc<D>,
    pub(super) kernels: Kernels<D>,
    pub(super) pool: Arc<Pool<D>>,
    pub(super) cache: Cache<D>,
}

/// A resident vector in f32.
pub struct Vector<D: Driver> {
    pub(super) values: Buffer<D>,
    pub(super) len: usize,
}

/// A resident embedding table in bf16.
pub struct Embedding<D: Driver> {
    table: Buffer<D>,
    hidden: usize,
}

impl From<DriverError> for BackendError {
    fn from(error: DriverError) -> Self {
        match error {
            DriverError::OutOfMemory { needed, free } => {
                Self::OutOfMemory { what: "device memory".to_owned(), needed: needed as u64, available: free }
            }
            DriverError::Compile { .. } => Self::Unsupported(error.to_string()),
            DriverError::Call { call, message } => Self::Operation { operation: call, message },
        }
    }
}

impl<D: Driver> CudaBackend<D> {
    /// A backend for models with these constants. Compiles the kernels, or finds them compiled.
    ///
    /// # Errors
    /// When a kernel does not compile for the device.
    pub fn new(arithmetic: Arithmetic, driver: D) -> Result<Self, BackendError> {
        let driver = Arc::new(driver);
        let kernels = Kernels::new(&driver)?;
        let (pool, cache) = (Pool::new(&driver), Cache::default());
        Ok(Self { arithmetic, driver, kernels, pool, cache })
    }

    /// Undefined activations.
    pub(super) fn tensor(&self, rows: usize, width: usize, element: Element) -> Result<Tensor<D>, BackendError> {
        let buffer = self.pool.take(rows * width * element.bytes())?;
        Ok(Tensor::whole(buffer, rows, width, element))
    }

    /// One block a row.
    fn launch_rows(&self, name: &'static str, rows: usize, arguments: &Arguments) -> Result<(), BackendError> {
        let shape = Shape { grid: [rows as u32, 1, 1], threads: 256, shared_bytes: 64 };
        Ok(self.kernels.launch(name, shape, arguments)?)
    }

    /// Adds what is pending.
    fn settle(&self, x: &Tensor<D>) -> Result<(), BackendError> {
        let Some(addend) = x.addend.borrow_mut().take() else { return Ok(()) };
        self.add_now(x, addend.address())
    }

    fn add_now(&self, x: &Tensor<D>, y: Address) -> Result<(), BackendError> {
        let count = x.rows * x.width;
        let arguments = Arguments::new().pointer(x.address()).pointer(y).u64(count as u64);
        let shape = Shape { grid: [count.div_ceil(1024).min(4096) as u32, 1, 1], threads: 256, shared_bytes: 0 };
        Ok(self.kernels.launch("add", shape, &arguments)?)
    }

    /// Rounds f32 rows into rows of bf16 that lie `stride` values apart.
    pub(super) fn narrow_into(&self, x: &Tensor<D>, y: Address, stride: usize) -> Result<(), BackendError> {
        self.settle(x)?;
        let arguments = Arguments::new().pointer(x.address()).pointer(y).size(x.width).size(stride);
        self.launch_rows("narrow", x.rows, &arguments)
    }

    /// `x` as dense bf16, if it is something else. Only tests multiply what no norm came before.
    fn narrowed(&self, x: &Tensor<D>) -> Result<Option<Tensor<D>>, BackendError> {
        if x.element == Element::Bf16 && x.is_dense() {
            return Ok(None);
        }
        let wide = self.widened(x)?;
        let narrow = self.tensor(x.rows, x.width, Element::Bf16)?;
        self.narrow_into(wide.as_ref().unwrap_or(x), narrow.address(), x.width)?;
        Ok(Some(narrow))
    }

    /// `x` as dense f32, if it is something else.
    pub(super) fn widened(&self, x: &Tensor<D>) -> Result<Option<Tensor<D>>, BackendError> {
        self.settle(x)?;
        if x.element == Element::F32 {
            return Ok(None);
        }
        let wide = self.tensor(x.rows, x.width, Element::F32)?;
        let arguments = Arguments::new().pointer(x.address()).pointer(wide.address()).size(x.width).size(x.stride);
        self.launch_rows("widen", x.rows, &arguments)?;
        Ok(Some(wide))
    }

    /// Words that a kernel reads.
    pub(super) fn words(&self, words: impl Iterator<Item = u32>) -> Result<Pooled<D>, BackendError> {
        let bytes: Vec<u8> = words.flat_map(u32::to_ne_bytes).collect();
        let buffer = self.pool.take(bytes.len())?;
        self.driver.upload(buffer.address(), &bytes)?;
        Ok(buffer)
    }
}

impl<D: Driver> Backend for CudaBackend<D> {
    type Tensor = Tensor<D>;
    type Vector = Vector<D>;
    type Linear = Linear<D>;
    type Embedding = Embedding<D>;
    type Experts = Experts<D>;
    type Routing = Routing<D>;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn device(&self) -> String {
        let Properties { name, compute_capability: (major, minor), memory_bytes, .. } = self.driver.properties();
        format!("{name}, sm_{major}{minor}, {} GiB", memory_bytes >> 30)
    }

    fn load_vector(&mut self, values: Vec<f32>) -> Result<Vector<D>, BackendError> {
        Ok(Vector { values: Buffer::holding(&self.driver, &f32_bytes(&values))?, len: values.len() })
    }

    fn load_linear(&mut self, weight: DenseMatrix, bias: Option<Vec<f32>>) -> Result<Linear<D>, BackendError> {
        self.resident_linear(&weight, bias.as_deref())
    }

    fn load_embedding(&mut self, table: DenseMatrix) -> Result<Embedding<D>, BackendError> {
        let hidden = table.columns;
        Ok(Embedding { table: Buffer::holding(&self.driver, &bf16_bytes(&table.data))?, hidden })
    }

    fn load_experts(&mut self, experts: ExpertsData) -> Result<Experts<D>, BackendError> {
        self.resident_experts(&experts)
    }

    fn allocate_kv_cache(&mut self, spec: &KvCacheSpec) -> Result<(), BackendError> {
        self.allocate_cache(spec)
    }

    fn kv_bytes_per_token_and_layer(&self, kv_heads: usize, head_dim: usize) -> usize {
        2 * kv_heads * head_dim * Element::Bf16.bytes()
    }

    fn begin(&mut self, batch: &Batch) -> Result<(), BackendError> {
        self.begin_step(batch)
    }

    fn embed(&mut self, table: &Embedding<D>, tokens: &[TokenId]) -> Result<Tensor<D>, BackendError> {
        let ids = self.words(tokens.iter().map(|token| token.0))?;
        let x = self.tensor(tokens.len(), table.hidden, Element::F32)?;
        let arguments = Arguments::new().pointer(table.table.address()).pointer(ids.address());
        self.launch_rows("embed", x.rows, &arguments.pointer(x.address()).size(table.hidden))?;
        Ok(x)
    }

    fn rms_norm(&mut self, x: &Tensor<D>, weight: &Vector<D>) -> Result<Tensor<D>, BackendError> {
        let y = self.tensor(x.rows, x.width, Element::Bf16)?;
        let addend = x.addend.borrow_mut().take();
        let arguments = Arguments::new()
            .pointer(x.address())
            .optional(addend.as_ref().map(|addend| addend.address()))
            .pointer(weight.values.address())
            .pointer(y.address())
            .size(x.width)
            .f32(self.arithmetic.geometry.rms_norm_eps);
        self.launch_rows("rms_norm", x.rows, &arguments)?;
        Ok(y)
    }

    fn linear(&mut self, x: &Tensor<D>, linear: &Linear<D>) -> Result<Tensor<D>, BackendError> {
        let narrowed = self.narrowed(x)?;
        let y = self.tensor(x.rows, linear.outputs, Element::F32)?;
        self.product(narrowed.as_ref().unwrap_or(x), linear, y.address(), Element::F32, y.width)?;
        Ok(y)
    }

    fn qkv(
        &mut self,
        x: &Tensor<D>,
        q: &Linear<D>,
        k: &Linear<D>,
        v: &Linear<D>,
    ) -> Result<Qkv<Tensor<D>>, BackendError> {
        let narrowed = self.narrowed(x)?;
        let x = narrowed.as_ref().unwrap_or(x);
        let all = self.tensor(x.rows, q.outputs + k.outputs + v.outputs, Element::Bf16)?;
        let mut column = 0;
        let mut part = |linear: &Linear<D>| {
            let part = all.columns(column, linear.outputs);
            column += linear.outputs;
            self.product(x, linear, part.address(), Element::Bf16, all.stride).map(|()| part)
        };
        Ok(Qkv { q: part(q)?, k: part(k)?, v: part(v)? })
    }

    fn attention(
        &mut self,
        qkv: Qkv<Tensor<D>>,
        site: &AttentionSite<'_, Vector<D>>,
        _batch: &Batch,
    ) -> Result<Tensor<D>, BackendError> {
        self.attend(&qkv, site)
    }

    fn route(&mut self, x: &Tensor<D>, router: &Linear<D>) -> Result<Routing<D>, BackendError> {
        let logits = self.linear(x, router)?;
        self.routing(&logits)
    }

    fn experts(
        &mut self,
        x: &Tensor<D>,
        routing: &Routing<D>,
        experts: &Experts<D>,
    ) -> Result<Tensor<D>, BackendError> {
        let narrowed = self.narrowed(x)?;
        self.mixture(narrowed.as_ref().unwrap_or(x), routing, experts)
    }

    fn add(&mut self, x: &mut Tensor<D>, y: &Tensor<D>) -> Result<(), BackendError> {
        self.settle(x)?;
        let wide = self.widened(y)?;
        let addend = Arc::clone(&wide.as_ref().unwrap_or(y).buffer);
        x.addend.borrow_mut().replace(addend);
        Ok(())
    }

    fn select_rows(&mut self, x: &Tensor<D>, rows: &[usize]) -> Result<Tensor<D>, BackendError> {
        self.settle(x)?;
        let indices = self.words(rows.iter().map(|&row| row as u32))?;
        let y = self.tensor(rows.len(), x.width, Element::F32)?;
        let arguments = Arguments::new().pointer(x.address()).pointer(indices.address()).pointer(y.address());
        self.launch_rows("select_rows", y.rows, &arguments.size(x.width))?;
        Ok(y)
    }

    fn to_host(&mut self, x: &Tensor<D>) -> Result<Vec<f32>, BackendError> {
        let wide = self.widened(x)?;
        let x = wide.as_ref().unwrap_or(x);
        let mut bytes = vec![0; 4 * x.rows * x.width];
        self.driver.download(x.address(), &mut bytes)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect())
    }

    fn from_host(&mut self, values: Vec<f32>, width: usize) -> Result<Tensor<D>, BackendError> {
        let x = self.tensor(values.len() / width, width, Element::F32)?;
        self.driver.upload(x.address(), &f32_bytes(&values))?;
        Ok(x)
    }

    fn update_host<E: From<BackendError>>(
        &mut self,
        x: &mut Tensor<D>,
        reduce: impl FnOnce(&mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut values = self.to_host(x)?;
        reduce(&mut values)?;
        *x = self.from_host(values, x.width)?;
        Ok(())
    }
}
