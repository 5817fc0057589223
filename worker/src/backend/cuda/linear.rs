//! Resident matrices and vectors, and products with them.

use half::bf16;

use super::{
    backend::CudaBackend,
    driver::{Address, Arguments, Driver, Shape},
    memory::Buffer,
    tensor::{Element, Tensor},
};
use crate::backend::{BackendError, DenseData, DenseMatrix};

/// A matrix `[outputs, inputs]` in bf16 with an optional bias in f32.
pub struct Linear<D: Driver> {
    weight: Buffer<D>,
    bias: Option<Buffer<D>>,
    pub(super) outputs: usize,
    inputs: usize,
}

/// Warps of a block at most.
const WARPS: usize = 8;
/// Outputs that a warp computes.
const STRIPE: usize = 16;
/// Rows up to which every weight is read once or twice; beyond, tiles of both operands go through shared memory.
const MOST_GEMV_ROWS: usize = 64;
/// Outputs, and rows, of a block for many rows; what its three stages take.
const TILE: usize = 128;
const GEMM_SHARED_BYTES: u32 = 96 * 1024;
/// Steps of 32 inputs below which a warp is not worth starting.
const LEAST_STEPS: usize = 6;

/// A matrix's values as bytes in bf16. Values of f32 are rounded.
pub(super) fn bf16_bytes(data: &DenseData) -> Vec<u8> {
    match data {
        DenseData::Bf16(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        DenseData::F32(values) => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
    }
}

pub(super) fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// How a product's contracted axis is shared: enough warps to keep the memory busy, none with next to nothing to do.
fn splits(outputs: usize, inputs: usize, multiprocessors: u32) -> usize {
    let stripes = outputs.div_ceil(STRIPE);
    // 16 warps a multiprocessor keep some 64 KB of loads under way.
    let wanted = (16 * multiprocessors as usize).div_ceil(stripes);
    let most = (inputs / 32).div_ceil(LEAST_STEPS).clamp(1, WARPS);
    // A power of two, so that it divides the warps of a block.
    let splits = wanted.clamp(1, most);
    if splits.is_power_of_two() { splits } else { splits.next_power_of_two() / 2 }
}

impl<D: Driver> CudaBackend<D> {
    pub(super) fn resident_linear(
        &self,
        weight: &DenseMatrix,
        bias: Option<&[f32]>,
    ) -> Result<Linear<D>, BackendError> {
        let (outputs, inputs) = (weight.rows, weight.columns);
        if !inputs.is_multiple_of(32) {
            let message = format!("a matrix with {inputs} columns; backend cuda needs a multiple of 32");
            return Err(BackendError::Unsupported(message));
        }
        let weight = Buffer::holding(&self.driver, &bf16_bytes(&weight.data))?;
        let bias = bias.map(|bias| Buffer::holding(&self.driver, &f32_bytes(bias))).transpose()?;
        Ok(Linear { weight, bias, outputs, inputs })
    }

    /// `y = x Wᵀ + b` into rows of `y` that lie `stride` values apart. `x` is dense bf16.
    pub(super) fn product(
        &self,
        x: &Tensor<D>,
        linear: &Linear<D>,
        y: Address,
        element: Element,
        stride: usize,
    ) -> Result<(), BackendError> {
        let arguments = Arguments::new()
            .pointer(linear.weight.address())
            .optional(linear.bias.as_ref().map(Buffer::address))
            .pointer(x.address())
            .pointer(y)
            .size(linear.outputs)
            .size(linear.inputs)
            .size(x.rows);
        if x.rows > MOST_GEMV_ROWS {
            let name = if element == Element::F32 { "gemm_f32" } else { "gemm_bf16" };
            let grid = [linear.outputs.div_ceil(TILE) as u32, x.rows.div_ceil(TILE) as u32, 1];
            let shape = Shape { grid, threads: 256, shared_bytes: GEMM_SHARED_BYTES };
            return Ok(self.kernels.launch(name, shape, &arguments.size(stride))?);
        }
        let (name, tiles) = match (x.rows, element) {
            (0..=8, Element::F32) => ("gemv_8_f32", 1),
            (9..=16, Element::F32) => ("gemv_16_f32", 2),
            (_, Element::F32) => ("gemv_32_f32", 4),
            (0..=8, Element::Bf16) => ("gemv_8_bf16", 1),
            (9..=16, Element::Bf16) => ("gemv_16_bf16", 2),
            (_, Element::Bf16) => ("gemv_32_bf16", 4),
        };
        let splits = splits(linear.outputs, linear.inputs, self.driver.properties().multiprocessors);
        let stripes = linear.outputs.div_ceil(STRIPE).div_ceil(WARPS / splits);
        let shape = Shape {
            grid: [stripes as u32, x.rows.div_ceil(8 * tiles) as u32, 1],
            threads: 32 * WARPS as u32,
            shared_bytes: (512 * tiles * WARPS) as u32,
        };
        Ok(self.kernels.launch(name, shape, &arguments.size(splits).size(stride))?)
    }
}
