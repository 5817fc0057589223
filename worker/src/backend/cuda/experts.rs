//! Resident experts in MXFP4, and their products.

use std::ops::Range;

use super::{
    backend::CudaBackend,
    driver::{Address, Arguments, Driver, Shape},
    linear::f32_bytes,
    memory::{Buffer, Pooled},
    tensor::{Element, Tensor},
};
use crate::backend::{BackendError, ExpertsData};

/// One layer's experts that this rank holds.
pub struct Experts<D: Driver> {
    held: Range<usize>,
    gate_up: Packed<D>,
    down: Packed<D>,
}

/// One matrix of every held expert, as `mxfp4.cuh` says.
struct Packed<D: Driver> {
    weights: Buffer<D>,
    exponents: Buffer<D>,
    bias: Option<Buffer<D>>,
    rows: usize,
    inputs: usize,
}

/// Which experts each row visits.
pub struct Routing<D: Driver> {
    /// `[rows, visits]` experts.
    chosen: Pooled<D>,
    /// `[rows, visits]` their weights.
    weights: Pooled<D>,
    rows: usize,
}

/// A matrix as the checkpoint has it.
struct Source<'a> {
    blocks: &'a [u8],
    scales: &'a [u8],
    bias: &'a [f32],
    experts: usize,
    rows: usize,
    inputs: usize,
    /// Even rows gate, odd rows up.
    interleaved: bool,
}

/// Values under one scale.
const BLOCK: usize = 32;
/// Blocks of a row that a warp takes at a time.
const QUAD: usize = 16;
/// Warps of a block at most.
const WARPS: usize = 8;
/// Outputs, and pairs, of a block for many rows; its two stages of activations and a word a pair.
const TILE: usize = 128;
const GEMM_SHARED_BYTES: u32 = (2 * TILE * 320 + 4 * TILE) as u32;
/// Pairs an expert, on average, from which the kernels for many rows are used.
const GEMM_PAIRS: usize = 32;
/// The largest scale that the kernels take: bf16 has no room for more beside the factor 2^126 that unpacking costs.
const LARGEST_SCALE: u32 = 128;

impl<D: Driver> CudaBackend<D> {
    pub(super) fn resident_experts(&self, data: &ExpertsData) -> Result<Experts<D>, BackendError> {
        let (experts, hidden, intermediate) = (data.experts.len(), data.hidden, data.intermediate);
        let gate_up = self.packed(&Source {
            blocks: &data.gate_up_blocks,
            scales: &data.gate_up_scales,
            bias: &data.gate_up_bias,
            experts,
            rows: 2 * intermediate,
            inputs: hidden,
            interleaved: true,
        })?;
        let down = self.packed(&Source {
            blocks: &data.down_blocks,
            scales: &data.down_scales,
            bias: &data.down_bias,
            experts,
            rows: hidden,
            inputs: intermediate,
            interleaved: false,
        })?;
        Ok(Experts { held: data.experts.clone(), gate_up, down })
    }

    /// Uploads a matrix and lets the device bring it into its own order.
    fn packed(&self, source: &Source<'_>) -> Result<Packed<D>, BackendError> {
        let (stripes, blocks) = (source.rows / 16, source.inputs / BLOCK);
        let all_stripes = source.experts * stripes;
        let weights = Buffer::new(&self.driver, all_stripes * blocks * 16 * 16)?;
        let exponents = Buffer::new(&self.driver, all_stripes * blocks.div_ceil(QUAD) * 256)?;
        let bias = (!source.bias.is_empty()).then(|| Buffer::holding(&self.driver, &f32_bytes(source.bias)));
        let bias = bias.transpose()?;
        if !source.blocks.is_empty() {
            let raw = Buffer::holding(&self.driver, source.blocks)?;
            let scales = Buffer::holding(&self.driver, source.scales)?;
            let largest = Buffer::holding(&self.driver, &0_u32.to_le_bytes())?;
            let arguments = Arguments::new()
                .pointer(raw.address())
                .pointer(scales.address())
                .pointer(weights.address())
                .pointer(exponents.address())
                .pointer(largest.address())
                .size(source.experts)
                .size(source.rows)
                .size(blocks)
                .u32(source.interleaved.into());
            let threads = blocks.next_multiple_of(QUAD) * 16;
            let grid = [all_stripes as u32, threads.div_ceil(256) as u32, 1];
            self.kernels.launch("repack", Shape { grid, threads: 256, shared_bytes: 0 }, &arguments)?;
            self.check_scales(&largest)?;
        }
        Ok(Packed { weights, exponents, bias, rows: source.rows, inputs: source.inputs })
    }

