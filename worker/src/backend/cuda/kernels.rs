//! The kernels' sources, which are part of the binary, and the kernels that were made of them for a device.

use std::{collections::HashMap, sync::Arc};

use super::driver::{Arguments, Driver, DriverError, Shape};

/// A file of kernels. What it includes is in [`HEADERS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelFile {
    /// Its name below `worker/kernels`.
    pub name: &'static str,
    /// Its text.
    pub source: &'static str,
}

macro_rules! file {
    ($name:literal) => {
        KernelFile { name: $name, source: include_str!(concat!("../../../kernels/", $name)) }
    };
}

/// What kernels include.
pub const HEADERS: [KernelFile; 6] = [
    file!("prelude.cuh"),
    file!("instructions.cuh"),
    file!("products.cuh"),
    file!("mxfp4.cuh"),
    file!("experts.cuh"),
    file!("attention.cuh"),
];
/// Embedding, norms, sums, conversions.
pub const ROWS: KernelFile = file!("rows.cu");
/// Products with dense matrices for few rows.
pub const DENSE: KernelFile = file!("dense.cu");
/// Products with dense matrices for many rows.
pub const GEMM: KernelFile = file!("gemm.cu");
/// Which experts rows visit.
pub const ROUTE: KernelFile = file!("route.cu");
/// The experts' products for few rows, and their weights' layout.
pub const EXPERTS: KernelFile = file!("experts.cu");
/// The experts' products for many rows.
pub const EXPERTS_GEMM: KernelFile = file!("experts_gemm.cu");
/// Rotary embedding, and keys and values on their way into the cache. Compiled with `HEAD_DIM` and `GROUP`, query heads
/// that share a head of keys, as all of attention is.
pub const KV_WRITE: KernelFile = file!("kv_write.cu");
/// Attention of sequences with one row each.
pub const ATTEND_DECODE: KernelFile = file!("attend_decode.cu");
/// Attention of sequences with many rows.
pub const ATTEND_PREFILL: KernelFile = file!("attend_prefill.cu");
/// Sums and exchanges between ranks that push into each other's memory; compiled with the definitions of
/// [`Region`](crate::collective::push::Region).
pub const ALL_REDUCE: KernelFile = file!("all_reduce.cu");
/// Every file that is compiled by itself. All but those of attention and the collectives need no definitions.
pub const FILES: [KernelFile; 10] =
    [ROWS, DENSE, GEMM, ROUTE, EXPERTS, EXPERTS_GEMM, KV_WRITE, ATTEND_DECODE, ATTEND_PREFILL, ALL_REDUCE];

/// Kernels of every file whose constants do not depend on the model.
const NAMES: [(KernelFile, &[&str]); 4] = [
    (ROWS, &["embed", "rms_norm", "add", "select_rows", "narrow", "widen"]),
    (DENSE, &["gemv_8_f32", "gemv_16_f32", "gemv_32_f32", "gemv_8_bf16", "gemv_16_bf16", "gemv_32_bf16"]),
    (ROUTE, &["route", "group_pairs"]),
    (EXPERTS, &["repack", "gate_up_8", "gate_up_16", "gate_up_32", "down_8", "down_16", "down_32", "combine"]),
];

/// Shared memory that every device gives a block without being asked, bytes.
const USUAL_SHARED_BYTES: u32 = 48 * 1024;
/// Shared memory that every device from sm_80 on gives a block that asks for it, bytes (sm_86 and sm_120: 99 KiB).
pub(super) const LARGE_SHARED_BYTES: u32 = 99 * 1024;

/// Compiled kernels by name.
pub(super) struct Kernels<D: Driver> {
    driver: Arc<D>,
    functions: HashMap<&'static str, D::Function>,
    /// Modules must outlive their functions.
    modules: Vec<D::Module>,
}

impl<D: Driver> Kernels<D> {
    /// Compiles what every model needs.
    pub(super) fn new(driver: &Arc<D>) -> Result<Self, DriverError> {
        let mut kernels = Self { driver: Arc::clone(driver), functions: HashMap::new(), modules: Vec::new() };
        for (file, names) in NAMES {
            kernels.add(&file, &[], names, USUAL_SHARED_BYTES)?;
        }
        kernels.add(&GEMM, &[], &["gemm_f32", "gemm_bf16"], LARGE_SHARED_BYTES)?;
        kernels.add(&EXPERTS_GEMM, &[], &["gate_up_gemm", "down_gemm"], LARGE_SHARED_BYTES)?;
        Ok(kernels)
    }

    /// Compiles a file with these definitions.
    pub(super) fn add(
        &mut self,
        file: &KernelFile,
        definitions: &[(&str, u32)],
        names: &[&'static str],
        shared_bytes: u32,
    ) -> Result<(), DriverError> {
        let module = self.driver.load(file, definitions)?;
        for name in names {
            self.functions.insert(name, self.driver.function(&module, name, shared_bytes)?);
        }
        self.modules.push(module);
        Ok(())
    }

    /// Starts a kernel.
    pub(super) fn launch(&self, name: &'static str, shape: Shape, arguments: &Arguments) -> Result<(), DriverError> {
        let missing = || DriverError::Call { call: "launch", message: format!("no kernel {name} was compiled") };
        self.driver.launch(self.functions.get(name).ok_or_else(missing)?, shape, arguments)
    }
}
