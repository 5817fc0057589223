//! The matrix kernel: activations times resident weights.
//!
//! Every sum is taken in one order, whatever the number of tokens, threads or the instruction set: within a block of 32
//! columns the even and the odd columns each form a chain of fused multiply-adds, the two are added, and the block's sum
//! times its scale is fused onto the row's sum, block after block. So results are the same bit for bit in every batch.
//!
//! Few tokens: weights are decoded in registers on their way from memory. Many: some blocks are decoded to the
//! first-level cache and then meet all tokens of the band.

use super::{
    blocks::{Block, Blocks, DECODED, Decoded, Pair, Panel},
    panels::{BLOCK, GROUPS, PANEL_ROWS, Panels},
    rows::{BAND_ROWS, Band, PackedRows},
    simd::{
        Kernel, LANES, Level, Simd, exp,
        pool::Pool,
        rectangles::{Cut, Rectangle, split},
    },
};

/// One row's sums with a panel.
type Sums = [[f32; LANES]; GROUPS];

/// What becomes of sums.
#[derive(Clone, Copy)]
pub(super) enum Outputs {
    /// Themselves.
    Sums,
    /// The first group's are gates, the second's ups.
    Swiglu {
        /// Clamp of both.
        limit: f32,
    },
}

impl Outputs {
    /// Outputs of a panel.
    fn columns(self) -> usize {
        match self {
            Self::Sums => PANEL_ROWS,
            Self::Swiglu { .. } => LANES,
        }
    }
}

/// A product about to be computed.
pub(super) struct Product<'a> {
    pub(super) panels: &'a Panels,
    /// Panels of each matrix.
    pub(super) panels_each: usize,
    /// Added to the sums: `[matrix, panel, group, lane]`.
    pub(super) bias: &'a [f32],
    pub(super) rows: &'a PackedRows,
    pub(super) outputs: Outputs,
}

impl Product<'_> {
    /// Computes `[rows, width]` in the order of the packed rows.
    pub(super) fn compute(&self, pool: &mut Pool, level: Level, out: &mut [f32], width: usize) {
        let cut = Cut { width, heights: &self.rows.heights(), columns: self.outputs.columns() };
        split(pool, out, &cut, |band, panel, out| {
            let band = &self.rows.bands[band];
            let panel = band.matrix * self.panels_each + panel;
            level.run(PanelTask { product: self, band, panel, out });
        });
    }
}

/// One panel of weights times one band of rows.
struct PanelTask<'a> {
    product: &'a Product<'a>,
    band: &'a Band,
    /// Counted through all matrices.
    panel: usize,
    out: Rectangle<'a, f32>,
}

impl Kernel for PanelTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        if self.band.tiles.len() > 1 {
            self.multiply_band(s);
            return;
        }
        match self.product.panels.panel(self.panel) {
            Panel::F32(blocks) => self.multiply_tile(s, blocks),
            Panel::Bf16(blocks) => self.multiply_tile(s, blocks),
            Panel::Mxfp4(blocks) => self.multiply_tile(s, blocks),
        }
    }
}

impl PanelTask<'_> {
    /// One tile, weights decoded in registers.
    #[inline(always)]
    fn multiply_tile<S: Simd, B: Blocks>(&mut self, s: S, blocks: B) {
        let (rows, values) = self.product.rows.tile(self.band.tiles.start);
        let mut sums = [[[0.0; LANES]; GROUPS]; MAX_TILE_ROWS];
        accumulate_tile(s, blocks, values, &mut sums[..rows]);
        self.finish(s, &sums[..rows]);
    }

    /// Many tiles, which share the work of decoding.
    #[inline(always)]
    fn multiply_band<S: Simd>(&mut self, s: S) {
        let mut sums = [[[0.0; LANES]; GROUPS]; BAND_ROWS];
        let mut decoded = Decoded::new();
        let panel = self.product.panels.panel(self.panel);
        for first in (0..self.product.panels.blocks).step_by(DECODED) {
            match panel {
                Panel::F32(blocks) => decoded.fill(s, blocks, first),
                Panel::Bf16(blocks) => decoded.fill(s, blocks, first),
                Panel::Mxfp4(blocks) => decoded.fill(s, blocks, first),
            }
            let columns = first * BLOCK..(first + (&decoded).len()) * BLOCK;
            let mut sums = &mut sums[..];
            for tile in self.band.tiles.clone() {
                let (rows, values) = self.product.rows.tile(tile);
                let (tile_sums, rest) = sums.split_at_mut(rows);
                accumulate_tile(s, &decoded, &values[columns.start * rows..columns.end * rows], tile_sums);
                sums = rest;
            }
        }
        self.finish(s, &sums[..self.band.rows]);
    }

    #[inline(always)]
    fn finish<S: Simd>(&mut self, s: S, sums: &[Sums]) {
        let (bias, _) = self.product.bias[self.panel * PANEL_ROWS..].as_chunks::<LANES>();
        for (row, sums) in sums.iter().enumerate() {
            let low = s.add(s.load(&sums[0]), s.load(&bias[0]));
            let high = s.add(s.load(&sums[1]), s.load(&bias[1]));
            let mut outputs = [[0.0; LANES]; GROUPS];
            match self.product.outputs {
                Outputs::Sums => {
                    s.store(low, &mut outputs[0]);
                    s.store(high, &mut outputs[1]);
                }
                Outputs::Swiglu { limit } => s.store(swiglu(s, low, high, limit), &mut outputs[0]),
            }
            // The last panel of a matrix may have fewer rows than lanes.
            let out = self.out.row(row);
            out.copy_from_slice(&outputs.as_flattened()[..out.len()]);
        }
    }
}