    fn check_scales(&self, largest: &Buffer<D>) -> Result<(), BackendError> {
        let mut bytes = [0; 4];
        self.driver.download(largest.address(), &mut bytes)?;
        match u32::from_le_bytes(bytes) {
            0..=LARGEST_SCALE => Ok(()),
            scale => Err(BackendError::Unsupported(format!(
                "an MXFP4 scale of 2^{}; backend cuda takes scales up to 2^{}",
                i64::from(scale) - 127,
                i64::from(LARGEST_SCALE) - 127
            ))),
        }
    }

    /// The experts of rows with these router logits, `[rows, experts]` in f32.
    pub(super) fn routing(&self, logits: &Tensor<D>) -> Result<Routing<D>, BackendError> {
        let visits = self.arithmetic.geometry.num_experts_per_tok;
        let bytes = 4 * logits.rows * visits;
        let (chosen, weights) = (self.pool.take(bytes)?, self.pool.take(bytes)?);
        let arguments = Arguments::new()
            .pointer(logits.address())
            .pointer(chosen.address())
            .pointer(weights.address())
            .size(logits.rows)
            .size(logits.width)
            .size(visits);
        let shape = Shape { grid: [logits.rows.div_ceil(4) as u32, 1, 1], threads: 128, shared_bytes: 0 };
        self.kernels.launch("route", shape, &arguments)?;
        Ok(Routing { chosen, weights, rows: logits.rows })
    }

    /// The weighted sum over each row's held experts. `x` is dense bf16.
    pub(super) fn mixture(
        &self,
        x: &Tensor<D>,
        routing: &Routing<D>,
        experts: &Experts<D>,
    ) -> Result<Tensor<D>, BackendError> {
        let visits = self.arithmetic.geometry.num_experts_per_tok;
        let (held, pairs, hidden) = (experts.held.len(), routing.rows * visits, experts.down.rows);
        let lists = self.visitors(routing, &experts.held, pairs)?;
        let gated = self.pool.take(2 * pairs * experts.down.inputs.max(1))?;
        let y = self.pool.take(4 * pairs * hidden)?;
        let sum = self.pool.take(4 * routing.rows * hidden)?;
        if held > 0 && experts.down.inputs > 0 {
            let sides =
                [(&experts.gate_up, x.address(), gated.address()), (&experts.down, gated.address(), y.address())];
            for (side, (matrix, from, to)) in sides.into_iter().enumerate() {
                let arguments = self.product_arguments(matrix, from, to, &lists, visits);
                if pairs >= GEMM_PAIRS * held {
                    self.many(["gate_up_gemm", "down_gemm"][side], matrix, arguments, &lists)?;
                } else {
                    self.few(side, matrix, arguments, routing.rows, held.min(pairs))?;
                }
            }
        }
        let arguments = Arguments::new()
            .pointer(y.address())
            .pointer(routing.chosen.address())
            .pointer(routing.weights.address())
            .pointer(sum.address())
            .size(hidden)
            .size(visits)
            .size(experts.held.start)
            .size(if experts.down.inputs > 0 { held } else { 0 });
        let grid = [hidden.div_ceil(256) as u32, routing.rows as u32, 1];
        self.kernels.launch("combine", Shape { grid, threads: 256, shared_bytes: 0 }, &arguments)?;
        Ok(Tensor::whole(sum, routing.rows, hidden, Element::F32))
    }