/// Slope of the sigmoid, from `gpt_oss/torch/model.py` of openai/gpt-oss.
const SWIGLU_ALPHA: f32 = 1.702;

/// `gate * sigmoid(1.702 gate) * (up + 1)` with the gate clamped from above and the up on both sides.
#[inline(always)]
fn swiglu<S: Simd>(s: S, gate: S::Float, up: S::Float, limit: f32) -> S::Float {
    // With the constant first, NaN passes through.
    let gate = s.min(s.splat(limit), gate);
    let up = s.max(s.splat(-limit), s.min(s.splat(limit), up));
    let one = s.splat(1.0);
    let divisor = s.add(one, exp(s, s.mul(gate, s.splat(-SWIGLU_ALPHA))));
    s.mul(s.div(gate, divisor), s.add(up, one))
}

/// Most rows of a tile, of all instruction sets.
const MAX_TILE_ROWS: usize = 6;

/// Adds the products of some blocks with a tile's `values`, `[column][row]`, to the sums of its rows.
#[inline(always)]
fn accumulate_tile<S: Simd, B: Blocks>(s: S, blocks: B, values: &[f32], sums: &mut [Sums]) {
    // The constant conditions keep sizes that an instruction set never has from being compiled for it.
    match sums.len() {
        1 => accumulate::<S, B, 1>(s, blocks, values, sums),
        2 if S::TILE_ROWS >= 2 => accumulate::<S, B, 2>(s, blocks, values, sums),
        3 if S::TILE_ROWS >= 3 => accumulate::<S, B, 3>(s, blocks, values, sums),
        4 if S::TILE_ROWS >= 4 => accumulate::<S, B, 4>(s, blocks, values, sums),
        5 if S::TILE_ROWS >= 5 => accumulate::<S, B, 5>(s, blocks, values, sums),
        _ if S::TILE_ROWS >= 6 => accumulate::<S, B, MAX_TILE_ROWS>(s, blocks, values, sums),
        rows => unreachable!("a tile of {rows} rows, of {} at most", S::TILE_ROWS),
    }
}

/// Per block: `ROWS * 64` multiply-adds of vectors, on `ROWS * 4` chains that stay in registers.
#[inline(always)]
fn accumulate<S: Simd, B: Blocks, const ROWS: usize>(s: S, blocks: B, values: &[f32], sums: &mut [Sums]) {
    let (columns, _) = values.as_chunks::<ROWS>();
    let (values, _) = columns.as_chunks::<BLOCK>();
    let Some(sums) = sums.first_chunk_mut::<ROWS>() else { return };
    for (index, values) in values.iter().enumerate().take(blocks.len()) {
        let block = blocks.block(index);
        block.prefetch(s);
        let mut chains = [([s.splat(0.0); GROUPS], [s.splat(0.0); GROUPS]); ROWS];
        let (octets, _) = values.as_chunks::<8>();
        for (octet, x) in octets.iter().enumerate() {
            step(s, block.pair::<S, 0>(s, octet), [&x[0], &x[1]], &mut chains);
            step(s, block.pair::<S, 1>(s, octet), [&x[2], &x[3]], &mut chains);
            step(s, block.pair::<S, 2>(s, octet), [&x[4], &x[5]], &mut chains);
            step(s, block.pair::<S, 3>(s, octet), [&x[6], &x[7]], &mut chains);
        }
        for row in 0..ROWS {
            let (even, odd) = chains[row];
            for group in 0..GROUPS {
                let block_sum = s.add(even[group], odd[group]);
                let sum = s.fma(block_sum, block.scale(s, group), s.load(&sums[row][group]));
                s.store(sum, &mut sums[row][group]);
            }
        }
    }
}

/// Two columns of all rows.
#[inline(always)]
fn step<S: Simd, const ROWS: usize>(s: S, weights: Pair<S>, values: [&[f32; ROWS]; 2], chains: &mut [Pair<S>; ROWS]) {
    let (w_even, w_odd) = weights;
    for row in 0..ROWS {
        let x = s.splat(values[0][row]);
        for group in 0..GROUPS {
            chains[row].0[group] = s.fma(w_even[group], x, chains[row].0[group]);
        }
        let x = s.splat(values[1][row]);
        for group in 0..GROUPS {
            chains[row].1[group] = s.fma(w_odd[group], x, chains[row].1[group]);
        }
    }
}