    fn product_arguments(
        &self,
        matrix: &Packed<D>,
        x: Address,
        y: Address,
        lists: &Visitors<D>,
        visits: usize,
    ) -> Arguments {
        Arguments::new()
            .pointer(matrix.weights.address())
            .pointer(matrix.exponents.address())
            .optional(matrix.bias.as_ref().map(Buffer::address))
            .pointer(x)
            .pointer(y)
            .pointer(lists.starts.address())
            .pointer(lists.sorted.address())
            .pointer(lists.active.address())
            .size(matrix.rows)
            .size(matrix.inputs)
            .size(visits)
            .size(splits(matrix.inputs))
            .f32(self.arithmetic.geometry.swiglu_limit)
    }

    /// One side of the experts for few rows: each visited expert's weights are read once for every 8, 16 or 32 of its
    /// pairs.
    fn few(
        &self,
        side: usize,
        matrix: &Packed<D>,
        arguments: Arguments,
        rows: usize,
        active: usize,
    ) -> Result<(), BackendError> {
        let (tiles, names) = match rows {
            0..=8 => (1, ["gate_up_8", "down_8"]),
            9..=16 => (2, ["gate_up_16", "down_16"]),
            _ => (4, ["gate_up_32", "down_32"]),
        };
        let splits = splits(matrix.inputs);
        let stripes_of_block = (WARPS / splits).max(1);
        let warps = splits * stripes_of_block;
        let shape = Shape {
            grid: [(matrix.rows / 16).div_ceil(stripes_of_block) as u32, active as u32, 1],
            threads: 32 * warps as u32,
            shared_bytes: (512 * tiles * warps) as u32,
        };
        Ok(self.kernels.launch(names[side], shape, &arguments)?)
    }

    /// One side of the experts for many rows.
    fn many(
        &self,
        name: &'static str,
        matrix: &Packed<D>,
        arguments: Arguments,
        lists: &Visitors<D>,
    ) -> Result<(), BackendError> {
        let grid = [matrix.rows.div_ceil(TILE) as u32, lists.most_tiles as u32, 1];
        let shape = Shape { grid, threads: 256, shared_bytes: GEMM_SHARED_BYTES };
        Ok(self.kernels.launch(name, shape, &arguments.align(8).pointer(lists.tiles.address()))?)
    }

    fn visitors(&self, routing: &Routing<D>, held: &Range<usize>, pairs: usize) -> Result<Visitors<D>, BackendError> {
        // Every expert may have one tile that is not full.
        let most_tiles = held.len() + pairs / TILE;
        let lists = Visitors {
            starts: self.pool.take(4 * (held.len() + 1))?,
            sorted: self.pool.take(4 * pairs)?,
            active: self.pool.take(4 * (held.len() + 1))?,
            tiles: self.pool.take(4 * (3 * most_tiles + 1))?,
            most_tiles,
        };
        let arguments = Arguments::new()
            .pointer(routing.chosen.address())
            .pointer(lists.starts.address())
            .pointer(lists.sorted.address())
            .pointer(lists.active.address())
            .pointer(lists.tiles.address())
            .size(pairs)
            .size(held.start)
            .size(held.len())
            .size(TILE);
        let threads = (32 * held.len()).clamp(32, 1024) as u32;
        let shape = Shape { grid: [1; 3], threads, shared_bytes: 4 * (held.len() as u32 + 1) };
        self.kernels.launch("group_pairs", shape, &arguments)?;
        Ok(lists)
    }
}

/// Each held expert's pairs of row and visit.
struct Visitors<D: Driver> {
    starts: Pooled<D>,
    sorted: Pooled<D>,
    active: Pooled<D>,
    /// At most `most_tiles` tiles of at most [`TILE`] pairs of one expert.
    tiles: Pooled<D>,
    most_tiles: usize,
}

/// Warps that share a stripe: one for each quad of blocks, as far as a block has warps.
fn splits(inputs: usize) -> usize {
    inputs.div_ceil(BLOCK * QUAD).min(WARPS)
}
